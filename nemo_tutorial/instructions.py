"""Instruction data, prepared once before a launch: rows in tokens, and packs of them in NeMo's own format.

DATASET/prepared/NAME/ holds the tokens of both files, DATASET/prepared/NAME/ARRANGEMENT/ the samples that training
reads. Each name is a hash of all that decides its content, so a changed row, template, tokenizer, length or packing
never finds what was made of another. With and without packing, the samples are made of the same tokens and read by
NeMo's same dataset class.
"""

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path

from nemo_tutorial import checkpoints, packing, preflight, prompts, terminal

FILES = ("training", "validation")
FORMAT = 1  # part of every name: raised when what is written changes
CHUNK = 500  # rows that a process gets at a time
BYTES_A_TOKEN = 4  # for estimates only: English text has about as many, and Chinese


@dataclass
class Prepared:
    """What training reads, and what is known about it."""

    folder: Path  # of training.npy, validation.npy, metadata.json
    facts: dict  # {"training": {...}, "validation": {...}}: rows, tokens, loss, longest, samples, fill, ...
    pack_size: int | None  # tokens; None without packing
    batch: int  # samples (packs, or rows) a step
    chat_template: str | None  # what replaces the tokenizer's own
    chat: prompts.Chat

    @property
    def rows_a_step(self):
        training = self.facts["training"]
        return self.batch * training["rows"] / training["samples"]

    @property
    def steps_an_epoch(self):
        return self.facts["training"]["samples"] // self.batch

    @property
    def validation_batches(self):
        return self.facts["validation"]["samples"] // self.batch


def prepare(args, tokenizer_folder, packs=None):
    """The samples for `args`: from the cache, or made now with all cores. Raises ValueError, naming file and line.

    `packs` is (length, number a step) of the run that goes on: on another number of GPUs they would come out otherwise.
    """
    root = Path(args.dataset_path) / "prepared"
    folder = root / _name(args, tokenizer_folder)
    chat = prompts.Chat(tokenizer_folder, args.prompt_template)
    try:
        _cached(folder, functools.partial(_tokenize, args, tokenizer_folder, chat))
        read = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        chat.day = datetime.fromisoformat(read["day"])
        facts = {}
        rows = {name: _rows(args, name, folder, facts) for name in FILES}
        groups, size, batch = _groups(args, rows, packs)
        arrangement = folder / _arrangement(args, size, batch)
        _cached(arrangement, functools.partial(_write, rows, groups, size or args.seq_length))
    except OSError as error:
        raise ValueError(
            f"--dataset_path {args.dataset_path}: the prepared rows are kept in {root}, which can't be written "
            f"({error}); copy the rows to a folder of your own"
        ) from None
    for name in FILES:
        tokens = sum(len(ids) - 1 for _, ids, _ in rows[name])
        fill = tokens / len(groups[name]) / (size or args.seq_length)
        facts[name] |= {"samples": len(groups[name]), "fill": fill}
    prepared = Prepared(arrangement, facts, size, batch, chat.own_template, chat)
    _report(args, read, prepared)
    _check(args, prepared)
    return prepared


def preview(args, tokenizer_folder, count):
    """Print the first rows as they would be trained on; nothing is written. Raises ValueError."""
    chat = prompts.Chat(tokenizer_folder, args.prompt_template)
    with open(Path(args.dataset_path) / "training.jsonl", "rb") as file:
        lines = list(enumerate(itertools.islice(file, count), 1))
    for (number, _), sample in zip(lines, _samples(chat, args.system_prompt, "training.jsonl", lines)):
        prompts.show(f"training.jsonl:{number}", chat.tokenizer, sample.ids, sample.loss)


def _cached(folder, make):
    """Make `folder` whole by `make`(folder to write in), or wait for another process that is just making it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    said = False
    while not folder.is_dir():
        try:
            with checkpoints.published(folder) as partial:
                partial.mkdir()
                make(partial)
        except FileExistsError:
            if not said:
                print(f"waiting: another process prepares {folder}", flush=True)
            said = True
            time.sleep(1)


# What a folder is named after.


def _name(args, tokenizer_folder):
    """A name for the tokens: it changes with the rows, the tokenizer, the template and the system prompt."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for package in ("transformers", "tokenizers"):
        digest.update(f"\0{package} {metadata.version(package)}".encode())
    for text in (args.prompt_template, args.system_prompt, prompts.PLAIN):
        digest.update(b"\0" + repr(text).encode())
    files = [Path(args.dataset_path) / f"{name}.jsonl" for name in FILES]
    files += [Path(tokenizer_folder) / name for name in checkpoints.ASSETS]
    files += sorted(Path(tokenizer_folder).glob("*.py"))  # a tokenizer's own code
    for file in files:
        digest.update(f"\0{file.name}\0".encode())
        if file.is_file():
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]


def _arrangement(args, size, batch):
    """A name for the samples made of these tokens: it changes with all that decides how they are cut and packed."""
    values = [FORMAT, args.seq_length, args.overlong]
    if args.packing:
        values += [size, batch, args.seed]
    return ("packed-" if args.packing else "rows-") + hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


# Rows -> tokens.


def _samples(chat, system_prompt, file, lines):
    """The rows of `lines`, pairs of (line number, JSON), as prompts.Sample. Raises ValueError with file and line."""
    conversations = [prompts.messages(json.loads(line), system_prompt) for _, line in lines]
    try:
        return chat.samples(conversations)
    except prompts.RowError as error:
        raise ValueError(
            f"--dataset_path: {file}:{lines[error.number][0]}: {error}; mend or remove the row, or give a "
            "--prompt_template"
        ) from None


def _work(file, system_prompt, lines):
    """A chunk of rows in tokens: (ids int32, loss bool, lengths int32, counts). Runs in a process of its own."""
    import numpy as np

    samples = _samples(_worker_chat, system_prompt, file, lines)
    counts = Counter(
        unasked=sum(sample.unasked for sample in samples),
        merged=sum(sample.merged for sample in samples),
        special=sum(
            any(_worker_chat.special.search(message["content"]) for message in prompts.messages(json.loads(line)))
            for _, line in lines
        ),
    )
    ids = np.fromiter(itertools.chain.from_iterable(sample.ids for sample in samples), np.int32)
    loss = np.fromiter(itertools.chain.from_iterable(sample.loss for sample in samples), np.bool_)
    return ids, loss, np.array([len(sample.ids) for sample in samples], np.int32), counts


_worker_chat = None  # each process has its own


def _start_worker(folder, prompt_template, day):
    global _worker_chat
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_chat = prompts.Chat(folder, prompt_template, day)


def _tokenize(args, tokenizer_folder, chat, output):
    """Write the tokens of both files to `output`: training.npz, validation.npz, facts.json."""
    import numpy as np

    facts = {"day": chat.day.isoformat()}
    for name in FILES:
        started = time.monotonic()
        file = Path(args.dataset_path) / f"{name}.jsonl"
        parts, counts = [], Counter()
        with open(file, "rb") as rows:
            for part in _chunks_done(args, tokenizer_folder, chat, file.name, enumerate(rows, 1)):
                parts.append(part[:3])
                counts.update(part[3])
        ids, loss, lengths = (np.concatenate(arrays) for arrays in zip(*parts))
        np.savez(output / f"{name}.npz", ids=ids, loss=loss, ends=np.cumsum(lengths, dtype=np.int64))
        facts[name] = {"rows": len(lengths), "tokens": len(ids), "loss": int(loss.sum()), **counts}
        seconds = time.monotonic() - started
        print(f"prepared {file.name}: {len(lengths):,} rows, {len(ids):,} tokens in {seconds:.0f} s", flush=True)
    (output / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _chunks_done(args, tokenizer_folder, chat, file, lines):
    """The results of `_work` for all chunks, in order; in one process if that takes no longer."""
    global _worker_chat
    first = list(itertools.islice(lines, 4 * CHUNK))
    if len(first) < 4 * CHUNK or os.cpu_count() == 1:
        _worker_chat = chat
        for chunk in _chunks(itertools.chain(first, lines)):
            yield _work(file, args.system_prompt, chunk)
        return
    workers = min(os.cpu_count(), 64)
    start = (tokenizer_folder, args.prompt_template, chat.day)
    # spawn: a fork of a process with threads, as this one may be, can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=start) as pool:
        print(f"preparing {file} in {workers} processes", flush=True)
        waiting = deque()
        try:
            for chunk in _chunks(itertools.chain(first, lines)):
                waiting.append(pool.submit(_work, file, args.system_prompt, chunk))
                if len(waiting) > 2 * workers:  # not all at once: the file may be larger than memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(f"--dataset_path: a process that prepared {file} was killed; is there memory?") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _chunks(lines):
    """Lists of CHUNK lines."""
    lines = iter(lines)
    while chunk := list(itertools.islice(lines, CHUNK)):
        yield chunk


# Tokens -> samples.


def _rows(args, name, folder, facts):
    """The rows of a file that are used, as (line, ids, loss): those that are too long by --overlong."""
    import numpy as np

    with np.load(folder / f"{name}.npz") as tokens:
        ids, loss, ends = tokens["ids"], tokens["loss"], tokens["ends"].tolist()
    limit = args.seq_length
    if args.packing and args.packed_sequence_size:
        limit = min(limit, args.packed_sequence_size)
    spans = [(line, start, end) for line, (start, end) in enumerate(zip([0, *ends], ends), 1)]
    long = [(line, end - start) for line, start, end in spans if end - start > limit]
    if long and args.overlong == "error":
        raise ValueError(
            f"--overlong error: {len(long)} rows of {name}.jsonl have more than {limit} tokens, the first in line "
            f"{long[0][0]}, the longest {max(long, key=lambda row: row[1])[1]}; raise --seq_length, or use --overlong "
            "drop or truncate"
        )
    rows, cut = [], 0
    for line, start, end in spans:
        if end - start > limit:
            end = start + limit
            if args.overlong == "drop" or not loss[start + 1 : end].any():
                continue
            cut += 1
        rows.append((line, ids[start:end], loss[start:end]))
    if not rows:
        raise ValueError(
            f"--seq_length {args.seq_length}: every row of {name}.jsonl has more than {limit} tokens; raise it"
        )
    facts[name] = {
        "rows": len(rows),
        "dropped": len(ends) - len(rows),
        "truncated": cut,
        "limit": limit,
        "longest": max(len(ids) for _, ids, _ in rows),
        "tokens": sum(len(ids) for _, ids, _ in rows),
        "loss": int(sum(loss.sum() for _, _, loss in rows)),
    }
    return rows


def _groups(args, rows, packs):
    """Which rows are a sample: ({file: [[index, ...], ...]}, length of a pack or None, samples a step)."""
    if not args.packing:
        groups = {name: [[index] for index in range(len(rows[name]))] for name in FILES}
        size, batch = None, args.global_batch_size
    else:
        lengths = {name: [len(ids) - 1 for _, ids, _ in rows[name]] for name in FILES}
        ranks = preflight.data_parallel_size(args)
        size = args.packed_sequence_size or packing.pack_size(
            lengths["training"],
            max(map(max, lengths.values())),
            args.global_batch_size,
            ranks,
            args.longest_pack,
            math.lcm(packing.MULTIPLE, args.tensor_model_parallel_size),
            preflight.least_micro_batches(args),
        )
        size = packs[0] if packs else size
        groups = {"training": packing.pack(lengths["training"], size, args.seed)}
        rows_a_pack = len(rows["training"]) / len(groups["training"])
        batch = packing.packs_a_step(args.global_batch_size, rows_a_pack, ranks)
        if packs and packs[1] % ranks == 0:
            batch = packs[1]
        groups["validation"] = packing.spread(lengths["validation"], size, batch)
    if len(groups["validation"]) < batch:
        # NeMo drops an unfilled validation batch: nothing would be validated, without a word.
        raise ValueError(
            f"--global_batch_size {args.global_batch_size} is {batch} {'packs' if args.packing else 'rows'} a step, "
            f"which the {len(rows['validation'])} rows of validation.jsonl never fill; use a smaller one, or fewer GPUs"
        )
    return groups, size, batch


def _write(rows, groups, size, output):
    """Write the samples: training.npy, validation.npy, metadata.json, all as NeMo's GPTSFTPackedDataset reads them.

    Arrays, where NeMo writes lists, which take seven times the memory; and the lines that a sample is made of.
    """
    import numpy as np

    facts = []
    for name in FILES:
        samples = np.empty(len(groups[name]), dtype=object)
        for number, group in enumerate(groups[name]):
            parts = [rows[name][index] for index in group]
            ends = np.cumsum([len(ids) for _, ids, _ in parts])
            samples[number] = {
                "input_ids": np.concatenate([ids for _, ids, _ in parts]),
                # One earlier than the tokens: the loss at a place is that of the token after it.
                "loss_mask": np.concatenate([np.append(loss[1:], False) for _, _, loss in parts]),
                "seq_start_id": [0, *ends[:-1].tolist()],
                "lines": [line for line, _, _ in parts],
            }
        np.save(output / f"{name}.npy", samples)
        lengths = [sum(len(rows[name][index][1]) - 1 for index in group) for group in groups[name]]
        facts.append(
            {
                "dataset_max_seqlen": max(len(ids) - 1 for _, ids, _ in rows[name]),
                "max_samples_per_bin": max(map(len, groups[name])),
                "packing_factor": round(len(rows[name]) / len(groups[name]), 2),
                "packing_efficiency": round(100 * sum(lengths) / len(lengths) / size, 2),
                "pack_size": size,
                "min_packed_seqlen": min(lengths),
            }
        )
    (output / "metadata.json").write_text(json.dumps(facts), encoding="utf-8")


# What was made of the rows, and whether it is right.


def _report(args, read, prepared):
    """Say what is lost or doubtful: rows too long, turns without loss, prompts that run into answers."""
    for name in FILES:
        facts, counts = prepared.facts[name], read[name]
        if facts["dropped"] or facts["truncated"]:
            terminal.warn(
                f"{name}.jsonl: {facts['dropped'] + facts['truncated']} of {counts['rows']} rows have more than "
                f"{facts['limit']} tokens (--overlong {args.overlong}): {facts['dropped']} are left out, "
                f"{facts['truncated']} cut, and their answers do not end"
            )
        if counts["unasked"]:
            terminal.warn(
                f"{name}.jsonl: {counts['unasked']} earlier answers have no loss: the chat template writes what is "
                "before them otherwise once the conversation goes on"
            )
        if counts["merged"]:
            terminal.warn(
                f"{name}.jsonl: {counts['merged']} answers begin within the prompt's last token, which a served model "
                "is asked without; a prompt should not end with a space"
            )
        if counts["special"]:
            terminal.warn(
                f"{name}.jsonl: {counts['special']} rows have a special token written out in their text; it is read "
                "as the token itself, in training as in serving"
            )
    wanted, got = args.global_batch_size, prepared.rows_a_step
    if args.packing and not 0.9 < got / wanted < 1.1:
        terminal.warn(
            f"--global_batch_size {wanted}: a step has {got:.1f} rows, as each rank needs a pack and a pack must hold "
            f"the longest row ({prepared.facts['training']['longest']} tokens); --no_packing trains on {wanted}"
        )
    warning = prompts.end_problem(prepared.chat, prepared.chat.tokenizer.name_or_path)
    if warning:
        terminal.warn(warning)


def _check(args, prepared, packs=10, rows=5):
    """Compare some of the samples that training will read with what serving would render of their rows now.

    Raises ValueError if a token differs, an end token is not in the loss, or the loss is on everything or nothing.
    Prints the first --show_samples rows of them.
    """
    import numpy as np

    chat = prepared.chat
    for name in FILES:
        facts = prepared.facts[name]
        if not 0 < facts["loss"] < facts["tokens"]:
            raise ValueError(f"{name}.jsonl: the loss is on {facts['loss']} of {facts['tokens']} tokens")
        samples = np.load(prepared.folder / f"{name}.npy", allow_pickle=True)
        chosen = random.Random(args.seed).sample(range(len(samples)), min(packs, len(samples)))
        lines = {line for number in chosen for line in samples[number]["lines"][:rows]}
        shown = sorted(itertools.chain.from_iterable(sample["lines"] for sample in samples))[: args.show_samples]
        lines |= set(shown if name == "training" else ())
        found = {}
        for sample in samples:
            if not lines.isdisjoint(sample["lines"]):
                found |= {line: (ids, loss) for line, ids, loss in _rows_of(sample) if line in lines}
        with open(Path(args.dataset_path) / f"{name}.jsonl", "rb") as file:
            texts = {line: text for line, text in enumerate(file, 1) if line in lines}
        for line in sorted(lines):
            ids, loss = found[line]
            rendered = chat.tokenizer.apply_chat_template(
                prompts.messages(json.loads(texts[line]), args.system_prompt),
                return_dict=False,
                strftime_now=chat.day.strftime,
            )
            where, cut = f"{name}.jsonl:{line}", len(rendered) > len(ids)
            if ids != rendered[: len(ids)] or (cut and args.overlong != "truncate"):
                raise ValueError(f"{where}: the prepared tokens are not those that the chat template renders now")
            if not cut and ids[len(loss) - 1 - loss[::-1].index(True)] != chat.end:
                raise ValueError(f"{where}: the end token is not in the loss")
        if name == "training":
            for line in shown:
                prompts.show(f"training.jsonl:{line}", chat.tokenizer, *found[line])


def _rows_of(sample):
    """(line, ids, loss) of each row in a sample that was written by `_write_samples`."""
    bounds = [*sample["seq_start_id"], len(sample["input_ids"])]
    for line, start, end in zip(sample["lines"], bounds, bounds[1:]):
        loss = [False, *sample["loss_mask"][start : end - 1].tolist()]
        yield line, sample["input_ids"][start:end].tolist(), loss
