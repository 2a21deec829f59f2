"""The verb ``restore``: a fused net gets its branches back."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Refusal
from reparam.cost import DEFAULT_COST, Cost
from reparam.errors import BlockError, ReparamError
from reparam.expansion.misfit import not_finite, quantized_kind
from reparam.expansion.region import Region, norm_of
from reparam.expansion.remainder import rows_of, take_remainder
from reparam.expansion.statistics import Inputs, set_statistics
from reparam.expansion.statistics import calibrate as calibrate_norms
from reparam.graph.lift import LIFTINGS, Lifting
from reparam.graph.modules import Fused
from reparam.graph.net_plan import numbers
from reparam.graph.options import Options, Rule
from reparam.graph.session import Session
from reparam.graph.wraps import wrapped
from reparam.nn.geometry import Norm

EXACT: Final = 1e-10  # relative error of weights that are solved for in float64
ROUNDINGS: Final = 64  # of the data type, by which a region may differ from the fused operation


def restore(
    fused: nn.Module | Mapping[str, Tensor],
    build: Callable[[], nn.Module],
    *,
    calibrate: Iterable[Any] | None = None,
    cost: Cost = DEFAULT_COST,
    exclude: tuple[Rule, ...] = (),
    only: tuple[Rule, ...] | None = None,
    liftings: tuple[Lifting, ...] = LIFTINGS,
    example_inputs: Any = None,
) -> nn.Module:
    """Give a fused net the branches of its architecture back, to train on; it computes what the fused net does.

    The plan of ``build()`` says which operations became which fused one. Branches start as ``build`` starts them, and
    in every region one convolution takes what they leave.

    Args:
        fused: a net that ``reparam.fuse`` made, or its ``state_dict()``.
        build: makes the net with branches, as it was built before it was trained and fused.
        calibrate: inputs, each a tensor, a tuple of arguments or a dict of keyword arguments. Statistics of norms are
            measured on them. A fused net does not hold them: without data they are those of inputs of mean 0 and
            variance 1, and the first steps in training mode compute something else.
        cost: what the net was fused with.
        exclude: what the net was fused with.
        only: what the net was fused with.
        liftings: what the net was fused with.
        example_inputs: what the net was fused with.

    Returns:
        What ``build`` returns, in eval mode, on the device and in the data type of ``fused``.

    Raises:
        ReparamError: ``fuse(build())`` has other parameters than ``fused``, these are quantized or not finite, or a
            region has no convolution that can take the remainder; the message names them.

    Example:
        >>> import reparam
        >>> def build():
        ...     return reparam.models.RepVGG(depths=(1, 1), widths=(4, 8), strides=(1, 2), num_classes=3)
        >>> deployed = reparam.fuse(build().eval())
        >>> net = reparam.restore(deployed, build)
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.allclose(net(x), deployed(x), atol=1e-5)
        True
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise ReparamError(
            f"expected build to be a function that makes the net, found {type(build).__name__}: write lambda: ..."
        )
    state = _state(fused)
    model = build()
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected build to return an nn.Module, found {type(model).__name__}")
    model.eval()
    floating = next((tensor for tensor in state.values() if tensor.is_floating_point()), None)
    if floating is not None:
        model.to(floating.device, floating.dtype)
    shadow = copy.deepcopy(model)
    tensors: dict[str, Tensor] = shadow.state_dict(keep_vars=True)  # of the modules that are about to be replaced
    session = Session(shadow, Options(cost, exclude, liftings, example_inputs, only))
    session.apply(check=True)
    _compare(shadow.state_dict(), state)
    paths = {id(module): path for path, module in shadow.named_modules()}
    norms: dict[str, Norm] = {}
    with torch.no_grad():
        wanted = [_wanted(region, state, paths) for region in session.fused]
        taken = {key for _, keys in wanted for key in keys}
        broken = not_finite({key: state[key] for key in taken})
        if broken:
            raise ReparamError(f"{broken}: expected finite numbers, found NaN or infinity: load other weights")
        for key, value in state.items():
            if key not in taken:
                if key not in tensors:
                    raise ReparamError(f"{key}: expected a parameter of build(), found one that fusing makes")
                tensors[key].copy_(value)
        targets = [target for target, _ in wanted]
        regions = [Region(part.plan.operations, part.plan.inlined, part.value) for part in session.fused]
        for region, target in zip(regions, targets, strict=True):
            take_remainder(region, target, _name(region))
            for member in region.members:
                norm = norm_of(member, region.operations[member])
                if norm is not None:
                    norms[member.path] = norm
                    if calibrate is None:
                        _estimate(region, norm, member)
        for region, target in zip(regions, targets, strict=True):
            _check(region, target, floating)
    model.load_state_dict({key: tensor.detach() for key, tensor in tensors.items()})
    if calibrate is not None:
        mine = [m for path, m in model.named_modules() if path in norms and isinstance(m, Norm)]
        calibrate_norms(model, mine, calibrate)
    return model


def _state(fused: object) -> dict[str, Tensor]:
    """The parameters of a fused net."""
    if isinstance(fused, nn.Module):
        for path, module in fused.named_modules():
            kind = quantized_kind(module)
            if kind:
                raise ReparamError(
                    f"{path}: expected a fused net in floating point, found the quantized {kind}: restore before you"
                    " quantize"
                )
    elif not isinstance(fused, Mapping):
        raise ReparamError(f"expected a net that reparam.fuse made, or its state_dict(), found {type(fused).__name__}")
    state: dict[str, Tensor] = dict(fused.state_dict() if isinstance(fused, nn.Module) else fused)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ReparamError(f"{key}: expected a tensor, found {type(value).__name__}: pass a state_dict()")
        if value.is_meta:
            raise ReparamError(f"{key}: expected numbers, found a meta tensor: load the weights first")
    return state


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise if two states differ in names or shapes."""
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    both = [key for key in expected if key in found]
    other = [key for key in both if expected[key].shape != found[key].shape]
    whole = [key for key in both if expected[key].is_floating_point() and not found[key].is_floating_point()]
    parts = [("missing", missing), ("not known", unknown), ("of another shape", other)]
    parts.append(("not in floating point", whole))
    said = "; ".join(f"{what}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}" for what, keys in parts if keys)
    if said:
        raise ReparamError(
            f"expected the parameters of fuse(build()), found others ({said}): pass what reparam.fuse made of this"
            " architecture, and the options that it was fused with"
        )


def _wanted(part: Fused, state: Mapping[str, Tensor], paths: Mapping[int, str]) -> tuple[Affine, list[str]]:
    """What a region is to compute, and the keys of the state that say so."""
    keys: list[str] = []
    terms: dict[Any, Any] = {}
    bias: Tensor | None = None
    for root, module in part.modules.items():
        conv = part.plan.formulas[part.value].terms[root]
        if module is None:
            terms[root] = conv
            continue
        holder = next(m for m in module.modules() if "weight" in m._parameters)
        path = paths[id(holder)]
        keys.append(f"{path}.weight" if path else "weight")
        groups = 1 if isinstance(holder, nn.Linear) else conv.groups
        whole = replace(conv, identity=False, groups=groups, weight=None)
        terms[root] = replace(whole, weight=state[keys[-1]].double().reshape(whole.weight_shape))
        if holder._parameters.get("bias") is not None:
            keys.append(f"{path}.bias" if path else "bias")
            bias = state[keys[-1]].double().reshape(-1)
    target = Affine(terms, bias is not None, bias)
    for wrap in reversed(part.plan.wraps.get(part.value, [])):
        scale = numbers(part.plan.operations, part.plan.inlined, wrap.norm)
        undone = wrapped(target, part.value, wrap, _inverse(scale))
        if isinstance(undone, Refusal):
            raise ReparamError(f"{wrap.norm.path}: expected a norm that can be taken out again: {undone}")
        target = undone
    return target, keys


def _inverse(norm: Affine) -> Affine:
    """The inverse of a scale and shift per channel."""
    ((root, conv),) = norm.terms.items()
    weight = rows_of(conv).double()
    shift = None if norm.bias is None else -norm.bias.double() / weight.reshape(-1)
    return Affine({root: replace(conv, weight=1 / weight)}, norm.biased, shift)


def _estimate(region: Region, norm: Norm, member: Any) -> None:
    """Statistics of a norm that was never trained, for inputs of mean 0 and variance 1."""
    fresh = norm.running_mean is not None and norm.running_var is not None and norm.affine
    if not fresh or bool(norm.running_mean.any()) or bool((norm.running_var != 1).any()):  # type: ignore[union-attr]
        return
    (source,) = region.operations[member].terms
    formula = region.formula(source)
    if source not in region.operations or any(conv.in_channels == 0 for conv in formula.terms.values()):
        return
    mean, variance = torch.zeros(norm.num_features), torch.zeros(norm.num_features)
    mean = mean.double() if formula.bias is None else formula.bias.double()
    variance = sum((Inputs().spread(conv) for conv in formula.terms.values()), variance.double())
    set_statistics(norm, mean, variance)


def _check(region: Region, target: Affine, like: Tensor | None) -> None:
    """Compare formulas; a kernel that two regions share can serve one of them only."""
    eps = torch.finfo(torch.float64 if like is None else like.dtype).eps
    found = region.formula()
    pairs = [(rows_of(found.terms[root]), rows_of(conv)) for root, conv in target.terms.items() if not conv.identity]
    if target.bias is not None and found.bias is not None:
        pairs.append((found.bias, target.bias))
    for now, wanted in pairs:
        size = max(float(wanted.abs().max()), 1.0)
        error = float((now.reshape(wanted.shape).double() - wanted).abs().max()) / size
        if not error <= max(EXACT, ROUNDINGS * eps):
            raise BlockError(
                f"{_name(region)}: expected a region that computes what the fused operation does, found a difference of"
                f" {error:.1e}: one of its kernels is part of another region, too"
            )


def _name(region: Region) -> str:
    return region.result.path or region.result.name
