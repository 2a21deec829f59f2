"""Padding, by a constant, by slice assignment, or by the values at the border."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from reparam.algebra import Border, Conv, Refusal
from reparam.algebra.sources import window
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.kinds import SPATIAL_PADS
from reparam.graph.lift.base import Known, Lifted, constant_vector, full, per_axis
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.proxy import assign
from reparam.graph.space import Space

MODES: Final = {
    "Zero": "constant", "Constant": "constant", "Reflection": "reflect", "Replication": "replicate",
    "Circular": "circular",
}  # fmt: skip
BORDERS: Final = {"reflect": Border.REFLECT, "replicate": Border.REPLICATE, "circular": Border.CIRCULAR}


def _fill(constant: Any, space: Space) -> Tensor | None:
    number = 0.0 if constant is None else float(constant)
    return None if number == 0 else torch.full((space.channels,), number, dtype=torch.float64)


def _asked(value: Value) -> tuple[Any, str, Any] | None:
    """Amounts, mode and constant of a padding; None for other operations."""
    kind, name = stock(value.module), name_of(value)
    if kind is not None:
        found = next((mode for mode in MODES if kind.__name__.startswith(mode)), None)
        if found is None or "Pad" not in kind.__name__:
            return None
        assert value.module is not None
        amounts = per_axis(value.module.padding, 2 * int(kind.__name__[-2]))
        return amounts, MODES[found], getattr(value.module, "value", None)
    if name in SPATIAL_PADS:
        return argument(value, 1, "padding"), "reflect" if name.startswith("reflection") else "replicate", None
    if name == "constant_pad_nd":
        return argument(value, 1, "pad"), "constant", argument(value, 2, "value", 0)
    if name == "pad":
        return argument(value, 1, "pad"), argument(value, 2, "mode", "constant"), argument(value, 3, "value")
    return None


def pad(value: Value, known: Known) -> Lifted:
    """``F.pad``, the padding modules of torch, and the padding operators of exported programs."""
    asked = _asked(value)
    if asked is None:
        return None
    amounts, mode, constant = asked
    source = tensor_input(value)
    space = known.space(source)
    if source is None or space is None:
        return Refusal("pad", "the rank of the padded value is not known", "give example_inputs")
    if not isinstance(amounts, list | tuple) or not all(isinstance(p, int) for p in amounts):
        return Refusal("pad", "the padding depends on the size of the input", "give example_inputs")
    if constant is not None and not isinstance(constant, Real):
        return Refusal("pad", "the value that pads depends on the input")
    if any(amounts[2 * space.axes :]):
        return Refusal("pad", "it pads channels or the batch")
    lo, hi = _before_and_behind(amounts, space.axes)
    if mode != "constant" and min(*lo, *hi, 0) < 0:
        return Refusal("pad", "a negative padding with a border mode")
    fill = _fill(constant, space) if mode == "constant" else None
    conv = window(space.channels, lo, hi, fill=fill, border=BORDERS.get(mode, Border.CONSTANT))
    weights = {} if conv.identity else {source: full(space.channels, 1.0)}
    return Operation("pad", {source: conv.structure}, weights, copies=True)


def _before_and_behind(amounts: Sequence[int], axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Torch lists pairs from the last axis to the first."""
    flat = [*amounts, *[0] * (2 * axes - len(amounts))]
    pairs = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(axes))]
    return tuple(before for before, _ in pairs), tuple(behind for _, behind in pairs)


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
        number = constant_vector(write.args[2], source, known)
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
        copies=True,
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
