"""Regions for a reader: their operations, their results, and the work of both."""

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from reparam.algebra import Affine, Conv
from reparam.cost import affine_work
from reparam.graph.net import Net, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.placing import Mode
from reparam.graph.shapes import Shape
from reparam.graph.weights_read import WeightsRead
from reparam.graph.worth import work_as_it_stands
from reparam.report import Footprint, Kernel, Kind, Region, Step


@final
class Describer:
    """Describes the regions of a report one after the other, and tells what an earlier one has counted.

    Args:
        shapes: sizes of the values for the example inputs, as far as they are known.
    """

    def __init__(self, shapes: Mapping[Value, Shape]) -> None:
        self.shapes = shapes
        self.weights: dict[Net, WeightsRead] = {}
        self.seen: dict[Value, float] = {}
        self.counted: set[int] = set()

    def region(self, plan: NetPlan, value: Value, error: float | None) -> Region:
        """One region before and after.

        Args:
            plan: plan of its net.
            value: the value that is replaced.
            error: what was measured.
        """
        members = region_members(plan, value)
        formula = Affine({}) if value in plan.dropped else plan.formulas[value]
        macs = 0.0
        for member, share in members.items():
            work = work_as_it_stands(plan.operations[member], plan.sizes, plan.sizes[member])
            macs += work.macs * share
        work_after = affine_work(formula, plan.sizes, plan.sizes[value])
        scale = plan.sizes[value] or 1.0
        known = all(v in self.shapes for v in (*members, *formula.terms))
        footprints = _footprints(plan, value, members, formula, self.shapes) if known else (None, None)
        steps, parameters = self._steps(plan, members)
        return Region(
            path=region_path(plan, value),
            steps=steps,
            result=kernels(formula),
            params_before=parameters,
            params_after=work_after.parameters,
            macs_before=macs / scale,
            macs_after=work_after.macs / scale,
            how=(plan.places[value].mode if value in plan.places else Mode.SWAP).value,
            footprint_before=footprints[0],
            footprint_after=footprints[1],
            error=error,
        )

    def _steps(self, plan: NetPlan, members: Mapping[Value, float]) -> tuple[tuple[Step, ...], int]:
        """The operations of a region, and how many parameters they have together."""
        if plan.net not in self.weights:
            self.weights[plan.net] = WeightsRead(plan.net)
        weights = self.weights[plan.net]
        inside: dict[int, int] = {}
        steps = []
        for member, share in members.items():
            own = {key: round(p.numel() * share) for key, p in weights.of(member).items()}
            shared = sum(number for key, number in own.items() if key in self.counted)
            again = member in self.seen and share == 1
            inside |= own
            if share == 1:
                self.counted |= own.keys()
            self.seen[member] = share
            label = plan.operations[member].label
            if label != "identity":
                steps.append(Step(label, member.path, sum(own.values()), shared, again))
        return tuple(steps), sum(inside.values())


def region_members(plan: NetPlan, value: Value) -> dict[Value, float]:
    """The operations of a region in order of execution, each with the share of its channels that is its business.

    The norms that it takes over through passages come last; of one behind a concatenation, each operation in front of
    the concatenation takes over some channels.
    """
    members = dict.fromkeys(plan.members(value), 1.0)
    for wrap in plan.wraps.get(value, ()):
        if wrap.joined is not None:
            members[wrap.norm] = 1.0
            continue
        channels = plan.operations[wrap.norm].structure.channels
        for member in (*plan.absorbed(wrap.norm), wrap.norm):
            members[member] = wrap.channels / channels
    return members


def region_path(plan: NetPlan, value: Value) -> str:
    """Dotted path of the module in which the result of a region stands."""
    place = plan.places.get(value)
    if place is None:
        return value.path
    frame = place.container or place.caller
    return place.at.path if frame is None else frame.path


def kernels(formula: Affine) -> tuple[Kernel, ...]:
    """The terms of a formula."""
    convs = tuple(map(_kernel, formula.terms.values()))
    if formula.size is None:
        return convs
    return (*convs, Kernel(Kind.BIAS_MAP, formula.channels, formula.channels, formula.size))


def _kernel(conv: Conv) -> Kernel:
    """A term of a formula."""
    kind = Kind.TRANSPOSED if conv.transposed else Kind.CONV
    if conv.identity:
        kind = Kind.INPUT
    elif conv.scales:
        kind = Kind.SCALE
    elif conv.axes == 0:
        kind = Kind.LINEAR
    padding = tuple(zip(conv.lo, conv.hi, strict=True))
    groups = conv.groups if kind in (Kind.CONV, Kind.TRANSPOSED) else 1
    remainders = None if conv.remainders is None else tuple(map(tuple, conv.remainders))
    channels, axes = (conv.in_channels, conv.out_channels), (conv.kernel, conv.stride, conv.dilation)
    return Kernel(kind, *channels, *axes, groups, padding, remainders)


def _footprints(
    plan: NetPlan, value: Value, members: Mapping[Value, float], after: Affine, shapes: Mapping[Value, Shape]
) -> tuple[Footprint, Footprint]:
    size = _element_size(members)
    macs, written = 0.0, 0.0
    for member, share in members.items():
        formula = plan.operations[member].structure
        sizes = _positions(formula, shapes), _elements(shapes[member], formula)
        macs += work_as_it_stands(plan.operations[member], *sizes).macs * share
        computes = plan.operations[member].bias is not None or not all(c.identity for c in formula.terms.values())
        if computes or len(formula.terms) > 1:
            written += torch.Size(shapes[member]).numel() * share
    work = affine_work(after, _positions(after, shapes), _elements(shapes[value], after))
    return Footprint(round(macs), round(written) * size), Footprint(
        round(work.macs), _written(after, value, shapes) * size
    )


def _written(formula: Affine, value: Value, shapes: Mapping[Value, Shape]) -> int:
    """Elements that the operations of a formula write: convolutions, the pads that some need, and the sums."""
    convs = [(root, conv) for root, conv in formula.terms.items() if not conv.identity]
    numel = torch.Size(shapes[value]).numel() if formula.terms else 0
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


def _element_size(members: Iterable[Value]) -> int:
    """Bytes of an element of the activations: those of the first weight."""
    for member in members:
        given = member.module.parameters() if member.module is not None else (*member.args, *member.kwargs.values())
        for tensor in given:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return tensor.element_size()
    return torch.empty(0).element_size()
