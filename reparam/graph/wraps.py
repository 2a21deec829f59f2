"""A scale and shift that one value takes over from another, through passages that hand on every channel by itself."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from reparam.algebra import Affine, Conv, Refusal, diagonal, identity, substitute
from reparam.graph.net import Value


@final
@dataclass(frozen=True, slots=True, eq=False)
class Wrap:
    """A scale and shift that a value takes over from another one.

    Args:
        norm: the value whose work is taken over; it hands on its input from then on.
        start: first of the norm's channels that applies.
        channels: how many apply.
        root: the input of the value to which it applies; None: it applies to the result.
        passages: values between the two, in order of execution.
        joined: another value that is added to the result, where that is what is taken over.
    """

    norm: Value
    start: int
    channels: int
    root: Value | None
    passages: tuple[Value, ...]
    joined: Value | None = None


def wrapped(formula: Affine, value: Value, wrap: Wrap, scale: Affine) -> Affine | Refusal:
    """``formula`` with a wrap applied; ``scale`` is the formula of the norm over its one root, or what is joined."""
    if wrap.joined is not None:
        both = identity(formula.channels, max(c.axes for c in formula.terms.values()))
        return substitute(Affine({value: both, wrap.joined: both}), {value: formula, wrap.joined: scale})
    (conv,) = scale.terms.values()
    if wrap.root is None:
        axes = max((c.axes for c in formula.terms.values()), default=0)
        outer = Affine({value: _slice(conv, wrap, axes)}, scale.biased, _cut(scale.bias, wrap))
        return substitute(outer, {value: formula})
    reader = formula.terms[wrap.root]
    if reader.fill is not None and not reader.never_outside:
        return Refusal("border_rule", "the reader pads by a constant that the scale and shift would change")
    axes = reader.axes
    inner = Affine({wrap.root: _slice(conv, wrap, axes)}, scale.biased, _cut(scale.bias, wrap))
    return substitute(formula, {wrap.root: inner})


def _slice(conv: Conv, wrap: Wrap, axes: int) -> Conv:
    """The channels of a scale that apply; of a shift alone, the identity."""
    if conv.identity:
        return identity(wrap.channels, axes)
    weight = None if conv.weight is None else conv.weight.reshape(-1)[wrap.start : wrap.start + wrap.channels]
    return diagonal(wrap.channels, axes, weight)


def _cut(bias: Tensor | None, wrap: Wrap) -> Tensor | None:
    return None if bias is None else bias[wrap.start : wrap.start + wrap.channels]
