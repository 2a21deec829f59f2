"""Random input on which two forms of one operation are compared."""

from collections.abc import Iterable
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


def length(conv: Conv, axis: int, outputs: int, trial: int) -> int:
    """Input length that gives as many outputs on the first axis and one more on the second, and so on in turn."""
    outputs = max(outputs, 1) + axis % 2
    if conv.transposed or conv.identity:
        return outputs
    s = conv.stride[axis]
    found = max(s * (outputs - 1) + 1 - conv.slack[axis] + (trial * (s - 1)), 1)
    while conv.remainders is not None and found % s not in conv.remainders[axis]:
        found += 1
    return found
