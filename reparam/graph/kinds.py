"""Which operations are convolutions, norms, sums, and which only hand on the channels of their input."""

from collections.abc import Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from reparam.graph.calls import ACTIVATIONS, DROPOUTS, argument, name_of, stock
from reparam.graph.net import Value

SAME_MODULES: Final = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.PReLU,
    nn.Sigmoid, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.RReLU, nn.Threshold, nn.Hardshrink,
    nn.Softshrink, nn.modules.dropout._DropoutNd, nn.Upsample, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)  # fmt: skip
POOLS: Final = frozenset(
    f"{kind}_pool{axes}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for axes in (1, 2, 3)
)
SAME_NAMES: Final = frozenset(
    [
        *ACTIVATIONS, *DROPOUTS, *POOLS, "contiguous", "clone", "alias", "detach", "neg", "abs", "exp", "sqrt", "clamp",
        "clamp_min", "clamp_max", "interpolate", "upsample", "instance_norm", "group_norm",
    ]
)  # fmt: skip
CONVS: Final[Mapping[str, int]] = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
TRANSPOSED_CONVS: Final[Mapping[str, int]] = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
SPATIAL_PADS: Final[Mapping[str, int]] = {
    f"{kind}_pad{axes}d": axes for kind in ("reflection", "replication") for axes in (1, 2, 3)
}
NORM_AXES: Final[Mapping[type, int | None]] = {
    nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None,
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
}  # fmt: skip
NORMS: Final = frozenset(["batch_norm", "instance_norm", "_native_batch_norm_legit_no_training"])
SUMS: Final = frozenset(["add", "sub", "rsub"])
PRODUCTS: Final = frozenset(["mul", "div"])
ADDED_PRODUCTS: Final = frozenset(["addcmul", "addcdiv"])


def asks_size(value: Value) -> bool:
    """Whether a transposed convolution is called with the size of its result."""
    transposed = isinstance(value.module, nn.modules.conv._ConvTransposeNd)
    return transposed and argument(value, 1, "output_size") is not None


def keeps_channels(value: Value) -> bool:
    """Whether the result has the channels of the input, of another type perhaps."""
    return passes_on(value) or name_of(value) in ("to", "type_as", "zeros_like")


def running_mean(value: Value) -> Any:
    """The running mean that a function is given: ``torch.nn.functional`` has it first, ``torch`` behind the shift."""
    first = value.node.target in (F.batch_norm, F.instance_norm)
    return argument(value, 1 if first else 3, "running_mean")


def operands(value: Value) -> tuple[Any, ...]:
    """What a sum, a product, or a sum of both combines element by element; empty for other operations."""
    name = name_of(value)
    if name in ADDED_PRODUCTS:
        return tuple(argument(value, place, known) for place, known in enumerate(("input", "tensor1", "tensor2")))
    return tuple(value.args[:2]) if name in SUMS or name in PRODUCTS else ()


def passes_on(value: Value) -> bool:
    """Whether the result has the channels of the input, on the same axis."""
    if value.module is not None:
        return isinstance(value.module, SAME_MODULES) and stock(value.module) is not None
    return name_of(value) in SAME_NAMES
