"""A Hub of our own on loopback, for the tests: models and datasets down, models up, and every way to fail."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from nemo_tutorial import corpora, hub

TOKEN = "hf_canary0123456789"
STORED = (".safetensors", ".parquet", ".jsonl", ".csv", ".txt")  # kept elsewhere, as the Hub keeps large files


class Answer(BaseHTTPRequestHandler):
    """One request to the Hub. Datasets are repositories named datasets/OWNER/NAME."""

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
            (r"/api/(datasets/[^/]+/[^/]+?)(?:/revision/(.+))?", self.info),
            (r"/api/(datasets/[^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", self.tree),
            (r"/api/(datasets/[^/]+/[^/]+)/paths-info/([^/]+)", self.paths_info),
            (r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
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
            name = repo.removeprefix("datasets/")
            self.send(body={"id": name, "sha": found[0], "siblings": siblings, "private": private})

    def entries(self, files, folder):
        """What the Hub says of every file and folder below `folder`."""
        inside = f"{folder}/" if folder else ""
        listed = {}
        for name, data in files.items():
            if name.startswith(inside):
                for parent in Path(name).parents:
                    if str(parent) != "." and str(parent).startswith(inside):
                        listed[str(parent)] = {"type": "directory", "path": str(parent), "oid": "0" * 40, "size": 0}
                listed[name] = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                if name.endswith(STORED):
                    oid = hashlib.sha256(data).hexdigest()
                    listed[name]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        return listed

    def tree(self, body, repo, revision, folder):
        found = self.files(repo, revision)
        if found:
            listed = self.entries(found[1], folder)
            deep = parse_qs(urlparse(self.path).query).get("recursive", ["False"])[0] == "True"
            here = [item for name, item in listed.items() if deep or str(Path(name).parent) == (folder or ".")]
            if not listed:
                return self.send(404, {"error": "no"}, X_Error_Code="EntryNotFound")
            self.send(body=here)

    def paths_info(self, body, repo, revision):
        found = self.files(repo, revision)
        if found:
            listed = self.entries(found[1], None)
            wanted = parse_qs(body.decode()).get("paths", [])
            self.send(body=[listed[name] for name in wanted if name in listed])

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
        if not name.endswith(STORED):
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
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, status = int(wanted.group(1)), 206
            end = min(int(wanted.group(2) or len(data)) + 1, len(data))
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data = data[start:end]
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
    running.handle_error = lambda *_: None  # clients hang up; what else goes wrong here, they see
    running.url = f"http://127.0.0.1:{running.server_port}"
    running.repos, running.store, running.log, running.failures, running.cut = {}, {}, [], [], 0

    def add(repo, folder, **more):
        found = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in found}
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
    from huggingface_hub import configure_http_backend, constants, file_download
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
    monkeypatch.setattr(corpora, "WAITS", (0, 0, 0))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    configure_http_backend()


def environment(server, tmp_path):
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
