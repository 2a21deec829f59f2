"""Lengths of values that the code of a forward alone fixes."""

import operator
from typing import Any

from torch import fx, nn

from reparam.graph.proxy import PLAIN


def length_in_code(node: fx.Node, root: nn.Module) -> int | None:
    """Number of elements of a value of the forward of ``root``; None if the input decides it."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    rest = node.args[1:]
    if name == "getitem" and node.meta.get(PLAIN) and isinstance(rest[0], slice):
        return _slice_length(rest[0])
    size = rest[0] if rest else node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size"))
    if name in ("split", "split_with_sizes") and isinstance(size, list | tuple):
        return len(size)
    if name == "split" and isinstance(size, int):
        dim = rest[1] if len(rest) > 1 else node.kwargs.get("dim", 0)
        total = _channels(node.args[0], root)
        return -(-total // size) if total and dim == 1 else None
    chunks = rest[0] if rest else node.kwargs.get("chunks")
    if name in ("chunk", "tensor_split") and isinstance(chunks, int):
        return chunks
    return None


def _channels(value: Any, root: nn.Module) -> int:
    """Channels of a value that a convolution or norm gives, also through elementwise operations; 0: unknown."""
    while isinstance(value, fx.Node):
        if value.op == "call_module":
            for module in reversed(list(root.get_submodule(str(value.target)).modules())):
                found = getattr(module, "out_channels", getattr(module, "num_features", None))
                if isinstance(found, int):
                    return found if _keeps_channels(root.get_submodule(str(value.target))) else 0
        if value.op == "call_function" and value.target is operator.getitem:
            return _part(value)
        value = value.args[0] if value.args and _elementwise(value) else None
    return 0


def _slice_length(part: slice) -> int | None:
    """Length of ``shape[-2:]`` or ``shape[:2]``, whatever the rank (a shorter shape is an error later)."""
    if part.step is not None:
        return None
    if isinstance(part.start, int) and part.start < 0 and part.stop is None:
        return -part.start
    return part.stop if part.start is None and isinstance(part.stop, int) and part.stop > 0 else None


def _keeps_channels(module: nn.Module) -> bool:
    """Whether the last convolution or norm of a module fixes the channels of its result."""
    if isinstance(module, nn.Sequential):
        return all(_keeps_channels(child) for child in module)
    simple = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity)
    return isinstance(module, simple) or type(module).__module__ == "torch.nn.modules.activation"


def _part(node: fx.Node) -> int:
    """Size of one part of a ``split`` by sizes along the channels; 0: unknown."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return 0
    name = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
    if name not in ("split", "split_with_sizes"):
        return 0
    sizes = source.args[1] if len(source.args) > 1 else ()
    dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    return int(sizes[index]) if isinstance(sizes, list | tuple) and dim == 1 else 0


def _elementwise(node: fx.Node) -> bool:
    """Whether a node gives as many channels as it gets."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("relu", "relu_", "add", "iadd", "sub", "mul", "sigmoid", "silu", "gelu", "contiguous")
