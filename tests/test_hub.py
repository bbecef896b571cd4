"""The Hub: downloads, uploads and every way they fail, against a server of our own that speaks the Hub's protocol."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from conftest import script

from nemo_tutorial import checkpoints, hub, models, runs

TOKEN = "hf_canary0123456789"
IMPORT = "convert_ckpt/convert_from_hf_to_nemo.py"
EXPORT = "convert_ckpt/convert_from_nemo_to_hf.py"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Answer(BaseHTTPRequestHandler):
    """One request to the Hub. Files that end in .safetensors are kept elsewhere, as the Hub keeps large ones."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status=200, body=b"", sent=None, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content_Length", len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else body[:sent])
        self.close_connection = self.close_connection or sent is not None

    def answer(self):
        server, path = self.server, unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.log.append((self.command, path, self.headers.get("Host"), self.headers.get("Authorization")))
        for number, (pattern, times, status, headers) in enumerate(server.failures):
            if times and re.search(pattern, f"{self.command} {path}"):
                server.failures[number] = (pattern, times - 1, status, headers)
                return self.send(status, {"error": "made to fail"}, **headers)
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", self.info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/stored/(\w+)", self.stored),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/verify", self.verify),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self.commit),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                return method(body, *match.groups())
        self.send(404, {"error": f"{self.command} {path} is not made yet"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def files(self, repo, revision):
        """The commit and files of a revision; None, with the Hub's answer sent, if there is none to be seen."""
        found = self.server.repos.get(repo)
        if found is None:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = found["refs"].get(revision or "main", revision)
        if commit not in found["commits"]:
            return self.send(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return commit, found["commits"][commit]

    def info(self, body, repo, revision):
        found = self.files(repo, revision)
        if found:
            siblings = [{"rfilename": name} for name in found[1]]
            private = self.server.repos[repo].get("private", False)
            self.send(body={"id": repo, "sha": found[0], "siblings": siblings, "private": private})

    def resolve(self, body, repo, revision, name):
        found = self.files(repo, revision)
        if not found:
            return
        commit, files = found
        if self.server.repos[repo].get("gated"):
            status = 403 if self.headers.get("Authorization") else 401
            return self.send(status, {"error": "restricted"}, X_Error_Code="GatedRepo")
        if name not in files:
            return self.send(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = files[name]
        if not name.endswith(".safetensors"):
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return self.send(body=data, ETag=f'"{etag}"', X_Repo_Commit=commit)
        oid = hashlib.sha256(data).hexdigest()
        self.server.store[oid] = data
        # Another host, as the Hub's storage is: huggingface_hub must not send it the token.
        self.send(
            302,
            Location=f"http://localhost:{self.server.server_port}/stored/{oid}",
            X_Repo_Commit=commit,
            X_Linked_ETag=f'"{oid}"',
            X_Linked_Size=len(data),
        )

    def stored(self, body, oid):
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return self.send(400, {"error": "the content is not what was announced"})
            self.server.store[oid] = body
            return self.send()
        data, status, headers = self.server.store[oid], 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            start, status = int(wanted.group(1)), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        cut, self.server.cut = self.server.cut, max(0, self.server.cut - 1)
        self.send(status, data, sent=len(data) // 2 if cut else None, ETag=f'"{oid}"', **headers)

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.server.repos else 200
        self.server.repos.setdefault(
            repo, {"refs": {"main": "0" * 40}, "commits": {"0" * 40: {}}, "private": asked.get("private", False)}
        )
        self.send(status, {"url": f"{self.server.url}/{repo}"})

    def validate(self, body):
        self.send(body={"warnings": [], "errors": []})

    def preupload(self, body, repo):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {True: "lfs", False: "regular"}
        answers = [
            {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False} for name in names
        ]
        self.send(body={"files": answers})

    def batch(self, body, repo):
        def action(what):
            return {"href": f"{self.server.url}/{what}"}

        objects = [
            item | {"actions": {"upload": action(f"stored/{item['oid']}"), "verify": action("verify")}}
            for item in json.loads(body)["objects"]
        ]
        self.send(body={"transfer": "basic", "objects": objects})

    def verify(self, body):
        item = json.loads(body)
        stored = self.server.store.get(item["oid"])
        self.send(200 if stored is not None and len(stored) == item["size"] else 404, {})

    def commit(self, body, repo):
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        found = self.server.repos[repo]
        found["commits"][oid] = found["commits"][found["refs"]["main"]] | files
        found["refs"]["main"] = oid
        self.send(body={"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})


@pytest.fixture
def server():
    """A Hub: `repos`, `log` of requests, `failures` (pattern, times, status, headers), `cut` downloads broken off."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    running.daemon_threads = True
    running.url = f"http://127.0.0.1:{running.server_port}"
    running.repos, running.store, running.log, running.failures, running.cut = {}, {}, [], [], 0

    def add(repo, folder, **more):
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        commit = hashlib.sha1(repr((repo, files)).encode()).hexdigest()
        found = running.repos.setdefault(repo, {"refs": {}, "commits": {}} | more)
        found["commits"][commit] = files
        found["refs"]["main"] = commit
        return commit

    running.add = add
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """This process, with the server as its Hub and an empty cache; a folder to work in."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import disable_progress_bars, reset_sessions

    disable_progress_bars()
    reset_sessions()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    cache = str(tmp_path / "cache/hub")
    monkeypatch.setenv("HF_HUB_CACHE", cache)
    for name, value in {
        "ENDPOINT": server.url,
        "HF_HUB_CACHE": cache,
        "HF_TOKEN_PATH": str(tmp_path / "no_token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    reset_sessions()


@pytest.fixture
def converted(monkeypatch):
    """Conversion that costs nothing: what the scripts do around it is the real thing."""
    import nemo_tutorial

    def import_model(folder, model, target):
        models.weight_files(folder)
        (target / "weights").mkdir(parents=True)
        (target / "weights/common.pt").write_bytes(b"weights")

    def export(source, target, max_shard_size, dtype):
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(bytes(range(256)) * 100)

    fake = types.SimpleNamespace(
        import_model=import_model,
        export=export,
        settle=lambda folder: None,
        verify=lambda *_: [("tensors", "equal")],
        sentence=lambda folder: [],
    )
    monkeypatch.setitem(sys.modules, "nemo_tutorial.conversion", fake)
    monkeypatch.setattr(nemo_tutorial, "conversion", fake, raising=False)


@pytest.fixture
def sharded(hf_folder):
    """Make a Hugging Face folder of two shards and a list of them."""

    def make(path, **fields):
        path = hf_folder(path, **fields)
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").unlink()
        for name in SHARDS:
            (path / name).write_bytes(data + name.encode() * 1000)
        weights = {"model.norm.weight": SHARDS[0], "lm_head.weight": SHARDS[1]}
        (path / hub.INDEX).write_text(json.dumps({"weight_map": weights}))
        return path

    return make


@pytest.fixture
def imports(load_script, capsys, here, converted):
    """Run the import script in this process: (exit code, everything that it said)."""

    def run(source="o/m", *more):
        code = 0
        try:
            load_script(IMPORT).main(["--source", source, "--output_path", "out", *more])
        except SystemExit as stop:
            code = stop.code
        said = "".join(capsys.readouterr())
        assert TOKEN not in said and "Traceback" not in said
        assert (here / "out").exists() == (code == 0)
        return code, said

    return run


@pytest.fixture
def refused(imports):
    """Run the import script: exactly one problem, exit code 2, nothing written. Returns the sentence."""

    def run(*argv):
        code, said = imports(*argv)
        assert code == 2 and "error: 1 problem; nothing was started" in said, said
        return said.split("\n  - ")[1].strip()

    return run


def manifest():
    return json.loads(Path("out/manifest.json").read_text())


def asked(server, method, pattern):
    return [path for verb, path, _, _ in server.log if verb == method and re.search(pattern, path)]


def test_import_of_a_hub_id(server, imports, sharded, tmp_path):
    """Papers and the listed safetensors come, nothing else; the manifest says which commit they are."""
    folder = sharded(tmp_path / "model")
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors"):
        (folder / name).write_bytes(b"x")
    commit = server.add("o/m", folder)
    code, said = imports()
    assert code == 0, said
    snapshot = tmp_path / "cache/hub/models--o--m/snapshots" / commit
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "tokenizer.json", hub.INDEX, *SHARDS}
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in snapshot.iterdir())
    facts = manifest()
    assert (facts["source"], facts["revision"], facts["commit"]) == ("o/m", "main", commit)
    assert facts["versions"]["transformers"] and facts["files"]


@pytest.mark.parametrize("revision", ["v1", "commit"])
def test_revision(server, imports, sharded, tmp_path, revision):
    first = server.add("o/m", sharded(tmp_path / "first"))
    second = server.add("o/m", sharded(tmp_path / "second", vocab_size=4096))
    server.repos["o/m"]["refs"]["v1"] = first
    assert first != second
    code, said = imports("o/m", "--revision", first if revision == "commit" else revision)
    assert code == 0 and manifest()["commit"] == first
    assert models.from_hf(manifest()["folder"]).vocab_size == 2048
    code, said = imports("o/m", "--overwrite")
    assert code == 0 and manifest()["commit"] == second


def test_revision_is_of_the_hub(refused, hf_folder, here):
    hf_folder(here / "hf")
    said = refused("hf", "--revision", "v1")
    assert "--revision v1" in said and "--source hf" in said and "leave the flag out" in said


@pytest.mark.parametrize("make", ["hf_folder", "sharded"])
def test_local_folder_needs_no_hub(server, imports, here, make, request):
    request.getfixturevalue(make)(here / "hf")
    assert imports("hf")[0] == 0
    assert server.log == [] and "commit" not in manifest()


def test_cache_is_enough_without_a_network(server, imports, sharded, tmp_path, monkeypatch):
    """Once downloaded: the server fails, then it is gone, then the Hub is switched off; the import goes on."""
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    commit = server.add("o/m", sharded(tmp_path / "model"))
    assert imports()[0] == 0
    server.log.clear()
    server.failures = [(".", 99, 503, {})]
    code, said = imports("o/m", "--overwrite")
    assert code == 0 and "503" in said and "the copy in the cache" in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = imports("o/m", "--overwrite")
    assert code == 0 and "can't be reached" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    code, said = imports("o/m", "--overwrite", "--revision", commit)
    assert code == 0 and "HF_HUB_OFFLINE is set" in said and manifest()["commit"] == commit
    assert not asked(server, "GET", "resolve|stored")


def test_papers_in_the_cache_are_not_weights(server, imports, refused, sharded, tmp_path, monkeypatch):
    """Pretraining leaves only papers in the cache: the import then fetches the rest, or says why not."""
    from huggingface_hub import constants

    server.add("o/m", sharded(tmp_path / "model"))
    hub.download_papers("o/m")
    assert models.hub_snapshot("o/m")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in refused("o/m")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    assert imports()[0] == 0


def test_dry_run_asks_nothing(server, refused, imports, sharded, tmp_path, here, load_script):
    server.add("o/m", sharded(tmp_path / "model"))
    assert "hf download" in refused("o/m", "--dry_run")
    assert server.log == []


MISSING = "there is no folder o/m here"
AGAIN = "try again"


@pytest.mark.parametrize(
    "failure, token, parts",
    [
        ((401, {"X_Error_Message": "Invalid credentials in Authorization header"}), True, ["(401)", "hf auth login"]),
        ((401, {"X_Error_Code": "RepoNotFound"}), False, [MISSING, "(401)", "hf auth login"]),
        ((401, {"X_Error_Code": "GatedRepo"}), False, ["gated (401)", "licence", "hf auth login"]),
        ((403, {"X_Error_Code": "GatedRepo"}), True, ["gated (403)", "licence", "the token here"]),
        ((403, {}), True, ["denies access", "(403)", "/settings/tokens"]),
        ((404, {"X_Error_Code": "RepoNotFound"}), True, [MISSING, "(404)", "check the spelling", "token"]),
        ((404, {"X_Error_Code": "RevisionNotFound"}), True, ["no revision main", "--revision"]),
        ((429, {}), False, ["too many requests", "(429)", AGAIN, "hf auth login"]),
        ((429, {}), True, ["too many requests", "(429)", AGAIN]),
        ((500, {}), False, ["fails (500)", AGAIN]),
        ((503, {}), False, ["fails (503)", AGAIN]),
    ],
)
def test_the_hub_refuses(server, refused, hf_folder, tmp_path, monkeypatch, failure, token, parts):
    status, headers = failure
    server.add("o/m", hf_folder(tmp_path / "model"))
    server.failures = [("api/models", 99, status, headers)]
    if token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refused()
    assert said.startswith("--source: ") and "o/m" in said and said.count("\n") == 0
    assert all(part in said for part in parts), said
    assert server.url in said or "gated" in said
    assert len(server.log) == (3 if status == 429 or status >= 500 else 1), "only what may pass is asked again"


def test_no_such_repository_and_no_such_revision(server, refused, hf_folder, tmp_path):
    server.add("o/m", hf_folder(tmp_path / "model"))
    assert "shows no model o/other (404)" in refused("o/other")
    said = refused("o/m", "--revision", "v9")
    assert "o/m has no revision v9" in said and "--revision" in said
    assert "o/m..x" in refused("o/m..x")  # not a name that the Hub can have


@pytest.mark.parametrize("token", [False, True])
def test_gated_weights(server, refused, hf_folder, tmp_path, monkeypatch, token):
    """The Hub shows a gated model's list of files to everyone, and the files to nobody without the licence."""
    server.add("o/m", hf_folder(tmp_path / "model"), gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refused()
    assert "o/m is gated" in said and f"{server.url}/o/m" in said
    assert ("an account that has not" in said) == token and ("hf auth login" in said) != token


def test_no_connection(refused, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused()
    assert "http://127.0.0.1:9 can't be reached" in said and "HF_ENDPOINT" in said and "o/m" in said


def test_a_hub_that_never_answers(server, refused, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER", 0.2)
    monkeypatch.setattr(Answer, "info", lambda *_: time.sleep(1))
    assert "can't be reached" in refused()


def test_too_many_requests_for_files(server, refused, imports, hf_folder, tmp_path):
    server.add("o/m", hf_folder(tmp_path / "model"))
    server.failures = [("HEAD .*safetensors$", 99, 429, {})]
    assert "(429)" in refused()
    server.failures = [("HEAD .*safetensors$", 2, 429, {})]
    assert imports()[0] == 0


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(server, imports, hf_folder, tmp_path, status):
    server.add("o/m", hf_folder(tmp_path / "model"))
    server.failures = [("api/models", 2, status, {})]
    assert imports()[0] == 0


def test_broken_download_goes_on(server, imports, sharded, tmp_path):
    """Two downloads broken off half way: the rest is asked for, by Range, and the whole is right."""
    folder = sharded(tmp_path / "model")
    server.add("o/m", folder)
    server.cut = 2
    code, said = imports()
    assert code == 0, said
    for name in SHARDS:
        assert (Path(manifest()["folder"]) / name).read_bytes() == (folder / name).read_bytes()


def test_download_that_always_breaks(server, refused, imports, sharded, tmp_path):
    """Nothing half is taken for a file; the same command goes on where it was."""
    server.add("o/m", sharded(tmp_path / "model"))
    server.cut = 99
    said = refused()
    assert "the download of o/m broke off" in said and "run this again" in said
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    server.cut = 0
    assert imports()[0] == 0


def test_download_of_another_size(server, refused, hf_folder, tmp_path, monkeypatch):
    """The storage ends the file early, and says that this is all of it."""
    server.add("o/m", hf_folder(tmp_path / "model"))
    monkeypatch.setattr(Answer, "stored", lambda self, body, oid: self.send(body=self.server.store[oid][:10]))
    said = refused()
    assert "broke off" in said and "hf download o/m --revision" in said and "--force-download" in said
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_pickles_only(server, refused, hf_folder, tmp_path):
    folder = hf_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    server.add("o/m", folder)
    said = refused()
    assert "o/m has no *.safetensors" in said and "pickles" in said and "--revision" in said
    assert not asked(server, "GET", r"\.bin")


@pytest.mark.parametrize(
    "fields, part",
    [({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"), ({"architectures": ["OtherModel"]}, "OtherModel")],
)
def test_refused_before_its_weights_are_downloaded(server, refused, hf_folder, tmp_path, fields, part):
    server.add("o/m", hf_folder(tmp_path / "model", **fields))
    assert part in refused()
    assert not asked(server, "GET", "safetensors|stored")


def test_full_disk_before_the_download(server, refused, hf_folder, tmp_path):
    server.add("o/m", hf_folder(tmp_path / "model", num_hidden_layers=10**9))
    assert "--output_path out needs" in refused()
    assert not asked(server, "GET", "safetensors|stored")


def test_shard_that_the_repository_lacks(server, refused, sharded, tmp_path):
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[1]).unlink()
    server.add("o/m", folder)
    assert f"lacks {SHARDS[1]}" in refused()


def test_token_goes_to_the_hub_only(server, imports, hf_folder, tmp_path, monkeypatch):
    """As a Bearer token, to the Hub and not to its storage; in no file and no output."""
    server.add("o/m", hf_folder(tmp_path / "model"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert imports()[0] == 0
    stored = [(host, token) for _, path, host, token in server.log if path.startswith("/stored")]
    others = [token for _, path, _, token in server.log if not path.startswith("/stored")]
    assert stored and all(host.startswith("localhost") and token is None for host, token in stored)
    assert others and set(others) == {f"Bearer {TOKEN}"}
    assert_nowhere(tmp_path)


def assert_nowhere(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def environment(server, tmp_path):
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }


def test_the_script_itself(server, tmp_path):
    """As its user runs it: HF_ENDPOINT and HF_TOKEN of the environment, one sentence, exit code 2."""
    (tmp_path / "work").mkdir()
    flags = ["--source", "o/m", "--output_path", "out/tiny"]
    done = script(tmp_path / "work", IMPORT, *flags, check=False, **environment(server, tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 1 problem; nothing was started\n  - --source: there is no folder o/m here")
    assert len(done.stderr.splitlines()) == 2 and TOKEN not in done.stderr
    assert {token for *_, token in server.log} == {f"Bearer {TOKEN}"}
    assert list((tmp_path / "work").iterdir()) == []


def test_model_for_pretraining_from_the_hub(server, here, hf_folder, tmp_path, load_script):
    """--hf_model_id of the training scripts: papers only, and the same sentences."""
    server.add("o/m", hf_folder(tmp_path / "model"))
    args = load_script("pretraining/pretrain.py").parse_args(["-D", "x", "--hf_model_id", "o/m"])
    source, model, problems = runs.weights(args, None)
    assert problems == [] and model.num_hidden_layers == 2
    assert not asked(server, "GET", "safetensors|stored")
    args.hf_model_id = "o/other"
    (problem,) = runs.weights(args, None)[2]
    assert problem.startswith("--hf_model_id: ") and "no model o/other (404)" in problem


# Upload


@pytest.fixture
def trained(here, nemo_checkpoint):
    """results/sft, tuned from results/pre, trained from an import of o/base: as the scripts leave them."""
    base = nemo_checkpoint(here / "nemo_ckpt/base")
    checkpoints.write_manifest(base, source="o/base", commit="1" * 40)

    def run(name, stage, step, before, metrics, **flags):
        path = (
            here / f"results/{name}/checkpoints/model_name=0--val_loss=1.00-step={step - 1}-consumed_samples=1.0-last"
        )
        nemo_checkpoint(path, stage=stage)
        record = {"stage": stage, "restored_from": before, "starts": [{"flags": flags, "versions": {}}]}
        (here / f"results/{name}/record").mkdir()
        (here / f"results/{name}/record/run.json").write_text(json.dumps(record))
        (here / f"results/{name}/record/metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
        return str(path.relative_to(here))

    losses = [{"step": 99, "loss": 7.5}, {"step": 100, "loss": 6.25}, {"step": 100, "val_loss": 6.5}]
    flags = {"dataset_path": "data/news/", "global_batch_size": 32, "seq_length": 8192, "hf_model_id": "o/base"}
    pre = run("pre", "pretraining", 100, "nemo_ckpt/base", losses, **flags)
    losses = [{"step": 10, "loss": 9.75}, {"step": 10, "loss": 1.125}, {"step": 11, "loss": 8.5}]
    flags = {"dataset_path": str(here / "private/alpaca"), "global_batch_size": 8, "peft": "lora"}
    return run("sft", "finetuning", 10, pre, losses, **flags)


@pytest.fixture
def exports(load_script, capsys, here, converted, trained, monkeypatch):
    """Run the export script in this process: (exit code, everything that it said)."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*more, source=trained):
        code = 0
        try:
            load_script(EXPORT).main(["--source", source, "--output_path", "hf_ckpt", *more])
        except SystemExit as stop:
            code = stop.code
        said = "".join(capsys.readouterr())
        assert TOKEN not in said and "Traceback" not in said
        return code, said

    return run


@pytest.mark.parametrize("private", [False, True])
def test_upload(server, exports, here, private):
    code, said = exports("--push_to_hub", "me/mine", *["--private"] * private)
    assert code == 0, said
    found = server.repos["me/mine"]
    commit = found["refs"]["main"]
    assert f"{server.url}/me/mine/commit/{commit}" in said and found["private"] == private
    files = found["commits"][commit]
    assert files == {path.name: path.read_bytes() for path in (here / "hf_ckpt").iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    tokens = {token for verb, path, _, token in server.log if not path.startswith("/stored")}
    assert tokens == {f"Bearer {TOKEN}"}
    assert_nowhere(here)


def test_model_card(exports, here):
    assert exports("--push_to_hub", "me/mine")[0] == 0
    assert (here / "hf_ckpt/README.md").read_text() == (
        "---\nbase_model: o/base\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        "# mine\n\nBase model: `o/base`\n\n"
        "## Pretraining\n\n- data: `data/news`\n- steps: 100\n- samples a step: 32\n- tokens a sample: 8192\n"
        "- training loss at the last step: 6.25\n- validation loss: 6.5\n\n"
        "## Finetuning (lora)\n\n- data: `alpaca`\n- steps: 10\n- samples a step: 8\n"
        "- training loss at the last step: 1.125\n\n"
        "Trained with NVIDIA NeMo.\n"
    )


def test_card_of_a_merged_adapter(trained, here, nemo_checkpoint):
    merged = nemo_checkpoint(here / "nemo_ckpt/merged")
    checkpoints.write_manifest(merged, adapter=str(here / trained))
    assert runs.stages(merged) == runs.stages(trained)


def test_card_says_nothing_that_is_not_known(here, nemo_checkpoint):
    assert runs.stages(nemo_checkpoint(here / "nemo_ckpt/other")) == (None, [])
    card = hub.model_card("me/mine", None, [])
    assert "base_model" not in card and "license" not in card and "Trained" not in card
    local = nemo_checkpoint(here / "nemo_ckpt/local")
    checkpoints.write_manifest(local, source="/some/folder/Llama")
    assert runs.stages(local) == ("Llama", [])
    assert "base_model:" not in hub.model_card("me/mine", "Llama", [])


def test_card_of_random_weights(trained, here):
    record = here / "results/pre/record/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"restored_from": None}))
    base, (pretraining, _) = runs.stages(trained)
    assert base is None and pretraining["weights before"] == "random, with the shape and tokenizer of `o/base`"


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "me/..", "me/mi ne", "me/-x", "me/x.git"])
def test_upload_to_no_name(server, exports, here, name):
    code, said = exports("--push_to_hub", name)
    assert code == 2 and f"--push_to_hub {name} is no name" in said and "OWNER/NAME" in said
    assert not (here / "hf_ckpt").exists() and server.log == []


def test_upload_without_a_token(server, exports, here, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, said = exports("--push_to_hub", "me/mine")
    assert code == 2 and "--push_to_hub me/mine: no token is here; log in: hf auth login" in said
    assert not (here / "hf_ckpt").exists() and server.log == []
    code, said = exports("--private")
    assert code == 2 and "--private has no effect without --push_to_hub" in said


@pytest.mark.parametrize(
    "pattern, status, part",
    [
        ("repos/create", 401, "refuses your token (401)"),
        ("repos/create", 403, "the right to write it"),
        ("preupload", 429, "too many requests"),
        ("objects/batch", 500, "fails (500)"),
        ("PUT /stored", 403, "(403)"),
        ("verify", 404, "404"),
        ("commit/main", 503, "fails (503)"),
    ],
)
def test_upload_that_fails(server, exports, here, pattern, status, part):
    server.failures = [(pattern, 99, status, {})]
    if "create" in pattern:
        server.failures.append(("GET /api/models", 99, status, {}))
    code, said = exports("--push_to_hub", "me/mine", "--private")
    assert code == 1 and "error: 1 problem" in said
    sentence = said.split("\n  - ")[1]
    assert sentence.startswith("--push_to_hub: ") and part in sentence and "me/mine" in sentence, sentence
    assert "hf_ckpt is whole" in sentence and "hf upload me/mine 'hf_ckpt' . --private" in sentence
    assert (here / "hf_ckpt/model.safetensors").is_file() and (here / "hf_ckpt/README.md").is_file()
    assert_nowhere(here)


def test_private_upload_to_a_public_model(server, exports, hf_folder, tmp_path):
    """--private must not publish: the Hub leaves a model that is there as public as it is."""
    server.add("me/mine", hf_folder(tmp_path / "model"))
    code, said = exports("--push_to_hub", "me/mine", "--private")
    assert code == 1 and "me/mine" in said and "public already" in said
    assert not asked(server, "POST", "commit|preupload")


def test_the_command_that_tries_again_is_one(server, exports, here, tmp_path):
    """What is printed after a failed upload is given to the real `hf`."""
    server.failures = [("commit/main", 1, 503, {})]
    said = exports("--push_to_hub", "me/mine")[1]
    command = re.search(r"hf (upload .*)", said).group(1)
    hf = Path(sys.executable).with_name("hf")
    if not hf.is_file():
        pytest.skip("no hf command beside this Python")
    words = [hf, *shlex.split(command)]
    env = os.environ | environment(server, tmp_path)
    subprocess.run(words, cwd=here, env=env, check=True, capture_output=True, timeout=60)
    found = server.repos["me/mine"]
    assert "model.safetensors" in found["commits"][found["refs"]["main"]]


@pytest.mark.nemo
def test_from_the_hub_and_back(server, stages, tmp_path):
    """The scripts themselves: a sharded model of the Hub through NeMo and back to the Hub, bit for bit."""
    from safetensors.torch import load, load_file, save_file

    folder = Path(shutil.copytree(stages / "hf_model/tiny", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2])))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / hub.INDEX).write_text(json.dumps(index))
    commit = server.add("o/tiny", folder)
    work, env = tmp_path / "work", environment(server, tmp_path)
    work.mkdir()
    done = script(work, IMPORT, "--source", "o/tiny", "--output_path", "nemo", **env)
    assert "all bit-equal" in done.stdout
    assert json.loads((work / "nemo/manifest.json").read_text())["commit"] == commit
    again = script(work, EXPORT, "--source", "nemo", "--output_path", "hf", "--push_to_hub", "me/tiny", **env)
    files = server.repos["me/tiny"]["commits"][server.repos["me/tiny"]["refs"]["main"]]
    assert "base_model: o/tiny" in files["README.md"].decode()
    uploaded = load(files["model.safetensors"])
    assert uploaded.keys() == tensors.keys() and all(uploaded[name].equal(tensors[name]) for name in tensors)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
    assert_nowhere(tmp_path)
