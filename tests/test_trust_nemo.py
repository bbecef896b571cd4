"""What the real NeMo writes passes, whatever its callbacks, optimizers and adapters; what else torch loads does not."""

import importlib
import inspect
import io
import pickle
import pkgutil
import shutil
from pathlib import Path

import pytest

from nemo_tutorial import models, trust

pytestmark = pytest.mark.nemo
# Of other packages than NeMo's and Megatron's, what may be reached by a name that stands for all classes of a module.
HARMLESS = {"typing", "collections", "dataclasses", "enum", "abc", "torch", "lightning", "nemo", "megatron", "fiddle"}


@pytest.fixture(scope="module")
def context(stages, tmp_path_factory):
    """Dump what NeMo saves beside weights: context(trainer, model, datamodule) gives the folder of the checkpoint."""
    from nemo.lightning.io.pl import TrainerContext

    def dump(trainer, model, data=None):
        folder = tmp_path_factory.mktemp("stock")
        (folder / "context").mkdir()
        extra = {"datamodule": data.__io__} if hasattr(data, "__io__") else {}
        TrainerContext(trainer=trainer, model=model, extra=extra).io_dump(folder / "context", yaml_attrs=["model"])
        return folder

    return dump


def built(recipe, stages):
    """Trainer, model, data and the rest of a recipe, as NeMo's train() and finetune() would have them."""
    import fiddle as fdl
    import nemo_run as run
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    tokenizer = run.Config(AutoTokenizer, str(stages / "hf_model/tiny"))
    recipe.trainer.accelerator, recipe.trainer.devices, recipe.trainer.num_nodes = "cpu", 1, 1
    recipe.model.tokenizer, recipe.data.tokenizer = tokenizer, tokenizer
    for name in ("apply_rope_fusion", "moe_permute_fusion"):  # these need Transformer Engine
        if hasattr(recipe.model.config, name):
            setattr(recipe.model.config, name, False)
    return fdl.build(recipe).keywords


@pytest.mark.parametrize("family", models.FAMILIES, ids=lambda family: family.architecture)
def test_contexts_of_stock_recipes(stages, context, family):
    """Pretraining, and fine-tuning all weights, LoRA and DoRA, by the recipes as they are."""
    from nemo.collections import llm

    factory = getattr(llm, next(iter(family.recipes.values())))
    where = {"dir": "results", "name": "x", "num_nodes": 1, "num_gpus_per_node": 1}
    kinds = [{"peft_scheme": scheme} for scheme in ("none", "lora", "dora")]
    recipes = [factory.finetune_recipe(**where, **kind) for kind in kinds] + [factory.pretrain_recipe(**where)]
    for recipe in recipes:
        parts = built(recipe, stages)
        trainer, model = parts["trainer"], parts["model"]
        parts["optim"].connect(model)
        model.optim = parts["optim"]
        trainer.callbacks += [parts["peft"]] if parts.get("peft") else []
        assert trust.problems(context(trainer, model, parts["data"])) == []


def test_contexts_with_stock_callbacks(stages, context):
    """NeMo's and Lightning's callbacks, loggers, optimizers and schedules, as users set them."""
    import nemo.lightning as nl
    import torch
    from lightning.pytorch import callbacks as lightning
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm
    from nemo.lightning.pytorch import callbacks as nemo
    from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
    from nemo.lightning.pytorch.optim import lr_scheduler
    from nemo.utils.exp_manager import DeltaTimingCallback, TimingCallback

    from nemo_tutorial import callbacks as ours

    own = [
        GarbageCollectionCallback(10, 10),
        MegatronCommOverlapCallback(tp_comm_overlap=False),
        nemo.NsysCallback(1, 2),
        nemo.PreemptionCallback(),
        nemo.ProgressPrinter(),
        nemo.MegatronProgressBar(),
        nemo.ModelCheckpoint(save_top_k=2, monitor="val_loss"),
        nemo.DdpParityChecker(interval=5),
        nemo.SpeedMonitor(window_size=5),
        TimingCallback(),
        DeltaTimingCallback(),
        lightning.LearningRateMonitor(),
        lightning.EarlyStopping("val_loss"),
        lightning.Timer(duration="00:04:00:00"),
        ours.Metrics("metrics.jsonl"),
        ours.ExitInterval(5),
    ]
    strategy = nl.MegatronStrategy(ddp=DistributedDataParallelConfig(), pipeline_dtype=torch.bfloat16)
    model = llm.LlamaModel(
        llm.LlamaConfig(num_layers=1, hidden_size=8, num_attention_heads=1, apply_rope_fusion=False),
        tokenizer=nl.io.load_context(stages / "nemo_ckpt/tiny/context", subpath="model.tokenizer"),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-3), lr_scheduler.WarmupHoldPolicyScheduler()),
    )
    for callback in own:
        trainer = nl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            plugins=nl.MegatronMixedPrecision("bf16-mixed"),
            callbacks=[callback],
            logger=[TensorBoardLogger("tb"), CSVLogger("csv")],
        )
        assert trust.problems(context(trainer, model)) == [], callback


def test_stock_import_passes(stages, tmp_path):
    """What `nemo llm import` writes, weights and context."""
    from nemo.collections import llm

    from nemo_tutorial import conversion  # noqa: F401  NeMo's importer without Transformer Engine

    llm.LlamaModel.importer(f"hf://{stages / 'hf_model/tiny'}")(output_path=tmp_path / "stock")
    assert trust.problems(tmp_path / "stock") == trust.problems(stages / "nemo_ckpt/tiny") == []


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


@pytest.mark.parametrize("kind", ["object", "tensor of bytes", "part of a tensor", "BytesIO"])
def test_objects_among_the_tensors(stages, tmp_path, kind):
    """Torch unpickles objects among the tensors, Transformer Engine the bytes in its own. Harmless ones pass."""
    import torch
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    canary = tmp_path / "canary"
    evil = pickle.dumps(Touch(canary))

    def as_bytes(content):
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def scaled(value):
        saved = io.BytesIO()
        torch.save({"scale": torch.ones(3), "margin": 0, "recipe": value}, saved)
        return saved

    harmless = {
        "object": {"step": 3, "state": torch.ones(2)},
        "tensor of bytes": as_bytes(pickle.dumps({"scale": torch.ones(3), "margin": 0})),
        "part of a tensor": torch.empty(0, dtype=torch.uint8),
        "BytesIO": scaled(None),
    }[kind]
    harmful = {
        "object": {"step": Touch(canary)},
        "tensor of bytes": as_bytes(evil),
        "part of a tensor": as_bytes(pickle.dumps({}) + evil)[len(pickle.dumps({})) :],
        "BytesIO": scaled(Touch(canary)),
    }[kind]
    for number, value in enumerate((harmless, harmful)):
        copy = Path(shutil.copytree(stages / "nemo_ckpt/tiny", tmp_path / f"copy{number}"))
        (copy / "manifest.json").unlink()
        saved = io.BytesIO()
        torch.save(value, saved)
        file = sorted((copy / "weights").glob("*.distcp"))[0]
        offset = file.stat().st_size
        with open(file, "ab") as opened:
            opened.write(saved.getvalue())
        metadata = dcp.FileSystemReader(copy / "weights").read_metadata()
        key = "rng_state" if kind == "object" else "module.decoder.layers.self_attention.linear_qkv._extra_state"
        key += "/shard_0_2"
        info = type(next(iter(metadata.storage_data.values())))(file.name, offset, len(saved.getvalue()))
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = info
        metadata.storage_meta = None
        (copy / "weights/.metadata").write_bytes(pickle.dumps(metadata))
        found = trust.problems(copy)
        if value is harmless:
            assert found == []
        else:
            assert found and all("/shard_0_2" in said for said in found), found
    assert not canary.exists()


def test_names_reach_only_what_is_meant():
    """In the NeMo that is installed, what stands for classes reaches none but NeMo's, Megatron's and torch's."""
    strange = []
    for module in modules_on(trust.CONFIGS) | modules_on(trust.PICKLED):
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            on_a_list = (module.__name__, name) in trust.CONFIGS or (module.__name__, name) in trust.PICKLED
            if on_a_list and inspect.isclass(value) and home.split(".")[0] not in HARMLESS:
                strange.append((module.__name__, name, home))
    assert sorted({(name, home) for _, name, home in strange}) == []


def modules_on(names):
    """The installed modules that a line with `*` in its module, or all classes of a module, means."""
    found = set()
    for line in names.lines:
        if line[0].endswith(".*") or "^" in line:
            package = line[0].removesuffix(".*")
            try:
                module = importlib.import_module(package)
            except ImportError:
                continue
            found.add(module)
            if line[0].endswith(".*"):
                for info in pkgutil.iter_modules(module.__path__, f"{package}."):
                    try:
                        found.add(importlib.import_module(info.name))
                    except Exception:  # needs a GPU or another package
                        continue
    return found


def test_rate(tmp_path):
    """The metadata of a large checkpoint takes seconds, and no module of torch's."""
    import time

    from torch.distributed.checkpoint import filesystem, metadata

    entries, stored = {}, {}
    for name in range(40):
        chunks = []
        for number in range(500):
            offsets = importlib.import_module("torch").Size([number, name * 1024])
            chunks.append(metadata.ChunkStorageMetadata(offsets, offsets))
            stored[metadata.MetadataIndex(f"w{name}", offsets, number)] = filesystem._StorageInfo(
                "__0_0.distcp", number, 9
            )
        properties = metadata.TensorProperties()
        entries[f"w{name}"] = metadata.TensorStorageMetadata(properties, offsets, chunks)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/.metadata").write_bytes(pickle.dumps(metadata.Metadata(entries, storage_data=stored)))
    began = time.process_time()
    assert trust.problems(tmp_path) == []
    rate = (tmp_path / "weights/.metadata").stat().st_size / (time.process_time() - began)
    assert rate > 1e6, rate
