"""The text of a forward, generated from the graph of a frame."""

from typing import Any, Final

from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from reparam.graph.net import Frame
from reparam.graph.signatures import parameters_of

PLAIN: Final = (type(None), bool, int, float, str)


def forward_source(frame: Frame) -> str:
    """Source of ``forward`` with the signature of the original one."""
    code = frame.trace.graph.python_code("self")
    imports = _format_import_block(dict(code.globals), sys_importer)
    lines = code.src.lstrip("\n").split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    signature = _signature(frame.module)
    return "\n".join([imports, f"def forward({signature}):", *lines[at + 1 :]])


def _signature(module: nn.Module) -> str:
    parts = ["self"]
    keyword_only = False
    for name, parameter in parameters_of(module).items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        parts.append(name if parameter.default is parameter.empty else f"{name}={parameter.default!r}")
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
        if parameter.default is not parameter.empty and not isinstance(parameter.default, PLAIN):
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
