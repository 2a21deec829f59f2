"""A convolution with branches beside it, summed."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from reparam.errors import ReparamError
from reparam.nn.branches import Branch, NormOf
from reparam.nn.geometry import CONVS, Convolution, Geometry, Norm, UnfitError
from reparam.nn.parts import Widened
from reparam.nn.recipes import Recipe, recipe_of


@final
class MultiBranch(nn.Module):
    """The sum of a convolution and branches that read the same input.

        y = main(x) + sum_b b(x)

    Args:
        main: a convolution, or one with its norm.
        branches: the others, by name.

    Example:
        >>> conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        >>> summed = MultiBranch(conv, {"point": nn.Conv2d(8, 8, 1), "identity": nn.Identity()})
        >>> summed(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, main: nn.Module, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.main = main
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, *size)`` to ``(N, out, *size of the convolution's output)``."""
        y: Tensor = self.main(x)
        for branch in self.branches.values():
            y = y + branch(x)
        return y


def block(
    conv: Convolution,
    branches: str | Recipe | Branch | Iterable[str | Branch] = "repvgg",
    *,
    norm: Norm | None = None,
) -> nn.Module:
    """The block that a recipe makes of a convolution and the norm behind it, which are copied.

    Branches that do not fit the convolution are left out. New parts start as torch and the papers start them, so the
    block computes something else than the convolution; ``reparam.expand`` makes it compute the same.

    Args:
        conv: a convolution of torch.
        branches: a preset (``"repvgg"``, ``"mobileone(4)"``), a list of branches (``["1x1", "1xk"]``), a recipe.
        norm: the batch norm behind the convolution. With a recipe that has a norm of the sum, it stays behind the
            block, is not part of it, and only shows what kind of norm to use inside.

    Returns:
        A ``MultiBranch``; a ``Widened`` where the recipe widens the convolution and puts no branch beside it.

    Raises:
        ReparamError: a branch is not known, or none fits.

    Example:
        >>> block(nn.Conv2d(4, 4, 5, padding=2, groups=4), ["kx1", "1xk"])
        MultiBranch(
          (main): Conv2d(4, 4, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2), groups=4)
          (branches): ModuleDict(
            (vertical): Conv2d(4, 4, kernel_size=(5, 1), stride=(1, 1), padding=(2, 0), groups=4, bias=False)
            (horizontal): Conv2d(4, 4, kernel_size=(1, 5), stride=(1, 1), padding=(0, 2), groups=4, bias=False)
          )
        )
    """
    if type(conv) not in CONVS.values():
        wanted = "expected a plain nn.Conv1d, nn.Conv2d or nn.Conv3d"
        raise ReparamError(f"{wanted}, found {type(conv).__module__}.{type(conv).__name__}")
    recipe = recipe_of(branches)
    try:
        parts = fitting(conv, recipe, norm)
    except UnfitError as error:
        raise ReparamError(f"expected a convolution that {recipe.name} fits, found {conv}: {error}") from error
    main = _main(conv, recipe, norm)
    made = MultiBranch(main, parts) if parts else main
    return made.to(conv.weight.device, conv.weight.dtype).train(conv.training)


def fitting(conv: Convolution, recipe: Recipe, norm: Norm | None) -> dict[str, nn.Module]:
    """The branches of a recipe that fit a convolution, by name.

    Raises:
        UnfitError: none does, and the convolution is not widened either.
        ReparamError: a branch cannot be made.
    """
    geometry = Geometry.of(conv)
    if geometry.pointwise and not recipe.pointwise:
        raise UnfitError(f"{recipe.name} is for kernels of more than one tap")
    parts: dict[str, nn.Module] = {}
    reasons: list[str] = []
    for branch in recipe.branches(geometry):
        wanted = (norm is not None and not recipe.norm_of_sum) if branch.norm is None else branch.norm
        if wanted and norm is None and conv.bias is None:
            reasons.append(f"{branch.name}: its norm would add a bias, which the convolution has not")
            continue
        try:
            module = _made(branch, geometry, _norm_of(norm, geometry.axes) if wanted else None)
        except UnfitError as error:
            reasons.append(f"{branch.name}: {error}")
            continue
        name, count = branch.name, 1
        while name in parts:
            count += 1
            name = f"{branch.name}_{count}"
        parts[name] = module
    if not parts and recipe.widening is None:
        raise UnfitError("; ".join(reasons) or f"{recipe.name} has no branch for a kernel of {geometry.kernel} taps")
    return parts


def _made(branch: Branch, geometry: Geometry, norm: NormOf | None) -> nn.Module:
    try:
        module: object = branch.make(geometry, norm)
    except (UnfitError, ReparamError):
        raise
    except Exception as error:
        raise ReparamError(
            f"branch {branch.name}: expected a module for {geometry}, but its function raises"
            f" {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ReparamError(
            f"branch {branch.name}: expected its function to return a module, found {type(module).__name__}"
        )
    return module


def _main(conv: Convolution, recipe: Recipe, norm: Norm | None) -> nn.Module:
    if recipe.widening is not None:
        return Widened(conv, recipe.widening.ratio, recipe.widening.before)
    kernel = copy.deepcopy(conv)
    if norm is None or (recipe.norm_of_sum and not recipe.norm_of_kernel):
        return kernel
    own = _norm_of(norm, Geometry.of(conv).axes)(conv.out_channels) if recipe.norm_of_sum else _affine_copy(norm)
    parts = nn.Sequential()
    parts.add_module("conv", kernel)
    parts.add_module("norm", own)
    return parts


def _norm_of(norm: Norm | None, axes: int) -> NormOf:
    """Makes norms of the kind of ``norm``, or torch's own."""
    options: dict[str, Any] = {}
    kind: type[Norm] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    if norm is not None:
        kind = type(norm)
        names = ("eps", "momentum", "process_group") if kind is nn.SyncBatchNorm else ("eps", "momentum")
        options = {name: getattr(norm, name) for name in names}
    return lambda channels: kind(channels, **options)


def _affine_copy(norm: Norm) -> Norm:
    """A copy with a scale and a shift of its own, which take what the sum of the other branches leaves."""
    own = copy.deepcopy(norm)
    if not own.affine:
        own.affine = True
        own.weight, own.bias = nn.Parameter(torch.ones(own.num_features)), nn.Parameter(torch.zeros(own.num_features))
    return own
