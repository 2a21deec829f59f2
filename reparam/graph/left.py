"""Everything that a plan leaves alone, each with its reason; near misses first."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from reparam.algebra import Affine, Refusal, substitute
from reparam.cost import Cost
from reparam.graph.near import Nearness
from reparam.graph.net import Reading, Value
from reparam.graph.net_plan import NetPlan

STEPS: Final = 32  # operations that are looked at to say why one sum stays


def left(reading: Reading, plans: Iterable[NetPlan], cost: Cost) -> list[Refusal]:
    """Everything left alone that could have been expected to fuse."""
    found: dict[tuple[str, str, str], Refusal] = {}
    for refusal in (*_whole_modules(reading), *(r for plan in plans for r in _of_net(plan, Nearness(plan, cost)))):
        found.setdefault((refusal.path, refusal.rule, refusal.condition), refusal)
    return near_first(found.values())


def near_first(refusals: Iterable[Refusal]) -> list[Refusal]:
    """Near misses first, in order otherwise."""
    return sorted(refusals, key=lambda refusal: not refusal.near)


def _whole_modules(reading: Reading) -> Iterator[Refusal]:
    for path, unread in reading.unread.items():
        yield Refusal("unread", str(unread), "see the line that stopped it", path=path)
    for path, reason in reading.opaque.items():
        yield Refusal("opaque", reason, "call it once, without hooks", path=path)
    for path, reason in reading.branching.items():
        remedy = "put what does not depend on it into a module of its own"
        yield Refusal("branches", reason, remedy, path=path)


def _of_net(plan: NetPlan, nearness: Nearness) -> Iterator[Refusal]:
    covered = {c for operation in plan.operations.values() for c in operation.covers}
    for value, refusal in plan.boundaries.items():
        if value not in covered:
            yield nearness.alone(refusal, value)
    explained: set[Value] = set()
    for (value, reader), refusal in _pairs(plan):
        explained.add(reader)
        yield nearness.pair(refusal, value, reader)
    for reader, operation in plan.operations.items():
        if len(operation.terms) > 1 and reader not in explained and not plan.gone(reader):
            apart = _why_apart(plan, reader)
            if apart is not None:
                yield nearness.pair(apart[1], apart[0], reader)
    touching = _touching(plan)
    for value, operation in plan.operations.items():
        if operation.norm and not plan.gone(value) and value not in plan.places and value not in plan.dropped:
            yield _lonely(plan, value, touching, nearness)


def _pairs(plan: NetPlan) -> Iterator[tuple[tuple[Value, Value], Refusal]]:
    """Refusals to put one operation into another that still stand; one for all summands refused for one reason."""
    found: dict[tuple[Value, str, str], list[tuple[Value, Refusal]]] = {}
    for (value, reader), refusal in plan.refusals.items():
        if not _stands(plan, value, reader, refusal) or value not in plan.formulas[reader].terms:
            continue
        found.setdefault((reader, refusal.rule, refusal.condition), []).append((value, refusal))
    for (reader, rule, condition), refused in found.items():
        if rule != "branch_sum":
            yield from (((value, reader), refusal) for value, refusal in refused)
            continue
        value, refusal = min(refused, key=lambda pair: pair[0].index)
        others = [f"{v.name} at {v.path or 'the root'}" for v, _ in refused if v is not value]
        if others:
            branches = "the other branch is" if len(others) == 1 else "the other branches are"
            refusal = replace(refusal, condition=f"{condition}; {branches} {', '.join(others)}")
        yield (value, reader), refusal


def _why_apart(plan: NetPlan, reader: Value) -> tuple[Value, Refusal] | None:
    """Why summands that come from one value are not one convolution, where the search gave up before the sum."""
    summands = [root for root in plan.formulas[reader].terms if isinstance(root, Value)]
    reached: dict[Value, set[Value]] = {summand: {summand} for summand in summands}
    formula: Affine = plan.formulas[reader]
    for _ in range(STEPS):
        inside = [r for r in formula.terms if isinstance(r, Value) and r in plan.formulas and not plan.gone(r)]
        if not inside:
            return None
        root = max(inside, key=lambda value: value.index)
        if formula.terms[root].fill is not None and not plan.formulas[root].numeric:
            return None  # whether the constant is that of the padded value, only weights tell
        through = [summand for summand, values in reached.items() if root in values]
        result = substitute(formula, {root: plan.formulas[root]})
        if isinstance(result, Refusal):
            value = through[0] if through else summands[0]
            return (value, result.at(value.path, value.name, reader.name)) if result.rule == "branch_sum" else None
        for summand in through:
            reached[summand].update(r for r in plan.formulas[root].terms if isinstance(r, Value))
        formula = result
    return None


def _stands(plan: NetPlan, value: Value, reader: Value, refusal: Refusal) -> bool:
    """Whether a refused pair is still there, and both do something."""
    gone = any(plan.gone(v) or plan.operations[v].hands_on for v in (value, reader))
    return not gone and refusal.rule != "boundary"


def _touching(plan: NetPlan) -> dict[Value, tuple[Value, Value]]:
    """The first refused pair of every value."""
    found: dict[Value, tuple[Value, Value]] = {}
    for (source, reader), refusal in plan.refusals.items():
        if _stands(plan, source, reader, refusal):
            found.setdefault(source, (source, reader))
            found.setdefault(reader, (source, reader))
    return found


def _lonely(plan: NetPlan, value: Value, touching: Mapping[Value, tuple[Value, Value]], nearness: Nearness) -> Refusal:
    """Why a norm stays."""
    if value in touching:
        source, reader = touching[value]
        refusal = plan.refusals[source, reader].at(value.path, source.name, reader.name)
        return nearness.pair(refusal, source, reader)
    if value in plan.alone:
        return plan.alone[value]
    sources = ", ".join(f"{v.name} at {v.path or 'the root'}" for v in value.inputs)
    users = ", ".join(sorted({f"{v.name}" for v in value.users})) or "the caller"
    return Refusal(
        "norm",
        f"its input ({sources}) and its readers ({users}) are not linear",
        path=value.path,
        operands=(value.name,),
    )
