"""What a forward is called with, what readings of it hold, and whether two of them are the same."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.graph.proxy import PLAIN
from reparam.graph.signatures import parameters_of
from reparam.graph.spelling import leaves


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


def reads_parts(graph: fx.Graph) -> bool:
    """Whether an input is a structure, or an object, of which parts are read."""
    return any(
        node.target in (getattr, operator.getitem, "get", "pop")
        and not node.meta.get(PLAIN)
        and node.args[0].op == "placeholder"
        and isinstance(node.args[-1], int | str)
        for node in graph.nodes
        if node.args and isinstance(node.args[0], fx.Node)
    )


def holds_type(graph: fx.Graph) -> bool:
    """Whether an argument of an operation is a data type or a device."""
    found = (argument for node in graph.nodes for argument in leaves((node.args, node.kwargs)))
    return any(isinstance(argument, torch.dtype | torch.device) for argument in found)
