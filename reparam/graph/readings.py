"""What a forward is called with, and whether two readings of it are the same."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from reparam.graph.proxy import PLAIN
from reparam.graph.signatures import parameters_of


def operations(graph: fx.Graph, tensors: Mapping[str, Tensor], modes: Mapping[fx.Node, tuple[bool, ...]]) -> list[Any]:
    """The operations of a reading, apart from the conditions on the input; to be compared with those of another."""
    found: list[Any] = []
    index: dict[fx.Node, int] = {}
    live = {node for node in graph.nodes if node.op == "output"}
    for node in reversed(graph.nodes):
        if node in live or not node.meta.get(PLAIN):
            live |= {node, *node.all_input_nodes}
    for node in graph.nodes:
        if node not in live:
            continue
        index[node] = len(found)
        target = id(tensors[node.target]) if node.op == "get_attr" else node.target
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: ("node", index[n]))
        found.append((node.op, target, repr(arguments), modes.get(node)))
    return found


def call_as_users_do(module: nn.Module, method: str, values: Mapping[str, Any]) -> Any:
    """Call a forward as a user does: what is left at its default is not given, for a decorator may give it itself."""
    positional, keyword = [], {}
    parameters = parameters_of(module, method)
    variadic = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty and not variadic
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(values.get(name, ()))
        elif parameter.kind is parameter.VAR_KEYWORD:
            keyword.update(values.get(name, {}))
        elif name in values and not (optional and values[name] is parameter.default):
            if parameter.kind is parameter.KEYWORD_ONLY or (
                optional and parameter.kind is not parameter.POSITIONAL_ONLY
            ):
                keyword[name] = values[name]
            else:
                positional.append(values[name])
    return getattr(module, method)(*positional, **keyword)
