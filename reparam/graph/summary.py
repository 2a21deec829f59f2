"""A region for a reader: its operations, its result, and the work of both."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Conv
from reparam.cost import Work, affine_work
from reparam.graph.net import Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.shapes import Shape
from reparam.report import Footprint, Kernel, Kind, Region, Step


def describe(
    plan: NetPlan, value: Value, shapes: Mapping[Value, Shape], counted: set[Value], error: float | None
) -> Region:
    """One region before and after.

    Args:
        plan: plan of its net.
        value: the value that is replaced.
        shapes: sizes of the values for the example inputs, as far as they are known.
        counted: values that earlier regions contain; those of this one are added.
        error: what was measured.
    """
    steps = _steps(plan, value, counted)
    members = region_members(plan, value)
    formula = plan.formulas[value]
    work_before = Work()
    for v in members:
        work_before += affine_work(plan.operations[v].structure, plan.sizes, plan.sizes[v])
    work_after = affine_work(formula, plan.sizes, plan.sizes[value])
    scale = plan.sizes[value] or 1.0
    place = plan.places[value]
    known = all(v in shapes for v in (*members, *formula.terms))
    footprints = _footprints(plan, value, members, shapes) if known else (None, None)
    return Region(
        path=place.container.path if place.container is not None else place.at.path,
        steps=steps,
        result=kernels(formula),
        params_before=sum(step.parameters for step in steps),
        params_after=work_after.parameters,
        macs_before=work_before.macs / scale,
        macs_after=work_after.macs / scale,
        how=place.mode.value,
        footprint_before=footprints[0],
        footprint_after=footprints[1],
        error=error,
    )


def region_members(plan: NetPlan, value: Value) -> list[Value]:
    """The operations of a region, in order of execution; norms that it takes over through passages come last."""
    return [*plan.absorbed(value), value, *(wrap.norm for wrap in plan.wraps.get(value, ()))]


def _steps(plan: NetPlan, value: Value, counted: set[Value]) -> tuple[Step, ...]:
    steps = []
    shares = {wrap.norm: wrap.channels for wrap in plan.wraps.get(value, ())}
    for member in region_members(plan, value):
        operation = plan.operations[member]
        parameters = _parameters(member)
        again = member in counted
        if member in shares:  # a norm behind a concatenation: each operation before it takes over some channels
            channels = next(iter(operation.terms.values())).out_channels
            parameters, again = parameters * shares[member] // channels, False
        else:
            counted.add(member)
        if operation.label != "identity":
            steps.append(Step(operation.label, member.path, parameters, again))
    return tuple(steps)


def kernels(formula: Affine) -> tuple[Kernel, ...]:
    """The terms of a formula."""
    return tuple(map(_kernel, formula.terms.values()))


def _kernel(conv: Conv) -> Kernel:
    """A term of a formula."""
    kind = Kind.TRANSPOSED if conv.transposed else Kind.CONV
    if conv.identity:
        kind = Kind.INPUT
    elif conv.axes == 0:
        kind = Kind.LINEAR
    padding = tuple(zip(conv.lo, conv.hi, strict=True))
    groups = conv.groups if kind in (Kind.CONV, Kind.TRANSPOSED) else 1
    return Kernel(kind, conv.in_channels, conv.out_channels, conv.kernel, conv.stride, conv.dilation, groups, padding)


def _footprints(
    plan: NetPlan, value: Value, members: list[Value], shapes: Mapping[Value, Shape]
) -> tuple[Footprint, Footprint]:
    size = _element_size(members)
    macs, written = 0.0, 0
    for member in members:
        formula = plan.operations[member].structure
        macs += affine_work(formula, _positions(formula, shapes), _elements(shapes[member], formula)).macs
        computes = plan.operations[member].bias is not None or not all(c.identity for c in formula.terms.values())
        if computes or len(formula.terms) > 1:
            written += torch.Size(shapes[member]).numel()
    after = plan.formulas[value]
    work = affine_work(after, _positions(after, shapes), _elements(shapes[value], after))
    return Footprint(round(macs), written * size), Footprint(round(work.macs), _written(after, value, shapes) * size)


def _written(formula: Affine, value: Value, shapes: Mapping[Value, Shape]) -> int:
    """Elements that the operations of a formula write: convolutions, the pads that some need, and the sums."""
    convs = [(root, conv) for root, conv in formula.terms.items() if not conv.identity]
    numel = torch.Size(shapes[value]).numel()
    total = numel * (max(len(convs), 1) + len(formula.terms) - 1)
    for root, conv in convs:
        if conv.needs_pad:
            shape = shapes[root]
            around = [n + lo + hi for n, lo, hi in zip(shape[-conv.axes :], conv.lo, conv.hi, strict=True)]
            total += torch.Size([*shape[: -conv.axes], *around]).numel()
    return total


def _positions(formula: Affine, shapes: Mapping[Value, Shape]) -> dict[Value, float]:
    """Elements per channel of each input."""
    positions: dict[Value, float] = {}
    for root, conv in formula.terms.items():
        assert isinstance(root, Value)
        positions[root] = torch.Size(shapes[root]).numel() / (conv.in_channels or 1)
    return positions


def _elements(shape: Shape, formula: Affine) -> float:
    """Elements per channel of a result."""
    return torch.Size(shape).numel() / (formula.channels or 1)


def _element_size(members: list[Value]) -> int:
    """Bytes of an element of the activations: those of the first weight."""
    for member in members:
        given = member.module.parameters() if member.module is not None else (*member.args, *member.kwargs.values())
        for tensor in given:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return tensor.element_size()
    return torch.empty(0).element_size()


def _parameters(value: Value) -> int:
    """Parameters of an operation; norm statistics are none."""
    if value.module is not None:
        return sum(p.numel() for p in value.module.parameters())
    tensors = {id(t): t for t in (*value.args, *value.kwargs.values()) if isinstance(t, nn.Parameter)}
    return sum(t.numel() for t in tensors.values())
