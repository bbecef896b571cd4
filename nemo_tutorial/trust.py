"""Whether a NeMo checkpoint may be loaded: all that its files would import or call, held against lists of names.

Loading one runs what it says: Fiddle imports and calls every name in `context/io.json`, and `weights/.metadata`,
`weights/common.pt`, objects within `weights/*.distcp` and some files of `context/` are pickles. Here all of them are
only read (see `pickles`). What ours and stock NeMo's checkpoints hold is on the lists; any other name is told.
Tensors are not looked at: torch reads those with an unpickler of its own that builds tensors only.
"""

import gc
import json
import os
import re
import stat
from pathlib import Path

from nemo_tutorial import compat, pickles, terminal

# What io.json may name: a module, and names in it. `*` is the rest of a word, `^` a class (a capital and the rest).
# Modules stand with all of their classes where these only keep what they are given: settings, callbacks, schedules.
# Where one of a module reads pickles, writes files or runs code, as some tokenizers and data modules of NeMo's do,
# its names are exact. Functions are exact always: they are called with whatever the file says.
CONFIGS = """
builtins dict list tuple set frozenset bytes slice int float str bool complex
fiddle._src.config Config BuildableTraverserMetadata NoValue
fiddle._src.partial Partial ArgFactory
nemo_run.config Config Partial
collections OrderedDict defaultdict
datetime timedelta
pathlib Path PosixPath
torch float* bfloat16 half double int* uint8 long bool
torch.nn.functional gelu silu relu
torch._C._nn gelu silu
torch.nn.init constant_ normal_ ones_ uniform_ xavier_normal_ xavier_uniform_ zeros_
transformers.generation.configuration_utils GenerationConfig
nemo.lightning.io.artifact.file DirArtifact DirOrStringArtifact FileArtifact PathArtifact
nemo.lightning.io.artifact.hf_auto from_pretrained
nemo.lightning.io.pl TrainerContext
nemo.collections.common.tokenizers.huggingface.auto_tokenizer AutoTokenizer
nemo.collections.common.tokenizers.sentencepiece_tokenizer SentencePieceTokenizer
nemo.collections.common.tokenizers.tiktoken_tokenizer TiktokenTokenizer
nemo.collections.common.tokenizers.bytelevel_tokenizers ByteLevelTokenizer
nemo.collections.common.tokenizers.null_tokenizer NullTokenizer
nemo.collections.llm.gpt.model.* *Config* *Model gpt_data_step gpt_forward_step default_layer_spec local_layer_spec
nemo.collections.llm.gpt.model.* transformer_engine_layer_spec transformer_engine_full_layer_spec mtp_block_spec
nemo.collections.llm.gpt.model.* gemma2_layer_spec gemma3_layer_spec heterogeneous_layer_spec
nemo.collections.llm.gpt.data.* AlpacaDataModule ChatDataModule DollyDataModule FineTuningDataModule MockDataModule
nemo.collections.llm.gpt.data.* MLPerfGovReportDataModule PackedSequenceSpecs PreTrainingDataModule SquadDataModule
nemo.collections.llm.peft.* CanonicalLoRA DoRA LoRA LoRAMerge ModuleMatcher
nemo.collections.llm.recipes.tp_overlap_configs.userbuffers ^
nemo.collections.llm.utils Config Partial
nemo.lightning.pytorch.trainer Trainer
nemo.lightning.pytorch.strategies.* ^
nemo.lightning.nemo_logger NeMoLogger
nemo.lightning.resume AutoResume
nemo.lightning.one_logger_callback OneLoggerNeMoCallback
megatron.core.distributed.* *Config
megatron.core.transformer.* *Config
megatron.core.transformer.enums ^ ^.*
megatron.core.model_parallel_config ModelParallelConfig
megatron.core.activations squared_relu quick_gelu
nemo.collections.llm.fn.activation openai_gelu quick_gelu squared_relu
megatron.core.fusions.* quick_gelu
"""
# What a pickle may name. Each is a class that keeps its arguments, or rebuilds a tensor or an array from bytes.
PICKLED = """
builtins set frozenset bytearray complex slice range
_codecs encode
_io BytesIO
argparse Namespace
collections OrderedDict defaultdict Counter deque
datetime datetime date timedelta timezone
pathlib Path PosixPath PurePosixPath
pathlib._local Path PosixPath PurePosixPath
signal Signals Handlers
nemo.utils.timers NamedTimer
numpy dtype ndarray float* int* uint* bool_
numpy.core.multiarray _reconstruct scalar
numpy._core.multiarray _reconstruct scalar
torch Size device strided *Storage float* bfloat16 half double int* uint* long bool
torch._utils _rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter
torch.storage UntypedStorage TypedStorage _load_from_bytes
torch.serialization _get_layout
torch.distributed.checkpoint.metadata BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta
torch.distributed.checkpoint.metadata TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING
torch.distributed.checkpoint.planner BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType
torch.distributed.checkpoint.filesystem _StorageInfo _StoragePrefix
megatron.core.dist_checkpointing.strategies.torch MCoreMetadata MCoreSavePlan
megatron.core.transformer.enums ^
megatron.core.enums ^
megatron.core.rerun_state_machine ^
lightning.fabric.utilities.data AttributeDict
"""
# What either may name: callbacks, loggers, schedules and settings, ours and stock ones.
BOTH = """
nemo.lightning.pytorch.callbacks.* ^
nemo.lightning.pytorch.callbacks.megatron_comm_overlap _CommOverlapConfig
nemo.lightning.pytorch.optim.* ^
nemo.lightning.pytorch.plugins.* ^
nemo.utils.exp_manager TimingCallback DeltaTimingCallback
nemo_tutorial.adam SmallStates StatesOnce
nemo_tutorial.ahead RunAhead
nemo_tutorial.answers LogitsOfAnswers
nemo_tutorial.callbacks ^
nemo_tutorial.hooks ^
nemo_tutorial.kernels CrossEntropy FlashAttention3 FusedRoPE GradientsInProduct RowwiseCasts SwiGLU
nemo_tutorial.loggers MLflow WeightsAndBiases
nemo_tutorial.lora AddedByKernels AddedInProduct GradientsOfInputs SplitBySequence
nemo_tutorial.network_check NetworkCheck
nemo_tutorial.optimizer_state SharedByReplicas
nemo_tutorial.progress Progress
nemo_tutorial.samples Samples
nemo_tutorial.tuning_data ^
lightning.pytorch.callbacks.* ^
lightning.pytorch.callbacks.progress.* ^
lightning.pytorch.trainer.states RunningStage TrainerFn TrainerStatus
lightning.pytorch.loggers.* CSVLogger MLFlowLogger TensorBoardLogger WandbLogger
megatron.core.optimizer.* *Config
transformer_engine.common.recipe ^
"""
# Read as pickles whatever they begin with. Other files are so only if they begin as one, or io.json names them.
SUFFIXES = (".metadata", ".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
METADATA = "BuildableTraverserMetadata"  # Fiddle's, of an object in io.json
LARGEST = 4 << 30  # bytes of a pickle that is read; weights are not in pickles but in *.distcp

# NVIDIA's advisories on what these scripts run: package, fixed in which version, what it takes, CVE numbers.
# From its bulletins 5686 to 5885 (github.com/NVIDIA/product-security) and the records in github.com/CVEProject.
ADVISORIES = (
    ("nemo_toolkit", "2.3.2", "a checkpoint's metadata", "CVE-2025-23303 CVE-2025-23304"),
    ("nemo_toolkit", "2.4.0", "input of export", "CVE-2025-23312 CVE-2025-23313 CVE-2025-23314 CVE-2025-23315"),
    ("nemo_toolkit", "2.5.1", "input of the LLM components", "CVE-2025-33204 CVE-2025-33205"),
    ("nemo_toolkit", "2.5.3", "a malicious model file", "CVE-2025-33212 CVE-2025-33226"),
    ("nemo_toolkit", "2.6.1", "a malicious file", "CVE-2025-33236 CVE-2025-33241 CVE-2025-33243 CVE-2025-33245"),
    ("nemo_toolkit", "2.6.1", "a malicious file", "CVE-2025-33246 CVE-2025-33249 CVE-2025-33250 CVE-2025-33251"),
    ("nemo_toolkit", "2.6.1", "a malicious file", "CVE-2025-33252 CVE-2025-33253"),
    ("nemo_toolkit", "2.6.2", "a malicious checkpoint", "CVE-2026-24157 CVE-2026-24159"),
    ("nemo_toolkit", "2.7.3", "a malicious file", "CVE-2026-24155 CVE-2026-24228 CVE-2026-24252"),
    ("nemo_toolkit", "3.0", "data, settings, tokenizer", "CVE-2026-24239 CVE-2026-65111 CVE-2026-65178 CVE-2026-65179"),
    ("megatron-core", "0.14.0", "a malicious file", "CVE-2025-23357 CVE-2026-24149"),
    ("megatron-core", "0.15.3", "a malicious checkpoint", "CVE-2025-33247 CVE-2026-24150 CVE-2026-24152"),
    ("megatron-core", "0.17.1", "a malicious checkpoint", "CVE-2026-65110 CVE-2026-65180"),
)
LASTS = 2  # fixes whose advisories are named one by one; of those before them, the number


class Names:
    """A list as above: whether a (module, name) is on it."""

    def __init__(self, table):
        self.lines = [line.split() for line in table.split("\n") if line]
        self.rules = []

    def __contains__(self, pair):
        # Only now, as --help should not take longer.
        self.rules = self.rules or [(_pattern([module]), _pattern(names)) for module, *names in self.lines]
        return any(module.fullmatch(pair[0]) and names.fullmatch(pair[1]) for module, names in self.rules)


def _pattern(words):
    words = [re.escape(word).replace(r"\*", r"\w*").replace(r"\^", r"[A-Z]\w*") for word in words]
    return re.compile("|".join(words), re.ASCII)


CONFIGS, PICKLED = Names(BOTH + CONFIGS), Names(BOTH + PICKLED)


def refusals(flag, checkpoint, trusted):
    """Why a checkpoint is not loaded, as problems; if it is `trusted`, these are only warned about."""
    found = problems(checkpoint)
    if not found:
        return []
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    said = f"{flag} {checkpoint} would run more than a checkpoint of NeMo's does: {'; '.join(found[:8])}{more}"
    if trusted:
        terminal.warn(f"{said}; loaded all the same, because of --trust_checkpoint")
        return []
    return [f"{said}. Whoever made it could run anything here: only if you trust them, add --trust_checkpoint"]


def problems(checkpoint):
    """What loading a checkpoint would run that is on no list, a sentence each: the file, and the name or the reason.

    The files are read, and nothing of them is imported, built or called.
    """
    root, found = Path(checkpoint).resolve(), {}
    files = _files(root, found)
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if file.name == "io.json":
                _context(file, root, name, found)
            elif file.name == "tokenizer_config.json" and _code(file):
                found[f"{name} has the tokenizer run code of its own (auto_map)"] = None
            elif file.suffix in (".yaml", ".yml"):
                _yaml(file, name, found)
            elif file.suffix != ".distcp":
                _pickle(file, root, name, found)
        except pickles.Unreadable as error:
            found[f"{name} {error}"] = None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            found[f"{name} is not as NeMo writes it ({error!r})"] = None
    return list(found)


def _files(root, found):
    """The files below `root`, without following links; those that lead out of it, and what is no file, are `found`."""
    files = []
    for folder, folders, names in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *sorted(names))):
            name = path.relative_to(root).as_posix()
            if path.is_symlink():
                if root not in path.resolve().parents:
                    found[f"{name} is a link that leads out of the checkpoint, where nothing was checked"] = None
            elif stat.S_ISREG(path.stat().st_mode):
                files.append(path)
            elif not path.is_dir():
                found[f"{name} is neither a file nor a folder"] = None
    return files


def _context(file, root, name, found):
    """io.json: its names, its tokenizer's code, and the pickles that it refers to."""
    content = json.loads(file.read_bytes())
    everything = list(_within(content))
    for value in everything:
        if "module" in value or value.get("type") == "pyref":
            pair = str(value.get("module")), str(value.get("name"))
            if pair not in CONFIGS:
                found[f"{name} names {_shown(pair)}"] = None
    for value in everything:
        if "items" not in value:
            continue
        values, kind = [_plain(item[1], content) for item in value["items"]], value["type"]["module"]
        if kind == "builtins" or value["type"]["name"] == METADATA:
            continue
        if len(values) == 1 and not kind.startswith(("fiddle.", "nemo_run.")):
            # NeMo unpickles what is named by the only value of an object of any other class.
            pickled = (file.parent / values[0]).resolve() if isinstance(values[0], str) else None
            if pickled is None or root not in pickled.parents or not pickled.is_file():
                found[f"{name} has a pickle read that is not in the checkpoint: {values[0]}"] = None
            else:
                _scan(pickled.read_bytes(), pickled.relative_to(root).as_posix(), found)
            continue
        # The labels of items are for people; Fiddle takes the arguments' names from the object's metadata.
        metadata = _plain(value["metadata"], content)
        names = _plain(metadata["items"][1][1], content)
        if metadata["type"]["name"] != METADATA or not isinstance(names, list) or len(names) != len(values):
            raise ValueError("an object without the names of its arguments")
        arguments = dict(zip(names, values))
        if arguments.get("trust_remote_code"):
            folder = arguments.get("pretrained_model_name")
            if not isinstance(folder, str) or not _harmless(file.parent / folder, root):
                found[f"{name} lets a tokenizer run code of its own: {folder}"] = None
        reader = arguments.get("auto_cls")
        if reader and not str(isinstance(reader, dict) and reader.get("module")).startswith("transformers.generation."):
            found[f"{name} reads files as {reader}"] = None


def _within(value):
    """Every dict in a JSON value, wherever it stands: NeMo looks at names in more places than Fiddle."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _within(inner)


def _plain(value, content):
    """What a value of io.json stands for: a leaf's value, a tuple as a list; another object as it is written."""
    for _ in range(100):
        if isinstance(value, dict) and value.get("type") == "ref":
            value = content["objects"][value["key"]]
        elif isinstance(value, dict) and value.get("type") == "leaf":
            value = value["value"]
        elif isinstance(value, dict) and isinstance(value.get("type"), dict) and value["type"].get("name") == "tuple":
            return [_plain(item[1], content) for item in value["items"]]
        else:
            return value
    raise pickles.Unreadable("refers to itself")


def _code(file):
    """Whether a tokenizer's or model's JSON file asks to run code of its own."""
    return file.is_file() and bool(json.loads(file.read_bytes()).get("auto_map"))


def _harmless(folder, root):
    """Whether a tokenizer's folder lies in the checkpoint and has no code of its own, whatever it is allowed."""
    inside = folder.is_dir() and root in folder.resolve().parents
    return inside and not any(_code(folder / name) for name in ("config.json", "tokenizer_config.json"))


def _yaml(file, name, found):
    """Tags by which YAML builds Python's objects; those that NeMo writes are none."""
    tag = re.search(r"^%TAG.*|!<[^>]*>|![\w!]*python[\w/:.]*|tag:yaml[^\s]*python.*", file.read_text("utf-8"), re.M)
    if tag:
        found[f"{name} has the YAML tag {_shown([tag[0]])}"] = None


def _pickle(file, root, name, found):
    """A file that is a pickle, or several; and the objects that .metadata says are in other files."""
    with open(file, "rb") as opened:
        head = opened.read(2)
        known = file.name.endswith(SUFFIXES)
        if not known and head[:1] != b"\x80" and head != b"PK":
            return
        if os.fstat(opened.fileno()).st_size > LARGEST:
            raise pickles.Unreadable(f"is a pickle of more than {terminal.gigabytes(LARGEST)}")
        value = _scan(head + opened.read(), name, found)
    if file.name.endswith(".metadata") and isinstance(value, pickles.Made):
        _objects(file, root, name, value, found)


def _objects(file, root, name, metadata, found):
    """What .metadata says is in other files and no tensor."""
    entries, stored = metadata.fields("state_dict_metadata", "storage_data")
    if not isinstance(entries, pickles.Pairs) or not isinstance(stored, pickles.Pairs):
        raise pickles.Unreadable("is not as torch writes it")
    kinds = {key: entry.of for key, entry in entries}
    tensor = ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata")
    for index, info in stored:
        key, offset = index.fields("fqn", "offset")
        if offset is None or kinds.get(key) != tensor:
            place = info.fields("relative_path", "offset", "length", "transform_descriptors")
            _object(file.parent, root, f"{name}'s {key}", key, *place, found)


def _object(folder, root, name, key, relative, offset, length, transforms, found):
    """An object that lies in a *.distcp file among the tensors."""
    path = (folder / relative).resolve()
    if root not in path.parents or transforms or not path.is_file() or not 0 <= length <= LARGEST:
        found[f"{name} is read from where nothing can be checked: {relative}"] = None
        return
    with open(path, "rb") as opened:
        opened.seek(offset)
        _scan(opened.read(length), name, found, everything="_extra_state" in key)


def _scan(data, name, found, everything=False):
    """Follow a pickle; its value. With `everything` all bytes in it are pickles too: Transformer Engine's states."""
    scan, collecting = pickles.Scan(everything), gc.isenabled()
    gc.disable()  # millions of small objects, none of them garbage: half the time
    try:
        return scan.file(data)
    except pickles.Unreadable as error:
        found[f"{name} {error}"] = None
    finally:
        if collecting:
            gc.enable()
        for pair in scan.names:
            if pair not in PICKLED:
                found[f"{name} names {_shown(pair)}"] = None
        for sentence in scan.problems:
            found[f"{name} {sentence}"] = None


def _shown(names):
    """A name from a file, as it can be printed."""
    text = ".".join(names)
    return text[:120] if text.isprintable() else repr(text[:120])


def advisories():
    """The known advisories that the installed NeMo and Megatron-Core lack the fixes of, in a sentence; or None."""
    rows = []
    for package, running in compat.versions(dict.fromkeys(package for package, *_ in ADVISORIES)).items():
        missed = {}
        for other, fixed, _, numbers in ADVISORIES:
            if other == package and _release(running) < _release(fixed):
                missed.setdefault(fixed, []).extend(numbers.split())
        named = [f"{', '.join(numbers)} (fixed in {fixed})" for fixed, numbers in list(missed.items())[::-1]]
        rest = sum(len(numbers) for numbers in list(missed.values())[:-LASTS])
        if named:
            more = [f"{rest} older ones"] if rest else []
            rows.append(f"{package} {running} lacks the fixes of {'; '.join(named[:LASTS] + more)}")
    return "; ".join(rows) or None


def _release(version):
    """'2.7.3rc1' -> (2, 7, 3): what can be compared."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))
