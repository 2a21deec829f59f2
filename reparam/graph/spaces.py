"""Channels and spatial axes of values, as far as the code alone fixes them.

A convolution, a norm or a linear layer that reads or gives a value fixes its channels: any other size would raise.
Elementwise operations pass them on. Nothing is guessed: a sum of two values may broadcast.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from reparam.graph.calls import argument, held_shape, name_of, stock, tensor_input
from reparam.graph.channels import picked, rest
from reparam.graph.constants import is_real
from reparam.graph.kinds import (
    CONVS,
    NORM_AXES,
    NORMS,
    SPATIAL_PADS,
    TRANSPOSED_CONVS,
    keeps_channels,
    operands,
    running_mean,
)
from reparam.graph.matrices import channel_axes, product, subscripts
from reparam.graph.net import Net, Value
from reparam.graph.passages import spread
from reparam.graph.proxy import assign
from reparam.graph.rank_rules import UNKNOWN, Rank, permutation
from reparam.graph.ranks import infer_ranks
from reparam.graph.shapes import Shape
from reparam.graph.sizes import is_plain
from reparam.graph.space import Space
from reparam.graph.stacks import summands


def infer(
    net: Net, ranks: Mapping[Value, Rank] | None = None, shapes: Mapping[Value, Shape] | None = None
) -> dict[Value, Space]:
    """Spaces of the values of a net; what is not known is absent.

    Args:
        net: the net.
        ranks: of its values; None: they are inferred.
        shapes: of some values, in an example.
    """
    ranks = infer_ranks(net) if ranks is None else ranks
    spaces: dict[Value, Space] = {}
    _settle(net, spaces, ranks, shapes or {})
    certain = len(spaces)
    for value in net.values:
        if value not in spaces:
            _from_constant(value, spaces)
    if len(spaces) > certain:
        _settle(net, spaces, ranks, shapes or {})
    return spaces


def _settle(net: Net, spaces: dict[Value, Space], ranks: Mapping[Value, Rank], shapes: Mapping[Value, Shape]) -> None:
    """Pass spaces on, forward and back, until nothing is new."""
    for _ in range(3):
        before = len(spaces)
        for value in net.values:
            _forward(value, spaces, ranks)
        for value in reversed(net.values):
            _backward(value, spaces, shapes, ranks)
        spread(net.values, spaces)
        if len(spaces) == before:
            break


def _from_constant(value: Value, spaces: dict[Value, Space]) -> None:
    """A constant of many numbers on one axis fixes that axis of a product or sum, whatever the other operand is.

    It is asked last: the constant may lie on another axis than the channels, and then a reader says where these are. So
    may the one axis over which a layer norm goes.
    """
    if isinstance(value.module, nn.LayerNorm) and len(value.module.normalized_shape) == 1:
        spaces[value] = Space(value.module.normalized_shape[0], 0)
    for constant in operands(value):
        if isinstance(constant, Tensor) and constant.numel() > 1 and max(constant.shape) == constant.numel():
            place = list(constant.shape).index(constant.numel())
            spaces[value] = Space(constant.numel(), constant.dim() - 1 - place)


def _fixed(
    value: Value, spaces: Mapping[Value, Space], ranks: Mapping[Value, Rank]
) -> tuple[Space | None, Space | None]:
    """Spaces of the input and of the output that the operation itself fixes."""
    kind, module = stock(value.module), value.module
    if module is not None:
        if kind is None:
            return None, None
        if isinstance(module, nn.modules.conv._ConvNd):
            axes, groups = len(module.kernel_size), module.groups
            if module.transposed:
                first, second, *_ = held_shape(module, module.in_channels, module.out_channels // groups)
                return Space(first, axes), Space(second * groups, axes)
            first, second, *_ = held_shape(module, module.out_channels, module.in_channels // groups)
            return Space(second * groups, axes), Space(first, axes)
        if isinstance(module, nn.Linear):
            first, second = held_shape(module, module.out_features, module.in_features)
            return Space(second, 0), Space(first, 0)
        if isinstance(module, nn.modules.batchnorm._NormBase) and kind in NORM_AXES:
            (channels,) = held_shape(module, module.num_features)
            space = _normed(value, channels, NORM_AXES[kind], spaces, ranks)
            return space, space
        return None, None
    name = name_of(value)
    if name in CONVS or name in TRANSPOSED_CONVS or name == "convolution":
        return _convolved(value, name)
    if name in NORMS:
        mean = running_mean(value)
        space = _normed(value, mean.numel(), None, spaces, ranks) if isinstance(mean, Tensor) else None
        return space, space
    found = product(value)
    return (None, None) if found is None else (Space(found.shape[1], found.axes), Space(found.shape[0], found.axes))


def _convolved(value: Value, name: str) -> tuple[Space | None, Space | None]:
    weight = argument(value, 1, "weight")
    groups = argument(value, 8 if name == "convolution" else 6, "groups", 1)
    if not isinstance(weight, Tensor) or not isinstance(groups, int):
        return None, None
    axes = weight.dim() - 2
    if name in TRANSPOSED_CONVS or (name == "convolution" and argument(value, 6, "transposed")):
        return Space(weight.shape[0], axes), Space(weight.shape[1] * groups, axes)
    return Space(weight.shape[1] * groups, axes), Space(weight.shape[0], axes)


def _normed(
    value: Value, channels: int, axes: int | None, spaces: Mapping[Value, Space], ranks: Mapping[Value, Rank]
) -> Space | None:
    """Space of a norm, whose channels are on axis 1: the rank tells where that is, or else a neighbour does."""
    if axes is None:
        rank = ranks.get(value, UNKNOWN).exact
        source = tensor_input(value)
        neighbour = (spaces.get(source) if source is not None else None) or spaces.get(value)
        if rank is not None and rank > 1:
            axes = rank - 2
        elif neighbour is not None:
            axes = neighbour.axes
    return None if axes is None else Space(channels, axes)


def _forward(value: Value, spaces: dict[Value, Space], ranks: Mapping[Value, Rank]) -> None:
    first = tensor_input(value)
    if value.declared is not None:
        source, own = value.declared.spaces(value, spaces.get(first) if first is not None else None)
    else:
        source, own = _fixed(value, spaces, ranks)
    found = product(value) if value.module is None else None
    if found is not None:
        first = found.source
    if source is not None and first is not None:
        spaces.setdefault(first, source)
    if own is not None:
        spaces.setdefault(value, own)
        return
    if value in spaces:
        return
    space = _inherited(value, first, spaces, ranks)
    if space is not None:
        spaces[value] = space


def _inherited(
    value: Value, first: Value | None, spaces: Mapping[Value, Space], ranks: Mapping[Value, Rank]
) -> Space | None:
    """The space that an operation passes on."""
    name = name_of(value)
    known = spaces.get(first) if first is not None else None
    if keeps_channels(value):
        return known
    if known is not None and _is_spatial(value, known):
        return known
    if value.node.target is assign:
        return known
    taken = picked(value, spaces.get)
    if taken is not None:
        return Space(len(taken[1]), spaces[taken[0]].axes)
    if name == "getitem":
        return known if first is not None and name_of(first) in NORMS else None  # one of three results
    if name == "einsum":
        return einsum_scale(value)
    stacked = {spaces.get(item) for item in summands(value, ranks)}
    if len(stacked) == 1:
        return stacked.pop()
    order = permutation(value, ranks.get(value, UNKNOWN).exact)
    if order is not None:
        if known is None or len(order) <= known.axes:
            return None
        return Space(known.channels, len(order) - 1 - order.index(len(order) - 1 - known.axes))
    combined = operands(value)
    values = [a for a in combined if isinstance(a, Value)]
    found = {spaces.get(v) for v in values}
    if len(found) != 1:
        return None
    (space,) = found
    if space is None:
        return None
    least = max(ranks.get(v, UNKNOWN).least for v in values)
    return space if all(fits(a, space, least) for a in combined if isinstance(a, Tensor)) else None


def _is_spatial(value: Value, space: Space) -> bool:
    """Whether an operation pads or slices the spatial axes of a value, and nothing else."""
    name, axes = name_of(value), space.axes
    if name in SPATIAL_PADS:
        return axes == SPATIAL_PADS[name]
    if name in ("pad", "constant_pad_nd"):
        amounts = argument(value, 1, "pad")
        return isinstance(amounts, list | tuple) and len(amounts) <= 2 * axes
    if name in ("narrow", "slice"):
        dim = argument(value, 1, "dim", 0)
        return axes > 0 and isinstance(dim, int) and (dim >= 2 or -axes <= dim < 0)
    if name != "getitem" or not isinstance(value.args[1], tuple):
        return False
    index = value.args[1]
    if not all(isinstance(part, slice) or part is Ellipsis for part in index):
        return False
    if Ellipsis in index:
        at = index.index(Ellipsis)
        return index[:at] == (slice(None),) * at and len(index) - at - 1 <= axes
    return axes > 0 and index[:2] == (slice(None),) * 2


def fits(constant: Tensor, space: Space, least: int = 0) -> bool:
    """Whether a constant, one number per channel at most, broadcasts into a value of this space without enlarging it.

    Args:
        constant: the constant.
        space: of the value.
        least: axes that the value has at least.
    """
    shape = tuple(constant.shape)
    most = max(space.axes + 2, least)
    if constant.numel() == 1:
        return len(shape) <= most
    place = len(shape) - 1 - space.axes
    return (
        0 <= place < most - space.axes
        and shape[place] == space.channels
        and all(n == 1 for i, n in enumerate(shape) if i != place)
    )


def einsum_scale(value: Value) -> Space | None:
    """The space of ``einsum("bchw,c->bchw", x, scale)``; None for other operations."""
    parsed = subscripts(value)
    if parsed is None or parsed[1] != parsed[4] or len(parsed[3]) != 1 or parsed[3] not in parsed[1]:
        return None
    axes = channel_axes(parsed[1], parsed[3])
    return None if axes is None else Space(parsed[2].shape[0], axes)


def _alone(value: Value, ranks: Mapping[Value, Rank]) -> Value | None:
    """The one operand that gives a sum or product its shape, beside numbers and constants of one element.

    It must be of a floating-point type for certain: a convolution takes ``image / 255`` of integers, and not these.
    """
    found = operands(value)
    least = ranks.get(value, UNKNOWN).least
    if any(isinstance(a, Tensor) and (a.numel() > 1 or a.dim() >= least) for a in found):
        return None
    values = {operand for operand in found if isinstance(operand, Value) and not is_plain(operand)}
    alone = values.pop() if len(values) == 1 and len(value.inputs) == 1 else None
    return alone if alone is not None and is_real(alone) else None


def _backward(
    value: Value, spaces: dict[Value, Space], shapes: Mapping[Value, Shape], ranks: Mapping[Value, Rank]
) -> None:
    if value not in spaces:
        return
    first, space = tensor_input(value), spaces[value]
    for other, found in rest(value, space, spaces.get):
        spaces.setdefault(other, found)
    for item in summands(value, ranks):
        spaces.setdefault(item, space)
    rank = ranks.get(value, UNKNOWN).exact
    order = permutation(value, rank)
    if first is not None and order is not None and len(order) > space.axes:
        spaces.setdefault(first, Space(space.channels, len(order) - 1 - order[len(order) - 1 - space.axes]))
    elif first is not None and (keeps_channels(value) or _is_spatial(value, space)):
        spaces.setdefault(first, space)
    elif operands(value):
        alone = _alone(value, ranks)
        if alone is not None:
            spaces.setdefault(alone, space)
        for operand in value.inputs:
            shape = shapes.get(operand, ())
            if (space.axes == 0 or len(shape) == space.axes + 2) and shape[-1 - space.axes :][:1] == (space.channels,):
                spaces.setdefault(operand, space)
