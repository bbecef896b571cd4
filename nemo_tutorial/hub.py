"""The Hugging Face Hub: a model down, as safetensors only, an exported one up; each failure as one sentence.

The network is huggingface_hub's: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its cache mean what they mean there.
"""

import json
import time
from pathlib import Path

from nemo_tutorial import checkpoints, terminal

INDEX = "model.safetensors.index.json"
WAITS = (1, 3)  # seconds until the Hub is asked again, where asking again may help
ANSWER = 10  # seconds that the Hub has to answer before the copy in the cache is used


def download_papers(repo, revision="main", code=False):
    """Fetch a model's configuration, tokenizer and list of weight files; the folder, named by its commit.

    With `code`, its Python files too.

    Where the Hub doesn't answer, the copy in its cache is taken. Raises ValueError with a sentence.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        _ask(repo, revision)
    except ValueError as problem:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise
        terminal.warn(f"{problem}; going on with the copy in the cache, {Path(cached).parent}")
        return Path(cached).parent
    return _download(repo, revision, [*checkpoints.ASSETS, INDEX, *(["*.py"] if code else [])])


def download_weights(repo, papers):
    """Fetch the safetensors of the commit that `papers` is; the same folder. Raises ValueError with a sentence."""
    names, whole = ["*.safetensors"], any(papers.glob("*.safetensors"))
    if (papers / INDEX).is_file():  # what it doesn't list is a second copy of the weights
        try:
            names = sorted(set(json.loads((papers / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{papers / INDEX} is no list of weights; name another --revision of {repo}") from None
        whole = all((papers / name).is_file() for name in names)
    if whole:
        return papers  # no network is needed
    _ask(repo, papers.name)
    folder = _download(repo, papers.name, names)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{repo} has no *.safetensors at {folder.name[:12]}, and pickles (*.bin) can run code when opened; "
            "name a revision that has them with --revision, or convert it once with transformers' save_pretrained"
        )
    return folder


def _ask(repo, revision):
    """Whether the Hub answers. snapshot_download, if it doesn't, waits for ever, and makes do with half a model."""
    from huggingface_hub import HfApi

    try:
        _patiently(lambda: HfApi().model_info(repo, revision=revision, timeout=ANSWER), _busy)
    except Exception as error:  # those of the Hub and of requests have no common base
        raise ValueError(explain(error, repo, revision)) from None


def _download(repo, revision, patterns):
    from huggingface_hub import snapshot_download

    wanted = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    try:
        # It asks again itself where the Hub fails; a download that broke off goes on where it was.
        return Path(_patiently(lambda: snapshot_download(repo, **wanted), lambda e: _broken(e) or _status(e) == 429))
    except Exception as error:  # those of the Hub, of requests and of hf_xet have no common base
        raise ValueError(explain(error, repo, revision)) from None


def _patiently(call, passes):
    """call(), again after each of WAITS as long as it fails with an error that passes."""
    for wait in (*WAITS, None):
        try:
            return call()
        except OSError as error:  # all errors of requests are
            if wait is None or not passes(_cause(error)):
                raise
        time.sleep(wait)


def _busy(error):
    return _status(error) == 429 or (_status(error) or 0) >= 500


def _cause(error):
    """What went wrong, where huggingface_hub raises a general error from it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error):
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _broken(error):
    from requests.exceptions import ChunkedEncodingError, ContentDecodingError

    return isinstance(error, (ChunkedEncodingError, ContentDecodingError)) or "Consistency check failed" in str(error)


def explain(error, repo, revision=None):
    """One sentence about a failed call: what is wrong, and what to do next. `revision` is None for an upload."""
    from huggingface_hub import constants, errors, get_token
    from requests import exceptions

    error = _cause(error)
    status, hub, token = _status(error), constants.ENDPOINT, get_token()
    page = f"{hub}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated ({status}): accept its licence on {page}, then " + (
            "run this again; the token here is of an account that has not" if token else "log in: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}; pass a branch, tag or commit of {page}/commits/main as --revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "use a token that may see it" if token else "log in: hf auth login"
        here = f"there is no folder {repo} here, and " if revision else ""
        return f"{here}{hub} shows no model {repo} ({status}); check the spelling, or, if it is private, {hint}"
    if status == 401:
        return f"{hub} refuses your token (401), for {repo}; log in again: hf auth login (or export another HF_TOKEN)"
    if status == 403:
        right = "read" if revision else "write"
        return f"{hub} denies access to {repo} (403); give the token the right to {right} it: {hub}/settings/tokens"
    if status == 429:
        hint = "" if token else ", or log in for a higher limit: hf auth login"
        return f"{hub} gets too many requests from here (429), for {repo}; try again in some minutes{hint}"
    if status is not None and status >= 500:
        return f"{hub} fails ({status}), for {repo}; try again later" + (", or name a local folder" if revision else "")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so the Hub is not asked for {repo} at {revision}; unset it, or name a folder"
    if _broken(error) or status == 416:  # 416: what is there already is longer than the file
        again = f"hf download {repo} --revision {revision} --include '*.safetensors' --force-download"
        return (
            f"the download of {repo} broke off; run this again: it goes on where it was. "
            f"If that doesn't help, start the files over: {again}"
        )
    if isinstance(error, (exceptions.ConnectionError, exceptions.Timeout)):
        return f"{hub} can't be reached, for {repo}; check the network and HF_ENDPOINT" + (
            ", or copy the model here and name its folder" if revision else ""
        )
    said = " ".join(str(error).split())[:300]  # huggingface_hub's own sentence
    return f"{repo}: {said}".replace(token or "\0", "<token>")


def upload_problems(repo, private):
    """What of --push_to_hub can be checked before there is anything to upload."""
    if repo is None:
        return ["--private has no effect without --push_to_hub OWNER/NAME; leave it out"] if private else []
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    problems = []
    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        problems.append(
            f"--push_to_hub {repo} is no name on the Hub; write OWNER/NAME, with letters, digits, '-', '_' and '.'"
        )
    if not get_token():
        problems.append(f"--push_to_hub {repo}: no token is here; log in: hf auth login (or export HF_TOKEN)")
    return problems


def upload(folder, repo, private):
    """Create model `repo` if it is not there, and commit `folder` to it; the commit's page. Raises ValueError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:  # it was there before
            raise PermissionError("it is public already, and --private makes only a new one private; name another")
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from NeMo").commit_url
    except Exception as error:  # those of the Hub, of requests and of hf_xet have no common base
        raise ValueError(explain(error, repo)) from None


def upload_command(folder, repo, private):
    """The command that tries an upload again."""
    return f"hf upload {repo} '{folder}' ." + (" --private" if private else "")


def model_card(repo, base, stages, adapter=False):
    """README.md of an exported model or adapter: what is known of how it was made, and no word more.

    `base` is a Hub id, another name, or None; `stages` are those of runs.stages, the first one first.
    """
    about = [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if base and "/" in base:
        about.insert(0, f"base_model: {base}")
    lines = ["---", *about, "---", "", f"# {repo.split('/')[1]}", ""]
    if base:
        lines += [f"Base model: `{base}`", ""]
    for stage in stages:
        lines += [f"## {stage['stage'].capitalize()}", ""]
        lines += [f"- {name}: {value}" for name, value in stage.items() if name != "stage" and value is not None]
        lines.append("")
    lines.append("Trained with NVIDIA NeMo." if stages else "Exported from an NVIDIA NeMo checkpoint.")
    return "\n".join(lines) + "\n"
