"""Weights as a stream: safetensors <-> Megatron's distributed checkpoint, by NeMo's own tables, tensor by tensor.

NeMo's converters hold both models whole in memory. Here their tables of names and transforms are used, each entry when
its tensor is written. The tables' code, the checkpoint's layout and its writer stay NeMo's, Megatron's and torch's.
NeMo's names, here, are those of a model with Transformer Engine's layers, whether there is a GPU or not.
"""

import contextlib
import copy
import json
import os
import re
import struct
import threading
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from megatron.core.dist_checkpointing.strategies import torch as megatron_format
from nemo.lightning import io
from nemo.lightning.io.state import StateDictTransform, TransformCTX
from safetensors import SafetensorError, safe_open
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from nemo_tutorial import checkpoints, models, terminal

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # safetensors' names
LAYER = re.compile(r"(decoder\.layers)\.(?!\d)")
EXPERTS = re.compile(r"(\.mlp\.experts)\.experts\.")


def like(shape, dtype):
    """A tensor without values."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def size(tensors):
    """Bytes of {name: tensor}."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def bits(tensor):
    """The bytes of a tensor, as numpy's."""
    return tensor.contiguous().view(torch.uint8).numpy()


def one_by_one(name):
    """A parameter's name, or a table's pattern of names, of grouped experts -> as if each were a module of its own.

    A checkpoint is the same for both; some of NeMo's tables are for the one, some for the other.
    """
    return re.sub(r"(\.mlp\.experts)\.(linear_fc[12]\.weight)(\d+|\*)$", r"\1.local_experts.\3.\2", name)


class HuggingFace:
    """The tensors of a Hugging Face folder: `meta` has names, shapes and dtypes; [name] maps one from its file.

    `files` are the safetensors to read, if they are not the folder's model.
    """

    def __init__(self, folder, files=None):
        self.files, self.meta = {}, {}
        for file in files or models.weight_files(folder):
            try:
                with safe_open(file, framework="pt") as weights:
                    for name in weights.keys():
                        part = weights.get_slice(name)
                        self.files[name] = file
                        self.meta[name] = like(part.get_shape(), DTYPES[part.get_dtype()])
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}); download it again") from None
            except KeyError as error:
                raise ValueError(f"{file}: {name} is of type {error}; only BF16, F16 and F32 are converted") from None

    def __getitem__(self, name):
        with safe_open(self.files[name], framework="pt") as weights:
            return weights.get_tensor(name)


class Megatron:
    """The weights of a NeMo checkpoint of any TP, PP and EP, by layer and expert: `meta` as above; [name] reads one.

    Ours, because torch's reader holds a tensor twice. Records are mapped, and nothing of them is unpickled.
    """

    def __init__(self, checkpoint):
        self.folder = Path(checkpoint) / "weights"
        metadata = dcp.FileSystemReader(self.folder).read_metadata()
        self.meta, self._where, self._chunks, self._data = {}, {}, {}, {}
        for index, info in metadata.storage_data.items():
            if index.offset is not None:
                self._data[index.fqn, tuple(index.offset)] = info
        for key, entry in metadata.state_dict_metadata.items():
            if not key.startswith("module.") or not hasattr(entry, "chunks"):
                continue  # optimizer state, random generators, Transformer Engine's extra state
            self._chunks[key] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            name, size, dtype = key.removeprefix("module."), tuple(entry.size), entry.properties.dtype
            # One tensor for all layers, and one for all experts of them: these are its first dimensions.
            places = [LAYER.search(name), EXPERTS.search(name)]
            for index in np.ndindex(size[: sum(place is not None for place in places)]):
                own = LAYER.sub(rf"\1.{index[0]}.", name) if index else name
                own = EXPERTS.sub(rf"\1.local_experts.{index[-1]}.", own) if len(index) > 1 else own
                self.meta[own], self._where[own] = like(size[len(index) :], dtype), (key, index)

    def __getitem__(self, name):
        (key, index), shape, dtype = self._where[name], tuple(self.meta[name].shape), self.meta[name].dtype
        out = torch.empty(shape, dtype=dtype)
        integer = np.dtype(f"u{dtype.itemsize}")
        target, filled = bits(out).view(integer).reshape(shape), 0
        for offsets, sizes in self._chunks[key]:
            inside = tuple(at - start for at, start in zip(index, offsets))
            if not all(0 <= at < size for at, size in zip(inside, sizes)):
                continue
            part = self._record(key, offsets, sizes, integer)[inside]
            region = list(zip(offsets, sizes))[len(index) :]
            target[tuple(slice(start, start + size) for start, size in region)] = part
            filled += part.size
        if filled != target.size:
            raise ValueError(f"{self.folder}: {key} has {filled} of {target.size} values")
        return out

    def pieces(self, name):
        """In how many parts the first dimension of a tensor was saved."""
        key, first = self._where[name][0], -self.meta[name].dim()
        return len({offsets[first] for offsets, _ in self._chunks[key]})

    def _record(self, key, offsets, sizes, integer):
        """One stored chunk, mapped: torch.save's zip, whose data lie uncompressed in it."""
        info = self._data[key, offsets]
        path = self.folder / info.relative_path
        try:
            with open(path, "rb") as file, zipfile.ZipFile(_Part(file, info.offset, info.length)) as archive:
                (entry,) = [e for e in archive.infolist() if "/data/" in e.filename]
                file.seek(info.offset + entry.header_offset)
                header = file.read(30)
                start = info.offset + entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            if entry.compress_type or entry.file_size != integer.itemsize * int(np.prod(sizes)):
                raise ValueError(f"a record of {entry.file_size} bytes")
            record = np.memmap(path, integer, "r", start, tuple(sizes) or (1,))
            if zlib.crc32(record.view(np.uint8)) != entry.CRC:
                raise ValueError("its checksum is another")
            return record.reshape(sizes)
        except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: {key} at {offsets} can't be read ({error}); the file is damaged") from None


def problem(checkpoint):
    """What of a checkpoint's weights is damaged, or None: the file, and the tensor if one is. Reads all of them.

    By the hashes in its manifest; in a checkpoint that training wrote there is none, but every record has a checksum.
    """
    changed = None
    if checkpoints.manifest(checkpoint):
        with terminal.progress("check", checkpoints.size(checkpoint)) as progress:
            changed = checkpoints.changed(checkpoint, progress)
        if not changed:
            return None
    try:
        _check_records(Path(checkpoint) / "weights")
    except ValueError as error:
        return str(error)
    return changed


def _check_records(folder):
    """Raise ValueError, with file and tensor, if a record of a distributed checkpoint has another checksum."""
    try:
        records = dcp.FileSystemReader(folder).read_metadata().storage_data.items()
    except Exception as error:  # a pickle: anything
        raise ValueError(f"{folder / '.metadata'} can't be read ({error!r}); the file is damaged") from None

    def check(item):
        index, info = item
        path = folder / info.relative_path
        try:
            with open(path, "rb") as file:
                part = _Part(file, info.offset, info.length)
                if part.read(2) != b"PK":  # no tensor, but a pickle: it has no checksum
                    return info.length
                with zipfile.ZipFile(part) as archive:
                    if archive.testzip():
                        raise ValueError("its checksum is another")
        except (OSError, ValueError, EOFError, struct.error, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: {index.fqn} can't be read ({error}); the file is damaged") from None
        return info.length

    total = sum(info.length for _, info in records)
    with ThreadPoolExecutor(os.cpu_count()) as pool, terminal.progress("check", total) as progress:
        for length in pool.map(check, records):
            progress(length)


class _Part:
    """A part of an open file, as a file."""

    def __init__(self, file, start, length):
        self.file, self.start, self.length = file, start, length
        self.seek(0)

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        base = {os.SEEK_SET: 0, os.SEEK_END: self.length}.get(whence)
        base = self.tell() if base is None else base
        return self.file.seek(self.start + base + offset) - self.start

    def tell(self):
        return self.file.tell() - self.start

    def read(self, size=-1):
        left = self.length - self.tell()
        return self.file.read(left if size < 0 else min(size, left))


@dataclass(frozen=True)
class Step:
    """One entry of a table for one layer: `transform` makes the tensors `targets` of the tensors `sources`."""

    transform: StateDictTransform
    sources: tuple
    targets: tuple


class Table:
    """A NeMo importer's or exporter's table, matched with the names of both sides.

    `source` and `target` are {name: tensor without values}; the configs are those that NeMo's transforms ask for:
    Hugging Face's on the one side, NeMo's on the other. Names that the table does not cover are in `unused` (of the
    source) and `unmade` (of the target).
    """

    def __init__(self, connector, source, target, source_config, target_config):
        self.target, self.source_config, self.target_config = target, source_config, target_config
        self.steps = []
        for transform in _entries(connector, source_config, target_config):
            if _found(transform.source_key, source) and _found(transform.target_key, target):
                self.steps += self._match(transform, source)
        self.maker = {name: step for step in self.steps for name in step.targets}
        self.unused = sorted(source.keys() - {name for step in self.steps for name in step.sources})
        self.unmade = sorted(target.keys() - self.maker.keys())

    def _match(self, transform, source):
        log = []  # which tensors belong together: what is read and written, in turn, with nothing computed
        dry = copy.copy(transform)
        dry.call_transform = lambda *args, **kwargs: (
            None if isinstance(transform.target_key, str) else [None] * len(transform.target_key)
        )
        dry(self._context(_Reads(source, log), _Writes(self.target, log)))
        steps, reads, writes = [], [], []
        for kind, name in [*log, ("read", None)]:
            if kind == "read" and writes:
                steps.append(Step(transform, tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes))))
                reads, writes = [], []
            (reads if kind == "read" else writes).append(name)
        return steps

    def _context(self, source, target):
        return TransformCTX(
            source=_Named(source, self.source_config),
            source_state=source,
            target=SimpleNamespace(config=self.target_config),
            target_state=target,
        )

    def make(self, step, source):
        """The tensors that a step makes of `source`'s: {name: tensor}."""
        values = {name: source[name] for name in step.sources}
        made = {name: torch.empty(self.target[name].shape, dtype=self.target[name].dtype) for name in step.targets}
        step.transform(self._context(values, made))
        for name, tensor in made.items():
            if tensor.shape != self.target[name].shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} where {tuple(self.target[name].shape)} belongs")
        return made

    def tensor(self, source, name):
        """One of the targets, made of `source`'s tensors."""
        return self.make(self.maker[name], source)[name]

    def tensors(self, source):
        """All that the table makes of `source`, one after the other: (name, tensor)."""
        for step in self.steps:
            for name, tensor in self.make(step, source).items():
                yield name, cast(name, tensor, self.target[name].dtype)


def cast(name, tensor, dtype):
    """A tensor in another dtype. Raises ValueError if a value is too large for it."""
    if tensor.dtype == dtype:
        return tensor
    other = tensor.to(dtype)
    if torch.isfinite(tensor).all() and not torch.isfinite(other).all():
        raise ValueError(f"{name} has values too large for {dtype}, up to {tensor.abs().max().item():.3g}")
    return other


class _Reads(dict):
    def __init__(self, values, log):
        super().__init__(values)
        self.log = log

    def __getitem__(self, name):
        self.log.append(("read", name))
        return super().__getitem__(name)


class _Writes(dict):
    def __init__(self, values, log):
        super().__init__(values)
        self.log = log

    def __setitem__(self, name, value):
        self.log.append(("write", name))
        super().__setitem__(name, value)


class _Named:
    """model.embed_tokens.weight as attributes: some of NeMo's transforms reach for a tensor that way."""

    def __init__(self, tensors, config, path=""):
        self._tensors, self._path, self.config = tensors, path, config

    def __getattr__(self, name):
        path = f"{self._path}.{name}".lstrip(".")
        return self._tensors[path] if path in self._tensors else _Named(self._tensors, None, path)


def _entries(connector, source_config, target_config):
    """What a converter hands to NeMo's apply_transforms, as a list of StateDictTransform."""
    found = []

    def capture(source, target, mapping, transforms=(), **kwargs):
        found.extend(StateDictTransform(key, value) for key, value in mapping.items())
        found.extend(transforms or ())
        return target

    own, io.apply_transforms = io.apply_transforms, capture
    try:
        connector.convert_state(SimpleNamespace(config=source_config), SimpleNamespace(config=target_config))
    finally:
        io.apply_transforms = own
    for entry in found:
        entry.source_key, entry.target_key = map(_one_by_one_each, (entry.source_key, entry.target_key))
    return found


def _one_by_one_each(keys):
    if isinstance(keys, dict):
        return {name: one_by_one(key) for name, key in keys.items()}
    return one_by_one(keys) if isinstance(keys, str) else tuple(map(one_by_one, keys))


def _found(keys, names):
    patterns = [keys] if isinstance(keys, str) else keys.values() if isinstance(keys, dict) else keys
    return all(any(re.fullmatch(_regex(pattern), name) for name in names) for pattern in patterns)


def _regex(pattern):
    return re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", "[^.]+")


class Streamed(megatron_format.TorchDistSaveShardedStrategy):
    """Megatron's way of saving, but each tensor is asked of `make` when its turn to be written comes.

    `make` takes one of the state dict's tensors, whose values do not count, and returns it with values. Of `size` bytes
    in all, SMALL and more are written by four threads, each a file of its own.
    """

    SMALL = 100_000_000

    def __init__(self, make, size):
        super().__init__("torch_dist", 1)
        self.make, self.threads = make, 4 if size >= self.SMALL else 1

    def save(self, sharded_state_dict, checkpoint_dir):
        named, *_ = megatron_format._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        try:
            dcp.save(
                megatron_format.mcore_to_pyt_state_dict(named, False),
                storage_writer=_Writer(checkpoint_dir, single_file_per_rank=True, thread_count=self.threads),
                planner=_Planner(self.make),
            )
        except CheckpointException as error:  # hides the cause, a full disk perhaps, and is no Exception
            (cause, _), *_ = error.failures.values()
            if isinstance(cause, RuntimeError) and "inline_container" in str(cause):  # torch's zip writer lost bytes
                cause = OSError(f"File too large or disk full: {checkpoint_dir} can't be written")
            raise cause from None


class _Writer(dcp.FileSystemWriter):
    """torch's, with threads of which the first failure ends all: its own lose what goes wrong in them."""

    def _write_data(self, planner, file_queue):
        write, threads, self.thread_count = super()._write_data, self.thread_count, 1
        with ThreadPoolExecutor(threads) as pool:
            parts = [pool.submit(write, planner, file_queue) for _ in range(threads)]
            try:
                results = [result for part in as_completed(parts) for result in part.result().value()]
            except BaseException as error:
                planner.failure = error
                raise
        written = torch.futures.Future()
        written.set_result(results)
        return written


class _Planner(megatron_format.MCoreSavePlanner):
    failure = None  # of one of the threads

    def __init__(self, make):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.make = make

    def resolve_data(self, write_item):
        if self.failure:
            raise self.failure
        value = self.lookup_object(write_item.index)
        return self.make(value) if isinstance(value, torch.Tensor) else super().resolve_data(write_item)


def writer(parameters, tensor, progress):
    """The `make` of Streamed for a model's `parameters` ({NeMo name: parameter}, the values of which do not count).

    `tensor` gives one with values, by its NeMo name.
    """
    names = {parameter.untyped_storage()._cdata: name for name, parameter in parameters.items()}
    lock, begun = threading.Lock(), {}  # a gated MLP's two halves are written by two threads, and made once

    def make(part):
        name, size = names[part.untyped_storage()._cdata], part.numel() * part.dtype.itemsize
        with lock:
            progress(size)
            future, left = begun.pop(name, (None, parameters[name].numel() * part.dtype.itemsize))
            mine, future = future is None, future or Future()
            if left > size:
                begun[name] = future, left - size
        if mine:
            try:
                future.set_result(tensor(name).contiguous())
            except BaseException as error:
                future.set_exception(error)
        return future.result().as_strided(part.size(), part.stride(), part.storage_offset())

    return make


def write_safetensors(folder, target, tensors, max_shard_size, progress, name="model"):
    """Write safetensors (one file, or shards and their index), as Hugging Face's libraries name them.

    `target` is {name: tensor without values}; `tensors` gives each once, in any order: (name, tensor).
    """
    split = split_torch_state_dict_into_shards(
        target, max_shard_size=max_shard_size, filename_pattern=name + "{suffix}.safetensors"
    )
    code = {dtype: name for name, dtype in DTYPES.items()}
    places, files = {}, []
    with contextlib.ExitStack() as stack:
        for file, names in split.filename_to_tensors.items():
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name in sorted(names, key=lambda name: (-target[name].dtype.itemsize, name)):
                size = target[name].numel() * target[name].dtype.itemsize
                header[name] = {
                    "dtype": code[target[name].dtype],
                    "shape": list(target[name].shape),
                    "data_offsets": [end, end + size],
                }
                end += size
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            files.append(stack.enter_context(open(Path(folder) / file, "wb")))
            files[-1].write(struct.pack("<Q", len(text)) + text)
            for name in names:
                places[name] = (files[-1], 8 + len(text) + header[name]["data_offsets"][0])
        for name, tensor in tensors:
            file, offset = places[name]
            file.seek(offset)
            file.write(bits(tensor))
            progress(tensor.numel() * tensor.dtype.itemsize)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def differences(target, tensors, written, progress):
    """Compare `tensors`, of which each is (name, tensor), with those that `written` has, bit by bit.

    `target` is {name: tensor without values} of all of them. Returns [(tensor, what differs), ...].
    """
    found = [(name, "missing") for name in target.keys() - written.meta.keys()]
    found += [(name, "in no table of NeMo's") for name in written.meta.keys() - target.keys()]
    for name, made in tensors:
        if name not in written.meta:
            continue
        have = written[name]
        progress(have.numel() * have.dtype.itemsize)
        if (made.shape, made.dtype) != (have.shape, have.dtype):
            found.append((name, f"{made.dtype} {tuple(made.shape)} became {have.dtype} {tuple(have.shape)}"))
        elif not _equal(bits(made).reshape(-1), bits(have).reshape(-1)):
            found.append((name, "other values"))
    return sorted(found)


def _equal(one, other, slab=1 << 26):
    """Whether two arrays of bytes are equal; in slabs, because a comparison makes an array of its own."""
    return all(np.array_equal(one[at : at + slab], other[at : at + slab]) for at in range(0, one.size, slab))
