"""The shape of the repository: what may import what, and what every script has in common."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

STDLIB_ONLY = (
    "arguments",
    "blends",
    "checkpoints",
    "compat",
    "config",
    "corpora",
    "dataset_report",
    "dataset_writer",
    "documents",
    "faults",
    "hub",
    "instructions",
    "live",
    "megatron_data",
    "memory",
    "metrics",
    "models",
    "network",
    "options",
    "overrides",
    "packing",
    "page",
    "pickles",
    "performance",
    "plan",
    "preflight",
    "prompts",
    "questions",
    "report",
    "runs",
    "schedule",
    "slurm",
    "terminal",
    "throughput",
    "tokenization",
    "trust",
    "workers",
)
BOOTSTRAP = """\
# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
"""
FOLDERS = ("convert_ckpt", "data", "pretraining", "finetuning")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
MODULES = sorted((ROOT / "nemo_tutorial").glob("*.py"))


def imports(path, everywhere):
    """Dotted names that a file imports, at its top level or `everywhere`; from a import b gives a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree) if everywhere else tree.body)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def test_there_are_scripts_and_modules():
    assert len(SCRIPTS) >= 8 and len(MODULES) >= 13


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_has_the_common_shape(path):
    text = path.read_text(encoding="utf-8")
    assert BOOTSTRAP in text
    assert text.count("sys.path") == 1
    tree = ast.parse(text)
    assert f"python {path.relative_to(ROOT)}" in ast.get_docstring(tree), "the docstring names the real command"
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[0] == "parse_args" and functions[-1] == "main"
    assert text.endswith('\n\nif __name__ == "__main__":\n    main()\n')


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_light_before_its_arguments_are_known(path):
    for name in imports(path, everywhere=False):
        parts = name.split(".")
        light = parts[0] in sys.stdlib_module_names or (parts[0] == "nemo_tutorial" and parts[1] in STDLIB_ONLY)
        assert light, f"{path.name} imports {name} at its top"


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_module_is_light(name):
    for imported in imports(ROOT / "nemo_tutorial" / f"{name}.py", everywhere=False):
        parts = imported.split(".")
        light = parts[0] in sys.stdlib_module_names or (parts[0] == "nemo_tutorial" and parts[1] in STDLIB_ONLY)
        assert light, f"{name} imports {imported} at its top"


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES], ids=lambda path: path.name)
def test_nothing_imports_a_script(path):
    scripts = {script.stem for script in SCRIPTS} | set(FOLDERS)
    for name in imports(path, everywhere=True):
        assert name.split(".")[0] not in scripts, f"{path.name} imports {name}"


def test_only_nemo_tutorial_is_a_package():
    found = [path for path in ROOT.glob("*/__init__.py")] + [path for path in ROOT.glob("*/*/__init__.py")]
    assert [str(path.relative_to(ROOT)) for path in found if path.parts[-2][0] != "."] == ["nemo_tutorial/__init__.py"]


@pytest.mark.parametrize(
    "name, asked, answer",
    [("corpus", ("text",), "text"), ("instructions", ("instruction", "input"), "output")],
)
def test_sample(name, asked, answer):
    """Enough of it, no row twice, both languages, and every row ends."""
    rows = [json.loads(line) for line in (ROOT / f"data/sample/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 200
    assert len({tuple(row[key] for key in asked) for row in rows}) == len(rows)
    assert all(row[key].strip() for row in rows for key in (asked[0], answer))
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", row[asked[0]])) for row in rows)
    assert 0.3 < chinese / len(rows) < 0.7


def test_no_path_of_a_developers_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()]
    assert len(files) > 30
    home = re.compile(rb"(?<![\w.])/(work|home/\w+|root|Users/\w+)/")
    for file in files:
        assert not home.search(file.read_bytes()), file
