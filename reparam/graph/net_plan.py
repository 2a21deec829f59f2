"""What happens to the values of one net, and the numbers that follow from it."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import final

from reparam.algebra import Affine, Refusal, substitute
from reparam.graph.lift import Known
from reparam.graph.net import Net, Value
from reparam.graph.operation import Operation, absorbed
from reparam.graph.placing import Place
from reparam.graph.wraps import Wrap, wrapped


@final
@dataclass(eq=False)
class NetPlan:
    """What happens to the values of one net.

    Args:
        net: the net.
        known: spaces and effects of its values.
        operations: affine values.
        boundaries: values that could be linear and are not, with the reason.
        formulas: current formula of every affine value.
        inlined: values that disappear.
        handed: norms that others took over through passages: each hands on its input.
        places: where each changed value is emitted.
        refusals: what was tried and refused, by value and reader.
        sizes: relative spatial elements of each value.
        dead: values that nothing needs.
        spread: values that disappeared into several readers.
        wraps: scales and shifts that a value takes over through passages.
        groups: each norm that was taken over, with those that share it.
        alone: why a norm was not taken over.
        dropped: norms whose value nothing reads.
    """

    net: Net
    known: Known
    operations: dict[Value, Operation]
    boundaries: dict[Value, Refusal]
    formulas: dict[Value, Affine]
    sizes: dict[Value, float]
    inlined: dict[Value, None] = field(default_factory=dict)
    handed: dict[Value, None] = field(default_factory=dict)
    places: dict[Value, Place] = field(default_factory=dict)
    refusals: dict[tuple[Value, Value], Refusal] = field(default_factory=dict)
    dead: set[Value] = field(default_factory=set)
    spread: dict[Value, list[Value]] = field(default_factory=dict)
    wraps: dict[Value, list[Wrap]] = field(default_factory=dict)
    groups: list[tuple[Value, list[Value]]] = field(default_factory=list)
    alone: dict[Value, Refusal] = field(default_factory=dict)
    dropped: list[Value] = field(default_factory=list)

    def gone(self, value: Value) -> bool:
        """Whether nothing computes a value any more as it was."""
        return value in self.inlined or value in self.handed

    def changed(self) -> list[Value]:
        """Materialised values into which others disappeared, in order of execution."""
        return [v for v in self.operations if v not in self.inlined and v in self.places]

    def absorbed(self, value: Value) -> list[Value]:
        """All values that disappeared into ``value``, in order of execution."""
        return absorbed(self.operations, self.inlined, value)

    def numbers(self, value: Value) -> Affine:
        """The formula of a value with weights."""
        formula = numbers(self.operations, self.inlined, value, pending=True)
        for wrap in self.wraps.get(value, ()):
            result = wrapped(formula, value, wrap, numbers(self.operations, self.inlined, wrap.norm))
            if isinstance(result, Refusal):
                raise AssertionError(f"a planned formula cannot be computed: {result}")
            formula = result
        return formula


def numbers(
    operations: Mapping[Value, Operation], inlined: Container[Value], value: Value, *, pending: bool = False
) -> Affine:
    """The formula of ``value`` with weights, the formulas of ``inlined`` put in.

    Args:
        operations: by value.
        inlined: what is put in.
        value: whose formula it is.
        pending: whether large weights are left to be computed, see ``reparam.algebra.Pending``.
    """
    done: dict[Value, Affine] = {}
    result: Affine | Refusal = Affine({})
    for v in (*absorbed(operations, inlined, value), value):
        formula = operations[v].numbers(pending)
        inner = {source: done[source] for source in formula.terms if source in done}
        result = substitute(formula, inner, trusted=True) if inner else formula
        if isinstance(result, Refusal) or any(root in inlined for root in result.terms):
            result = _from_outside(operations, inlined, v)
        if isinstance(result, Affine):
            done[v] = result
    if isinstance(result, Refusal):
        raise AssertionError(f"a planned formula cannot be computed: {result}")
    return result


def _from_outside(operations: Mapping[Value, Operation], inlined: Container[Value], value: Value) -> Affine | Refusal:
    """The same, one operation after the other from the last to the first.

    A layer between two changes of layout is a convolution, and a part of the three behind a convolution is none.
    """
    formula: Affine | Refusal = operations[value].numbers()
    while isinstance(formula, Affine):
        inside = [root for root in formula.terms if isinstance(root, Value) and root in inlined]
        if not inside:
            break
        last = max(inside, key=lambda root: root.index)
        formula = substitute(formula, {last: operations[last].numbers()}, trusted=True)
    return formula
