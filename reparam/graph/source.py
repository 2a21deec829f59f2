"""The text of a forward, generated from the graph of a frame."""

from typing import Any

from torch import fx, nn

from reparam.graph.net import Frame
from reparam.graph.signatures import parameters_of
from reparam.graph.spelling import PLAIN, apart, imports, spelled, unused


def forward_source(frame: Frame) -> str:
    """Source of ``forward`` with the signature of the original one."""
    graph, mended = spelled(frame.trace.graph)
    arguments = parameters_of(frame.module)
    root = unused("self", {node.name for node in graph.nodes} | arguments.keys())
    code = graph.python_code(root)
    text = code.src
    for printed, meant in mended.items():
        text = text.replace(printed, meant)
    text = text[text.index("def forward(") :]
    renamed, text = apart(text, arguments, code.globals)
    _, _, body = text.partition("\n")
    signature = _signature(root, frame.module)
    return "\n".join([*imports(code.globals), *renamed, f"def forward({signature}):", body])


def _signature(root: str, module: nn.Module) -> str:
    parts = [root]
    parameters = parameters_of(module)
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


def fixed_signature(module: nn.Module) -> str:
    """Why no forward with the signature of this one can be written; empty if it can."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    try:
        parameters: Any = parameters_of(module).values()
    except (TypeError, ValueError):
        return "its forward has no signature"
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"its forward takes *{parameter.name}"
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
