"""Near misses: refusals whose one condition is all that parts two operations.

A refusal names the first condition that failed. Where the two formulas can be put together once it is lifted, that is
done, and the cost policy is asked: a refusal is near only if the merged operation would also be taken. Where they
cannot (branches of unequal sizes, weights of two data types), it is near if it has a remedy.
"""

from dataclasses import replace
from typing import Final, final

from reparam.algebra import Refusal, substitute
from reparam.cost import Cost
from reparam.graph.net import Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.worth import Worth

BY_OPTION: Final = frozenset(["cost", "excluded"])  # the remedy is another argument, not another model
BY_EXAMPLE: Final = ("give example_inputs", "give an example input")  # so is this
NO_FORMULA: Final = frozenset(["branch_sum", "conv_after_conv", "pad"])  # what would be merged has no formula
STEPS: Final = 32  # operations that are looked at beside one


@final
class Nearness:
    """Tells which refusals of one net are near misses."""

    def __init__(self, plan: NetPlan, cost: Cost) -> None:
        self.plan = plan
        untouched = {value: formula for value, formula in plan.formulas.items() if value not in plan.places}
        self.worth = Worth(cost, plan.sizes, untouched, plan.operations)

    def pair(self, refusal: Refusal, value: Value, reader: Value) -> Refusal:
        """The refusal to put ``value`` into ``reader``, marked if it is a near miss."""
        return replace(refusal, near=self._pair_is_near(refusal, value, reader))

    def alone(self, refusal: Refusal, value: Value) -> Refusal:
        """The refusal to read one operation as linear, marked if a neighbour is linear."""
        return replace(refusal, near=_by_model(refusal) and self._has_neighbour(value))

    def _pair_is_near(self, refusal: Refusal, value: Value, reader: Value) -> bool:
        if not _by_model(refusal):
            return False
        if refusal.rule in NO_FORMULA:
            return True
        before = {value: self.plan.formulas[value], reader: self.plan.formulas[reader]}
        if value not in before[reader].terms:
            return False
        merged = substitute(before[reader], {value: before[value]}, trusted=True)
        return not isinstance(merged, Refusal) and self.worth.gain(before, {reader: merged}) is None

    def _has_neighbour(self, value: Value) -> bool:
        """Whether it would meet a linear operation: in front of it, behind it, or beside it in a sum."""
        return any(self._computes(v) for v in (*value.inputs, *value.users)) or any(
            self._has_brother(value, user) for user in value.users
        )

    def _computes(self, value: Value) -> bool:
        """Whether a value is linear and more than a copy, or a sum of copies."""
        operation = self.plan.operations.get(value)
        if operation is None:
            return False
        return operation.bias is not None or not all(conv.identity for conv in operation.terms.values())

    def _has_brother(self, value: Value, total: Value) -> bool:
        """Whether another summand of ``total`` is a linear function of what ``value`` reads."""
        operation = self.plan.operations.get(total)
        pending = [] if operation is None else [summand for summand in operation.terms if summand is not value]
        for _ in range(STEPS):
            if not pending:
                return False
            found = pending.pop()
            if found in value.inputs:
                return True
            if found in self.plan.operations:
                pending += self.plan.operations[found].terms
        return False


def _by_model(refusal: Refusal) -> bool:
    """Whether the remedy is a change of the model."""
    return bool(refusal.remedy) and refusal.rule not in BY_OPTION and refusal.remedy not in BY_EXAMPLE
