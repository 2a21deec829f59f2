"""Largest weight of every output channel, before and after: one scale for all channels must hold the largest."""

from dataclasses import dataclass
from statistics import median
from typing import final

import torch

from reparam.algebra import Affine, Conv
from reparam.algebra.groups import rows
from reparam.errors import ReparamError
from reparam.graph.options import Options
from reparam.graph.session import Session
from reparam.graph.summary import region_members
from reparam.report import Plan


@final
@dataclass(frozen=True, slots=True)
class ChannelRanges:
    """Largest magnitude of the weights of every output channel of one region.

    Args:
        path: dotted path of the module in which the result stands.
        before: ``(out,)``, of the convolution or linear layer of the region that has most weights.
        after: ``(out,)``, of the one that replaces it.
    """

    path: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def spread_before(self) -> float:
        """Widest channel, in medians: with one scale per tensor, the median channel has so many times fewer levels."""
        return spread(self.before)

    @property
    def spread_after(self) -> float:
        """The same of the replacement."""
        return spread(self.after)


def spread(ranges: tuple[float, ...]) -> float:
    """Largest of some ranges in medians; 1 where all are zero.

    Example:
        >>> spread((1.0, 2.0, 8.0))
        4.0
    """
    middle = median(ranges)
    return max(ranges) / middle if middle else float("inf") if max(ranges) else 1.0


def weight_ranges(plan: Plan) -> tuple[ChannelRanges, ...]:
    """Ranges of the weights that the model has now, of every region of a plan that becomes an operation."""
    session = Session(plan.model, plan.options or Options())
    found = []
    with torch.no_grad():
        for (net, value), region in zip(session.regions(), plan.regions, strict=False):
            before = [
                conv for member in region_members(net, value) for conv in _convs(net.operations[member].numbers())
            ]
            after = _convs(net.numbers(value))
            if any(conv.device is None or conv.device.type == "meta" for conv in (*before, *after)):
                raise ReparamError(
                    f"expected weights with values, found weights on the meta device at {region.path or 'the model'}:"
                    " load the weights before asking for their ranges"
                )
            largest = max(after or [_identity(net.numbers(value))], key=_size)
            found.append(ChannelRanges(region.path, _ranges(max(before, key=_size, default=largest)), _ranges(largest)))
    return tuple(found)


def _convs(formula: Affine) -> list[Conv]:
    """Terms with weights that are more than a scale, where there are any."""
    terms = [conv for conv in formula.terms.values() if not conv.identity]
    return [conv for conv in terms if not conv.diagonal] or terms


def _identity(formula: Affine) -> Conv:
    return next(iter(formula.terms.values()))


def _size(conv: Conv) -> int:
    return conv.out_channels * conv.in_channels // conv.groups * conv.taps


def _ranges(conv: Conv) -> tuple[float, ...]:
    largest = rows(conv).double().abs().flatten(1).amax(1)  # (out,)
    return tuple(largest.tolist())
