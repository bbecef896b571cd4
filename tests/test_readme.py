"""The READMEs against the scripts: every command is one that its script accepts, in both languages alike."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-TW.md", *sorted(ROOT.glob("[!.]*/README.md"))]


def blocks(path, language="bash"):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(block):
    """The words of each command of a block: lines joined, ${VAR} filled in, [[word, ...], ...]."""
    variables = {}
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\{(\w+)\}", lambda match: variables[match.group(1)], line)
        assignment = re.fullmatch(r"(\w+)=(\S*)\s*(#.*)?", line)
        if assignment:
            variables[assignment.group(1)] = assignment.group(2)
        elif line.strip():
            yield shlex.split(re.sub(r"<(\w+)>", r"'<\1>'", line), comments=True)


def scripts():
    """(README, words) of every command that starts one of our scripts."""
    for readme in READMES:
        for block in blocks(readme):
            for words in commands(block):
                if words[0] == "python" and words[1].endswith(".py"):
                    yield readme, words[1:]
                elif words[0] == "./quickstart.sh":
                    yield readme, ["quickstart.py", *words[1:]]


SCRIPTS = list(scripts())


def test_both_languages_have_the_same_commands():
    english, chinese = blocks(READMES[0]), blocks(READMES[1])
    assert len(english) > 10
    assert english == chinese


def test_the_readmes_start_every_stage():
    started = {words[0] for readme, words in SCRIPTS if readme == READMES[0]}
    assert started >= {
        "quickstart.py",
        "convert_ckpt/convert_from_hf_to_nemo.py",
        "data/download_pretrain_data.py",
        "data/preprocess_data_for_megatron.py",
        "pretraining/pretrain.py",
        "finetuning/download_split_data.py",
        "finetuning/finetune.py",
        "finetuning/merge_lora.py",
        "convert_ckpt/convert_from_nemo_to_hf.py",
        "finetuning/generate.py",
    }


@pytest.mark.parametrize(
    "readme, words", SCRIPTS, ids=[f"{readme.relative_to(ROOT)}-{words[0]}" for readme, words in SCRIPTS]
)
def test_command_is_accepted(readme, words, monkeypatch):
    monkeypatch.chdir(ROOT)  # commands name files of the repository
    script = ROOT / words[0]
    assert script.is_file()
    spec = importlib.util.spec_from_file_location("readme_" + script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.parse_args(words[1:])  # exits 2 at a flag that it doesn't have


@pytest.mark.parametrize("readme", READMES[:2], ids=lambda path: path.name)
def test_the_file_map_is_true(readme):
    column = len("requirements.txt  requirements.lock ")  # where the descriptions begin
    maps = [block for block in blocks(readme, "text") if "pyproject.toml" in block]
    assert len(maps) == 1
    folder, named = ROOT, []
    for line in maps[0].splitlines():
        if not line.startswith(" "):
            folder = ROOT
        named += [folder / entry for entry in line[:column].split()]
        if not line.startswith(" ") and named[-1].name and line[:column].rstrip().endswith("/"):
            folder = named[-1]
    missing = [str(path.relative_to(ROOT)) for path in named if not path.exists()]
    assert len(named) > 20
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert not [target for target in local if not (readme.parent / target).exists()]


@pytest.mark.parametrize("folder", ["convert_ckpt", "data", "pretraining", "finetuning"])
def test_the_folder_readme_names_every_script(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert not [script.name for script in (ROOT / folder).glob("*.py") if script.name not in text]
