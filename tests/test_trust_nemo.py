"""What the real NeMo writes passes, whatever its callbacks, optimizers and adapters; what else torch loads does not."""

import ast
import importlib.util
import io
import pickle
import shutil
from pathlib import Path

import pytest

from nemo_tutorial import models, trust

pytestmark = pytest.mark.nemo
# Packages of which a class may be reached by a name that stands for all classes of a module: of the other ones it is
# settings, paths and tables; none runs, reads or writes anything when it is made.
HARMLESS = set(
    "typing typing_extensions collections dataclasses enum abc contextlib pathlib datetime "
    "torch lightning lightning_utilities nemo megatron fiddle transformers peft thunder rich prettytable".split()
)


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


def test_contexts_of_our_settings_of_speed(stages, context):
    """LoRA with all that `--performance auto` may add, as on a GPU."""
    from nemo.collections import llm

    from nemo_tutorial import performance, recipes

    recipe = llm.llama32_1b.finetune_recipe(dir="results", name="x", num_gpus_per_node=1, peft_scheme="lora")
    recipes.set_performance(recipe, None, performance.SETTINGS)
    parts = built(recipe, stages)
    parts["trainer"].callbacks += [parts["peft"]]
    found = context(parts["trainer"], parts["model"], parts["data"])
    added = [setting.callback.rpartition(".")[2] for setting in performance.SETTINGS if setting.callback]
    text = "".join(path.read_text(errors="replace") for path in (found / "context").iterdir() if path.is_file())
    assert added and all(name in text for name in added)
    assert trust.problems(found) == []


@pytest.mark.full
def test_contexts_with_stock_callbacks(stages, context):
    """NeMo's and Lightning's callbacks, optimizers and schedules, as users set them."""
    import nemo.lightning as nl
    import torch
    from lightning.pytorch import callbacks as lightning
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm
    from nemo.lightning.pytorch import callbacks as nemo
    from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
    from nemo.lightning.pytorch.optim import lr_scheduler
    from nemo.utils.exp_manager import DeltaTimingCallback, TimingCallback

    from nemo_tutorial import callbacks as ours
    from nemo_tutorial import progress

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
        progress.Progress("metrics.jsonl", 1, None, False),
        ours.ExitInterval(5),
    ]
    model = llm.LlamaModel(
        llm.LlamaConfig(num_layers=1, hidden_size=8, num_attention_heads=1, apply_rope_fusion=False),
        tokenizer=nl.io.load_context(stages / "nemo_ckpt/tiny/context", subpath="model.tokenizer"),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-3), lr_scheduler.WarmupHoldPolicyScheduler()),
    )
    refused = set()
    for callback in own:
        trainer = nl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=nl.MegatronStrategy(ddp=DistributedDataParallelConfig(), pipeline_dtype=torch.bfloat16),
            plugins=nl.MegatronMixedPrecision("bf16-mixed"),
            callbacks=[callback],
        )
        found = trust.problems(context(trainer, model))
        if found:
            refused.add(type(callback).__name__)
            print(type(callback).__name__, found)
    # Saved with a function as code, with a file system made by a call, with a number in a pickle's place.
    assert refused <= {"ProgressPrinter", "ModelCheckpoint", "DdpParityChecker"}


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
    """In the installed NeMo, what stands for all classes of a module is what it imports, too: of these packages."""
    strange, seen = set(), 0
    for names in (trust.CONFIGS, trust.PICKLED):
        for pattern, *words in names.lines:
            for module, file in modules(pattern) if "*" in pattern or "^" in words else ():
                seen += 1
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.ImportFrom) and not node.level:
                        found = [alias.name for alias in node.names if (module, alias.asname or alias.name) in names]
                        strange |= {(node.module, name) for name in found}
    assert seen > 100
    assert {(home, name) for home, name in strange if home.split(".")[0] not in HARMLESS} == set()


def modules(pattern):
    """The installed modules that a line of a list means: (name, file), without importing them."""
    top, *rest = pattern.removesuffix(".*").split(".")
    spec = importlib.util.find_spec(top)
    for folder in spec.submodule_search_locations if spec else ():
        place = Path(folder, *rest)
        files = sorted(place.glob("*.py")) if pattern.endswith(".*") else [place.with_suffix(".py")]
        for file in files:
            if file.is_file():
                yield ".".join((top, *file.relative_to(folder).with_suffix("").parts)), file


def test_rate(tmp_path):
    """The metadata of a large checkpoint takes seconds, and no module of torch's."""
    import time

    import torch
    from torch.distributed.checkpoint import filesystem, metadata

    entries, stored = {}, {}
    for name in range(40):
        chunks = []
        for number in range(500):
            offsets = torch.Size([number, name * 1024])
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
