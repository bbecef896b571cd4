"""A run in a file: the flags as YAML, and perhaps a whole recipe, as --dry_run full prints it."""

import argparse
import difflib
import re
from pathlib import Path

HEAD = "--- # "  # YAML's own marks around a document, so that it can be cut out of what is printed
TAIL = "..."
# Flags that a recipe that is given in full does not hold: how it is started, not what it does.
STARTED = tuple(
    "config dry_run executor gpu_memory hf_token wandb_token trust_checkpoint fresh allow_change max_restarts account "
    "partition qos time gres mem exclusive constraint nodelist container_image container mount setup env srun_arg "
    "sbatch_arg wait chain save_before".split()
)


def read(path, parser):
    """A file's flags as words for `parser`, `overrides`, and recipe or None. Raises ValueError with all mistakes."""
    import yaml  # not above: --help needs only the standard library

    class Loader(yaml.SafeLoader):
        """Reads 1e-5 as a number: by YAML 1.1, PyYAML's, it would be a text."""

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} can't be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no flags; write one a line, such as max_steps: 100")
    recipe = content.pop("recipe", None)
    overrides = content.pop("overrides", None) or []
    words, problems = [], []
    for name, value in content.items():
        flag = "--" + str(name).lstrip("-").replace("-", "_")
        action = parser._option_string_actions.get(flag)
        if action is None or flag in ("--config", "--help"):
            near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
            hint = f"; did you mean {near[0][2:]}?" if near and flag != "--config" else ""
            problems.append(f"--config {path}: {name} is not a flag of {parser.prog}{hint}")
        elif flag.endswith("_token"):
            problems.append(f"--config {path}: {name} would lie open in a file; export it instead, and remove the line")
        else:
            words += _words(flag, action, value, parser)
    if problems:
        raise ValueError("\n".join(problems))
    return words, [str(word) for word in overrides], recipe


def _words(flag, action, value, parser):
    """One flag and its value as on a command line."""
    if value is None:
        return []
    if action.nargs == 0:
        if value is True:
            return [flag]
        no = f"--no_{flag[2:]}"
        return [no] if value is False and no in parser._option_string_actions else []
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not isinstance(action, argparse._AppendAction):
        return [flag, *map(str, values)]
    # With =, because a value may begin with a dash.
    return [flag] if value == "" and action.nargs == "?" else [f"{flag}={one}" for one in values]


def flags(args, parser):
    """The flags that `args` stand for, as they can be read again; what is no flag, or a secret, is left out."""
    found = {}
    for action in parser._actions:
        value, name = getattr(args, action.dest, None), action.option_strings[0] if action.option_strings else ""
        hidden = action.dest in ("help", "config", "dry_run") or action.dest.endswith("_token")
        if hidden or value is None or value is False and action.nargs == 0 and f"--no_{action.dest}" not in name:
            continue
        found[action.dest] = value
    return found


def text(flags, recipe):
    """The YAML of a run; `recipe` is NeMo-Run's own YAML of it, with all overrides in it."""
    import yaml

    head = yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)
    return head + "recipe:\n" + "".join(f"  {line}\n" for line in recipe.splitlines())


def differences(ours, theirs):
    """Where two recipes, as YAML, differ: {dotted path: (value of ours, of theirs)}; what one lacks is None."""
    import yaml

    def leaves(node, path=""):
        if not isinstance(node, (dict, list)) or not node:
            return {path: node}
        items = node.items() if isinstance(node, dict) else ((f"[{index}]", value) for index, value in enumerate(node))
        found = {}
        for name, value in items:
            found |= leaves(value, f"{path}{name}" if str(name).startswith("[") else f"{path}.{name}".lstrip("."))
        return found

    ours, theirs = leaves(yaml.safe_load(ours)), leaves(yaml.safe_load(theirs))
    paths = sorted(ours.keys() | theirs.keys())
    return {path: (ours.get(path), theirs.get(path)) for path in paths if ours.get(path) != theirs.get(path)}


def load(content):
    """The recipe that a parsed YAML document describes. Raises ValueError if it names what this NeMo does not have."""
    import importlib

    import nemo_run as run

    made = {}  # by the identity of a YAML node: what is shared (the tokenizer) stays shared

    def named(target):
        module, _, name = target.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            raise ValueError(f"--config: the recipe names {target}, which is not there") from None

    def build(node):
        if isinstance(node, list):
            return [build(value) for value in node]
        if not isinstance(node, dict):
            return node
        if id(node) in made:
            return made[id(node)]
        if "_target_" not in node:
            result = {key: build(value) for key, value in node.items()}
        elif node.get("_call_") is False:
            result = named(node["_target_"])
        else:
            kind = run.Partial if node.get("_partial_") else run.Config
            arguments = {key: build(value) for key, value in node.items() if key not in ("_target_", "_partial_")}
            result = kind(named(node["_target_"]), **arguments)
        made[id(node)] = result
        return result

    recipe = build(content)
    if not isinstance(recipe, run.Partial):
        raise ValueError("--config: recipe is not one; take it as --dry_run full prints it")
    return recipe
