"""What a convolution costs, and the policy that decides whether an exact rewrite is made.

Rules decide equality, the policy decides use. A policy is any function from ``Work`` to a number; a rewrite is made iff
the number gets smaller. Sizes are relative: elements per channel at the resolution of the region.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Final, final

from reparam.algebra import Affine, Border, Conv


@final
@dataclass(frozen=True, slots=True)
class Work:
    """Work of an operation or of several.

    Args:
        macs: multiply-adds.
        traffic: elements of activations read and written.
        parameters: weights and biases.
        launches: operations.
        convolutions: convolutions and products with a matrix among them.
    """

    macs: float = 0.0
    traffic: float = 0.0
    parameters: int = 0
    launches: int = 0
    convolutions: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.macs + other.macs,
            self.traffic + other.traffic,
            self.parameters + other.parameters,
            self.launches + other.launches,
            self.convolutions + other.convolutions,
        )


Cost = Callable[[Work], float]


def macs_and_traffic(work: Work) -> float:
    """The default: ``MACs + (elements read + written)``."""
    return work.macs + work.traffic


def macs(work: Work) -> float:
    """Multiply-adds; ties are decided by traffic."""
    return work.macs + 1e-6 * work.traffic


def traffic(work: Work) -> float:
    """Elements of activations read and written."""
    return work.traffic + 1e-6 * work.macs


def parameters(work: Work) -> float:
    """Parameters; ties are decided by traffic."""
    return work.parameters + 1e-6 * work.traffic


def always(work: Work) -> float:
    """Fewest operations, whatever they cost."""
    return work.launches + 1e-12 * work.traffic


DEFAULT_COST: Final[Cost] = macs_and_traffic
NO_MORE_CONVOLUTIONS: Final = (macs_and_traffic, macs, traffic, parameters)  # make none of a pool and a norm


@lru_cache(maxsize=8192)
def conv_work(conv: Conv, biased: bool, size_in: float, size_out: float, pads: bool = False) -> Work:
    """Work of one convolution; ``size_in`` and ``size_out`` are spatial elements, ``pads`` says that a pad is apart."""
    groups = conv.groups if conv.axes else 1  # nn.Linear has no groups
    if conv.diagonal:
        groups = conv.groups
    weights = conv.out_channels * conv.in_channels // groups * conv.taps
    positions = size_in if conv.transposed else size_out
    return Work(
        macs=weights * positions,
        traffic=conv.in_channels * size_in * (1 + 2 * pads) + conv.out_channels * size_out,
        parameters=weights + (conv.out_channels if biased else 0),
        launches=1 + pads,
        convolutions=int(not conv.diagonal),
    )


def _bent(conv: Conv) -> bool:
    """Whether torch pads in a step of its own: all but zeros."""
    return conv.border is not Border.CONSTANT and not conv.never_outside


def affine_work(formula: Affine, sizes: Mapping[Any, float], size_out: float) -> Work:
    """Work of a value that is computed as its formula says: one convolution per term, and the sum."""
    biased = formula.biased and formula.size is None
    works = []
    for root, conv in formula.terms.items():
        if conv.identity:
            continue
        works.append(conv_work(conv, biased, sizes[root], size_out, conv.needs_pad or _bent(conv)))
        biased = False
    extra = len(formula.terms) - 1
    channels = formula.channels or 1
    if formula.size is not None:  # added in a pass of its own, to each image of a batch
        works.append(Work(traffic=2 * channels * size_out, parameters=channels * prod(formula.size), launches=1))
    elif biased and any(conv.identity for conv in formula.terms.values()):
        extra += 1  # a bias that no convolution takes along
    if len(works) == 1 and not extra:
        return works[0]
    return sum(works, Work(traffic=3 * channels * size_out * extra, launches=extra))


def operation_work(
    formula: Affine,
    sizes: Mapping[Any, float],
    size_out: float,
    *,
    passes: bool = False,
    copies: bool = False,
    pools: bool = False,
) -> Work:
    """Work of one operation as it stands in a net: one launch, whatever its formula.

    ``passes`` says that it runs even where its formula is the identity, as ``x + 0`` does and ``nn.Identity`` does not;
    ``copies`` that it only copies elements, as a pad does, and multiplies nothing; ``pools`` that it is a mean over
    windows.
    """
    convs = [(root, conv) for root, conv in formula.terms.items() if not conv.identity]
    if len(formula.terms) == 1:
        if not convs:
            runs = formula.biased or passes
            return Work(traffic=2 * (formula.channels or 1) * size_out * runs, launches=int(runs))
        ((root, conv),) = convs
        if conv.moves:
            return Work(launches=1)  # a view
        if copies:
            return replace(conv_work(conv, formula.biased, sizes[root], size_out), macs=0.0, convolutions=0)
        work = conv_work(conv, formula.biased, sizes[root], size_out, _bent(conv))
        return replace(work, convolutions=0) if pools else work
    channels = formula.channels or 1
    if convs and all(conv.moves for _, conv in convs):  # each part is copied
        copied = sum(conv.in_channels * sizes[root] for root, conv in convs)
        return Work(traffic=copied + channels * size_out, launches=1)
    return Work(
        macs=len(convs) * channels * size_out,
        traffic=(len(formula.terms) + 1) * channels * size_out,
        launches=1,
    )


def resolution(conv: Conv, size_in: float) -> float:
    """Spatial elements of the result, up to borders."""
    return size_in * prod(conv.stride) if conv.transposed else size_in / prod(conv.stride)
