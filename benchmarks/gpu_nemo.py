"""One measured run of NeMo for gpu.py: NeMo's stock recipe, or ours, with named changes."""

import importlib.util
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import fiddle as fdl
import gpu_measure
import gpu_trials
import nemo_run as run
import torch
from lightning.pytorch.callbacks import Callback
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.data.mock import MockDataModule
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from nemo.collections.llm.gpt.model.base import gpt_data_step
from nemo.lightning import megatron_init
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_tutorial import compat, performance, recipes

ROOT = Path(__file__).resolve().parents[1]
MODELS = {  # name -> (NeMo's config, NeMo's recipe, changed sizes)
    "1b": ("Llama32Config1B", "llama32_1b", {}),
    "1b_4": ("Llama32Config1B", "llama32_1b", {"num_layers": 4}),
    "3b": ("Llama32Config3B", "llama32_3b", {}),
    "8b": ("Llama31Config8B", "llama31_8b", {}),
    "tiny": (
        "Llama32Config1B",
        "llama32_1b",
        {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2},
    ),
}
VOCABULARY = {"tiny": 2048, "1b_4": 16384}
END = 1  # of gpu.py's tokenizer


class Tokens(torch.utils.data.Dataset):
    """Samples of random tokens, as NeMo's mock dataset gives them."""

    collate_fn = staticmethod(torch.utils.data.default_collate)

    def __init__(self, vocabulary, seed, samples, seq_length, with_mask):
        self.draw = vocabulary, seed
        self.samples, self.seq_length = samples, seq_length
        self.constant = {"loss_mask": torch.ones(seq_length), "position_ids": torch.arange(seq_length)}
        if with_mask:  # Megatron's own attention, without Transformer Engine, wants one
            self.constant["attention_mask"] = torch.ones(1, seq_length, seq_length).tril() < 0.5

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        drawn = torch.from_numpy(gpu_measure.tokens(*self.draw, index, self.seq_length + 1))
        return {"tokens": drawn[:-1], "labels": drawn[1:], **self.constant}


class RandomTokens(MockDataModule):
    """NeMo's mock data module with our tokens."""

    def __init__(self, vocabulary, seed, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary, self.seed = vocabulary, seed

    def setup(self, stage=""):
        self._train_ds = self._validation_ds = self._test_ds = Tokens(
            self.vocabulary, self.seed, self.num_train_samples, self.seq_length, self.create_attention_mask
        )


COUNTED = []  # (tokens, tokens that are no padding) of each micro batch


def counting_data_step(batches):
    """NeMo's own, counting what is padding: the end token, which no text of ours holds."""
    batch = gpt_data_step(batches)
    COUNTED.append((batch["tokens"].numel(), (batch["tokens"] != END).sum()))
    return batch


def write_rows(folder, seed):
    """training.jsonl and validation.jsonl: rows of random words with the lengths of gpu_measure.lengths."""
    folder.mkdir()
    draw = random.Random(seed)
    for name, count in (("training", 4096), ("validation", 64)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for prompt, answer in gpu_measure.lengths(seed, count):
                row = {"input": prompt, "output": answer}
                row = {key: " ".join(f"w{draw.randrange(1000)}" for _ in range(size)) for key, size in row.items()}
                file.write(json.dumps(row) + "\n")


def instructions(packs):
    """The rows of write_rows, in packs of so many times the sequence length.

    0: padded as NeMo does, to the longest of a micro batch.
    """

    def change(recipe):
        folder = Path("rows")
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other ranks wait until NeMo has read them here
            write_rows(folder, recipe.data.seed)
        size = recipe.data.seq_length
        if packs:
            options = {"micro_batch_size": 1, "global_batch_size": recipe.data.global_batch_size // packs}
            options["packed_sequence_specs"] = run.Config(
                PackedSequenceSpecs, packed_sequence_size=size * packs, tokenizer_model_name="words"
            )
        else:  # about as many tokens a step
            options = {"micro_batch_size": 8, "global_batch_size": 16 * recipe.data.global_batch_size}
        template = {"prompt_template": "{input} {output}", "add_bos": False, "add_eos": True}
        recipe.data = run.Config(
            llm.FineTuningDataModule,
            dataset_root=str(folder.absolute()),
            seq_length=size,
            tokenizer=recipe.data.tokenizer,
            num_workers=2,
            dataset_kwargs=template,
            **options,
        )
        recipe.model.config.data_step_fn = counting_data_step

    return change


class Recorder(Callback):
    """Hands each step to gpu_measure.Steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.begin()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.end(outputs["loss"] if isinstance(outputs, dict) else outputs)


# --- named changes: contestant "ours+gc" or "stock+mbs4" is a recipe with these applied in turn ---


class InputGradients(Callback):
    """With all weights frozen, what is recomputed gets gradients only if its input asks for one."""

    def on_fit_start(self, trainer, pl_module):
        for name, module in pl_module.named_modules():
            if name.endswith("word_embeddings"):
                module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def recompute(**values):
    def change(recipe):
        config(**values)(recipe)
        if getattr(recipe, "peft", None):
            recipe.trainer.callbacks.append(run.Config(InputGradients))

    return change


def micro_batch(size):
    def change(recipe):
        recipe.data.micro_batch_size = size

    return change


def config(**values):
    def change(recipe):
        for name, value in values.items():
            setattr(recipe.model.config, name, value)

    return change


def environment(**values):
    def change(recipe):
        os.environ.update(values)

    return change


def ddp(**values):
    def change(recipe):
        for name, value in values.items():
            setattr(recipes.ddp_config(recipe), name, value)

    return change


FP8 = {"delayed": "delayed_scaling", "current": "current_scaling", "block": "subchannel_scaling"}


def fp8(recipe_name, **values):
    """NeMo's plugin of that recipe for stock, which ours has by its own flags (see flags); then what is asked of it."""

    def change(recipe):
        if not getattr(recipe.trainer.plugins, "fp8", None):
            recipe.trainer.plugins = compat.fp8_plugin(recipe_name)
        for name, value in values.items():
            setattr(recipe.trainer.plugins, name, value)

    return change


def bf16_gradients(recipe):
    ddp(grad_reduce_in_fp32=False)(recipe)
    recipe.trainer.plugins.grad_reduce_in_fp32 = False


def optimizer(moments=torch.float32):
    """Transformer Engine's fused Adam with its states in other precisions."""

    def change(recipe):
        adam = recipe.optim.config
        adam.use_distributed_optimizer = True
        adam.use_precision_aware_optimizer = True
        adam.exp_avg_dtype = adam.exp_avg_sq_dtype = moments

    return change


def collect(steps):
    def change(recipe):
        recipe.trainer.callbacks.append(run.Config(GarbageCollectionCallback, steps, steps))

    return change


def without(*names):
    def change(recipe):
        kept = [c for c in recipe.trainer.callbacks if fdl.get_callable(c).__name__ not in names]
        recipe.trainer.callbacks = kept

    return change


def callback(cls):
    def change(recipe):
        recipe.trainer.callbacks.append(run.Config(cls))

    return change


def cuda_graphs(recipe):
    config(cuda_graph_impl="local", use_te_rng_tracker=True)(recipe)
    recipe.trainer.strategy.use_te_rng_tracker = True


def without_ours(recipe):
    """NeMo's own callbacks alone."""
    modules = [fdl.get_callable(callback).__module__ for callback in recipe.trainer.callbacks]
    recipe.trainer.callbacks = [
        callback
        for callback, module in zip(recipe.trainer.callbacks, modules)
        if not module.startswith("nemo_tutorial.")
    ]


def virtual_stages(recipe):
    """Two virtual pipeline stages a GPU, with what recipes.set_parallelism sets for them."""
    recipe.trainer.strategy.virtual_pipeline_model_parallel_size = 2
    recipe.model.config.overlap_p2p_comm, recipe.model.config.batch_p2p_comm = True, False


def tensor_parallel_overlap(recipe):
    """Transformer Engine's products that send and receive as they go; needs sequence parallelism."""
    os.environ["UB_SKIPMC"] = "1"  # without NVLink multicast
    overlap = run.Config(MegatronCommOverlapCallback, tp_comm_overlap=True, tp_comm_bootstrap_backend="nccl")
    recipe.trainer.callbacks.append(overlap)


def log_every(steps):
    def change(recipe):
        recipe.trainer.log_every_n_steps = steps

    return change


CHANGES = {
    "mbs1": micro_batch(1),
    "mbs2": micro_batch(2),
    "mbs4": micro_batch(4),
    "mbs8": micro_batch(8),
    "packed": instructions(1),
    "packed_2": instructions(2),
    "packed_4": instructions(4),
    "packed_8": instructions(8),
    "padded": instructions(0),
    "nonan": ddp(check_for_nan_in_grad=False),
    "overlap": ddp(overlap_grad_reduce=True, overlap_param_gather=True, average_in_collective=True),
    "nooverlap": ddp(overlap_grad_reduce=False, overlap_param_gather=False, average_in_collective=False),
    "ce_te": config(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te"),
    "ce_native": config(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native"),
    "grads_bf16": bf16_gradients,
    "adam_aware": optimizer(),
    "adam_bf16": optimizer(torch.bfloat16),
    # Gradients and moments in bf16 or FP8, of the weights the 16 bits that bf16 lacks: by the script's own flags.
    "lean": lambda recipe: None,
    "lean_fp8": lambda recipe: None,
    "no_distopt": lambda recipe: setattr(recipe.optim.config, "use_distributed_optimizer", False),
    "gc": collect(100),
    "log10": log_every(10),
    "vpp": virtual_stages,
    "tp_overlap": tensor_parallel_overlap,
    "no_callbacks": without_ours,
    "no_progress": without("Progress"),
    "no_guard": without("LossGuard"),
    "quiet": without("Progress", "TimingCallback"),
    "idle": callback(gpu_trials.Idle),
    "segments": lambda recipe: torch.cuda.memory._set_allocator_settings("expandable_segments:True"),
    "connections": environment(CUDA_DEVICE_MAX_CONNECTIONS="8"),
    "fuser": config(use_transformer_engine_op_fuser=True),
    "lora_fuser": callback(gpu_trials.FuseLoRA),
    "graphs": cuda_graphs,
    "recompute_selective": config(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "recompute_norm": config(recompute_granularity="selective", recompute_modules=["layernorm"]),
    "recompute_mlp": config(recompute_granularity="selective", recompute_modules=["mlp"]),
    "recompute_full": recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "recompute_half": recompute(recompute_granularity="full", recompute_method="block", recompute_num_layers=16),
    **{f"fp8_{name}": fp8(recipe_name) for name, recipe_name in FP8.items()},
    "fp8_current_all": fp8("current_scaling", first_last_layers_bf16=False),
    "fp8_current_nogather": fp8("current_scaling", fp8_param_gather=False),
    "fp8_delayed_nogather": fp8("delayed_scaling", fp8_param_gather=False),
}


def flags(cell):
    """The tutorial's flags of this run, as pretrain.py and finetune.py have them after their checks."""
    pretrain = cell["kind"] == "pretrain"
    path = ROOT / ("pretraining/pretrain.py" if pretrain else "finetuning/finetune.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tp, pp, cp, _ = cell["layout"]
    nodes, gpus = (math.prod(cell["layout"]), 1) if cell.get("share_gpu") else (1, math.prod(cell["layout"]))
    words = f"--dataset_path none --experiment benchmark --num_nodes {nodes} --num_gpus {gpus}"
    words += f" --accelerator {cell['accelerator']} -T {tp} -P {pp} -C {cp}"
    words += f" --seq_length {cell['seq']} --global_batch_size {cell['gbs']} --max_steps {cell['total']}"
    words += f" --lr {cell['lr']} --min_lr {cell['lr'] / 10} --warmup_steps {max(1, cell['total'] // 10)}"
    words += f" --val_check_interval {cell['total']} --limit_val_batches 1"
    words += " --peft lora" if cell["kind"] == "lora" else ""
    if lean := re.search(r"\+lean(_fp8)?", cell["contestant"]):
        words += " --use_precision_aware_optimizer --main_grads_dtype bf16"
        words += " --exp_avg_dtype {0} --exp_avg_sq_dtype {0}".format("fp8" if lean[1] else "bf16")
    if scaling := re.search(r"\+fp8_([a-z]+)", cell["contestant"]):
        words += f" --fp8 --fp8_recipe {FP8[scaling[1]]}"
    args = script.parse_args(words.split())
    args.sequence_parallel, args.log_interval = tp > 1, 10  # the interval of a run of 1,000 steps and more
    if not pretrain:
        args.packing = "packed" in cell["contestant"]
    return args


def arithmetic(shape):
    """What nemo_tutorial.throughput asks of a model, for one of NeMo's configs."""
    heads = shape.kv_channels or shape.hidden_size // shape.num_attention_heads
    a_layer = shape.hidden_size * heads * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
    a_layer += 3 * shape.hidden_size * shape.ffn_hidden_size
    tied = shape.share_embeddings_and_output_weights
    embeddings = shape.vocab_size * shape.hidden_size * (1 if tied else 2)
    return SimpleNamespace(
        tie_word_embeddings=tied,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        active_parameters=shape.num_layers * a_layer + embeddings,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        head_dim=heads,
        sliding_window=None,
    )


def build(cell, steps, tokenizer):
    """The recipe of `cell["contestant"]`: "stock" or "ours", "+name" of a change, "-name" of one of our settings."""
    cls, recipe_name, sizes = MODELS[cell["model"]]
    vocabulary = VOCABULARY.get(cell["model"], 128256)
    base, *changes = cell["contestant"].replace("-", "+-").split("+")
    args = flags(cell)
    kind = "pretrain_recipe" if cell["kind"] == "pretrain" else "finetune_recipe"
    recipe = recipes.start(recipe_name, kind, args)
    data = {
        "vocabulary": vocabulary,
        "seed": cell["data_seed"],
        "seq_length": cell["seq"],
        "micro_batch_size": 1,
        "global_batch_size": cell["gbs"],
        "num_train_samples": cell["gbs"] * (cell["total"] + 2),
        "num_workers": 2,
        "tokenizer": run.Config(AutoTokenizer, tokenizer, use_fast=True),
    }
    if base == "ours":
        shape = getattr(llm, cls)(vocab_size=vocabulary, **sizes)
        recipes.set_model(recipe, args, shape, tokenizer)
    else:
        for name, value in {"seq_length": cell["seq"], "vocab_size": vocabulary, **sizes}.items():
            setattr(recipe.model.config, name, value)
    recipe.data = run.Config(RandomTokens, **data)
    if kind == "finetune_recipe":
        recipe.tokenizer = "data"
    strategy, trainer = recipe.trainer.strategy, recipe.trainer
    if base == "ours":
        recipes.set_parallelism(recipe, args)
        recipes.set_logging(recipe, args, arithmetic(shape))
        recipes.set_training(recipe, args)
        recipes.set_precision(recipe, args)
        recipes.set_memory(recipe, args, None)
        dropped = {name[1:] for name in changes if name.startswith("-")}
        chosen = [setting for setting in performance.settings(args) if setting.name.replace(" ", "_") not in dropped]
        recipes.set_performance(recipe, args, chosen)
    else:
        for name, size in zip(("tensor_model", "pipeline_model", "context"), cell["layout"]):
            setattr(strategy, f"{name}_parallel_size", size)
        strategy.sequence_parallel, strategy.virtual_pipeline_model_parallel_size = args.sequence_parallel, None
        strategy.pipeline_dtype = torch.bfloat16 if args.pipeline_model_parallel_size > 1 else None
        trainer.max_steps, trainer.val_check_interval = cell["total"], cell["total"]
        trainer.limit_test_batches = 0
        scheduler = recipe.optim.lr_scheduler
        recipe.optim.config.lr, scheduler.min_lr, scheduler.warmup_steps = args.lr, args.min_lr, args.warmup_steps
    # What is not measured: validation, checkpoints.
    trainer.limit_val_batches, trainer.num_sanity_val_steps, trainer.enable_checkpointing = 0, 0, False
    recipe.log.log_dir, recipe.log.ckpt, recipe.log.use_datetime_version = "log", None, False
    recipe.resume = None
    if cell["kind"] == "lora":
        recipe.peft.dim, recipe.peft.alpha = 16, 32
    for name in changes:
        if not name.startswith("-"):
            CHANGES[name](recipe)
    trainer.callbacks = [*trainer.callbacks, Recorder(steps)]
    return recipe


def settings(recipe):
    """What of the recipe decides speed and memory, as plain values."""
    model, adam = recipe.model.config, recipe.optim.config
    ddp, plugin = getattr(recipe.trainer.strategy, "ddp", None), recipe.trainer.plugins
    wanted = [
        (recipe.data, "micro_batch_size global_batch_size seq_length"),
        (model, "cross_entropy_loss_fusion cross_entropy_fusion_impl gradient_accumulation_fusion"),
        (model, "recompute_granularity recompute_method recompute_num_layers recompute_modules"),
        (model, "use_transformer_engine_op_fuser enable_cuda_graph"),
        (ddp, "overlap_grad_reduce overlap_param_gather average_in_collective check_for_nan_in_grad"),
        (plugin, "grad_reduce_in_fp32 fp8 fp8_recipe fp8_param_gather first_last_layers_bf16"),
        (adam, "use_distributed_optimizer use_precision_aware_optimizer store_param_remainders"),
        (adam, "main_grads_dtype exp_avg_dtype exp_avg_sq_dtype"),
        (getattr(recipe, "peft", None), "dim alpha"),
    ]
    found = {}
    for node, names in wanted:
        for name in names.split():
            value = getattr(node, name, None)
            if value is not None:
                found[name] = value if isinstance(value, (bool, int, float, str, list)) else str(value)
    return found


def measure(cell, tokenizer):
    """Run one cell in this process, in the current folder; return its row."""
    steps = gpu_measure.Steps(cell["steps"], cell["warmup"], cell["profile"])
    cell = cell | {"total": steps.total}
    recipe = build(cell, steps, tokenizer)
    # NeMo seeds with 1234 whatever is asked: the weights' own seed is the cell's.
    set_seed = megatron_init._set_random_seed
    megatron_init._set_random_seed = lambda seed: set_seed(cell["seed"])
    found = {}

    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):  # before the first step there is no adapter yet
            if found:
                return
            shape = pl_module.config
            weights = list(trainer.strategy.megatron_parallel.parameters())  # of this rank, all parts of its stage
            count = sum(weight.numel() for weight in weights)
            trained = sum(weight.numel() for weight in weights if weight.requires_grad)
            found["parameters"], found["trained"] = count, trained
            products = arithmetic(shape).active_parameters
            if not shape.share_embeddings_and_output_weights:
                products -= shape.vocab_size * shape.hidden_size
            found["flops"] = gpu_measure.flops_a_token(
                products, products * trained / count, shape.num_layers, shape.hidden_size, cell["seq"]
            )
            found["micro_batch_size"] = recipe.data.micro_batch_size
            found["settings"] = settings(recipe)

    recipe.trainer.callbacks = [*recipe.trainer.callbacks, Sizes()]
    fdl.build(recipe)()
    tokens = cell["gbs"] * cell["seq"] // math.prod(cell["layout"])  # a GPU
    if COUNTED:  # only what is no padding counts
        every, real = ([int(pair[i]) for pair in COUNTED] for i in (0, 1))
        micro_batches = len(real) // steps.total
        tokens = [sum(real[first : first + micro_batches]) for first in range(0, len(real), micro_batches)]
        found["padding"] = round(1 - sum(real) / sum(every), 4)
    return found | steps.result(tokens, found["flops"])
