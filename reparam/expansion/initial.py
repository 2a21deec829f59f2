"""How a block starts, so that it computes what the convolution computed.

1. New kernels start as torch starts them, 1x1 kernels in front of another one as the identity.
2. A norm at the end of a branch has a tenth of the scale of the norm that was behind the convolution; without a norm,
   a branch has a tenth of the convolution's weight, row by row. An identity without a norm is the input itself.
3. Statistics of new norms are those of inputs whose entries are independent, with the one mean and variance that
   explain the statistics of the norm behind the convolution best.
4. The convolution takes the remainder, and its norm the statistics of what it gives now.
"""

import copy
from typing import Final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Conv, identity
from reparam.algebra.groups import rows
from reparam.algebra.sources import precise
from reparam.errors import BlockError, ReparamError
from reparam.expansion.misfit import not_finite
from reparam.expansion.region import Region, kernel_of, norm_of
from reparam.expansion.remainder import take_remainder
from reparam.expansion.sites import Site
from reparam.expansion.statistics import Inputs, set_statistics
from reparam.graph.check import TOLERANCE
from reparam.graph.evaluate import evaluate
from reparam.graph.net import Value
from reparam.graph.trial import OUTPUTS, ROOM, length, margin
from reparam.nn import ChannelScale, MultiBranch
from reparam.nn.recipes import Recipe

GAIN: Final = 0.1
ROUNDINGS: Final = 16  # of the data type, by which a block may differ


@torch.no_grad()
def fit(block: nn.Module, site: Site, recipe: Recipe) -> None:
    """Set the numbers of a new block so that it computes what stood at its site.

    Args:
        block: made of the site's convolution by the recipe.
        site: the convolution, and the norm that the block takes along unless the recipe leaves it behind the sum.
        recipe: what the block was made by.

    Raises:
        ReparamError: the convolution or its norm holds numbers that are not finite, or variances below zero.
        BlockError: it does not compute the same.
    """
    _refuse_broken(site)
    region = Region.of(block)
    inside = site.norm is not None and not recipe.norm_of_sum
    wanted = site.normed if inside else site.alone
    ((_, kernel),) = site.alone.terms.items()
    inputs = Inputs()
    if site.norm is not None:
        assert site.norm.running_mean is not None
        assert site.norm.running_var is not None
        mean, variance = precise(site.norm.running_mean), precise(site.norm.running_var)
        inputs = Inputs.of(kernel, site.alone.bias, mean, variance)
    if isinstance(block, MultiBranch):
        gains = GAIN * _sizes(site, inside)
        row_norms = _row_norms(kernel)
        for name, branch in block.branches.items():
            _start(region, f"branches.{name}", branch, inputs, gains, GAIN * row_norms)
    ((root, _),) = region.formula().terms.items()
    ((_, conv),) = wanted.terms.items()
    target = Affine({root: conv}, wanted.biased, wanted.bias)
    own = next((v for v in region.members if v.path == "main.norm" and v.module is not None), None)
    norm = None if own is None else norm_of(own, region.operations[own])
    if norm is not None and own is not None and site.norm is not None and not inside:
        set_statistics(norm, mean, variance)
    take_remainder(region, target, site.path)
    if norm is not None and own is not None and site.norm is not None:
        (source,) = region.operations[own].terms
        now, before = region.formula(source), rows(kernel).double().flatten(1).square().sum(1)
        (changed,) = now.terms.values()
        after = rows(changed).double().flatten(1).square().sum(1)
        ratio = torch.where(before > 0, after / before.clamp(min=1e-300), torch.ones_like(after))
        shift = inputs.seen_by(now)[0] - inputs.seen_by(site.alone)[0]
        spread = torch.where(before > 0, variance * ratio, inputs.variance * after)
        set_statistics(norm, mean + shift, spread)
    _check(block, root, target, site)


def _refuse_broken(site: Site) -> None:
    found = not_finite(dict(site.conv.named_parameters()))
    where = site.path
    if not found and site.norm is not None:
        norm = site.norm
        found, where = not_finite(dict(norm.state_dict())), f"the batch norm behind {site.path}"
        if not found and norm.running_var is not None and bool((norm.running_var < 0).any()):
            raise ReparamError(f"{where}: expected variances of at least 0, found {float(norm.running_var.min()):.3g}")
    if found:
        raise ReparamError(
            f"{where}: expected finite numbers, found NaN or infinity in its {found}: load other weights, or leave the"
            " module out with where"
        )


def _sizes(site: Site, inside: bool) -> Tensor:
    """How large outputs of the convolution are, ``(out,)``: their standard deviation, or the norm of their row."""
    if site.norm is None:
        ((_, kernel),) = site.alone.terms.items()
        return _row_norms(kernel)
    assert site.norm.running_var is not None
    if not inside:
        return precise(site.norm.running_var).sqrt()
    if not site.norm.affine:
        return torch.ones(site.norm.num_features)
    scale: Tensor = site.norm.weight
    return precise(scale).abs()


def _row_norms(conv: Conv) -> Tensor:
    """Euclidean norms of the rows of a kernel, ``(out,)``."""
    norms: Tensor = torch.linalg.vector_norm(rows(conv).double().flatten(1), dim=1)
    return norms


def _start(
    region: Region,
    path: str,
    branch: nn.Module,
    inputs: Inputs,
    gains: Tensor,  # (out,)
    row_norms: Tensor,  # (out,)
) -> None:
    """Statistics and scales of one branch."""
    names = [f"{path}.{name}".rstrip(".") for name, module in branch.named_modules()]
    members = [value for value in region.members if value.path in names]
    norms = [value for value in members if norm_of(value, region.operations[value]) is not None]
    for value in norms:
        norm = norm_of(value, region.operations[value])
        assert norm is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        (source,) = region.operations[value].terms
        mean, variance = inputs.seen_by(_over_input(region, source, value))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    if norms:
        last = norm_of(norms[-1], region.operations[norms[-1]])
        assert last is not None
        last.weight.copy_(gains)
        return
    if isinstance(branch, ChannelScale):
        branch.weight.copy_(row_norms.reshape(branch.weight.shape))
        return
    kernels = [value for value in members if kernel_of(value) is not None]
    if kernels:
        (conv,) = region.formula(members[-1]).terms.values()
        size = _row_norms(conv)
        kernel = kernel_of(kernels[-1])
        assert kernel is not None
        factor = torch.where(size > 0, row_norms / size.clamp(min=1e-300), torch.ones_like(size))
        kernel.mul_(factor.reshape(-1, *(1,) * (kernel.dim() - 1)))


def _over_input(region: Region, source: Value, reader: Value) -> Affine:
    """The formula of what a norm reads; of the input itself with the channels that the norm has."""
    if source in region.operations:
        return region.formula(source)
    ((_, conv),) = region.operations[reader].terms.items()
    return Affine({source: identity(conv.in_channels, conv.axes)})


@torch.no_grad()
def _check(block: nn.Module, root: Value, target: Affine, site: Site) -> None:
    """Run a block in float64 on random input of two sizes, and compare it with the formula that it is to compute."""
    precise_block = copy.deepcopy(block).to("cpu", torch.float64).eval()
    ((_, conv),) = target.terms.items()
    extra = margin([target])
    for trial, outputs in enumerate(OUTPUTS):
        size = [length(conv, axis, outputs + ROOM + extra, trial) for axis in range(conv.axes)]
        x = torch.randn(2, conv.in_channels, *size, generator=torch.Generator().manual_seed(trial), dtype=torch.float64)
        found = precise_block(x)
        wanted = evaluate(target, {root: x})
        allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(site.conv.weight.dtype).eps)
        magnitude = rows(conv).double().abs().flatten(1).sum(1).max() * x.abs().mean()  # of what is summed
        magnitude += 0.0 if target.bias is None else target.bias.abs().max()
        error = float((found - wanted).abs().max())
        if not error <= allowed * float(magnitude):  # both are zero where a norm has neither scale nor shift
            raise BlockError(
                f"{site.path}: expected a block that computes what the convolution does, found a difference of"
                f" {error:.1e} in values of {float(magnitude):.1e}: a bug of this library, please report it, and leave"
                " the module out with where"
            )
