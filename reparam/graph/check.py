"""Compare a fused region with the operations that it replaces, in float64, on random input of two sizes."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine
from reparam.graph.average_pools import places_in_front
from reparam.graph.direct import Direct
from reparam.graph.evaluate import Evaluator, evaluate
from reparam.graph.net import Frame, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.run import Evaluation, run, units
from reparam.graph.trial import BATCH, OUTPUTS, ROOM, length, lengths_together, margin

TOLERANCE: Final = 1e-9


def region_error(plan: NetPlan, value: Value, formula: Affine) -> float:
    """Largest difference, relative to the size of the result, between the formula and the original operations.

    Args:
        plan: of the net.
        value: the fused value.
        formula: its formula, with weights.

    Returns:
        The error; infinity if the shapes differ.
    """
    result = _last_identity(plan, value)
    region = [*_region(plan, value), *_between(plan, value, result)]
    evaluator = Evaluator(formula)
    whole = units(region, plan.dead)
    for room, parts in ((0, whole), (ROOM, whole), (0, region)):
        try:
            return _region_error(plan, evaluator, result, parts, room)
        except Exception:  # larger input may do, or operations one by one: a module may take one size only
            continue
    return _region_error(plan, evaluator, result, region, ROOM)


def _region_error(
    plan: NetPlan, evaluator: Evaluator, result: Value, region: Sequence[Value | Frame], room: int
) -> float:
    formula, modules = evaluator.formula, dict[int, nn.Module]()
    worst = 0.0
    extra = margin([formula]) + room
    for trial, outputs in enumerate(OUTPUTS):
        generator = torch.Generator().manual_seed(trial)
        inputs: dict[Value, Tensor] = {}
        most = max(conv.axes for conv in formula.terms.values())
        convs = list(formula.terms.values())
        sizes = [lengths_together(convs, axis, outputs + extra, trial) for axis in range(most)]
        for place, (root, conv) in enumerate(formula.terms.items()):
            assert isinstance(root, Value)
            meant = plan.aliases.get(root, root)
            if meant in inputs:
                inputs[root] = inputs[meant]
                continue
            shape = [BATCH[trial], conv.in_channels or formula.channels or 3]
            axes = conv.axes if conv.in_channels else most
            shape += [sizes[axis][place] for axis in range(axes)]
            if formula.size is not None:
                given = [length(conv, axis, size - axis % 2, 0) for axis, size in enumerate(formula.size)]
                shape[2:] = conv.lengths or given
            if axes == 0:
                shape[1:1] = [3] * (max(plan.known.rank(root).least, 2) - 2)
            inputs[meant] = inputs[root] = torch.randn(shape, generator=generator, dtype=torch.float64)
        with torch.no_grad(), Direct():
            wanted = run(region, result, inputs, modules)
            found, magnitude = evaluator.run(inputs)
        if wanted.shape != found.shape:
            return float("inf")
        worst = max(worst, float(((wanted - found).abs() / magnitude).max()))
    return worst


def group_error(plan: NetPlan, norm: Value, members: list[Value]) -> float:
    """The same for values that take over a norm through passages: both sides are run through the passages."""
    for spare in ((0, 1), (0, 0)):  # branches with strides may agree in size only for some lengths of the input
        try:
            return _group_error(plan, norm, members, spare)
        except Exception:
            continue
    return _group_error(plan, norm, members, (1, 1))


def _group_error(plan: NetPlan, norm: Value, members: list[Value], spare: Sequence[int]) -> float:
    modules: dict[int, nn.Module] = {}
    formulas = {member: plan.numbers(member) for member in members}
    wraps = [wrap for member in members for wrap in plan.wraps[member] if wrap.norm is norm]
    before = wraps[0].root is not None
    worst = 0.0
    extra = margin(formulas.values())
    behind = max(w for formula in formulas.values() for conv in formula.terms.values() for w in (1, *conv.extent))
    room = max(places_in_front(wrap.passages, behind + 1 if before else 1) for wrap in wraps)
    for trial, outputs in enumerate(OUTPUTS):
        generator = torch.Generator().manual_seed(trial)
        inputs: dict[Value, Tensor] = {}
        with torch.no_grad():
            if norm in plan.bared:
                worst = max(
                    worst, *(_bared_error(plan, norm, m, formulas[m], room, generator, modules) for m in members)
                )
                continue
            if before:
                source = next(iter(plan.formulas[norm].terms))
                space = plan.known.spaces[norm]
                places = [outputs + max(room, 4) + axis % 2 for axis in range(space.axes)]
                shape = [2, space.channels, *places] if space.axes else _tokens(plan, norm, space.channels)
                start = {source: torch.randn(shape, generator=generator, dtype=torch.float64)}
                whole, skipped = Evaluation(start, modules), Evaluation({**start, norm: start[source]}, modules)
                pairs = []
                for member in members:
                    wrap = next(w for w in plan.wraps[member] if w.norm is norm)
                    assert wrap.root is not None
                    result = evaluate(formulas[member], {wrap.root: skipped.value(wrap.root)})
                    pairs.append((whole.value(member), result))
            else:
                terms = [(root, conv) for formula in formulas.values() for root, conv in formula.terms.items()]
                most = max(conv.axes for _, conv in terms)
                convs, wide = [conv for _, conv in terms], outputs + max(room, 2) + extra
                sizes = [lengths_together(convs, axis, wide, spare[trial]) for axis in range(most)]
                for place, (root, conv) in enumerate(terms):
                    assert isinstance(root, Value)
                    shape = [2, conv.in_channels] if conv.axes else _tokens(plan, root, conv.in_channels)
                    shape += [sizes[axis][place] for axis in range(conv.axes)]
                    inputs.setdefault(root, torch.randn(shape, generator=generator, dtype=torch.float64))
                new: dict[Value, Tensor] = {}
                for member, formula in formulas.items():
                    new[member] = evaluate(formula, {r: inputs[r] for r in formula.terms if isinstance(r, Value)})
                (last,) = plan.formulas[norm].terms
                pairs = [(Evaluation(inputs, modules).value(norm), Evaluation({**inputs, **new}, modules).value(last))]
        for wanted, found in pairs:
            if wanted.shape != found.shape:
                return float("inf")
            worst = max(worst, float((wanted - found).abs().max() / (wanted.abs().max() + 1e-300)))
    return worst


def _bared_error(
    plan: NetPlan,
    norm: Value,
    member: Value,
    formula: Affine,
    room: int,
    generator: torch.Generator,
    modules: dict[int, nn.Module],
) -> float:
    """The same for one reader of a norm that loses its scale and shift."""
    wrap = next(w for w in plan.wraps[member] if w.norm is norm)
    space = plan.known.spaces[norm]
    (conv,) = formula.terms.values()
    places = [max(length(conv, axis, 4 + margin([formula]), 0), room + axis) for axis in range(space.axes)]
    shape = [2, space.channels, *places] if space.axes else _tokens(plan, norm, space.channels)
    if not space.axes and conv.axes:  # tokens become an image on the way
        shape = [2, *(length(conv, axis, 4 + margin([formula]), 0) for axis in range(conv.axes)), space.channels]
    bare = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = plan.operations[norm].numbers()
    whole = evaluate(scale, {norm: bare})
    assert wrap.root is not None
    wanted = Evaluation({norm: whole}, modules).value(member)
    found = evaluate(formula, {wrap.root: Evaluation({norm: bare}, modules).value(wrap.root)})
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max() / (wanted.abs().max() + 1e-300))


def _tokens(plan: NetPlan, value: Value, channels: int) -> list[int]:
    """A shape with the channels last, of a rank that the value can have."""
    return [2, *[3] * (max(plan.known.rank(value).least, 3) - 2), channels]


def _region(plan: NetPlan, value: Value) -> list[Value]:
    inside = {*plan.absorbed(value), value}
    for member in tuple(inside):
        if member in plan.operations:
            inside.update(plan.operations[member].covers)
    return sorted(inside, key=lambda v: v.index)


def _last_identity(plan: NetPlan, value: Value) -> Value:
    """The value behind the operations that hand on ``value`` as it is: with them, whole modules can be run."""
    while len(value.users) == 1:
        (user,) = value.users
        operation = plan.operations.get(user)
        if operation is None or user in plan.inlined or list(operation.terms) != [value]:
            break
        if operation.bias is not None or not operation.terms[value].identity:
            break
        value = user
    return value


def _between(plan: NetPlan, first: Value, last: Value) -> list[Value]:
    found = []
    while last is not first:
        found.append(last)
        (last,) = plan.operations[last].terms
    return found[::-1]
