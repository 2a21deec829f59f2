"""A cost policy that measures: alternatives of a region are timed on the device that will run them.

Counts decide where they agree: a rewrite with no more multiply-adds, traffic and operations is made. Where they do not,
the operations of both forms are run on random numbers, of the batch, data type and device of an example, and the
shorter time decides. A region of ``n`` elements per channel is timed on a square of as many.
"""

import time
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Conv
from reparam.cost import Work, macs_and_traffic
from reparam.errors import ReparamError

Timer = Callable[[Callable[[Tensor], Any], Tensor], float]
WARM_UP: Final = 2  # runs that are not timed
RUNS: Final = 7  # runs of which the shortest counts


def seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    """Seconds that one call takes: the shortest of several, each waited for."""
    synchronize = getattr(getattr(torch, x.device.type, None), "synchronize", lambda: None)
    best = float("inf")
    for turn in range(WARM_UP + RUNS):
        synchronize()
        start = time.perf_counter()
        run(x)
        synchronize()
        if turn >= WARM_UP:
            best = min(best, time.perf_counter() - start)
    return best


@final
class Measured:
    """Cost policy that keeps the faster of two forms; see ``measured``."""

    def __init__(self, example_inputs: Any, timer: Timer = seconds) -> None:
        self.example = _first_tensor(example_inputs)
        self.timer = timer
        self._known: dict[Any, float] = {}

    def __call__(self, work: Work) -> float:
        """The default policy, by which steps are looked for before they are measured."""
        return macs_and_traffic(work)

    def faster(self, old: float, new: float, before: Work, after: Work) -> bool:
        """Whether a form that takes ``new`` seconds should replace one that takes ``old``."""
        counts = ((before.macs, after.macs), (before.traffic, after.traffic), (before.launches, after.launches))
        fewer = all(b <= a for a, b in counts) and any(b < a for a, b in counts)
        return fewer or new < old

    def time_of(self, formula: Affine, sizes: Mapping[Any, float], size_out: float, original: bool) -> float:
        """Seconds of a value that is computed as its formula says, or as one operation of the net stands there."""
        total = 0.0
        for root, conv in formula.terms.items():
            if conv.identity or (original and conv.moves):
                continue
            total += self._term(conv, formula.biased, sizes[root], original)
        extra = len(formula.terms) - 1 + (formula.biased and all(c.identity for c in formula.terms.values()))
        extra += formula.size is not None
        if extra > 0:
            axes = max(conv.axes for conv in formula.terms.values())
            shape = self._shape(formula.channels or 1, axes, size_out)
            total += extra * self._timed(("add", shape), lambda x: x + x, shape)
        return total

    def _term(self, conv: Conv, biased: bool, size: float, original: bool) -> float:
        from reparam.graph.build import build

        shape = self._shape(conv.in_channels, conv.axes, size)
        if conv.diagonal and original:
            numbers = torch.ones(conv.in_channels, *(1,) * conv.axes, dtype=self.example.dtype).to(self.example.device)
            return self._timed(
                ("scale", shape, biased), lambda x: x * numbers + numbers if biased else x * numbers, shape
            )
        key = (conv.out_channels, conv.in_channels, conv.kernel, conv.stride, conv.dilation, conv.lo, conv.hi)
        whole = (*key, conv.groups, conv.border, conv.transposed, conv.output_padding, biased, shape)
        if whole in self._known:
            return self._known[whole]
        weight = torch.randn(conv.weight_shape)
        bias = torch.randn(conv.out_channels) if biased else None
        plain = Conv(*key, conv.groups, weight, False, conv.border, None, conv.transposed, conv.output_padding)
        module: nn.Module = build(plain, bias, dtype=self.example.dtype, device=self.example.device)
        return self._timed(whole, module, shape)

    def _shape(self, channels: int, axes: int, size: float) -> tuple[int, ...]:
        elements = max(size * prod(self.example.shape[2:]), 1.0)
        batch = self.example.shape[0] if self.example.dim() else 1
        if axes == 0:
            return (batch, max(round(elements), 1), channels)
        return (batch, channels, *(max(round(elements ** (1 / axes)), 1),) * axes)

    def _timed(self, key: Any, run: Callable[[Tensor], Any], shape: tuple[int, ...]) -> float:
        if key not in self._known:
            x = torch.randn(shape, dtype=self.example.dtype, device=self.example.device)
            with torch.no_grad():
                self._known[key] = self.timer(run, x)
        return self._known[key]


def measured(example_inputs: Any, *, timer: Timer = seconds) -> Measured:
    """A cost policy that times the alternatives of a region and keeps the faster one.

    Args:
        example_inputs: a tensor, or a tuple or dict of arguments: its first tensor ``(batch, channels, *sizes)`` gives
            batch, sizes, data type and device.
        timer: gives the seconds of one call of a function on a tensor.

    Returns:
        The policy, for ``fuse(model, cost=measured(x))``. Times are kept, so that one policy gives one answer.

    Raises:
        ReparamError: there is no tensor of floating-point numbers among the inputs.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> reparam.fuse(net, cost=reparam.measured(torch.randn(1, 3, 8, 8)))[1]
        Identity()
    """
    return Measured(example_inputs, timer)


def _first_tensor(inputs: Any) -> Tensor:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    raise ReparamError(
        f"expected example_inputs with a tensor (batch, channels, *sizes), found {type(inputs).__name__}: pass what the"
        " model is called with"
    )
