"""Channels that are picked, put behind each other, written, or exchanged: matrices of zeros and ones."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from reparam.algebra import Conv, selection
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.channels import indexed, joined, picked
from reparam.graph.lift.base import Known, Lifted
from reparam.graph.net import Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.proxy import assign

MOST: Final = 32  # parts of a concatenation: planning one takes a time that grows with their square


def _matrix(outputs: int, inputs: int, pairs: list[tuple[int, int]]) -> Numbers:
    """Ones at ``(output, input)``, ``(out, in)``; a pair that is named twice counts twice."""

    def numbers() -> Tensor:
        matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
        if pairs:
            rows, columns = zip(*pairs, strict=True)
            matrix.index_put_((torch.tensor(rows), torch.tensor(columns)), torch.ones(()).double(), accumulate=True)
        return matrix

    return numbers


def _moved(
    label: str, outputs: int, axes: int, parts: Mapping[Value, tuple[int, list[tuple[int, int]]]], rank: int | None
) -> Operation:
    """A sum of selections: by value, its channels and the pairs of output and input."""
    terms: dict[Value, Conv] = {}
    weights: dict[Value, Callable[[], Tensor]] = {}
    for value, (inputs, pairs) in parts.items():
        terms[value] = selection(outputs, inputs, axes)
        weights[value] = _matrix(outputs, inputs, pairs)
    return Operation(label, terms, weights, assumed_rank=rank)


def _rank(value: Value, axes: int, behind_batch: bool, known: Known) -> int | None:
    """The rank that is taken for granted where the axis of the channels is counted from the front."""
    return axes + 2 if behind_batch and known.rank(value).exact != axes + 2 else None


def channel_selection(value: Value, known: Known) -> Lifted:
    """``x[:, a:b]``, ``x.split(...)[i]``, ``chunk``, ``narrow``, ``index_select`` along the channels."""
    found = picked(value, known.space)
    if found is None:
        return None
    source, channels, behind_batch = found
    space = known.space(source)
    if space is None or known.rank(source).most < space.axes + 2:
        return None
    pairs = list(enumerate(channels))
    rank = _rank(source, space.axes, behind_batch, known)
    return _moved("channels", len(channels), space.axes, {source: (space.channels, pairs)}, rank)


def concatenation(value: Value, known: Known) -> Lifted:
    """``torch.cat`` along the channels."""
    found = joined(value, known.space)
    if found is None:
        return None
    items, space, behind_batch = found
    if len(items) > MOST or any(known.rank(item).most < space.axes + 2 for item in items):
        return None
    parts: dict[Value, tuple[int, list[tuple[int, int]]]] = {}
    start = 0
    for item in items:
        inner = known.space(item)
        assert inner is not None
        _, pairs = parts.setdefault(item, (inner.channels, []))
        pairs += [(start + channel, channel) for channel in range(inner.channels)]
        start += inner.channels
    return _moved("concat", space.channels, space.axes, parts, _rank(items[0], space.axes, behind_batch, known))


def channel_shuffle(value: Value, known: Known) -> Lifted:
    """``nn.ChannelShuffle`` and ``F.channel_shuffle``: channel ``i g + j`` of the result is ``j c/g + i``."""
    module = value.module
    if stock(module) is nn.ChannelShuffle:
        groups = module.groups  # type: ignore[union-attr]
    elif name_of(value) in ("channel_shuffle", "native_channel_shuffle"):
        groups = argument(value, 1, "groups")
    else:
        return None
    source = tensor_input(value)
    space = known.space(source)
    if source is None or space is None or not isinstance(groups, int) or not space.axes or space.channels % groups:
        return None
    if known.rank(source).most < space.axes + 2:
        return None
    per_group = space.channels // groups
    pairs = [(i * groups + j, j * per_group + i) for i in range(per_group) for j in range(groups)]
    parts = {source: (space.channels, pairs)}
    return _moved("channel shuffle", space.channels, space.axes, parts, _rank(source, space.axes, True, known))


def channel_assignment(value: Value, known: Known) -> Lifted:
    """``x[:, a:b] = y``."""
    if value.node.target is not assign or value not in known.effects.pure or len(value.args) != 3:
        return None
    target, index, written = value.args
    space, other = known.space(target), known.space(written)
    if space is None or other is None or space.axes != other.axes or target is written:
        return None
    found = indexed(target, index, space)
    if found is None or not len(found[1]) == len(set(found[1])) == other.channels:
        return None
    _, channels, behind_batch = found
    kept = [(c, c) for c in range(space.channels) if c not in set(channels)]
    parts = {target: (space.channels, kept), written: (other.channels, [(c, i) for i, c in enumerate(channels)])}
    return _moved("concat", space.channels, space.axes, parts, _rank(target, space.axes, behind_batch, known))
