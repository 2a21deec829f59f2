"""Read one module: its forward as a small ``torch.fx`` graph with every child a leaf.

Parameters stay concrete while tracing, so that generated weights become constants and ``if self.alpha:`` works.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from reparam.graph.arguments import ArgumentSpec, filled, has_hole
from reparam.graph.callers import LOOKS_UP
from reparam.graph.code import ASKS_NONE, code_of
from reparam.graph.examples import Examples
from reparam.graph.going_through import Survey, noting_attributes
from reparam.graph.modes import current_mode
from reparam.graph.proxy import EXAMPLE
from reparam.graph.questions import asking_types, asks_classes_of
from reparam.graph.reading import ACTIVE, traced_builtins
from reparam.graph.readings import call_as_users_do, holds_type, operations, reads_parts
from reparam.graph.sequences import Ranks, holds
from reparam.graph.snapshot import Snapshot
from reparam.graph.splices import ITERATED
from reparam.graph.tensor_writes import changed_meanwhile, writes_to_tensors
from reparam.graph.tracer import Kinds, Lacking, Tracer
from reparam.graph.unread import Unread, first_line, place_of, raised_by_user

MOST_ATTEMPTS: Final = 64  # each condition that is an assertion costs one
MOST_OUTCOMES: Final = 8  # that are not the same


@final
@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The forward of one module.

    Args:
        module: the module.
        arguments: with what it was read.
        graph: its operations; children are ``call_module`` nodes.
        inputs: placeholder nodes by parameter name.
        tensors: of every ``get_attr`` node, the tensor; names that start with ``_constant`` were computed while
            tracing.
        read: qualified names of the parameters and buffers that were read.
        types_read: names among these of which nothing but the type or device was asked, going through all of a module.
        fixed_type: whether a type or device that the forward asked of a tensor stands in the graph.
        touched: dotted paths of modules below the children that were looked at.
        kinds: of which descendants it was asked whether they are of some classes, with the answers.
        lacking: what descendants were asked for and do not have.
        surveys: of which descendants, or of itself, it went through all children or tensors.
        modes: nodes under another autocast or gradient mode than the caller's.
        specialised: whether sizes of the example input went into the graph.
        cache: a collection of the module that the forward fills; empty if none.
        computed: whether the forward computed with tensors alone, so that the graph may depend on what they hold.
        within: nodes that methods of the module compute: names and numbers of the calls, outermost first.
        recast: a class of lists or dicts that the forward makes and the graph holds as plain ones; empty if none.
        typed: arguments of which it was asked what they are, or have, with the classes; None if these are unknown.
        doubtful: why a call may take another way than the one that was read; empty if there is no reason to doubt.
        otherwise: what it does for other outcomes of its conditions on the input.
        branches: the line of code with the last of these conditions; empty if there is one outcome.
        sharers: modules that have the same graph, being alike, beside the one that was read.
    """

    module: nn.Module
    arguments: ArgumentSpec
    graph: fx.Graph
    inputs: Mapping[str, fx.Node]
    tensors: Mapping[str, Tensor]
    read: Mapping[int, str]
    types_read: frozenset[str]
    fixed_type: bool
    touched: frozenset[str]
    kinds: tuple[Kinds, ...]
    lacking: tuple[Lacking, ...]
    surveys: frozenset[Survey]
    modes: Mapping[fx.Node, tuple[bool, ...]]
    specialised: bool = False
    computed: bool = True
    within: Mapping[fx.Node, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    cache: str = ""
    recast: str = ""
    typed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    doubtful: str = ""
    otherwise: "tuple[Trace, ...]" = ()
    branches: str = ""
    sharers: list[nn.Module] = field(default_factory=list)

    @property
    def several(self) -> str:
        """Why a call may do something else than the graph; empty if it does this."""
        return self.doubtful or (f"its forward branches on its input ({self.branches})" if self.otherwise else "")


def trace(
    module: nn.Module,
    arguments: ArgumentSpec,
    examples: Examples | None = None,
    method: str = "forward",
) -> Trace | Unread:
    """Read ``module.forward``; must run inside ``reading()``.

    Every outcome of a condition on the input is followed, unless it raises an error or does the same. Functions that
    their author marked by ``torch.fx.wrap`` are one operation where they cannot be looked into. The module is left as
    it was, also if its forward writes to itself (which is then a reason not to trust the reading).

    Args:
        module: the module.
        arguments: for each parameter of its forward a constant, a hole, or a structure of them.
        examples: sizes of its inputs and of the results of its children.
        method: what is read instead of the forward.
    """
    refused = _not_python(module)
    if refused is not None:
        return refused
    result = _follow(module, arguments, examples, method)
    numbers = isinstance(result, Unread) and result.reason.startswith("TypeError")
    if numbers:
        result = _follow(module, arguments, examples, method, numbers=True)
    if isinstance(result, Unread) or result.otherwise:
        closed = _follow(module, arguments, examples, method, opens=False, numbers=numbers)
        if isinstance(closed, Trace) and (isinstance(result, Unread) or not closed.otherwise):
            return closed
    if isinstance(result, Unread) and ITERATED in result.reason and examples is None:
        return _spliced(module, arguments, method) or result
    return result


def _spliced(module: nn.Module, arguments: ArgumentSpec, method: str) -> Trace | None:
    """Read a forward that puts shapes of unknown length into other sequences; None if it does more with them."""
    for numbers in (False, True):
        result = _follow(module, arguments, None, method, numbers=numbers, splices=True)
        if isinstance(result, Trace):
            break
    else:
        return None

    def counted(ranks: Ranks) -> Trace | bool:
        found = _follow(module, arguments, None, method, numbers=numbers, ranks=ranks)
        if isinstance(found, Unread):
            return found.raised or found.reason.startswith(("ValueError", "IndexError"))
        return not found.otherwise and found

    return result if not result.otherwise and holds(result, counted) else None


def _follow(
    module: nn.Module,
    arguments: ArgumentSpec,
    examples: Examples | None,
    method: str,
    *,
    opens: bool = True,
    numbers: bool = False,
    splices: bool = False,
    ranks: Ranks | None = None,
) -> Trace | Unread:
    """Read a forward along the outcomes of its conditions that do not raise."""
    found: list[Trace] = []
    branches = ""
    answers: list[bool] = []
    for _ in range(MOST_ATTEMPTS):
        tracer = Tracer(module, examples, answers, method)
        tracer.opens, tracer.numbers, tracer.splices = opens, numbers, splices
        tracer.ranks = ranks
        result = _attempt(tracer, arguments, method)
        answers = tracer.answers[: len(tracer.asked)]
        if not isinstance(result, _Raised):
            if isinstance(result, Unread):
                return result
            if not any(_same(other, result) for other in found):
                found.append(result)
                branches = tracer.asked[-1][1] if tracer.asked else ""
            if len(found) > MOST_OUTCOMES:
                read = frozenset(tracer.read.values())
                return Unread("TraceError: the forward branches on its input", branches, read)
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            break
        answers[-1] = False
    else:
        read = frozenset(tracer.read.values())
        return Unread("TraceError: its forward has too many conditions on its input", tracer.asked[-1][1], read)
    if found:
        return _together(found, branches)
    assert isinstance(result, _Raised)
    return replace(result.unread, raised=True)


def _together(outcomes: list[Trace], branches: str) -> Trace:
    """The first of several outcomes, with what all of them look at."""
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    looked_at = frozenset(name for other in outcomes for name in {*other.read.values()} - other.types_read)
    return replace(
        first,
        types_read=frozenset().union(*(other.types_read for other in outcomes)) - looked_at,
        fixed_type=any(other.fixed_type for other in outcomes),
        read={key: name for other in reversed(outcomes) for key, name in other.read.items()},
        touched=frozenset().union(*(other.touched for other in outcomes)),
        kinds=tuple(kind for other in outcomes for kind in other.kinds),
        lacking=tuple(lack for other in outcomes for lack in other.lacking),
        surveys=frozenset().union(*(other.surveys for other in outcomes)),
        doubtful=next((other.doubtful for other in outcomes if other.doubtful), ""),
        typed={name: kinds for other in outcomes for name, kinds in other.typed.items()},
        otherwise=tuple(outcomes[1:]),
        branches=branches,
    )


@final
@dataclass(frozen=True, slots=True)
class _Raised:
    """The forward raised an error of its own."""

    unread: Unread


def _attempt(tracer: Tracer, arguments: ArgumentSpec, method: str) -> "Trace | Unread | _Raised":
    try:
        found = _record(tracer, arguments, method)
    finally:
        tracer.release()
    if tracer.left_behind() and isinstance(found, Trace):
        return Unread("forward keeps values beyond its call", read=frozenset(found.read.values()))
    return found


def _record(tracer: Tracer, arguments: ArgumentSpec, method: str) -> "Trace | Unread | _Raised":
    module = tracer.root
    snapshot = tracer.snapshot = Snapshot(module)
    held = tuple(value for value in vars(module).values() if type(value) is FunctionType)
    code = tracer.code = code_of(type(module), method, held)
    inputs: dict[str, fx.Node] = {}
    try:
        with torch.enable_grad():
            tracer.mode = current_mode()
            values = {}
            for name, spec in arguments.items():
                values[name] = spec
                if has_hole(spec):
                    placeholder = tracer.create_proxy("placeholder", name, (), {})
                    inputs[name] = placeholder.node
                    if tracer.examples is not None and tracer.examples.argument(name) is not None:
                        placeholder.node.meta[EXAMPLE] = tracer.examples.argument(name)
                    values[name] = filled(spec, placeholder)
            ACTIVE.append(tracer)
            try:
                with (
                    traced_builtins(tracer.opens, tracer.numbers),
                    asking_types(code, tracer),
                    noting_attributes(code, tracer),
                    tracer.watch,
                ):
                    result = call_as_users_do(module, method, values)
                tracer.returning = True
                output = tracer.create_arg(result)
            finally:
                ACTIVE.pop()
            tracer.graph.output(output)
    except Exception as error:  # user code under symbolic values can raise anything
        snapshot.restore(tracer.before)
        read, written = frozenset(tracer.read.values()), frozenset(tracer.written)
        unread = Unread(first_line(error), place_of(error), read, written=written)
        return _Raised(unread) if raised_by_user(error) else unread
    meanwhile = changed_meanwhile(tracer.watch.changed, ((tracer.read[id(t)], t) for t in tracer.kept))
    changed = snapshot.restore(tracer.before) or writes_to_tensors(tracer.graph)
    if changed or meanwhile:
        owners = frozenset(name.rpartition(".")[0] for name in meanwhile) - {""}
        reason = changed or f"forward changes {meanwhile[0]} for a while"
        return Unread(reason, read=frozenset(tracer.read.values()), written=owners)
    return Trace(
        module=module,
        arguments=arguments,
        graph=tracer.graph,
        inputs=inputs,
        tensors=tracer.tensors,
        read=dict(tracer.read),
        types_read=tracer.types_read(),
        fixed_type=not tracer.watch.asked_type.isdisjoint(tracer.read) and holds_type(tracer.graph),
        touched=frozenset(tracer.touched),
        kinds=(*tracer.kinds, *(asks_classes_of(module, tracer.touched) if code.asks_class else ())),
        lacking=tuple(tracer.lacking),
        surveys=tracer.going_through.all(tracer.watch.asked_type | tracer.watch.looked_at),
        modes=tracer.modes,
        specialised=tracer.specialised,
        computed=tracer.watch.computed,
        within=tracer.within,
        cache=snapshot.cached,
        recast=tracer.recast,
        typed={
            **(dict.fromkeys(inputs, (None,)) if code.asks_class else {}),
            **{name: tuple(kinds) for name, kinds in tracer.typed.items()},
        },
        doubtful=code.doubtful
        or (ASKS_NONE if code.asks_none and reads_parts(tracer.graph) else "")
        or ("" if tracer.doubtful == LOOKS_UP and snapshot.cached else tracer.doubtful),
    )


def _same(a: Trace, b: Trace) -> bool:
    """Whether two readings of one forward are the same operations, apart from the conditions themselves."""
    return operations(a.graph, a.tensors, a.modes) == operations(b.graph, b.tensors, b.modes)


def _not_python(module: nn.Module) -> Unread | None:
    if isinstance(module, torch.jit.ScriptModule):
        return Unread("the module is scripted")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return Unread("the module is lazy and has no weights yet; run it once")
    if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
        return Unread(f"{type(module).__name__} overrides __call__")
    return None
