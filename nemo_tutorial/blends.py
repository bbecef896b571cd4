"""Which data a pretraining run reads and how much of each: --dataset_path taken apart, and Megatron's arithmetic on it.

Source of the arithmetic: megatron/core/datasets, Megatron-Core 0.15.3: blended_megatron_dataset_builder.py (how many
samples a source must have), gpt_dataset.py (how many epochs that takes), helpers.cpp (whose turn it is).
"""

import difflib
import hashlib
import json
import math
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from pathlib import Path

from nemo_tutorial import checkpoints, megatron_data, terminal

SPLITS = ("training", "validation", "test")
KEYS = {"train": 0, "training": 0, "validation": 1, "valid": 1, "test": 2}  # of a blend file; Megatron says `valid`
FILES = (".yaml", ".yml", ".json")
SURPLUS = 0.005  # Megatron makes each source of a blend this much longer than its share
TURNS = 3_000_000  # turns that are played out one by one: a second
EPOCHS = 1_000_000  # Megatron counts a source's epochs, and lists the documents of all of them, before the first step


@dataclass
class Part:
    """What one source gives to one split of a run."""

    prefix: str
    weight: float  # as it is given to Megatron, which divides by the sum
    documents: int
    tokens: int
    samples: int = 0  # that the run reads; of validation: that one validation reads


@dataclass
class Blend:
    """The parts of each split: training, validation, test. `split` is None where validation has its own sources."""

    parts: tuple
    split: str | None

    def prefixes(self):
        """Every source once."""
        return list(dict.fromkeys(part.prefix for parts in self.parts for part in parts))

    def files(self):
        """The files of every source."""
        return [f"{prefix}.{end}" for prefix in self.prefixes() for end in ("idx", "bin")]

    def paths(self):
        """What NeMo's PreTrainingDataModule takes: a list, or a dict of lists where the splits have their own sources.

        With several sources it alternates weight and prefix. Always: without weights Megatron would read each source
        once and stop, however many steps were asked for.
        """
        listed = []
        for parts in self.parts:
            prefixes = [str(Path(part.prefix).absolute()) for part in parts]
            weights = [repr(part.weight) for part in parts]
            listed.append(prefixes if len(parts) == 1 else [word for pair in zip(weights, prefixes) for word in pair])
        if self.split is not None:
            return listed[0]
        # NeMo wants three sets; nothing is tested, so the third may be any.
        return {"train": listed[0], "validation": listed[1], "test": listed[2] or listed[1]}


def read(words, split):
    """The Blend that --dataset_path and --split (None: not given) say. Raises ValueError with every problem in a list.

    `words` are folders and prefixes, or weights and prefixes in turn, or one blend file.
    """
    given, where = None, "--dataset_path"
    if len(words) == 1 and Path(words[0]).suffix in FILES:
        where += f" {words[0]}"
        given = _read_file(words[0])
    else:
        given = [_entries(words, where), None, None]
    if given[1] is not None and split is not None:
        raise ValueError([f"--split {split} has no effect: {where} has a validation set of its own; leave it out"])
    problems, found = [], []
    for entries in given:
        found.append([])
        for weight, path in entries or []:
            try:
                indices = [megatron_data.read_index(prefix) for prefix in megatron_data.prefixes(path)]
                found[-1].append((weight, indices))
            except (ValueError, OSError) as error:
                problems.append(f"{where}: {error}")
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ValueError(problems)
    names = [str(Path(index.prefix).resolve()) for source in found for _, indices in source for index in indices]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError([f"{where}: {name} is named twice; name it once, with another weight" for name in twice])
    if given[1] is not None:
        return Blend(tuple(_whole(source) for source in found), None)
    split = "998,1,0" if split is None else split
    return Blend(_shares(found[0], split), split)


def _read_file(path):
    """A blend file, YAML or JSON: [training, validation, test], each a list of (weight or None, path), or None."""
    import yaml  # not above: --help needs only the standard library

    where = f"--dataset_path {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text), where)
        content = yaml.safe_load(text)
    except OSError as error:
        raise ValueError([f"{where} can't be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError([f"{where} is not YAML: {said}"]) from None
    if not isinstance(content, dict):
        raise ValueError([f"{where} is no blend: it needs `train:` with sources under it; see pretraining/README.md"])
    problems, given = [], [None, None, None]
    for key, value in content.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            problems.append(f"{where}: {key!r} is none of train, validation, test" + (f": {near[0]}?" if near else ""))
        elif given[KEYS[key]] is not None:
            problems.append(f"{where}: {key} is there under another name already; keep one")
        elif value is not None:
            try:
                given[KEYS[key]] = _entries(_words(value, where), where)
            except ValueError as error:
                problems += error.args[0]
    if given[0] is None and not problems:
        problems.append(f"{where} has no `train:`; name the sources to train on")
    if given[2] is not None and given[1] is None and not problems:
        problems.append(f"{where} has `test:` and no `validation:`; name a validation set too")
    if problems:
        raise ValueError(problems)
    return given


def _refuse_repeated_keys(node, where):
    """YAML's reader would take the last of two equal keys without a word."""
    if node is None or not hasattr(node, "tag") or isinstance(node.value, str):
        return
    pairs = node.value if node.tag.endswith(":map") else []
    seen = set()
    for key, _ in pairs:
        if key.value in seen:
            raise ValueError([f"{where}:{key.start_mark.line + 1}: {key.value} is there twice; keep one"])
        seen.add(key.value)
    for child in [value for _, value in pairs] or node.value:
        _refuse_repeated_keys(child, where)


def _words(value, where):
    """Sources of a blend file as words of a command line: `path`, [path, ...], [weight, path, ...], {path: weight}."""
    if isinstance(value, dict):
        if any(isinstance(weight, (dict, list)) or weight is None for weight in value.values()):
            raise ValueError([f"{where}: under a path stands its weight, a number above 0"])
        return [str(word) for path, weight in value.items() for word in (weight, path)]
    words = value if isinstance(value, list) else [value]
    if not words or any(not isinstance(word, (str, int, float)) for word in words):
        raise ValueError([f"{where}: sources are a path, a list of paths, or `path: weight` lines"])
    return [str(word) for word in words]


def _number(word):
    try:
        return float(word)
    except ValueError:
        return None


def _entries(words, where):
    """["30", "a", "70", "b"] or ["a", "b"] -> [(weight or None, path), ...]."""
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 == 0 and None not in weights:
        bad = [word for word, weight in zip(words[::2], weights) if not 0 < weight < math.inf]
        if bad:
            raise ValueError(
                [f"{where}: the weight {word} is not a number above 0; a source of none is left out" for word in bad]
            )
        return list(zip(weights, words[1::2]))
    if any(_number(word) is not None and not megatron_data.is_there(word) for word in words):
        said = "are not weights and sources in turn; write WEIGHT PREFIX WEIGHT PREFIX, or no weights at all"
        raise ValueError([f"{where}: {' '.join(words)} {said}"])
    return [(None, word) for word in words]


def _whole(source):
    """The parts of a split whose sources are all its own."""
    tokens = [[index.tokens for index in indices] for _, indices in source]
    weights = _weights(source, tokens)
    flat = [index for _, indices in source for index in indices]
    return [Part(index.prefix, weight, index.sequences, index.tokens) for index, weight in zip(flat, weights)]


def _shares(source, split):
    """The parts of the three splits where each source is divided by --split. Raises ValueError with the problems."""
    try:
        counts = [[megatron_data.split_tokens(index, split) for index in indices] for _, indices in source]
    except ValueError as error:
        raise ValueError([str(error)]) from None
    weights = _weights(source, [[tokens[0] for tokens in several] for several in counts])
    parts = ([], [], [])
    indices = [index for _, indices in source for index in indices]
    for index, weight, tokens in zip(indices, weights, [tokens for several in counts for tokens in several]):
        for number, span in enumerate(megatron_data.split_sequences(index.sequences, split)):
            if span is not None:
                parts[number].append(Part(index.prefix, weight, span[1] - span[0], tokens[number]))
    return parts


def _weights(source, tokens):
    """One weight for each prefix: what was given, in a folder shared out by tokens; if none was given, the tokens."""
    weights = []
    for (weight, _), counts in zip(source, tokens):
        if weight is None or len(counts) == 1:
            weights += [float(count) if weight is None else weight for count in counts]
        else:
            weights += [weight * count / max(1, sum(counts)) for count in counts]
    return weights


def normalize(weights):
    """Megatron's: weights that add up to 1, with numpy's rounding."""
    import numpy

    weights = numpy.array(weights, dtype=numpy.float64)
    return (weights / numpy.sum(weights)).tolist()


def turns(weights, samples):
    """How many of the first `samples` samples of a blend come from each source.

    Megatron gives each turn to the source that is furthest behind its weight. After as many turns as whole weights in
    lowest terms add up to, none is behind and it begins again, so only the rest is played out. Above TURNS even that
    takes too long: then it is the weight's share, rounded, which is right within as many samples as there are sources.
    """
    if len(weights) == 1:
        return [samples]
    whole = [Fraction(repr(weight)) for weight in weights]
    scale = reduce(math.lcm, (weight.denominator for weight in whole))
    whole = [int(weight * scale) for weight in whole]
    whole = [weight // math.gcd(*whole) for weight in whole]
    period = sum(whole)
    rounds = samples // period
    counts = [rounds * weight for weight in whole]
    if (samples - rounds * period) * len(weights) > TURNS:
        return [round(samples * weight / period) for weight in whole]
    shares = list(enumerate(normalize(normalize(weights))))  # the builder normalizes, and so does the dataset
    for turn in range(rounds * period, samples):
        behind, chosen = -math.inf, 0
        for number, share in shares:
            error = share * max(turn, 1) - counts[number]
            if error > behind:
                behind, chosen = error, number
        counts[chosen] += 1
    return counts


def epochs_built(tokens, samples, seq_length):
    """How often Megatron lists a source's documents so that they give `samples` samples."""
    return max(1, -(-(samples * seq_length + 1) // tokens))


def plan(blend, args):
    """Fill in the samples of every part; the problems: what Megatron would refuse or hang on, once the GPUs are taken.

    Needs the batch size, steps, validation interval and batches in `args`.
    """
    batch = args.global_batch_size
    validations = args.max_steps // args.val_check_interval + 1
    targets = (args.max_steps * batch, validations * args.limit_val_batches * batch, 0)
    read_samples = (targets[0], args.limit_val_batches * batch, 0)
    problems = []
    for name, parts, target, samples in zip(SPLITS, blend.parts, targets, read_samples):
        if not parts:
            continue
        weights = [part.weight for part in parts]
        needed, size = [target], target
        if len(parts) > 1:
            needed = [math.ceil(target * weight) for weight in normalize(weights)]
            size = sum(needed)
            needed = [math.ceil(count * (1 + SURPLUS)) for count in needed]
        drawn = turns(weights, size)
        for part, count, most, taken in zip(parts, turns(weights, samples), needed, drawn):
            part.samples = count
            epochs = epochs_built(part.tokens, most, args.seq_length)
            if epochs > EPOCHS:
                problems.append(
                    f"{_named(blend, name, part)} has {part.tokens:,} tokens, and would be listed {epochs:,} times "
                    f"before the first step; {_more(blend, name)}"
                )
            elif taken > (epochs * part.tokens - 1) // args.seq_length:
                problems.append(
                    f"{_named(blend, name, part)} is a few samples too short for the rounding of Megatron's blend; "
                    "change its weight or --max_steps a little"
                )
    return problems


def split_problems(blend, seq_length):
    """Splits that hold nothing: Megatron would count their epochs for ever."""
    if not blend.parts[1]:
        return [f"--split {blend.split} leaves nothing to validate on; use one such as 98,2,0"]
    problems = []
    for name, parts in zip(SPLITS, blend.parts):
        for part in parts:
            named = _named(blend, name, part)
            if part.documents == 0:
                problems.append(
                    f"{named} ({_total(blend, part)} documents) rounds to none, and Megatron would wait for ever; "
                    f"{_more(blend, name)}"
                )
            elif part.tokens == 0:
                problems.append(
                    f"{named} has only empty documents, and Megatron would wait for ever; {_more(blend, name)}"
                )
            elif name == "training" and part.tokens <= seq_length:
                problems.append(
                    f"--dataset_path: {part.prefix} has {part.tokens} tokens to train on, less than one sample of "
                    f"--seq_length {seq_length} needs; add data, or use a shorter --seq_length"
                )
    return problems


def _named(blend, name, part):
    if blend.split is None:
        return f"--dataset_path: the {name} source {part.prefix}"
    return f"--split {blend.split}: the {name} share of {part.prefix}"


def _more(blend, name):
    if blend.split is None:
        return f"preprocess more {name} data, or leave the source out"
    return "give it a larger share, such as --split 90,10,0, or its own data in a blend file"


def _total(blend, part):
    return sum(other.documents for parts in blend.parts for other in parts if other.prefix == part.prefix)


def describe(blend, args):
    """Print what each source gives to each split: of training in the whole run, of validation each time."""
    rows = []
    for name, parts in zip(SPLITS, blend.parts):
        total = sum(part.samples for part in parts)
        for part in parts:
            if part.tokens <= args.seq_length:
                terminal.warn(f"{_named(blend, name, part)} has {part.tokens} tokens: they are repeated in each sample")
            seen = part.samples * args.seq_length
            row = [name, part.prefix, f"{part.documents:,}", f"{part.tokens:,}"]
            if name == "test":
                rows.append([*row, "", "none: a run does not test", "", ""])
                continue
            rows.append(
                [*row, f"{part.samples / total:.2%}", f"{part.samples:,}", f"{seen:,}", f"{seen / part.tokens:.2f}"]
            )
        if len(parts) > 1 and total:
            documents, tokens = sum(part.documents for part in parts), sum(part.tokens for part in parts)
            sums = [f"{documents:,}", f"{tokens:,}", "", f"{total:,}", f"{total * args.seq_length:,}"]
            rows.append([name, "all", *sums, f"{total * args.seq_length / tokens:.2f}"])
    print("\nsources: what the run reads (of validation: each time)")
    terminal.table(["split", "source", "documents", "tokens", "share", "samples", "tokens read", "epochs"], rows)


def index_folder(blend, args):
    """Where Megatron's sample index of this run lies: one folder for all runs that read the same in the same order.

    Its name is made from the state of the files too: Megatron itself would take an old index for changed data.
    """
    files = [
        (file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns)
        for prefix in sorted({str(Path(part.prefix).absolute()) for parts in blend.parts for part in parts})
        for file in (prefix + ".bin", prefix + ".idx")
    ]
    steps = [args.max_steps, args.val_check_interval, args.limit_val_batches, args.global_batch_size]
    key = json.dumps([blend.paths(), blend.split, args.seq_length, args.seed, steps, files])
    return Path("results", ".index_mapping", hashlib.sha256(key.encode()).hexdigest()[:16])


def build_index(recipe):
    """Build the sample index that the ranks of a pretraining recipe will look for, unless an equal run did.

    Ours, because NeMo's build_pretraining_datamodule wants MASTER_ADDR and a free port, and stays in its group.
    """
    import fiddle
    from torch import distributed

    folder, trainer, began = Path(recipe.data.index_mapping_dir), recipe.trainer, time.monotonic()
    while not folder.is_dir():
        try:
            with checkpoints.published(folder) as partial:
                partial.mkdir()
                data = fiddle.build(recipe.data)
                data.index_mapping_dir = str(partial)
                distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
                try:
                    data.build(
                        trainer.max_steps,
                        trainer.val_check_interval,
                        trainer.limit_val_batches,
                        trainer.limit_test_batches,
                    )
                finally:
                    distributed.destroy_process_group()
        except FileExistsError:  # another node, or another run, is at it
            time.sleep(1)
    terminal.describe("index", [("folder", folder), ("seconds", f"{time.monotonic() - began:.0f}")])
