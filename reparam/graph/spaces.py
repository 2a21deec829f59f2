"""Channels and spatial axes of values, as far as the code alone fixes them.

A convolution, a norm or a linear layer that reads or gives a value fixes its channels: any other size would raise. Elementwise
operations pass them on. Nothing is guessed: a sum of two values may broadcast.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reparam.graph.net import Net, Value


@final
@dataclass(frozen=True, slots=True)
class Space:
    """``channels`` on the axis in front of ``axes`` spatial ones (the last axis if ``axes`` is 0)."""

    channels: int
    axes: int


SAME_MODULES: Final = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.PReLU,
    nn.Sigmoid, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.RReLU, nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._LPPoolNd, nn.Upsample,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
)  # fmt: skip
SAME_NAMES: Final = frozenset(
    "relu relu_ relu6 silu silu_ gelu hardswish hardsigmoid hardtanh leaky_relu prelu sigmoid sigmoid_ tanh tanh_ elu mish "
    "softplus dropout dropout1d dropout2d dropout3d contiguous clone detach neg abs exp sqrt clamp clamp_ __neg__ "
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate upsample "
    "instance_norm group_norm".split()
)
CONV_FUNCTIONS: Final[Mapping[Any, int]] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
CONV_TRANSPOSE_FUNCTIONS: Final[Mapping[Any, int]] = {
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}
NORM_AXES: Final[Mapping[type, int | None]] = {
    nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None,
}  # fmt: skip


def stock(module: nn.Module | None) -> type | None:
    """The torch type whose forward a module runs, looking through parametrizations; None for other modules."""
    if module is None:
        return None
    kind = type(module)
    if kind.__module__ == "torch.nn.utils.parametrize":
        kind = kind.__mro__[1]
    return kind if kind.__module__.startswith("torch.nn.modules.") else None


def name_of(value: Value) -> str:
    """Name of the function or method; empty for a module."""
    if value.module is not None or value.node.op == "placeholder":
        return ""
    target = value.node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def argument(value: Value, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return value.args[position] if len(value.args) > position else value.kwargs.get(name, default)


def tensor_input(value: Value) -> Value | None:
    """The value that a unary operation reads."""
    first = value.args[0] if value.args else next(iter(value.kwargs.values()), None)
    return first if isinstance(first, Value) else None


def infer(net: Net) -> dict[Value, Space]:
    """Spaces of the values of a net; what is not known is absent."""
    from reparam.graph.passages import spread

    spaces: dict[Value, Space] = {}
    for _ in range(3):
        before = len(spaces)
        for value in net.values:
            _forward(value, spaces)
        for value in reversed(net.values):
            _backward(value, spaces)
        spread(net.values, spaces)
        if len(spaces) == before:
            break
    return spaces


def _fixed(value: Value, spaces: Mapping[Value, Space]) -> tuple[Space | None, Space | None]:
    """Spaces of the input and of the output that the operation itself fixes."""
    kind, module = stock(value.module), value.module
    if kind is not None and module is not None:
        if isinstance(module, nn.modules.conv._ConvNd):
            axes = len(module.kernel_size)
            return Space(module.in_channels, axes), Space(module.out_channels, axes)
        if kind is nn.Linear:
            return Space(int(module.in_features), 0), Space(int(module.out_features), 0)  # type: ignore[arg-type]
        if kind in NORM_AXES:
            source = tensor_input(value)
            neighbour = spaces.get(source) if source is not None else None
            neighbour = neighbour or spaces.get(value)
            axes_ = NORM_AXES[kind]
            if axes_ is None and neighbour is not None:
                axes_ = neighbour.axes
            if axes_ is not None:
                space = Space(int(module.num_features), axes_)  # type: ignore[arg-type]
                return space, space
        return None, None
    target = value.node.target
    for table, inner, outer in ((CONV_FUNCTIONS, 1, 0), (CONV_TRANSPOSE_FUNCTIONS, 0, 1)):
        if target in table:
            weight = argument(value, 1, "weight")
            groups = argument(value, 6 if outer == 0 else 6, "groups", 1)
            if not isinstance(weight, Tensor) or not isinstance(groups, int):
                return None, None
            a, b = weight.shape[0], weight.shape[1] * groups
            axes = table[target]
            return (Space(b, axes), Space(a, axes)) if outer == 0 else (Space(a, axes), Space(b, axes))
    if target is F.linear:
        weight = argument(value, 1, "weight")
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return Space(weight.shape[1], 0), Space(weight.shape[0], 0)
    if target is F.batch_norm or target is torch.batch_norm:
        mean = argument(value, 1, "running_mean") if target is F.batch_norm else argument(value, 3, "running_mean")
        source = tensor_input(value)
        neighbour = (spaces.get(source) if source is not None else None) or spaces.get(value)
        if isinstance(mean, Tensor) and neighbour is not None:
            space = Space(mean.numel(), neighbour.axes)
            return space, space
    return None, None


def _passes_on(value: Value) -> bool:
    if value.module is not None:
        return isinstance(value.module, SAME_MODULES) and stock(value.module) is not None
    return name_of(value) in SAME_NAMES


SUMS: Final[Mapping[str, Callable[..., Any]]] = {
    "add": operator.add, "__add__": operator.add, "__radd__": operator.add, "iadd": operator.add,
    "sub": operator.sub, "__sub__": operator.sub, "isub": operator.sub,
}  # fmt: skip
PRODUCTS: Final = frozenset("mul __mul__ __rmul__ imul truediv div __truediv__ itruediv".split())


def _forward(value: Value, spaces: dict[Value, Space]) -> None:
    source, own = _fixed(value, spaces)
    first = tensor_input(value)
    if source is not None and first is not None:
        spaces.setdefault(first, source)
    if own is not None:
        spaces.setdefault(value, own)
        return
    if value in spaces:
        return
    name = name_of(value)
    if _passes_on(value):
        if first is not None and first in spaces:
            spaces[value] = spaces[first]
        return
    if name == "pad":
        amounts = argument(value, 1, "pad")
        if first in spaces and isinstance(amounts, list | tuple) and len(amounts) <= 2 * spaces[first].axes:
            spaces[value] = spaces[first]
        return
    if name in SUMS or name in PRODUCTS or name in ("rsub", "__rsub__"):
        operands = [a for a in value.args[:2] if not isinstance(a, str)]
        known = [spaces.get(a) for a in operands if isinstance(a, Value)]
        if any(k is None for k in known) or len({*known}) != 1 or known[0] is None:
            return
        if all(isinstance(a, Value) or not isinstance(a, Tensor) or narrow(a, known[0]) for a in operands):
            spaces[value] = known[0]


def narrow(constant: Tensor, space: Space) -> bool:
    """Whether a constant broadcasts into a value of this space without enlarging it, one number per channel at most."""
    shape = tuple(constant.shape)
    if constant.numel() == 1:
        return len(shape) <= max(space.axes + 2, 1)
    place = len(shape) - 1 - space.axes
    return (
        0 <= place <= 1
        and shape[place] == space.channels
        and all(n == 1 for i, n in enumerate(shape) if i != place)
    )


def _backward(value: Value, spaces: dict[Value, Space]) -> None:
    if value in spaces and _passes_on(value):
        first = tensor_input(value)
        if first is not None:
            spaces.setdefault(first, spaces[value])
