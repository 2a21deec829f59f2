"""One operation of a net as an affine formula of its inputs."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from reparam.algebra import Affine, Conv, Pending
from reparam.graph.net import Value

Numbers = Callable[[], Tensor]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """``bias + sum_r Conv_r(r)`` of one node; weights are computed only when they are asked for.

    Args:
        label: what it is, for a reader: ``"batch norm"``, ``"conv 3x3"``.
        terms: structure, by input.
        weights: of the terms that are not identities, ``(out, in/groups, *kernel)``, transposed as the convolution's.
        bias: ``(out,)``; None if there is none.
        covers: inputs of earlier nodes that the formula already contains.
        norm: whether it is a batch norm.
        generated: whether its weight is computed anew at every call.
        assumed_rank: rank of the input that the formula takes for granted; None: it holds for every rank.
        read_rank: rank that a reader of its batch size takes for granted where its input takes its place.
        looked_at: whether its shape is read, so that a value of the same shape, or batch, must take its place.
        arithmetic: whether it is a sum or product written out: no reason for a convolution by itself, and a pass over
            the tensor also where the formula is the identity (``x + 0``).
        copies: whether it copies elements and multiplies none: a pad, a slice.
        pool: whether it is a mean over windows.
    """

    label: str
    terms: Mapping[Value, Conv]
    weights: Mapping[Value, Numbers]
    bias: Numbers | None = None
    covers: tuple[Value, ...] = ()
    norm: bool = False
    generated: bool = False
    assumed_rank: int | None = None
    read_rank: int | None = None
    looked_at: bool = False
    arithmetic: bool = False
    copies: bool = False
    pool: bool = False

    @property
    def structure(self) -> Affine:
        """The formula without numbers."""
        return Affine(dict(self.terms), self.bias is not None)

    @property
    def rank_if_gone(self) -> int | None:
        """Rank of the input that is taken for granted where its input, or what that was made of, takes its place."""
        return self.assumed_rank if self.assumed_rank is not None else self.read_rank

    @property
    def hands_on(self) -> bool:
        """Whether it returns its one input as it is."""
        return self.bias is None and len(self.terms) == 1 and all(conv.identity for conv in self.terms.values())

    @property
    def moves(self) -> bool:
        """Whether it only puts channels elsewhere."""
        return self.bias is None and all(conv.moves for conv in self.terms.values())

    @property
    def relays(self) -> bool:
        """Whether it hands on every channel of its one input, in another layout perhaps."""
        return self.hands_on or (len(self.terms) == 1 and all(conv.order is not None for conv in self.terms.values()))

    @property
    def carries(self) -> bool:
        """Whether a scale and shift of its value is one of its inputs."""
        return self.relays or self.moves

    def numbers(self, pending: bool = False, device: torch.device | None = None) -> Affine:
        """The formula with numbers.

        Args:
            pending: whether large weights are computed later, when the formula is complete.
            device: where they are; None: where they were made.
        """
        terms = {
            value: _with(conv, self.weights[value]().to(device=device), pending) if value in self.weights else conv
            for value, conv in self.terms.items()
        }
        return Affine(terms, self.bias is not None, None if self.bias is None else self.bias().to(device=device))


def _with(conv: Conv, weight: Tensor, pending: bool) -> Conv:
    weight = weight.reshape(conv.weight_shape)
    if pending and not (conv.transposed or conv.diagonal or weight.is_meta):
        return replace(conv, pending=Pending.of(conv, weight))
    return replace(conv, weight=weight)


@final
@dataclass(frozen=True, slots=True)
class Either:
    """What is in one of two containers."""

    one: Container[Value]
    other: Container[Value]

    def __contains__(self, value: object) -> bool:
        return value in self.one or value in self.other


def absorbed(operations: Mapping[Value, Operation], inlined: Container[Value], value: Value) -> list[Value]:
    """All of ``inlined`` that the formula of ``value`` contains, in order of execution."""
    found: dict[Value, None] = {}
    pending = [value]
    while pending:
        for source in operations[pending.pop()].terms:
            if source in inlined and source not in found:
                found[source] = None
                pending.append(source)
    return sorted(found, key=lambda v: v.index)
