"""One trace for modules that are alike."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx, nn

from reparam.graph.trace import Trace
from reparam.graph.tracer import Tracer


def can_be_shared(traced: Trace) -> bool:
    """Whether modules that are alike have the same trace: what it reads is registered and goes into operations only."""
    names = {*traced.read.values(), *traced.tensors}
    return not (traced.computed or traced.specialised or traced.otherwise) and not any(
        name.startswith("_constant") for name in names
    )


def of_its_like(traced: Trace, module: nn.Module) -> Trace:
    """The trace of a module that is like the one which was read; the two share one graph."""
    traced.sharers.append(module)
    own = {name: _registered(module, name) for name in (*traced.read.values(), *traced.tensors)}
    return replace(
        traced,
        module=module,
        tensors={name: own[name] for name in traced.tensors},
        read={id(own[name]): name for name in traced.read.values()},
    )


def with_own_graph(traced: Trace) -> tuple[Trace, Mapping[fx.Node, fx.Node]]:
    """The trace with a copy of its graph, to be changed, and the copies by node."""
    graph = fx.Graph(tracer_cls=Tracer)
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(traced.graph, copies))
    own = replace(
        traced,
        graph=graph,
        inputs={name: copies[node] for name, node in traced.inputs.items()},
        modes={copies[node]: mode for node, mode in traced.modes.items()},
        within={copies[node]: calls for node, calls in traced.within.items()},
        sharers=[],
    )
    return own, copies


def _registered(module: nn.Module, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    tensor = owner._parameters.get(last)
    return owner._buffers[last] if tensor is None else tensor  # type: ignore[return-value]
