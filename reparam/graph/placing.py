"""Where a fused convolution can stand.

The values that disappear must be taken out of the forwards in which they stand, and the new operation must stand where
all its inputs are known. In order of preference:

- *swap*: the values are a chain of child modules; the convolution replaces one of them, the others become
  ``nn.Identity``, and no forward changes;
- *container*: they are all that a module does; the convolution replaces the module;
- *edit*: the forward of one module is generated anew, which is also the place to ask for the rank of an input. It is
  the innermost one that knows the result and in which, or below which, all that disappears is computed; if there is
  none, the one in which the result is computed, and its callers no longer compute what they gave it.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import final

from torch import nn

from reparam.algebra import Affine, Refusal
from reparam.graph.asked import noticed
from reparam.graph.build import kind_of
from reparam.graph.idle import idle_in_callers
from reparam.graph.net import Frame, Value
from reparam.graph.operation import Operation, absorbed


class Mode(Enum):
    """How a fused operation enters the model."""

    SWAP = "a child is replaced"
    CONTAINER = "the module is replaced"
    EDIT = "the forward is generated"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where and how a fused value is emitted.

    Args:
        at: the value in whose position the new operation stands.
        mode: how it gets there.
        stands_for: per root, the value that carries it in the frame of ``at`` after the rewrite.
        passed: values that hand on their input from now on.
        container: the frame whose module is replaced.
        caller: the frame whose forward is generated, if it is not that of ``at`` but one that calls it.
        idle: values that callers of that frame compute for it alone, and so need not any more; each with the caller.
        bared: norms of which nothing but the statistics is left.
    """

    at: Value
    mode: Mode
    stands_for: Mapping[Value, Value]
    passed: tuple[Value, ...]
    container: Frame | None = None
    caller: Frame | None = None
    idle: Mapping[Value, Frame] = field(default_factory=dict)
    bared: tuple[Value, ...] = ()

    @property
    def frame(self) -> Frame:
        """The frame in which the new operation stands."""
        return self.caller or self.at.frame


@final
@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """What may be changed where.

    Args:
        passable: why a value cannot be taken out of the forward in which it stands, or of one that calls that; empty
            if it can.
        crossing: why values cannot be joined, because another entry point of their module lies between; empty if they
            can.
        exposed: why values cannot vanish, because another forward than one that is generated reads their parameters.
        replaceable: why the child that a value calls cannot be replaced; empty if it can.
        container: why the module of a frame cannot be replaced; empty if it can.
        mistaken: why a module cannot be replaced by one of another class, which a forward would notice, other than
            that of a frame that is generated; empty if it can.
    """

    passable: Callable[[Value, Frame], str]
    crossing: Callable[[Iterable[Value]], str]
    exposed: Callable[[Iterable[Value], Iterable[Value], Place], str]
    replaceable: Callable[[Value], str]
    container: Callable[[Frame], str]
    mistaken: Callable[[str, Callable[[], type[nn.Module]], Frame | None], str]


def place(
    reader: Value,
    formula: Affine,
    operations: Mapping[Value, Operation],
    inlined: Container[Value],
    site: Site,
    dead: Set[Value],
    shared: Container[Value] = (),
) -> Place | Refusal:
    """Where to compute ``formula`` as the value of ``reader``, or why nowhere; not where ``shared`` values stand."""
    if any(conv.fill is not None and not conv.never_outside for conv in formula.terms.values()):
        return Refusal("pad", "no torch convolution pads by one constant per channel")
    if any(conv.order is not None for conv in formula.terms.values()):
        return Refusal("layout", "its axes stand in another order than those of its input")
    if all(conv.moves for conv in formula.terms.values()):
        return Refusal("cost", "it only moves channels, which no convolution does at less")
    members = [*absorbed(operations, inlined, reader), reader]
    crossing = site.crossing(members)
    covered = [value for member in members for value in operations[member].covers]
    if crossing:
        return Refusal("entry_point", crossing, "compute them in one method, whatever its arguments are")
    path = [reader]
    while len(operations[path[-1]].terms) == 1:
        (source,) = operations[path[-1]].terms
        if source not in inlined:
            break
        path.append(source)
    looked_at = next((value for value in members if operations[value].looked_at and value not in path), None)
    if looked_at is not None:
        return Refusal("used_elsewhere", f"the shape of {looked_at.name} at {looked_at.path or 'the root'} is read")
    chain = len(operations[path[-1]].terms) == 1
    if chain:
        swap = _swap(path, formula, operations, site, shared)
        if swap is not None and not site.exposed(members, covered, swap):
            return swap
    if any(conv.sized for conv in formula.terms.values()):
        return Refusal("place", "its size is asked for where it is called", "use output_padding")
    candidates = [value for value in (path if chain else path[::-1]) if value not in shared]
    if chain:
        candidates.sort(key=lambda v: _size(operations[v]), reverse=True)
    step = _Step(path, members, covered, formula, operations, inlined, site, dead)
    reasons = []
    for at in candidates:
        result = _edit(step, at)
        if isinstance(result, Place):
            return result
        reasons.append(result)
    return Refusal("place", reasons[0], "change that, or compute it in a module of its own")


def _size(operation: Operation) -> tuple[bool, int, int]:
    conv = next(iter(operation.terms.values()))
    return (not conv.diagonal, conv.taps, conv.in_channels * conv.out_channels // max(conv.groups, 1))


def _swap(
    path: list[Value], formula: Affine, operations: Mapping[Value, Operation], site: Site, shared: Container[Value]
) -> Place | None:
    """A convolution of a chain is a child that can be replaced, and the other values can hand on their input."""
    if any(site.passable(value, value.frame) for value in path if value.module is None):
        return None
    if any(site.replaceable(value) for value in path if value.module is not None):
        return None
    convs = [
        value
        for value in path
        if value.module is not None
        and not next(iter(operations[value].terms.values())).diagonal
        and not (operations[value].looked_at and value is not path[0])
        and value not in shared
    ]
    if not convs:
        return None
    sized = [value for value in convs if next(iter(operations[value].terms.values())).sized]
    at = max(sized or convs, key=lambda v: (_size(operations[v]), -v.index))
    (root,) = operations[path[-1]].terms
    (operand,) = operations[at].terms
    for value in path:
        kind = (lambda: kind_of(formula)) if value is at else (lambda: nn.Identity)
        if value.module is not None and site.mistaken(value.path, kind, None):
            return None
    return Place(at, Mode.SWAP, {root: operand}, tuple(v for v in path if v is not at))


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A fused value that is to stand in a generated forward: its chain, what it takes up and covers, what decides."""

    path: list[Value]
    members: list[Value]
    covered: list[Value]
    formula: Affine
    operations: Mapping[Value, Operation]
    inlined: Container[Value]
    site: Site
    dead: Set[Value]


def _edit(step: _Step, at: Value) -> Place | str:
    """A place in the innermost forward that will do of those that know ``at``."""
    best: Place | str = ""
    for home in at.frame.upwards():
        if home.local(at) is None:
            break
        found = _edit_in(step, home, at)
        if isinstance(found, Place):
            found = step.site.exposed(step.members, step.covered, found) or found
        if isinstance(found, Place):
            idle = idle_in_callers(home, [*step.members, *step.covered], found.passed, step.site.passable)
            if not idle:
                return found
            found = idle if isinstance(idle, str) else replace(found, idle=idle)
        if not best or (isinstance(best, str) and isinstance(found, Place)):
            best = found
    return best


def _edit_in(step: _Step, home: Frame, at: Value) -> Place | str:
    """The place of ``at`` in one forward."""
    path, formula, operations, inlined, site = step.path, step.formula, step.operations, step.inlined, step.site
    vanishing = [*step.members, *step.covered]
    passed = list(path[: path.index(at)])
    in_front: list[Value] = []
    stands_for: dict[Value, Value] = {}
    for root in formula.terms:
        assert isinstance(root, Value)
        found = _carrier(home, root, at, operations, inlined)
        if found is None:
            return f"{root.name} at {root.path or 'the root'} is not known where the sum is formed"
        stands_for[root], steps = found
        in_front.extend(steps)
    passed += in_front
    for value in path[1:]:
        if operations[value].looked_at and value not in passed:
            return f"the shape of {value.name} at {value.path or 'the root'} is read"
    for value in passed:
        reason = site.passable(value, value.frame) if value.module is None or site.replaceable(value) else ""
        if not reason and value.module is not None and value.frame is not home:
            reason = site.mistaken(value.path, lambda: nn.Identity, None)
        if reason:
            return reason
    if home is at.frame:
        container, behind = _covered(at, path, list(stands_for.values()), operations, inlined, step.dead)
        ranks = operations[path[0]].assumed_rank or any(
            operations[v].rank_if_gone for v in absorbed(operations, inlined, path[0])
        )
        whole = container is not None and not ranks and not site.container(container)
        if container is not None and whole and not site.mistaken(container.path, lambda: kind_of(formula), None):
            return Place(at, Mode.CONTAINER, stands_for, (*behind, *in_front), container)
    reason = site.passable(at, home) or noticed(home, formula, vanishing, operations, site.mistaken)
    if reason:
        return reason
    return Place(at, Mode.EDIT, stands_for, tuple(passed), caller=None if home is at.frame else home)


def _carrier(
    frame: Frame, root: Value, at: Value, operations: Mapping[Value, Operation], inlined: Container[Value]
) -> tuple[Value, list[Value]] | None:
    """A value known in ``frame`` that carries ``root`` once the values between them hand on their input."""
    if frame.local(root) is not None:
        return root, []
    for value in frame.locals:
        steps, step = [], value
        while step in inlined and step is not at and len(operations[step].terms) == 1:
            steps.append(step)
            (step,) = operations[step].terms
            if step is root:
                return value, steps
    return None


def _covered(
    at: Value,
    path: list[Value],
    sources: list[Value],
    operations: Mapping[Value, Operation],
    inlined: Container[Value],
    dead: Set[Value],
) -> tuple[Frame | None, list[Value]]:
    """The frame whose whole work is this formula of ``sources``, and the values behind it that hand on its result."""
    frame = at.frame
    inputs = [frame.env[node] for node in frame.trace.inputs.values()]
    if frame.parent is None or frame.call is None or len(inputs) != 1 or inputs != sources:
        return None, []
    if len(frame.call.args) + len(frame.call.kwargs) != 1:
        return None, []
    result = frame.parent.env.get(frame.call)
    if result not in path[: path.index(at) + 1]:
        return None, []
    behind = path[: path.index(result)]
    members = [v for v in (*absorbed(operations, inlined, path[0]), path[0]) if v not in behind]
    known = {*members, *(c for value in members for c in operations[value].covers)}
    whole = all(value in known or value in dead for value in frame.below())
    return (frame, behind) if whole else (None, [])
