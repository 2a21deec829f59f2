"""Random input on which two forms of one operation are compared."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Final

import torch
from torch import Tensor

from reparam.algebra import Affine, Border, Conv
from reparam.graph.net import Value

OUTPUTS: Final = (0, 1)  # beyond those that a border can reach; axes differ, so that they cannot be mixed up
BATCH: Final = (2, 1)
ROOM: Final = 2  # outputs more, where operations need them: a pool takes no input that is smaller than its kernel


def inputs_of(formula: Affine, trial: int) -> dict[Value, Tensor]:
    """Input of a formula, in float64; trial 0 and 1 have other sizes."""
    generator = torch.Generator().manual_seed(trial)
    inputs: dict[Value, Tensor] = {}
    for root, conv in formula.terms.items():
        assert isinstance(root, Value)
        lengths = (length(conv, axis, OUTPUTS[trial] + ROOM + margin([formula]), trial) for axis in range(conv.axes))
        shape = (BATCH[trial], conv.in_channels, *lengths)
        inputs[root] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs


def margin(formulas: Iterable[Affine]) -> int:
    """Outputs per axis that a border can reach."""
    convs = [conv for formula in formulas for conv in formula.terms.values()]
    if any(conv.border is not Border.CONSTANT for conv in convs):  # a reflecting border must be shorter than the input
        return 3 * max((abs(p) for conv in convs for p in (*conv.lo, *conv.hi)), default=0)
    return max((_reached(conv, axis) for conv in convs for axis in range(conv.axes)), default=0)


def _reached(conv: Conv, axis: int) -> int:
    """Outputs on one axis that the borders of a convolution can reach, at both ends."""
    step = 1 if conv.transposed else conv.stride[axis]
    return sum(-(-abs(p) // step) for p in (conv.lo[axis], conv.hi[axis]))


def lengths_together(convs: Sequence[Conv], axis: int, outputs: int, trial: int) -> list[int]:
    """Input lengths for which several convolutions give the same number of outputs, ``outputs`` at least.

    A transposed convolution gives some numbers only, and more outputs than it has inputs.
    """
    scattered = [conv for conv in convs if conv.transposed and axis < conv.axes]
    if len(convs) < 2 or not scattered:
        return [length(conv, axis, outputs, trial) for conv in convs]
    wanted = range(max(outputs, 1), max(outputs, 1) + prod(conv.stride[axis] for conv in scattered))
    fit = (n for n in wanted if all(_gathered(conv, axis, n + axis % 2) is not None for conv in scattered))
    outputs = next(fit, outputs)
    ends = [_gathered(conv, axis, outputs + axis % 2) if conv in scattered else None for conv in convs]
    return [length(c, axis, outputs, trial) if n is None else n for c, n in zip(convs, ends, strict=True)]


def _gathered(conv: Conv, axis: int, outputs: int) -> int | None:
    """Input length for which a transposed convolution gives so many outputs; None if there is none."""
    more = conv.output_padding[axis] if conv.output_padding else 0
    steps, rest = divmod(outputs - 1 - more - conv.extent[axis] + conv.lo[axis] + conv.hi[axis], conv.stride[axis])
    return steps + 1 if rest == 0 and steps >= 0 else None


def length(conv: Conv, axis: int, outputs: int, trial: int) -> int:
    """Input length that gives as many outputs on the first axis and one more on the second, and so on in turn."""
    outputs = max(outputs, 1) + axis % 2
    if conv.transposed or conv.identity or axis >= conv.axes:
        return outputs
    s = conv.stride[axis]
    found = max(s * (outputs - 1) + 1 - conv.slack[axis] + (trial * (s - 1)), 1)
    while conv.remainders is not None and found % s not in conv.remainders[axis]:
        found += 1
    return found
