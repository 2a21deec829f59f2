"""What cannot be expanded or restored, said before anything is changed."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor, nn

from reparam.algebra import Conv, Refusal, branch_sum
from reparam.errors import ReparamError
from reparam.expansion.region import Region

QUANTIZED: Final = ("torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")


def quantized_kind(module: nn.Module) -> str:
    """The class of a module of torch's quantization, with its package; empty for all others."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" if kind.__module__.startswith(QUANTIZED) else ""


def misfit(branch: nn.Module, kernel: Conv) -> str:
    """Why a branch cannot, in eval mode, stand beside a convolution and become one with it; empty: it can.

    Args:
        branch: a module of one input.
        kernel: the convolution.

    Example:
        >>> from reparam.algebra import identity
        >>> misfit(nn.Conv1d(4, 4, 3, padding=1), identity(4, 1))
        'expected taps that are some of the 1 of the convolution, found a sum of 3'
    """
    try:
        region = Region.of(nn.Sequential(copy.deepcopy(branch)).eval())
    except ReparamError as error:
        return str(error)
    terms = region.formula().terms
    others = [root for root in terms if root.node.op != "placeholder"]
    if others or len(terms) != 1:
        found = ", ".join(root.path.partition(".")[2] or root.name for root in others)
        return f"expected an affine map of its input, found one that is not: its part {found}"
    (conv,) = terms.values()
    plain, whole = replace(conv, weight=None), replace(kernel, weight=None)
    total = branch_sum([whole, whole if plain.identity and not plain.in_channels else plain])
    if isinstance(total, Refusal):
        return f"expected a map that can be summed with the convolution, found another one: {total}"
    if (total.kernel, total.lo, total.hi) != (whole.kernel, whole.lo, whole.hi):
        return f"expected taps that are some of the {whole.taps} of the convolution, found a sum of {total.taps}"
    return ""


def not_finite(tensors: Mapping[str, Tensor | None]) -> str:
    """The name of the first tensor of floating-point numbers that holds NaN or infinity; empty: none does."""
    for name, tensor in tensors.items():
        if (
            tensor is not None
            and tensor.is_floating_point()
            and not tensor.is_meta
            and not bool(tensor.isfinite().all())
        ):
            return name
    return ""
