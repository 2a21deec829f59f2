"""Let one convolution of a region take what the sum of the others leaves.

A region computes ``P X Q + R``, where ``X`` is one kernel, ``P`` and ``Q`` the maps behind and before it and ``R`` all
that does not pass through ``X``. To make it compute ``T`` instead, with all else as it is,

    X' = X + P⁺ (T − (P X Q + R)) Q⁺,

which is exact if ``P`` and ``Q`` have one tap, ``P`` has full row rank and ``Q`` full column rank, and ``X`` has all
the taps in which the two differ. With a norm behind and nothing before it, that is a division of rows.
"""

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from reparam.algebra import Affine, Conv, Refusal, branch_sum, conv_after_conv, identity
from reparam.algebra.branch_sum import add_into, common_box
from reparam.algebra.groups import densify, rows, swap
from reparam.errors import ReparamError
from reparam.expansion.region import Region, bias_of, kernel_of, norm_of
from reparam.graph.net import Value

FULL_RANK = 1e-9  # largest part of a difference that may be left when it was written into a kernel
FAINT = 1e-3  # a scale is switched on again where a kernel would have to grow by more than its inverse


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Holder:
    """A kernel that could take a difference: ``value`` computes it, ``outer`` and ``inner`` are ``P`` and ``Q``."""

    value: Value
    outer: Conv
    inner: Conv
    box: Conv

    @property
    def diagonal(self) -> bool:
        return all(c.identity or (c.groups == c.in_channels == c.out_channels) for c in (self.outer, self.inner))

    @property
    def wide(self) -> bool:
        """Whether neither map around the kernel is bound to lose channels."""
        outer, inner = self.outer, self.inner
        return outer.in_channels >= outer.out_channels and inner.out_channels >= inner.in_channels


@torch.no_grad()
def take_remainder(region: Region, target: Affine, where: str) -> None:
    """Change one kernel per input of a region, and a shift, so that it computes ``target``.

    Args:
        region: the operations; the parameters that they hold are written to.
        target: what the region is to compute, over the same inputs.
        where: path of the module, for messages.

    Raises:
        ReparamError: no kernel of the region can hold the difference.
    """
    for root, wanted in target.terms.items():
        difference = _difference(region, root, wanted, where)
        if difference is None:
            continue
        holder = _holder(region, root, difference, where)
        if _switch_on(region, holder, difference):
            again = _difference(region, root, wanted, where)
            assert again is not None
            difference = again
            holder = _holder(region, root, difference, where)
        _write(holder, difference, where)
    _write_shift(region, target, where)


def _difference(region: Region, root: object, wanted: Conv, where: str) -> Conv | None:
    """What is missing in the kernel over one input; None: both are the input itself."""
    found = region.formula().terms.get(root)
    if found is None:
        raise ReparamError(f"{where}: expected a region that reads the input {root}, found one that does not")
    if found.identity and wanted.identity:
        return None
    result = branch_sum([wanted, replace(found, weight=-rows_of(found), identity=False)])
    if isinstance(result, Refusal):
        raise ReparamError(f"{where}: expected a region of the same geometry, found another one: {result}")
    return result


def rows_of(conv: Conv) -> Tensor:
    """The weight as it is stored, also of an identity."""
    return rows(conv) if conv.weight is None else conv.weight


def _holder(region: Region, root: Any, difference: Conv, where: str) -> _Holder:
    found = []
    for value in region.members:
        operation = region.operations[value]
        if kernel_of(value) is None or len(operation.terms) != 1:
            continue
        ((source, conv),) = operation.terms.items()
        inner = region.formula(source).terms if source in region.inlined else {source: identity(0, 0)}
        if set(inner) != {root}:
            continue
        outer = region.behind(value)
        holder = None if outer is None else _fitting(value, outer, conv, inner[root], difference)
        if holder is not None:
            found.append(holder)
    if not found:
        raise ReparamError(
            f"{where}: expected a convolution with {difference.taps} taps and {difference.groups} groups that only"
            " norms, scales and 1x1 convolutions surround, to take what the other branches leave; found none among "
            + ", ".join(value.path or value.name for value in region.members)
        )
    return max(found, key=lambda h: (h.diagonal, h.wide, -h.value.index))


def _fitting(value: Value, outer: Conv, conv: Conv, inner: Conv, difference: Conv) -> _Holder | None:
    inner = identity(conv.in_channels, conv.axes) if inner.in_channels == 0 else inner
    if not (_one_tap(outer) and _one_tap(inner)):
        return None
    first = conv_after_conv(conv.structure, inner.structure)
    box = first if isinstance(first, Refusal) else conv_after_conv(outer.structure, first)
    if isinstance(box, Refusal):
        return None
    common = common_box(box, difference)
    if isinstance(common, Refusal) or (common.kernel, common.lo, common.groups) != (box.kernel, box.lo, box.groups):
        return None
    return _Holder(value, outer, inner, box) if conv.groups == box.groups else None


def _one_tap(conv: Conv) -> bool:
    """Whether a map is a matrix on the channels, up to padding and cropping."""
    return not conv.transposed and {*conv.kernel, *conv.stride} <= {1}


def _spread(holder: _Holder, difference: Conv) -> Tensor:
    """The difference as a weight of the holder's box, ``(out, in/groups, *kernel)``."""
    box = holder.box
    device = difference.weight.device if difference.weight is not None else None
    total = torch.zeros(box.out_channels, box.in_channels // box.groups, *box.kernel, dtype=torch.float64)
    total = total.to(device)
    add_into(total, box, difference)
    return total


def _write(holder: _Holder, difference: Conv, where: str) -> None:
    kernel = kernel_of(holder.value)
    assert kernel is not None
    wanted, g = _spread(holder, difference), holder.box.groups
    if holder.diagonal:
        step = _divided(wanted, holder.outer, holder.inner, g)
        left = torch.zeros((), dtype=torch.float64)
    else:
        second, first = (
            densify(rows(conv).double(), conv.groups, g).reshape(g, conv.out_channels // g, -1)
            for conv in (holder.outer, holder.inner)
        )
        first = first.to(second.device)
        blocks = wanted.reshape(g, wanted.shape[0] // g, wanted.shape[1], -1)
        for inverted in (_by_products, torch.linalg.pinv):
            solved = _between(inverted(second), blocks, inverted(first.mT).mT)
            left = (blocks - _between(second, solved, first)).abs().max()
            if left <= FULL_RANK * wanted.abs().max():
                break
        step = solved.reshape(-1, solved.shape[2], *holder.box.kernel)
    if not left <= FULL_RANK * wanted.abs().max():
        raise ReparamError(
            f"{where}: expected maps of full rank around the kernel of {holder.value.path or holder.value.name}, found"
            " that they lose channels: widen them"
        )
    if holder.box.transposed:
        step = swap(step, g)
    kernel.copy_(kernel.double() + step.reshape(kernel.shape).to(kernel.device))


def _by_products(wide: Tensor) -> Tensor:
    """A right inverse ``A' (A A')^-1`` of matrices ``(groups, rows, columns)`` of full row rank; NaN if it is not."""
    inverse, info = torch.linalg.inv_ex(wide @ wide.mT)
    found: Tensor = wide.mT @ inverse
    return torch.where(info.reshape(-1, 1, 1) == 0, found, torch.nan)


def _between(left: Tensor, kernels: Tensor, right: Tensor) -> Tensor:
    """``left K right`` for every tap of ``K``, ``(groups, rows, columns, taps)``."""
    groups, _, columns, taps = kernels.shape
    rows_done = (left @ kernels.flatten(2)).reshape(groups, -1, columns, taps)
    done: Tensor = rows_done.movedim(3, 2) @ right[:, None]
    return done.movedim(2, 3)


def _divided(wanted: Tensor, outer: Conv, inner: Conv, groups: int) -> Tensor:
    """Rows by the scale behind the kernel, columns by the one before it; a row of zeros stays one."""
    shape = (-1, *(1,) * (wanted.dim() - 1))
    scale = rows(outer).double().to(wanted.device).reshape(shape)
    step = torch.where(wanted == 0, wanted, wanted / scale)
    columns = rows(inner).double().to(wanted.device).reshape(groups, 1, -1, *(1,) * (wanted.dim() - 2))
    blocks = step.reshape(groups, -1, *step.shape[1:])
    return torch.where(blocks == 0, blocks, blocks / columns).reshape(step.shape)


def _switch_on(region: Region, holder: _Holder, difference: Conv) -> bool:
    """Set scales of norms behind a kernel to 1 where they are so small that the kernel could not take the difference.

    Returns:
        Whether one was.
    """
    if not holder.diagonal:
        return False
    kernel = kernel_of(holder.value)
    assert kernel is not None
    wanted = _spread(holder, difference).flatten(1).abs().amax(1)
    scale = rows(holder.outer).double().to(wanted.device).reshape(-1).abs()
    faint = scale * kernel.detach().double().abs().amax().to(wanted.device) < FAINT * wanted
    if not faint.any():
        return False
    changed = False
    for value in region.members:
        norm = norm_of(value, region.operations[value])
        if norm is None or not norm.affine or holder.value not in region.below(value):
            continue
        off = faint.to(norm.weight.device) & (norm.weight.abs() < FAINT)
        changed = changed or bool(off.any())
        norm.weight[off] = 1
    return changed


def _write_shift(region: Region, target: Affine, where: str) -> None:
    now = region.formula()
    if not target.biased and not now.biased:
        return
    if not now.biased or now.bias is None:
        raise ReparamError(f"{where}: expected a region with a bias, found none: it cannot take the one of the target")
    missing = -now.bias.double()
    if target.bias is not None:
        missing = missing + target.bias.double().to(missing.device)
    for value in sorted(region.members, key=lambda v: (not region.operations[v].norm, -v.index)):
        shift = bias_of(value)
        outer = None if shift is None else region.behind(value)
        if shift is None or outer is None or not outer.diagonal or shift.numel() != missing.numel():
            continue
        scale = rows(outer).double().reshape(-1).to(missing.device)
        if bool(((scale == 0) & (missing != 0)).any()):
            continue
        step = torch.where(missing == 0, missing, missing / scale)
        shift.copy_(shift.double() + step.to(shift.device))
        return
    raise ReparamError(f"{where}: expected a shift that can be set channel by channel, found none")
