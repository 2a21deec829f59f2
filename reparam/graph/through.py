"""Norms and scales that go through passages into the convolutions on the other side.

Back: a scale and shift behind passages goes into everything in front of them, split where channels are concatenated.
Forward: one in front of passages goes into the convolution or linear layer behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from reparam.algebra import Affine, Conv, Refusal, diagonal, substitute
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.passages import Spaces, parts


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
    """

    norm: Value
    start: int
    channels: int
    root: Value | None
    passages: tuple[Value, ...]


def wrapped(formula: Affine, value: Value, wrap: Wrap, scale: Affine) -> Affine | Refusal:
    """``formula`` with a wrap applied; ``scale`` is the formula of the norm over its one root."""
    (conv,) = scale.terms.values()
    if wrap.root is None:
        axes = max((c.axes for c in formula.terms.values()), default=0)
        outer = Affine({value: _slice(conv, wrap, axes)}, scale.biased, _cut(scale.bias, wrap))
        return substitute(outer, {value: formula})
    axes = formula.terms[wrap.root].axes
    inner = Affine({wrap.root: _slice(conv, wrap, axes)}, scale.biased, _cut(scale.bias, wrap))
    return substitute(formula, {wrap.root: inner})


def _slice(conv: Conv, wrap: Wrap, axes: int) -> Conv:
    weight = None if conv.weight is None else conv.weight.reshape(-1)[wrap.start : wrap.start + wrap.channels]
    return diagonal(wrap.channels, axes, weight)


def _cut(bias: Tensor | None, wrap: Wrap) -> Tensor | None:
    return None if bias is None else bias[wrap.start : wrap.start + wrap.channels]


def producers(
    norm: Value, first: Value, spaces: Spaces, operations: Mapping[Value, Operation], single: Mapping[Value, int]
) -> list[tuple[Value, Wrap]] | Refusal:
    """The operations in front of the passages behind which ``norm`` stands, each with its share of the norm."""
    found: list[tuple[Value, Wrap]] = []
    pending = [(first, 0, ())]
    while pending:
        value, start, behind = pending.pop()
        if single.get(value, 0) != 1:
            return Refusal("used_elsewhere", f"the value of {value.name} at {value.path} is read more than once")
        if value in operations:
            space = spaces[value]
            found.append((value, Wrap(norm, start, space.channels, None, behind)))
            continue
        inputs = parts(value, spaces)
        if inputs is None:
            return Refusal("norm", f"{value.name} at {value.path or 'the root'} lies in front of it and is not linear")
        pending += [(source, start + offset, (value, *behind)) for source, offset in inputs]
    return found


def consumer(
    norm: Value, spaces: Spaces, operations: Mapping[Value, Operation]
) -> list[tuple[Value, Wrap]] | Refusal:
    """The operation behind the passages in front of which ``norm`` stands."""
    value, passages = norm, []
    while True:
        if len(value.users) != 1 or value.returned:
            return Refusal("used_elsewhere", f"the value of {value.name} at {value.path} is read more than once")
        (user,) = value.users
        if user in operations:
            break
        inputs = parts(user, spaces)
        if inputs is None or len(inputs) != 1 or inputs[0][0] is not value:
            return Refusal("norm", f"{user.name} at {user.path or 'the root'} lies behind it and is not linear")
        passages.append(user)
        value = user
    if value not in operations[user].terms or not passages:
        return Refusal("norm", "nothing linear lies behind it")
    return [(user, Wrap(norm, 0, spaces[norm].channels, value, tuple(passages)))]
