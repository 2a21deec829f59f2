"""The modules of a fused region, ready to enter the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Refusal
from reparam.graph.build import build
from reparam.graph.memory_format import has_channels_last, put_channels_last
from reparam.graph.net import Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.placing import Place


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """Data type and device of weights, whether they are trained, and whether their channels lie last in memory."""

    dtype: torch.dtype
    device: torch.device
    trainable: bool
    channels_last: bool


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """One region, ready to enter the model.

    Args:
        plan: plan of its net.
        value: the value that is replaced.
        place: where.
        modules: per root, the module that computes the term, or holds the weights that do; None: the root itself.
        kind: of its weights.
    """

    plan: NetPlan
    value: Value
    place: Place
    modules: dict[Value, nn.Module | None]
    kind: Kind


def mixed(plan: NetPlan, value: Value) -> Refusal | None:
    """Why the weights of a region cannot be put together: several data types or devices."""
    members = plan.weighing(value)
    kinds = {tensor.dtype for member in members for tensor in _weights(plan, member)}
    if len(kinds) > 1:
        return Refusal("dtype", f"weights of several data types: {sorted(map(str, kinds))}", "use one data type")
    for tensor in (tensor for member in members for tensor in _factors(plan, member)):
        if kinds and torch.promote_types(tensor.dtype, *kinds) not in kinds:
            return Refusal("dtype", f"a tensor of {tensor.dtype} widens the result", "use one data type")
    devices = {tensor.device for member in members for tensor in member.tensors()}
    if len(devices) > 1:
        return Refusal("device", f"weights on several devices: {sorted(map(str, devices))}", "use one device")
    return None


def kind_of_weights(plan: NetPlan, value: Value) -> Kind | Refusal:
    """Of what kind the weights of a region are."""
    weights = [tensor for member in plan.members(value) for tensor in _weights(plan, member)]
    weights = weights or _only_weights(plan.net.root.module)
    if not weights:
        return Refusal("dtype", "no weight fixes the data type of the result", "use one data type in the whole model")
    trainable, channels_last = (any(map(asked, weights)) for asked in (lambda w: w.requires_grad, has_channels_last))
    return Kind(weights[0].dtype, weights[0].device, trainable, channels_last)


def built(formula: Affine, kind: Kind) -> dict[Value, nn.Module | None]:
    """The modules that compute a formula; the bias goes with the first."""
    bias = formula.bias
    modules: dict[Value, nn.Module | None] = {}
    terms = sorted(formula.terms.items(), key=lambda term: (term[1].identity, term[1].scales))
    for root, conv in terms:
        assert isinstance(root, Value)
        if conv.identity and bias is None and len(terms) > 1:
            modules[root] = None
            continue
        module = build(conv, bias, dtype=kind.dtype, device=kind.device, trainable=kind.trainable)
        if kind.channels_last:
            put_channels_last(module)
        modules[root], bias = module, None
    return {root: modules[root] for root in formula.terms if isinstance(root, Value)}


def _only_weights(module: nn.Module) -> list[Tensor]:
    """A parameter of a model in which all parameters and statistics are of one data type and on one device."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return tensors[:1] if len({(t.dtype, t.device) for t in tensors}) == 1 else []


def _factors(plan: NetPlan, value: Value) -> Iterator[Tensor]:
    """Tensors that arithmetic of a region computes with: the widest decides the type of the result."""
    if plan.operations[value].arithmetic:
        arguments = (*value.args, *value.kwargs.values())
        yield from (a for a in arguments if isinstance(a, Tensor) and a.dim() and a.is_floating_point())


def _weights(plan: NetPlan, value: Value) -> Iterator[Tensor]:
    """Floating-point weights of the convolutions and linear layers among the operations of a region."""
    operation = plan.operations[value]
    if operation.norm:
        return
    if value.declared is not None:
        yield from (tensor for tensor in value.tensors() if tensor.is_floating_point())
        return
    if value.module is not None:
        weight = getattr(value.module, "weight", None)
        if "weight" in value.module.__dict__:  # a hook computes it anew, of what is held
            weight = next((t for t in value.module._parameters.values() if t is not None and t.dim() > 1), weight)
        if isinstance(weight, Tensor):
            yield weight
        return
    if all(conv.diagonal for conv in operation.terms.values()):
        return
    for argument in (*value.args, *value.kwargs.values()):
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() > 1:
            yield argument
