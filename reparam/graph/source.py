"""The text of a forward, generated from the graph of a frame."""

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from reparam.graph.methods import Method
from reparam.graph.net import Frame
from reparam.graph.signatures import parameters_of
from reparam.graph.spelling import PLAIN, apart, imports, renamed, spelled, unused


def source_of(frame: Frame, methods: Iterable[Method] = ()) -> str:
    """Source of ``forward``, and of some methods that it calls, with their original signatures."""
    named: dict[str, Any] = {}
    lines: list[str] = []
    texts = [_function(frame.module, "forward", frame.trace.graph, named, lines)]
    texts += [_function(frame.module, method.name, method.graph, named, lines) for method in methods]
    return "\n".join([*dict.fromkeys(lines), *texts])


def _function(module: nn.Module, name: str, graph: fx.Graph, named: dict[str, Any], lines: list[str]) -> str:
    """Source of one function; adds to what is named, and to the lines in front of all functions."""
    graph, mended = spelled(graph)
    arguments = parameters_of(module, name)
    root = unused("self", {node.name for node in graph.nodes} | arguments.keys())
    code = graph.python_code(root)
    text = code.src
    for printed, meant in mended.items():
        text = text.replace(printed, meant)
    text = text[text.index("def forward(") :]
    others = [key for key, found in code.globals.items() if named.get(key, found) is not found]
    names, text = renamed(text, others, {*arguments, *named, *code.globals})
    found = {names.get(key, key): found for key, found in code.globals.items()}
    hiding, text = apart(text, arguments, found)
    lines += [*imports(found), *hiding]
    named |= found
    _, _, body = text.partition("\n")
    return f"def {name}({_signature(root, module, name)}):\n{body}"


def _signature(root: str, module: nn.Module, method: str) -> str:
    parts = [root]
    parameters = parameters_of(module, method)
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    keyword_only = False
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        parts.append(name if parameter.default is parameter.empty else f"{name}={parameter.default!r}")
        if positional and name == positional[-1]:
            parts.append("/")
    return ", ".join(parts)


def fixed_signature(module: nn.Module, method: str = "forward") -> str:
    """Why no forward (or other method) with the signature of this one can be written; empty if it can."""
    if method in module.__dict__:
        return f"its {method} was replaced on the instance"
    try:
        parameters: Any = parameters_of(module, method).values()
    except (TypeError, ValueError):
        return f"its {method} has no signature"
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            return f"its {method} takes {stars}{parameter.name}"
        if parameter.default is not parameter.empty and type(parameter.default) not in PLAIN:
            return f"the default of {parameter.name} is no plain constant"
    return ""


def same_graph(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two traces of one module do the same, up to unused inputs."""

    def operations(graph: fx.Graph) -> list[tuple[Any, ...]]:
        number: dict[fx.Node, Any] = {}
        found: list[tuple[Any, ...]] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                number[node] = str(node.target)
                continue
            number[node] = len(found)
            args = fx.node.map_arg((node.args, tuple(node.kwargs.items())), lambda n: f"%{number[n]}")
            found.append((node.op, str(node.target), repr(args)))
        return found

    return operations(a) == operations(b)
