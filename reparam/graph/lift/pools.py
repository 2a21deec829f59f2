"""Average pooling, and pooling over windows of one element."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from reparam.algebra import Refusal
from reparam.algebra.sources import pool_is_conv
from reparam.graph.lift.base import Known, Lifted, per_axis, shape_text
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.spaces import argument, stock, tensor_input

POOLS: Final = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}


def average_pool(value: Value, known: Known) -> Lifted:
    """``nn.AvgPool*d`` and ``F.avg_pool*d``."""
    source, kind, module = tensor_input(value), stock(value.module), value.module
    if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        axes = int(kind.__name__[-2])
        size, stride, padding = module.kernel_size, module.stride, module.padding  # type: ignore[union-attr]
        ceil_mode, include = module.ceil_mode, module.count_include_pad  # type: ignore[union-attr]
        divisor = getattr(module, "divisor_override", None)
    elif value.module is None and value.node.target in POOLS:
        axes = POOLS[value.node.target]
        size = argument(value, 1, "kernel_size")
        stride, padding = argument(value, 2, "stride"), argument(value, 3, "padding", 0)
        ceil_mode, include = argument(value, 4, "ceil_mode", False), argument(value, 5, "count_include_pad", True)
        divisor = argument(value, 6, "divisor_override")
    elif kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        axes = int(kind.__name__[-2])
        size, stride, padding = module.kernel_size, module.stride, module.padding  # type: ignore[union-attr]
        if set(per_axis(size, axes)) != {1} or module.return_indices or any(per_axis(padding, axes)):  # type: ignore[union-attr, arg-type]
            return None
        ceil_mode, include, divisor = False, True, None
    else:
        return None
    space = known.space(source)
    if source is None or space is None or space.axes != axes:
        return Refusal("pool_is_conv", "the channels of the pooled value are not known", "give example_inputs")
    kernel = per_axis(size, axes)
    conv = pool_is_conv(
        space.channels,
        kernel,
        per_axis(stride if stride is not None and stride != [] else size, axes),
        per_axis(padding, axes),
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(include),
        divisor=divisor,
        numeric=False,
    )
    if isinstance(conv, Refusal):
        return conv
    if conv.identity:
        return Operation("identity", {source: conv}, {})
    number = 1 / (divisor or torch.Size(kernel).numel())
    shape = conv.weight_shape
    return Operation(f"average pool {shape_text(kernel)}", {source: conv},
                     {source: lambda: torch.full(shape, number, dtype=torch.float64)})  # fmt: skip
