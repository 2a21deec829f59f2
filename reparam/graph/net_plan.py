"""What happens to the values of one net, and the numbers that follow from it."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch

from reparam.algebra import Affine, Refusal, substitute
from reparam.algebra.bias_map import flattened
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
        groupings: of a sum whose branches become several convolutions of one input: the input's name by branch.
        aliases: what such a name stands for.
        bared: norms of which nothing but the statistics is left; their operation is the scale and shift that went.
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
    groupings: dict[Value, dict[Value, Value]] = field(default_factory=dict)
    aliases: dict[Value, Value] = field(default_factory=dict)
    bared: list[Value] = field(default_factory=list)
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

    def alias(self, root: Value, number: int) -> Value:
        """Another name for a value, so that a formula can have several convolutions of it."""
        known = [name for name, meant in self.aliases.items() if meant is root]
        while len(known) < number:
            known.append(replace(root))
            self.aliases[known[-1]] = root
            self.sizes[known[-1]] = self.sizes[root]
            for frame in self.net.frames:
                if root in frame.locals:
                    frame.locals[known[-1]] = frame.locals[root]
        return known[number - 1]

    def part(self, value: Value, root: Value) -> list[Value]:
        """The values in ``value`` that one of its terms contains, as far as its terms are groups of branches."""
        names = self.groupings.get(value, {})
        inside = {
            m for b, name in names.items() if name is root or root not in names.values() for m in (b, *self.absorbed(b))
        }
        return [m for m in (*self.absorbed(value), value) if (m in inside) == (root in self.aliases)]

    def members(self, value: Value) -> list[Value]:
        """``value``, what disappeared into it, and the branches that it took over with what disappeared into them."""
        joined = [wrap.joined for wrap in self.wraps.get(value, ()) if wrap.joined is not None]
        return [*(m for other in joined for m in self.members(other)), *self.absorbed(value), value]

    def weighing(self, value: Value) -> list[Value]:
        """All values whose numbers the formula of a value is made of."""
        return [*self.members(value), *(wrap.norm for wrap in self.wraps.get(value, ()))]

    def numbers(self, value: Value) -> Affine:
        """The formula of a value with weights."""
        device = _device(self.weighing(value))
        formula = numbers(self.operations, self.inlined, value, self.groupings.get(value), device, pending=True)
        for wrap in self.wraps.get(value, ()):
            if wrap.joined is None:
                other = numbers(self.operations, self.inlined, wrap.norm, device=device)
            else:
                other = self.numbers(wrap.joined)
            result = wrapped(formula, value, wrap, other)
            if isinstance(result, Refusal):
                raise AssertionError(f"a planned formula cannot be computed: {result}")
            formula = result
        if self.formulas[value].size is None and formula.size is not None:
            assert formula.bias is not None  # what was padded and cropped again
            formula = replace(formula, bias=flattened(formula.bias), size=None)
        return formula


def numbers(
    operations: Mapping[Value, Operation],
    inlined: Container[Value],
    value: Value,
    names: Mapping[Value, Value] | None = None,
    device: torch.device | None = None,
    *,
    pending: bool = False,
) -> Affine:
    """The formula of ``value`` with weights, the formulas of ``inlined`` put in.

    Args:
        operations: by value.
        inlined: what is put in.
        value: whose formula it is.
        names: by branch, another name for its one input, so that it is not joined with the others.
        device: where the numbers meet; None: where the weights of the operations are.
        pending: whether large weights are left to be computed, see ``reparam.algebra.Pending``.
    """
    result = folded(operations, inlined, value, names, device, pending=pending)
    if isinstance(result, Refusal):
        raise AssertionError(f"a planned formula cannot be computed: {result}")
    return result


def folded(
    operations: Mapping[Value, Operation],
    inlined: Container[Value],
    value: Value,
    names: Mapping[Value, Value] | None = None,
    device: torch.device | None = None,
    *,
    pending: bool = False,
    numeric: bool = True,
) -> Affine | Refusal:
    """The same, or without weights, or why a part of a planned formula is none by itself."""
    done: dict[Value, Affine] = {}
    result: Affine | Refusal = Affine({})
    members = (*absorbed(operations, inlined, value), value)
    device = _device(members) if numeric and device is None else device
    for v in members:
        formula = operations[v].numbers(pending, device) if numeric else operations[v].structure
        inner = {source: done[source] for source in formula.terms if source in done}
        result = substitute(formula, inner, trusted=True) if inner else formula
        if isinstance(result, Refusal) or any(root in inlined for root in result.terms):
            result = _from_outside(operations, inlined, v, device, numeric=numeric)
        if isinstance(result, Affine):
            if names is not None and v in names:
                (conv,) = result.terms.values()
                result = replace(result, terms={names[v]: conv})
            done[v] = result
    return result


def _device(values: Iterable[Value]) -> torch.device | None:
    """Where the weights of some values are, and so the numbers of pools and scales, which are made on the CPU.

    None, if they hold no tensor, or on a device without float64, where they come from the CPU, too.
    """
    device = next((tensor.device for value in values for tensor in value.tensors()), None)
    return None if device is None or device.type == "mps" else device


def _from_outside(
    operations: Mapping[Value, Operation],
    inlined: Container[Value],
    value: Value,
    device: torch.device | None,
    *,
    numeric: bool = True,
) -> Affine | Refusal:
    """The same, one operation after the other from the last to the first.

    A layer between two changes of layout is a convolution, and a part of the three behind a convolution is none.
    """
    formula: Affine | Refusal = operations[value].numbers(device=device) if numeric else operations[value].structure
    while isinstance(formula, Affine):
        inside = [root for root in formula.terms if isinstance(root, Value) and root in inlined]
        if not inside:
            break
        last = max(inside, key=lambda root: root.index)
        inner = operations[last].numbers(device=device) if numeric else operations[last].structure
        formula = substitute(formula, {last: inner}, trusted=True)
    return formula
