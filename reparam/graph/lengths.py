"""Lengths of values that the code of a forward alone fixes."""

from torch import fx, nn


def slice_length(part: slice) -> int | None:
    """Length of ``shape[-2:]`` or ``shape[:2]``, whatever the rank (a shorter shape is an error later)."""
    if part.step is not None:
        return None
    if isinstance(part.start, int) and part.start < 0 and part.stop is None:
        return -part.start
    return part.stop if part.start is None and isinstance(part.stop, int) and part.stop > 0 else None


def keeps_channels(module: nn.Module) -> bool:
    """Whether the last convolution or norm of a module fixes the channels of its result."""
    if isinstance(module, nn.Sequential):
        return all(keeps_channels(child) for child in module)
    simple = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity)
    return isinstance(module, simple) or type(module).__module__ == "torch.nn.modules.activation"


def part(node: fx.Node) -> int:
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


def elementwise(node: fx.Node) -> bool:
    """Whether a node gives as many channels as it gets."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("relu", "relu_", "add", "iadd", "sub", "mul", "sigmoid", "silu", "gelu", "contiguous")
