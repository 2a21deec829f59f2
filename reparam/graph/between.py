"""What stands between the linear operations of a net: the reason why they are no larger regions."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from reparam.algebra import Refusal
from reparam.graph.calls import name_of
from reparam.graph.in_place import VIEWS
from reparam.graph.net import Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.sizes import is_plain

MOVES: Final = frozenset([*VIEWS, "reshape", "reshape_as", "cat", "concat", "concatenate", "stack"])


def boundaries(plans: Iterable[NetPlan]) -> tuple[Refusal, ...]:
    """One refusal for each kind of operation that lies between linear ones and is not linear, the first of its kind."""
    first: dict[tuple[str, str, str], tuple[Refusal, int]] = {}
    for plan in plans:
        for value in _between(plan):
            refusal = plan.alone.get(value) or plan.boundaries.get(value)
            refusal = refusal or Refusal("boundary", f"{value.name} is no affine convolution")
            key = (value.name, refusal.rule, refusal.condition)
            found, count = first.get(key, (refusal.at(value.path, value.name), 0))
            first[key] = found, count + 1
    return tuple(
        replace(refusal, condition=f"{refusal.condition} ({count} times)") if count > 1 else refusal
        for refusal, count in first.values()
    )


def _between(plan: NetPlan) -> list[Value]:
    """Operations that are not linear, with linear ones on both sides, or on one if they might have been linear."""
    work = {v for v, operation in plan.operations.items() if any(not c.identity for c in operation.terms.values())}
    behind: set[Value] = set()
    for value in plan.net.values:
        if any(source in work or source in behind for source in value.inputs):
            behind.add(value)
    before: set[Value] = set()
    for value in reversed(plan.net.values):
        if any(user in work or user in before for user in value.users):
            before.add(value)
    covered = {c for operation in plan.operations.values() for c in operation.covers}
    return [
        value
        for value in plan.net.values
        if (value in behind) + (value in before) + (value in plan.boundaries or value in plan.alone) >= 2
        and value not in plan.operations
        and value not in covered
        and not is_plain(value)
        and name_of(value) not in MOVES
    ]
