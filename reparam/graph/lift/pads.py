"""Padding, by a constant, by slice assignment, or by the values at the border."""

from dataclasses import replace
from numbers import Real
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.algebra import Border, Conv, Refusal
from reparam.algebra.sources import window
from reparam.graph.lift.base import Known, Lifted, constant_vector, full, per_axis
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.proxy import assign
from reparam.graph.spaces import Space, argument, name_of, stock, tensor_input


def _fill(constant: Any, space: Space) -> Tensor | None:
    number = 0.0 if constant is None else float(constant)
    return None if number == 0 else torch.full((space.channels,), number, dtype=torch.float64)


BORDERS: Final = {"reflect": Border.REFLECT, "replicate": Border.REPLICATE, "circular": Border.CIRCULAR}


def pad(value: Value, known: Known) -> Lifted:
    """``F.pad`` and the padding modules of torch."""
    source, kind = tensor_input(value), stock(value.module)
    mode, constant = "constant", None
    if value.module is not None:
        name = kind.__name__ if kind is not None else ""
        found = next((m for m in ("Zero", "Constant", "Reflection", "Replication", "Circular") if name.startswith(m)), "")
        if not found or "Pad" not in name:
            return None
        mode = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}.get(found, "constant")
        constant = getattr(value.module, "value", None)
        axes = int(name[-2])
        flat = per_axis(value.module.padding, 2 * axes)
    elif value.node.target in (F.pad, torch.nn.functional.pad) or name_of(value) == "pad":
        flat = argument(value, 1, "pad")
        mode, constant = argument(value, 2, "mode", "constant"), argument(value, 3, "value")
    else:
        return None
    space = known.space(source)
    if source is None or space is None:
        return Refusal("pad", "the rank of the padded value is not known", "give example_inputs")
    if not isinstance(flat, list | tuple) or not all(isinstance(p, int) for p in flat):
        return Refusal("pad", "the padding depends on the size of the input", "give example_inputs")
    if constant is not None and not isinstance(constant, Real):
        return Refusal("pad", "the value that pads depends on the input")
    behind = [*flat, *[0] * (2 * space.axes - len(flat))]
    if any(behind[2 * space.axes :]):
        return Refusal("pad", "it pads channels or the batch")
    lo = tuple(behind[2 * i] for i in reversed(range(space.axes)))
    hi = tuple(behind[2 * i + 1] for i in reversed(range(space.axes)))
    if mode != "constant" and min(*lo, *hi, 0) < 0:
        return Refusal("pad", "a negative padding with a border mode")
    conv = window(space.channels, lo, hi, fill=_fill(constant, space) if mode == "constant" else None,
                  border=BORDERS.get(mode, Border.CONSTANT))  # fmt: skip
    return Operation("pad", {source: conv.structure}, {} if conv.identity else {source: full(space.channels, 1.0)})


def framed_pad(value: Value, known: Known) -> Lifted:
    """A zero padding whose border is then filled, side by side, with one constant per channel."""
    if value.node.target is not assign or not isinstance(value.args[0], Value):
        return None
    chain: list[Value] = []
    step: Value = value
    while step.node.target is assign and step in known.effects.pure and isinstance(step.args[0], Value):
        chain.append(step)
        step = step.args[0]
    if not chain or name_of(step) != "pad" or len(step.users) != 1 or any(len(c.users) != 1 for c in chain[1:]):
        return None
    padded = pad(step, known)
    if not isinstance(padded, Operation):
        return padded
    ((source, conv),) = padded.terms.items()
    space = known.space(source)
    assert space is not None
    open_sides = {(a, e) for a in range(space.axes) for e, p in ((0, conv.lo[a]), (1, conv.hi[a])) if p > 0}
    fills: list[Tensor] = []
    for write in chain:
        side = _side(write.args[1], conv)
        number = constant_vector(write.args[2], space)
        if side is None or number is None:
            return Refusal("pad", "what is written is not a whole side of the padding, one constant per channel")
        open_sides.discard(side)
        fills.append(number())
    same = all(f.device.type == "meta" or torch.equal(f, fills[0]) for f in fills)
    if open_sides or not same:
        return Refusal("pad", "the sides of the padding are filled by different constants, or one is not filled")
    return Operation(
        "pad by a constant",
        {source: replace(conv, fill=fills[0])},
        dict(padded.weights),
        covers=(step, *chain[1:]),
    )


def _side(index: Any, conv: Conv) -> tuple[int, int] | None:
    """Which side of the frame a slice names: (axis, 0 before or 1 behind)."""
    if not isinstance(index, tuple) or not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return None
    spatial = index[2:]
    if any(i != slice(None) for i in index[:2]) or len(index) > conv.axes + 2:
        return None
    named = [axis for axis, i in enumerate(spatial) if i != slice(None)]
    if len(named) != 1:
        return None
    axis, part = named[0], spatial[named[0]]
    if part.start in (0, None) and part.stop == conv.lo[axis]:
        return axis, 0
    if part.start == -conv.hi[axis] and part.stop is None:
        return axis, 1
    return None
