"""How a generated forward spells what it reads: names of children, classes, constants.

``torch.fx`` writes ``self.heads.class(x)`` for a child that is named by a keyword, prints an enumeration within a dict
and a named tuple within another as no Python reads them, imports classes by a name that they may not have, and takes
for granted that no argument is called ``torch``.
"""

import ast
import builtins
import enum
import json
import keyword
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from torch import fx
from torch.fx.graph import _custom_builtins, _is_from_torch
from torch.package.importer import ObjMismatchError, ObjNotFoundError, sys_importer

OPERATORS: Final = ("_operator", "builtins")
PLAIN: Final = (type(None), bool, int, float, str)


def unspoken(graph: fx.Graph) -> str:
    """Why no text can say what a graph does; empty if one can."""
    for node in graph.nodes:
        if node.op == "call_function" and _unnamed(node.target):
            return f"its forward uses {_called(node.target)}, which no module holds by name"
        for name in node.kwargs:
            if not _sayable(name):
                return f"its forward passes an argument named {name!r}"
        for constant in leaves((node.args, node.kwargs)):
            if (isinstance(constant, enum.Enum) or hasattr(constant, "_fields")) and _unnamed(type(constant)):
                return f"its forward uses {_called(type(constant))}, which no module holds by name"
            if isinstance(constant, enum.Enum):
                if constant.name not in type(constant).__members__:
                    return f"its forward uses {constant}, which has no name of its own"
            elif _of_a_subclass(constant) and not (
                isinstance(constant, float) and node.op in ("call_function", "call_method")
            ):
                return f"its forward holds a {type(constant).__name__}, which cannot be written as text"
    return ""


def spelled(graph: fx.Graph) -> tuple[fx.Graph, Mapping[str, str]]:
    """The graph in words that ``torch.fx`` prints right, and what is to be replaced in the text by what."""
    odd = any(
        (node.op in ("call_module", "get_attr") and not all(map(_sayable, str(node.target).split("."))))
        or any(map(_made, leaves((node.args, node.kwargs))))
        for node in graph.nodes
    )
    if not odd:
        return graph, {}
    copy, copies, names = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, str]()
    copy.output(copy.graph_copy(graph, copies))
    for node in list(copy.nodes):
        if node.op in ("call_module", "get_attr"):
            node.target = ".".join(_quoted(name, names) for name in str(node.target).split("."))
        if any(map(_made, leaves((node.args, node.kwargs)))):
            with copy.inserting_before(node):
                node.args, node.kwargs = _making(copy, node.args), _making(copy, dict(node.kwargs))
    return copy, names


def imports(named: Mapping[str, Any]) -> list[str]:
    """Lines that give every object its name."""
    return sorted({_import(name, found) for name, found in named.items()})


def apart(text: str, arguments: Iterable[str], named: Collection[str]) -> tuple[list[str], str]:
    """A function that reads no global by the name of one of its arguments: lines in front of it, and its text."""
    hidden = [name for name in arguments if name in named or hasattr(builtins, name)]
    names, text = renamed(text, hidden, {*arguments, *named})
    return [f"{new} = {name}" for name, new in names.items()], text


def renamed(text: str, hidden: Collection[str], taken: Collection[str]) -> tuple[Mapping[str, str], str]:
    """A function that reads some globals by new names: these, by the old ones, and its text."""
    if not hidden:
        return {}, text
    tree = ast.parse(text)
    taken = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {*taken}
    names = {name: unused(f"{name}_", taken) for name in hidden}
    return names, ast.unparse(_Renamed(names).visit(tree))


def unused(name: str, taken: Collection[str]) -> str:
    """A name that is not taken."""
    while name in taken:
        name += "_"
    return name


class _Renamed(ast.NodeTransformer):
    """Globals by other names. ``torch_1 = torch``, the one kind of line that assigns a name, reads the argument."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return node if isinstance(node.value, ast.Name) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def _sayable(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _quoted(name: str, names: dict[str, str]) -> str:
    """A name that ``torch.fx`` puts between quotes, where it must."""
    if _sayable(name):
        return name
    if name.isidentifier():  # the text is to be mended, for it would be taken for sayable
        written = f"\\x{ord(name[0]):02x}{name[1:]}"
        names[f'"{written}"'] = f'"{name}"'
        return written
    return json.dumps(name, ensure_ascii=False)[1:-1]


def leaves(argument: Any) -> Iterator[Any]:
    """Every leaf of an argument but nodes, and every named tuple and dict."""
    if isinstance(argument, fx.Node):
        return
    if type(argument) in PLAIN:
        yield argument
        return
    if isinstance(argument, Mapping) or (isinstance(argument, tuple) and hasattr(argument, "_fields")):
        yield argument
    if isinstance(argument, list | tuple):
        for item in argument:
            yield from leaves(item)
    elif isinstance(argument, Mapping):
        for key, item in argument.items():
            yield from leaves(key)
            yield from leaves(item)
    else:
        yield argument


def _of_a_subclass(constant: Any) -> bool:
    """Whether a number or text may print as something else, as those of numpy do."""
    return isinstance(constant, PLAIN) and type(constant) not in PLAIN and not isinstance(constant, enum.Enum)


def _made(constant: Any) -> bool:
    """Whether ``torch.fx`` prints a constant wrongly."""
    if isinstance(constant, Mapping):
        return any(isinstance(leaf, enum.Enum) for part in constant.items() for leaf in leaves(part))
    return hasattr(constant, "_fields") or _of_a_subclass(constant)


def _making(graph: fx.Graph, argument: Any) -> Any:
    """An argument with calls of named tuples and dicts in their place, where need be."""
    if isinstance(argument, Mapping):
        items = [(_making(graph, key), _making(graph, item)) for key, item in argument.items()]
        return graph.call_function(dict, (items,)) if _made(argument) else dict(items)
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return graph.call_function(type(argument), tuple(_making(graph, item) for item in argument))
    if isinstance(argument, list | tuple):
        return type(argument)(_making(graph, item) for item in argument)
    return float(argument) if _of_a_subclass(argument) else argument


def _unnamed(found: Any) -> bool:
    if getattr(found, "__module__", None) in OPERATORS or _is_from_torch(found):
        return False
    return _home(found) is None


def _called(found: Any) -> str:
    return str(getattr(found, "__qualname__", found))


def _home(found: Any) -> tuple[str, str] | None:
    """Module and dotted name of a class or function: its own, or that of a variable that holds it."""
    try:
        module, name = sys_importer.get_name(found)
    except (ObjNotFoundError, ObjMismatchError, AttributeError):
        module = str(getattr(found, "__module__", ""))
        variables = vars(sys.modules[module]) if module in sys.modules else {}
        name = next((name for name, value in variables.items() if value is found and _sayable(name)), "")
    return (module, name) if name else None


def _import(name: str, found: Any) -> str:
    if name in _custom_builtins:
        return _custom_builtins[name].import_str
    home = _home(found)
    assert home is not None, f"{found} was found when the place was chosen"
    first, dot, inner = home[1].partition(".")
    line = f"from {home[0]} import {first} as {name}"
    return f"{line}; {name} = {name}.{inner}" if dot else line
