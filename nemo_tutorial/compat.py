"""The only place that asks which version or feature is there."""

import inspect
import sys
import types


def supported(function, **kwargs):
    """The part of `kwargs` that `function` takes in this version of NeMo or NeMo-Run."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in kwargs.items() if name in parameters}


def replace(owner, name, ours):
    """Put `ours` there if what is there has the same parameters, as in another version it may not; whether it was."""
    theirs = getattr(owner, name, None)
    same = theirs and inspect.signature(theirs).parameters.keys() == inspect.signature(ours).parameters.keys()
    if same:
        setattr(owner, name, ours)
    return bool(same)


def leave_out_allocator():
    """To be called before NeMo is imported: Megatron 0.15 would build an allocator for inference, unused here.

    Where CUDA's compiler is, that takes 12 to 17 s (H200's host), once a home folder or, where it fails, each time; and
    a process that is killed meanwhile leaves torch's lock, for which all later imports wait for ever, without a word.
    """
    if version("megatron-core").startswith("0.15."):
        module = types.ModuleType("megatron.core.inference.unified_memory")
        module.has_unified_memory, module.create_unified_mempool = False, None
        sys.modules.setdefault(module.__name__, module)


def fp8_plugin(recipe):
    """NeMo's precision plugin for an FP8 recipe. Raises ValueError if this container's NeMo lacks it."""
    from nemo.collections.llm.recipes.precision import mixed_precision

    names = {
        "delayed_scaling": "bf16_with_fp8_mixed",
        "current_scaling": "bf16_with_fp8_current_scaling_mixed",
        "subchannel_scaling": "bf16_with_fp8_subchannel_scaling_mixed",
        "mxfp8": "bf16_with_mxfp8_mixed",
    }
    factory = getattr(mixed_precision, names[recipe], None)
    if factory is None:
        raise ValueError(f"--fp8_recipe {recipe}: this NeMo has no {names[recipe]}; use a newer container")
    return factory()


def scheduler(name, flag):
    """NeMo's learning-rate scheduler of that name. Raises ValueError if this container's NeMo lacks it."""
    from nemo.lightning.pytorch.optim import lr_scheduler

    found = getattr(lr_scheduler, name, None)
    if found is None:
        raise ValueError(f"{flag}: this NeMo has no {name}; use --lr_decay cosine, or a newer container")
    return found


def counts_tokens():
    """Whether NeMo's loss says of how many tokens it is, so that Megatron can average over them (NeMo 2.4, not 2.2)."""
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    return "num_valid_tokens" in MaskedTokenLossReduction.forward.__code__.co_varnames


def version(package):
    """Its version; "" if it is missing."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions(packages=("nemo_toolkit", "nemo_run", "megatron-core", "torch", "transformer_engine", "transformers")):
    """Versions, of what a run depends on or of `packages`; a missing package is left out."""
    return {package: found for package in packages if (found := version(package))}
