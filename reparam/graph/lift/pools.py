"""Average pooling, and pooling that keeps single elements."""

from typing import Any, Final

import torch
from torch import nn

from reparam.algebra import Refusal
from reparam.algebra.sources import pool_is_conv
from reparam.graph.average_pools import AveragePool, average_pool
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.lift.base import Known, Lifted, depends_on_input, passed, per_axis, shape_text
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.sizes import readings, spatial_sizes

MAXIMA: Final = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}
ADAPTIVE: Final = {f"adaptive_{kind}_pool{axes}d": axes for kind in ("avg", "max") for axes in (1, 2, 3)}


def pool(value: Value, known: Known) -> Lifted:
    """``nn.AvgPool*d``, ``F.avg_pool*d``; maxima over windows of one element."""
    found = average_pool(value)
    if found is None:
        single = _single_maximum(value)
        if single is None:
            return None
        found = AveragePool(single[0], 1, single[1], 0, False, True, None)
    axes, size, stride, padding, ceil_mode, include, divisor = found
    source = tensor_input(value)
    space = known.space(source)
    if source is None or space is None or space.axes != axes:
        return Refusal("pool_is_conv", "the channels of the pooled value are not known", "give example_inputs")
    if any(map(depends_on_input, (size, stride, padding))):
        return Refusal("pool_is_conv", "its window depends on the input")
    kernel = per_axis(size, axes)
    conv = pool_is_conv(
        space.channels,
        kernel,
        per_axis(stride if stride is not None and stride != [] else size, axes),
        per_axis(padding, axes),
        ceil_mode=bool(ceil_mode) and set(kernel) != {1},
        count_include_pad=bool(include),
        divisor=divisor,
        numeric=False,
    )
    if isinstance(conv, Refusal):
        return conv
    if conv.identity:
        return passed(source, known)
    number = 1 / (divisor or torch.Size(kernel).numel())
    shape = conv.weight_shape
    single_elements = set(kernel) == {1}
    label = "every second element" if single_elements else f"average pool {shape_text(kernel)}"
    weight = {source: lambda: torch.full(shape, number, dtype=torch.float64)}
    return Operation(label, {source: conv}, weight, pool=not single_elements, copies=single_elements)


def _single_maximum(value: Value) -> tuple[int, Any] | None:
    """Axes and stride of a maximum over windows of one element, which returns elements of its input."""
    kind, module, name = stock(value.module), value.module, name_of(value)
    if kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        if module.return_indices:  # type: ignore[union-attr]
            return None
        axes = int(kind.__name__[-2])
        size, stride, padding = module.kernel_size, module.stride, module.padding  # type: ignore[union-attr]
    elif name in MAXIMA:
        axes = MAXIMA[name]
        size = argument(value, 1, "kernel_size")
        stride, padding = argument(value, 2, "stride"), argument(value, 3, "padding", 0)
    else:
        return None
    if any(map(depends_on_input, (size, stride, padding))):
        return None
    if set(per_axis(size, axes)) != {1} or any(per_axis(padding, axes)):
        return None
    return axes, stride if stride is not None and stride != [] else 1


def adaptive_pool(value: Value, known: Known) -> Lifted:
    """Adaptive pooling to the size that its input has: ``(None, None)``, or the size of the input itself."""
    module, kind, source = value.module, stock(value.module), tensor_input(value)
    if kind is not None and issubclass(
        kind, nn.modules.pooling._AdaptiveAvgPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd
    ):
        if getattr(module, "return_indices", False):
            return None
        axes, size = int(kind.__name__[-2]), module.output_size  # type: ignore[union-attr]
    elif name_of(value) in ADAPTIVE:
        axes, size = ADAPTIVE[name_of(value)], argument(value, 1, "output_size")
    else:
        return None
    if source is None:
        return None
    if isinstance(size, list | tuple) and all(entry is None for entry in size):
        return passed(source, known)
    if not spatial_sizes(size, source, axes, known.rank(source)):
        return None
    result = passed(source, known)
    return Operation(result.label, result.terms, {}, covers=readings(size, value))
