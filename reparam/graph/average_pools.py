"""Average pools as they are called."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from torch import nn

from reparam.graph.calls import argument, name_of, stock
from reparam.graph.net import Value

FUNCTIONS: Final = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}


class AveragePool(NamedTuple):
    """Arguments of an average pool: numbers, one per axis or one for all; or values that depend on the input."""

    axes: int
    size: Any
    stride: Any
    padding: Any
    ceil_mode: Any
    count_include_pad: Any
    divisor: Any

    @property
    def keeps_constants(self) -> bool:
        """Whether every result is the mean of elements of the input, so that a constant image stays what it is."""
        padded = self.padding not in (0, (0,) * self.axes, [0] * self.axes)
        return self.divisor is None and (self.count_include_pad is False or not padded)


def places_in_front(passages: Sequence[Value], places: int) -> int:
    """Places along an axis that leave as many as asked for behind passages, pools among them."""
    for pool in map(average_pool, reversed(passages)):
        if pool is not None:
            places = places * _largest(pool.stride or pool.size) + _largest(pool.size)
    return places


def _largest(sizes: Any) -> int:
    numbers = [n for n in (sizes if isinstance(sizes, list | tuple) else (sizes,)) if isinstance(n, int)]
    return max(numbers, default=1)


def average_pool(value: Value) -> AveragePool | None:
    """Arguments of ``nn.AvgPool*d`` and ``F.avg_pool*d``; None for other operations."""
    kind, module, name = stock(value.module), value.module, name_of(value)
    if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        options: Any = module
        return AveragePool(
            int(kind.__name__[-2]),
            options.kernel_size,
            options.stride,
            options.padding,
            options.ceil_mode,
            options.count_include_pad,
            getattr(options, "divisor_override", None),
        )
    if name not in FUNCTIONS:
        return None
    return AveragePool(
        FUNCTIONS[name],
        argument(value, 1, "kernel_size"),
        argument(value, 2, "stride"),
        argument(value, 3, "padding", 0),
        argument(value, 4, "ceil_mode", False),
        argument(value, 5, "count_include_pad", True),
        argument(value, 6, "divisor_override"),
    )
