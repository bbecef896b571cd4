"""Words at the end of a command that change the recipe, in NeMo-Run's own syntax: trainer.log_every_n_steps=5.

One that names what a flag sets is that flag, so that all that is derived from it is right; the others are given to
NeMo-Run's parser once there is a recipe. In both cases the last one wins.
"""

import difflib
import importlib.util
import inspect
import re
from pathlib import Path

ROOTS = ("model", "trainer", "data", "optim", "log", "resume", "peft", "tokenizer")
WORD = re.compile(r"([A-Za-z_]\w*(?:\.\w+|\[\w+\])*)\s*(=|\+=|-=|\*=|/=|\|=|&=)\s*(.+)", re.DOTALL)
# What flags set, by its place in the recipe.
FLAGS = {
    "trainer.max_steps": "max_steps",
    "trainer.log_every_n_steps": "log_interval",
    "trainer.devices": "num_gpus",
    "trainer.num_nodes": "num_nodes",
    "trainer.val_check_interval": "val_check_interval",
    "trainer.limit_val_batches": "limit_val_batches",
    "trainer.accelerator": "accelerator",
    "optim.config.lr": "lr",
    "optim.lr_scheduler.min_lr": "min_lr",
    "optim.lr_scheduler.warmup_steps": "warmup_steps",
    "data.global_batch_size": "global_batch_size",
    "data.micro_batch_size": "micro_batch_size",
    "data.seq_length": "seq_length",
    "model.config.seq_length": "seq_length",
    "data.seed": "seed",
    "data.num_workers": "num_workers",
    "log.name": "experiment",
    "log.ckpt.save_top_k": "save_top_k",
    "model.config.recompute_granularity": "recompute",
    "model.config.recompute_method": "recompute_method",
    "model.config.recompute_num_layers": "recompute_num_layers",
    "peft.dim": "lora_rank",
    "peft.alpha": "lora_alpha",
    "peft.dropout": "lora_dropout",
    "optim.config.use_precision_aware_optimizer": "use_precision_aware_optimizer",
} | {
    f"trainer.strategy.{name}": name
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
    )
}
# Where the names of a place in the recipe are written, by package and file: read, not imported, so that most misspelt
# keys are found at once. What is in none of these is found once there is a recipe.
SOURCES = {
    "trainer": [("lightning", "pytorch/trainer/trainer.py")],
    "trainer.strategy.ddp": [("megatron", "core/distributed/distributed_data_parallel_config.py")],
    "optim.config": [("megatron", "core/optimizer/optimizer_config.py")],
    "model.config": [
        ("megatron", "core/transformer/transformer_config.py"),
        ("megatron", "core/model_parallel_config.py"),
        ("nemo", "collections/llm/gpt/model/*.py"),
    ],
    "log.ckpt": [
        ("lightning", "pytorch/callbacks/model_checkpoint.py"),
        ("nemo", "lightning/pytorch/callbacks/model_checkpoint.py"),
    ],
}
# What says which model and data these are, where the run lies and how it goes on: decided before there is a recipe.
FIXED = ("model.tokenizer", "data.paths", "data.dataset_root", "data.tokenizer", "log.log_dir", "resume", "tokenizer")


def split(words, takes_value):
    """Divide a command's words: (those for the flags, overrides at the end).

    `takes_value` says of a flag whether the word after it is its value.
    """
    start = len(words)
    while start and WORD.fullmatch(words[start - 1]) and _is_override(words[start - 1]):
        start -= 1
    if start and start < len(words) and words[start - 1].startswith("-") and "=" not in words[start - 1]:
        start += takes_value(words[start - 1])
    return words[:start], words[start:]


def _is_override(word):
    key = WORD.fullmatch(word)[1]
    return "." in key or "[" in key or key in ROOTS


def as_flags(words, flags):
    """Divide overrides: (words for the flags that they stand for, the others, problems). `flags` are a script's own."""
    found, others, problems = [], [], []
    for word in words:
        key, operation, value = WORD.fullmatch(word).groups()
        root = re.split(r"[.\[]", key)[0]
        if root not in ROOTS:
            near = difflib.get_close_matches(root, ROOTS, n=1, cutoff=0.4)
            hint = f"did you mean {key.replace(root, near[0], 1)}?" if near else f"it has {', '.join(ROOTS)}"
            problems.append(f"{word}: the recipe has no {root}; {hint}")
        elif key.startswith(tuple(f"{name}." for name in FIXED)) or key in FIXED:
            problems.append(f"{word}: that is decided by the flags, before there is a recipe; leave it out")
        elif FLAGS.get(key) not in flags:
            others.append(word)
            problems += _unknown(word, key)
        elif operation != "=":
            problems.append(f"{word}: {key} is set by --{FLAGS[key]}; write --{FLAGS[key]} with its new value")
        elif FLAGS[key] == "sequence_parallel":
            found.append("--sequence_parallel" if value.lower() == "true" else "--no_sequence_parallel")
        elif FLAGS[key] == "use_precision_aware_optimizer":
            found += ["--use_precision_aware_optimizer"] * (value.lower() == "true")
        else:
            found += [f"--{FLAGS[key]}", value]
    return found, others, problems


def _unknown(word, key):
    """A problem, if NeMo's sources are here and none of those for a key's place has its last name."""
    place, _, name = key.rpartition(".")
    names = set()
    for package, pattern in SOURCES.get(place, ()):
        spec = importlib.util.find_spec(package)
        files = [
            file for root in (spec.submodule_search_locations if spec else ()) for file in Path(root).glob(pattern)
        ]
        if not files:
            return []
        for file in files:
            names |= set(re.findall(r"^(?: {4}| {8})(\w+) ?:", file.read_text(encoding="utf-8"), re.MULTILINE))
    name = re.split(r"\[", name)[0]
    if not names or name in names:
        return []
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return [f"{word}: {place} has no {name}" + (f"; did you mean {place}.{near[0]}?" if near else "")]


def apply(recipe, words):
    """Change a recipe as `words` say, with NeMo-Run's parser. Raises ValueError, a line for each that it can't."""
    from nemo_run.cli import cli_parser

    problems = []
    for word in words:
        key, _, value = WORD.fullmatch(word).groups()
        problem = _misspelt(recipe, word, key)
        if problem is None:
            try:
                cli_parser.parse_cli_args(recipe, [word])
            except cli_parser.CLIException as error:
                problem = f"{word}: {error.args[0].split(' (Argument:')[0]}"
            except (TypeError, ValueError, AttributeError) as error:
                problem = f"{word}: {value} can't be used there ({error})"
        if problem:
            problems.append(problem)
    if problems:
        raise ValueError("\n".join(problems))


def _misspelt(recipe, word, key):
    """Why a key's place in the recipe does not exist, with the nearest that does; or None."""
    import fiddle as fdl

    node, path = recipe, ""
    for name in key.split("."):
        name, *indices = re.findall(r"\w+", name)
        if not isinstance(node, fdl.Buildable):
            return f"{word}: {path} is {node!r} in this recipe, which has no {name}"
        names, anything = _parameters(fdl.get_callable(node))
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7 if anything else 0.5)
        if name not in names and (near or not anything):
            hint = f"did you mean {f'{path}.{near[0]}'.lstrip('.')}?" if near else f"it has {', '.join(sorted(names))}"
            return f"{word}: {path or 'the recipe'} has no {name}; {hint}"
        path = f"{path}.{name}".lstrip(".")
        node = getattr(node, name, None)
        for index in indices:
            try:
                node = node[int(index)]
            except (TypeError, ValueError, IndexError):
                return f"{word}: {path} has no [{index}]"
    return None


def _parameters(function):
    """Names that a function or class takes, those that a class hands on to its bases too; and whether it takes any."""
    functions = [function]
    if inspect.isclass(function):
        functions += [base.__init__ for base in function.__mro__[1:] if "__init__" in vars(base) and base is not object]
    names = {}
    for one in functions:
        names |= inspect.signature(one).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(one).parameters.values()):
            break
    else:
        return set(names) - {"self", "args", "kwargs"}, True
    return set(names) - {"self", "args", "kwargs"}, False
