"""What makes a run fast, as a table: which settings `--performance auto` makes in NeMo's recipe, when, and why.

Plain data and the standard library, so that a dry run can say it. `recipes.set_performance` writes it into the recipe;
`--performance off` leaves NeMo's own settings. benchmarks/README.md has what each is worth, and what did not help.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from nemo_tutorial import preflight


@dataclass(frozen=True)
class Setting:
    """One change to a recipe."""

    name: str
    why: str
    when: Callable  # of the flags: does it apply?
    values: dict = field(default_factory=dict)  # path in the recipe -> value; a path that it lacks is left out
    callback: str | None = None  # "module.Class" of nemo_tutorial, added to the trainer's
    gpu: bool = True  # False: made without a GPU too


def lora_alone(args):
    """Whether all of an adapter's two products are on each GPU, with nothing between them."""
    return args.peft == "lora" and args.tensor_model_parallel_size == 1 and not args.lora_dropout


def split_lora(args):
    """Whether an adapter's two products, with nothing between them, are where each GPU has a part of the sequence."""
    return args.peft == "lora" and not args.lora_dropout and args.sequence_parallel


SETTINGS = [
    Setting(
        "loss",
        "cross entropy of Transformer Engine: no copies of the logits in float32",
        lambda args: True,
        {"model.config.cross_entropy_loss_fusion": True, "model.config.cross_entropy_fusion_impl": "te"},
    ),
    Setting(
        "logits",
        "their gradient is written once, when the gradient of the loss is known, and not again to multiply by that",
        lambda args: True,
        callback="kernels.CrossEntropy",
    ),
    Setting(
        "answers",
        "in fine-tuning, logits of the tokens alone that have a loss: a prompt's and the padding's are of no use",
        lambda args: hasattr(args, "packing") and args.tensor_model_parallel_size * args.context_parallel_size == 1,
        callback="answers.LogitsOfAnswers",
        gpu=False,
    ),
    Setting(
        "attention",
        "FlashAttention 3 on a Hopper GPU, if it is installed: cuDNN's takes a sixth longer at heads of 64",
        lambda args: args.context_parallel_size == 1,
        callback="kernels.FlashAttention3",
    ),
    Setting(
        "activation",
        "SwiGLU of Transformer Engine: its gradient takes 0.6 of the time of what torch.compile makes of Megatron's",
        lambda args: True,
        callback="kernels.SwiGLU",
    ),
    Setting(
        "positions",
        "q, k and v of Llama are split and turned by their positions in one pass over memory",
        # Packs that are split between GPUs have their positions in another order.
        lambda args: args.context_parallel_size == 1 or getattr(args, "packing", False) is False,
        callback="kernels.FusedRoPE",
    ),
    Setting(
        "gradients",
        "weight gradients, of Llama, are added up inside their products: NeMo's own where there is Apex",
        # In bf16 they are to save memory, of which this takes a gradient of each shape.
        lambda args: not args.peft and args.main_grads_dtype != "bf16",
        callback="kernels.GradientsInProduct",
    ),
    Setting(
        "casts",
        "the optimizer's weights are cast to FP8 without transposed copies, which nothing reads: 6 times as fast",
        lambda args: args.fp8 and not args.peft,
        callback="kernels.RowwiseCasts",
    ),
    Setting(
        "one replica",
        "nothing to overlap or to average with one data-parallel replica; NaN is looked for once a step, not a bucket",
        # Not of gradients in bf16: see recipes.set_memory.
        lambda args: preflight.data_parallel_size(args) == 1 and args.main_grads_dtype != "bf16",
        {
            "trainer.strategy.ddp.overlap_grad_reduce": False,
            "trainer.strategy.ddp.overlap_param_gather": False,
            "trainer.strategy.ddp.average_in_collective": False,
        },
    ),
    Setting(
        "garbage",
        "what is there after the first step is no garbage: Python's collector leaves it alone, half a second each time",
        lambda args: True,
        callback="hooks.FreezeHeap",
        gpu=False,
    ),
    Setting(
        "pause",
        "what Megatron and Lightning do for nothing between two steps, while the GPU waits, is left out",
        lambda args: True,
        callback="hooks.ShortPause",
        gpu=False,
    ),
    Setting(
        "ahead",
        "no step waits for a number, as clipping, NaN checks and logs do: those are looked at a step later",
        lambda args: True,
        callback="ahead.RunAhead",
        gpu=False,
    ),
    Setting(
        "adapter",
        "what LoRA adds, to outputs and to gradients, is added inside its matrix products, not in passes of its own",
        lora_alone,
        callback="lora.AddedInProduct",
    ),
    Setting(
        "adapter split",
        "where the sequence is split, so is what LoRA reads and writes; NeMo gathers it whole, and keeps its inputs",
        split_lora,
        callback="lora.SplitBySequence",
        gpu=False,
    ),
    Setting(
        "adapter kernels",
        "what LoRA adds around SwiGLU and to a block's output, of Llama, the kernels add that read those anyway",
        lambda args: lora_alone(args) and not args.fp8,
        callback="lora.AddedByKernels",
    ),
]


def settings(args):
    """The settings that `--performance auto` makes for these flags, the hardware's filled in."""
    if args.performance == "off":
        return []
    # The fast kernels are Transformer Engine's: on a GPU only, and not in fp32, which is for comparing.
    kernels = args.accelerator != "cpu" and args.precision != "fp32"
    return [setting for setting in SETTINGS if setting.when(args) and (kernels or not setting.gpu)]
