"""Channel groups: one weight layout, and views that place a finer grouping inside a coarser one.

A weight with ``g`` groups is block diagonal. A map with ``g m`` groups is a map with ``g`` groups whose blocks are
block diagonal again, so a sum or a chain of maps with ``a`` and ``b`` groups has ``gcd(a, b)`` groups and never fewer
than needed.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from reparam.algebra.conv import Conv


def rows(conv: Conv) -> Tensor:
    """The weight as ``(out, in/groups, *kernel)``, also of a transposed convolution and of an identity."""
    if conv.pending is not None:
        return conv.pending.compute()
    if conv.weight is None:
        if not conv.identity:
            raise ValueError("expected a convolution with a weight, found structure only")
        return torch.ones(conv.weight_shape, dtype=torch.float64)
    return swap(conv.weight, conv.groups) if conv.transposed else conv.weight


def with_rows(box: Conv, weight: Tensor) -> Conv:
    """``box`` with a weight given as ``(out, in/groups, *kernel)``."""
    return replace(box, weight=swap(weight, box.groups) if box.transposed else weight)


def swap(weight: Tensor, groups: int) -> Tensor:
    """Exchange input and output channels inside every group: ``(a, b/g, *k)`` to ``(b, a/g, *k)``."""
    a, b = weight.shape[:2]
    blocks = weight.reshape(groups, a // groups, b, *weight.shape[2:]).transpose(1, 2)
    return blocks.reshape(groups * b, a // groups, *weight.shape[2:])


def finer_blocks(weight: Tensor, groups: int, finer: int) -> Tensor:
    """View of a weight with ``groups`` groups: the diagonal blocks of ``finer`` groups.

    Args:
        weight: ``(out, in/groups, *kernel)``, its first two axes contiguous.
        groups: its groups.
        finer: a multiple of ``groups``.

    Returns:
        A writable view ``(groups, out/finer, in/finer, *kernel, finer/groups)``.
    """
    m = finer // groups
    out, inner, *kernel = weight.shape
    blocks = weight.view(groups, m, out // finer, m, inner // m, *kernel)
    return blocks.diagonal(dim1=1, dim2=3)


def as_finer_blocks(weight: Tensor, groups: int, finer: int) -> Tensor:
    """A weight with ``finer`` groups, arranged like ``finer_blocks`` of a weight with ``groups`` groups."""
    m = finer // groups
    out, inner, *kernel = weight.shape
    return weight.reshape(groups, m, out // finer, inner, *kernel).movedim(1, -1)


def densify(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The same map written with ``fewer`` groups (a divisor of ``groups``), zeros between the blocks."""
    if groups == fewer:
        return weight
    out, inner, *kernel = weight.shape
    dense = weight.new_zeros(out, inner * groups // fewer, *kernel)
    finer_blocks(dense, fewer, groups).copy_(as_finer_blocks(weight, fewer, groups))
    return dense


def response(conv: Conv, vector: Tensor) -> Tensor:
    """What the map gives on an input that is ``vector``, ``(in,)``, everywhere: ``sum_a W[a] . vector``, ``(out,)``."""
    if conv.identity:
        return vector
    if conv.pending is not None:
        return conv.pending.response(vector)
    weight = rows(conv)
    total = weight.reshape(*weight.shape[:2], prod(conv.kernel)).sum(-1, dtype=vector.dtype)
    blocks = total.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    return (blocks @ vector.reshape(conv.groups, -1, 1)).reshape(conv.out_channels)
