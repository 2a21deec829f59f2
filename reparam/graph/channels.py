"""Which channels of a value an operation picks: slices, indices, one part of a split."""

from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from reparam.graph.calls import argument, name_of
from reparam.graph.net import Value
from reparam.graph.proxy import assign
from reparam.graph.space import Space

WHOLE: Final = slice(None)
SPLITS: Final = frozenset(["split", "split_with_sizes", "chunk"])

CONCATS: Final = frozenset(["cat", "concat", "concatenate"])


def is_channel_axis(dim: Any, space: Space) -> bool:
    """Whether ``dim`` is the axis of the channels; behind a batch, where it is counted from the front."""
    return isinstance(dim, int) and (dim == -(space.axes + 1) or (dim == 1 and space.axes > 0))


def picked(value: Value, space_of: Any) -> tuple[Value, list[int], bool] | None:
    """The channels that an operation takes out of another value.

    Args:
        value: an operation.
        space_of: gives the space of a value, or None.

    Returns:
        The other value, the channels in order, and whether that holds behind a batch only; None for other operations.
    """
    name = name_of(value)
    source = value.args[0] if value.args else None
    if not isinstance(source, Value):
        return None
    if name == "getitem" and name_of(source) in SPLITS:
        return _part(source, value.args[1], space_of)
    space = space_of(source)
    if space is None or space.channels == 0:
        return None
    if name == "getitem":
        return indexed(source, value.args[1], space)
    dim = argument(value, 1, "dim")
    if name == "index_select" and is_channel_axis(dim, space):
        chosen = _channels(argument(value, 2, "index"), space.channels)
    elif name == "narrow" and is_channel_axis(dim, space):
        start, length = argument(value, 2, "start"), argument(value, 3, "length")
        whole = isinstance(start, int) and isinstance(length, int) and start >= 0
        chosen = list(range(start, start + length)) if whole else None
    else:
        return None
    return None if chosen is None else (source, chosen, dim >= 0)


def _part(split: Value, index: Any, space_of: Any) -> tuple[Value, list[int], bool] | None:
    source, dim = split.args[0], argument(split, 2, "dim", 0)
    space = space_of(source) if isinstance(source, Value) else None
    if space is None or space.channels == 0 or not is_channel_axis(dim, space) or not isinstance(index, int):
        return None
    sizes: Any = argument(split, 1, "chunks" if name_of(split) == "chunk" else "split_size_or_sections")
    sizes = split.kwargs.get("split_size", split.kwargs.get("split_sizes")) if sizes is None else sizes
    if isinstance(sizes, int) and sizes > 0:
        size = -(-space.channels // sizes) if name_of(split) == "chunk" else sizes
        sizes = [min(size, space.channels - start) for start in range(0, space.channels, size)]
    if not isinstance(sizes, list | tuple) or not all(isinstance(n, int) for n in sizes):
        return None
    if sum(sizes) != space.channels or not -len(sizes) <= index < len(sizes):
        return None
    start = sum(sizes[: index % len(sizes)])
    return source, list(range(start, start + sizes[index])), dim >= 0


def indexed(source: Value, index: Any, space: Space) -> tuple[Value, list[int], bool] | None:
    """``x[:, a:b]``, ``x[:, [1, 3], ...]``, ``x[..., a:b]``, with all other axes whole."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Value) or part is None for part in parts):
        return None
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    named = [i for i, part in enumerate(parts) if part is not Ellipsis and not _is_whole(part)]
    if len(dots) > 1 or len(named) != 1:
        return None
    (at,) = named
    dim = at - len(parts) if dots and at > dots[0] else at
    if not is_channel_axis(dim, space):
        return None
    chosen = _channels(parts[at], space.channels)
    return None if chosen is None else (source, chosen, dim >= 0)


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part == WHOLE


def _channels(index: Any, channels: int) -> list[int] | None:
    """The channels that an index names; None where it names none, one that is not there, or depends on the input."""
    if isinstance(index, slice):
        ends = (index.start, index.stop, index.step)
        return list(range(channels))[index] or None if all(isinstance(e, int | None) for e in ends) else None
    if isinstance(index, Tensor):
        if index.dim() != 1 or index.is_floating_point() or index.device.type == "meta":
            return None
        index = index.tolist()
    if not isinstance(index, list) or not index:
        return None
    if all(isinstance(i, bool) for i in index):
        return [i for i, used in enumerate(index) if used] if len(index) == channels else None
    whole = all(isinstance(i, int) and -channels <= i < channels for i in index)
    return [i % channels for i in index] if whole else None


def joined(value: Value, space_of: Any) -> tuple[Sequence[Value], Space, bool] | None:
    """Values whose channels are put behind each other, and the space of the result."""
    if name_of(value) not in CONCATS:
        return None
    items, dim = argument(value, 0, "tensors"), argument(value, 1, "dim", 0)
    if not isinstance(items, list | tuple) or not items or not all(isinstance(item, Value) for item in items):
        return None
    spaces = [space_of(item) for item in items]
    if any(s is None or s.channels == 0 or s.axes != spaces[0].axes for s in spaces):
        return None
    if not is_channel_axis(dim, spaces[0]):
        return None
    return items, Space(sum(s.channels for s in spaces), spaces[0].axes), dim >= 0


def rest(value: Value, space: Space, space_of: Any) -> list[tuple[Value, Space]]:
    """Inputs whose channels follow from those of a result: the whole of a part, or the one part that is not known."""
    if value.node.target is assign and isinstance(value.args[0], Value):
        return [(value.args[0], space)]
    source = value.args[0] if value.args else None
    if isinstance(source, Value) and name_of(value) == "getitem" and name_of(source) in SPLITS:
        sizes = argument(source, 1, "split_size_or_sections")
        sizes = source.kwargs.get("split_size", source.kwargs.get("split_sizes")) if sizes is None else sizes
        listed = isinstance(sizes, list | tuple) and all(isinstance(n, int) for n in sizes)
        if listed and isinstance(source.args[0], Value) and is_channel_axis(argument(source, 2, "dim", 0), space):
            return [(source.args[0], Space(sum(sizes), space.axes))]
    if name_of(value) in CONCATS and is_channel_axis(argument(value, 1, "dim", 0), space):
        items = argument(value, 0, "tensors")
        if not isinstance(items, list | tuple) or not all(isinstance(item, Value) for item in items):
            return []
        known = [space_of(item) for item in items]
        open_items = [item for item, found in zip(items, known, strict=True) if found is None]
        channels = space.channels - sum(found.channels for found in known if found is not None)
        if len(open_items) == 1 and channels > 0:
            return [(open_items[0], Space(channels, space.axes))]
    return []
