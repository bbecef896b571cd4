"""bf16 matrix products of a CPU that has none: computed in float32, then rounded, as they are where it has them.

oneDNN has them with AVX-512 only; elsewhere PyTorch's own loops take 3 to 28 times as long as a float32 product.
"""

import warnings

import torch

# What torch's products come to, those of a backward pass too, which calls no function of Python's.
OPERATORS = ("mm", "addmm", "bmm", "baddbmm")
LIBRARY = torch.library.Library("aten", "IMPL")  # with it, what is registered would go


def are_slow():
    """Whether oneDNN has no bf16 on this CPU, or isn't there."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_in_float32():
    """Register the products below in the place of torch's, in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # it is meant
        for name in OPERATORS:
            LIBRARY.impl(name, _product(getattr(torch.ops.aten, name).out), "CPU")


def _product(into):
    """The operator of which `into`, its variant with `out`, stays torch's own; all but bf16 is given to that as it is.

    It allocates two float32 copies of the factors and one of the result, for as long as it runs.
    """

    def product(*tensors, **scales):
        rounded = all(tensor.dtype is torch.bfloat16 for tensor in tensors)
        tensors = [tensor.float() for tensor in tensors] if rounded else tensors
        result = into(*tensors, **scales, out=tensors[0].new_empty(0))
        return result.bfloat16() if rounded else result

    return product
