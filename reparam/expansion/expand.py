"""The verb ``expand``: convolutions become blocks."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from reparam.errors import ReparamError
from reparam.expansion.initial import fit
from reparam.expansion.sites import Site, Survey, find_sites
from reparam.expansion.statistics import calibrate as calibrate_norms
from reparam.graph.fusing import refuse_bad_model
from reparam.graph.options import Rule, rules
from reparam.graph.swap import State, homes_of, replace_module
from reparam.nn import Branch, Recipe, block
from reparam.nn.geometry import Norm
from reparam.nn.recipes import recipe_of

Branches = str | Recipe | Branch | Iterable[str | Branch]


def expand(
    model: nn.Module,
    branches: Branches = "repvgg",
    *,
    where: tuple[Rule, ...] | None = None,
    preserve: bool = True,
    calibrate: Iterable[Any] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace convolutions by multi-branch blocks that compute the same; ``reparam.fuse`` undoes it.

    A batch norm that alone reads a convolution goes into the block, or stays behind it, as the preset says. Branches
    that do not fit a convolution are left out; a convolution that none fits stays, and ``reparam.expansion.survey``
    says why. New kernels are drawn from torch's global generator.

    Args:
        model: any module, in eval mode.
        branches: a preset (``"repvgg"``, ``"mobileone(4)"``), a list of branches (``["1x1", "1xk"]``) or a recipe.
        where: path patterns (``"layer1.*"``), types, or predicates of ``(path, module)``; None: every convolution.
        preserve: keep what the model computes in eval mode: the convolution takes what the branches leave. Otherwise
            new parts start as the papers start them.
        calibrate: inputs, each a tensor, a tuple of arguments or a dict of keyword arguments. Statistics of the norms
            in the blocks are measured on them; without, they are estimated.
        example_inputs: as for ``fuse``.
        inplace: change ``model`` itself; on an error it is left as it was.

    Returns:
        A model of the same class, in eval mode; call ``train()`` on it.

    Raises:
        TrainingModeError: the model is in training mode.
        ReparamError: a branch is not known, a module that ``where`` names cannot be expanded, nothing can, or a
            convolution is quantized.

    Example:
        >>> import torch, reparam
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> wide = reparam.expand(net, "repvgg")
        >>> [name for name, _ in wide[0].branches.named_children()]
        ['point', 'identity']
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(wide(x), net(x), atol=1e-5)
        True
        >>> reparam.fuse(wide).state_dict().keys() == reparam.fuse(net).state_dict().keys()
        True
    """
    if calibrate is not None and not preserve:
        raise ReparamError("expected calibrate without preserve=False, whose norms start as the papers start them")
    found, recipe = _looked_at(model, branches, where, example_inputs)
    if not found.sites:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(found.left.items())[:3])
        raise ReparamError(
            f"expected a convolution that {recipe.name} can expand, found none among {len(found.left)}"
            + (f" ({reasons})" if reasons else "")
        )
    target = model if inplace else copy.deepcopy(model)
    mine = dict(target.named_modules(remove_duplicate=False))
    made = {site.path: _made(site, recipe, preserve) for site in found.sites}
    norms = {path: site.norm for path, site in ((s.path, s) for s in found.sites) if not recipe.norm_of_sum}
    names = {id(module): path for path, module in model.named_modules()}
    before = [State(module) for module in target.modules()]
    try:
        homes = homes_of(target)
        for path, new in made.items():
            replace_module(homes, mine[path], new)
            norm = norms.get(path)
            if norm is not None:
                replace_module(homes, mine[names[id(norm)]], nn.Identity().train(norm.training))
        if calibrate is not None:
            inside = [m for new in made.values() for m in new.modules() if isinstance(m, Norm)]
            calibrate_norms(target, inside, calibrate)
    except BaseException:
        for state in before:
            state.restore()
        raise
    return target


def survey(
    model: nn.Module,
    branches: Branches = "repvgg",
    *,
    where: tuple[Rule, ...] | None = None,
    example_inputs: Any = None,
) -> Survey:
    """What ``expand`` would do: convolutions with their branches, and those that stay, with the reason.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
        >>> print(survey(net, "repvgg"))
        1 convolutions become blocks:
          0: point
        1 convolutions stay:
          2: repvgg is for kernels of more than one tap
    """
    return _looked_at(model, branches, where, example_inputs)[0]


def _looked_at(
    model: nn.Module, branches: Branches, where: tuple[Rule, ...] | None, example_inputs: Any
) -> tuple[Survey, Recipe]:
    recipe = recipe_of(branches)
    chosen = None if where is None else rules(where, "where")
    refuse_bad_model(model)
    return find_sites(model, recipe, chosen, example_inputs), recipe


def _made(site: Site, recipe: Recipe, preserve: bool) -> nn.Module:
    made = block(site.conv, recipe, norm=site.norm)
    trainable = site.conv.weight.requires_grad
    for parameter in made.parameters():
        parameter.requires_grad_(trainable)
    if preserve and not site.conv.weight.is_meta:
        with torch.no_grad():
            fit(made, site, recipe)
    return made
