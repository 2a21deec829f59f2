"""What forwards ask about modules other than their results: their classes, and what those define."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, final

from torch import nn

from reparam.algebra import Affine
from reparam.graph.build import kind_of
from reparam.graph.bytecode import MOST, names, strings
from reparam.graph.entry_methods import OWN, codes_of
from reparam.graph.net import Frame, Reading, Value
from reparam.graph.operation import Operation
from reparam.graph.questions import Exactly
from reparam.graph.used import join

TAKEN: Final = frozenset(
    (
        "bias",
        "dilation",
        "groups",
        "in_channels",
        "in_features",
        "kernel_size",
        "out_channels",
        "out_features",
        "padding",
        "stride",
        "weight",
    )
)


@final
class Asked:
    """The questions of all forwards of a model that was read."""

    def __init__(self, model: nn.Module, reading: Reading) -> None:
        self._model = model
        self._kinds: dict[str, list[tuple[Any, bool, Frame]]] = {}
        self._lacking: dict[str, list[tuple[str, Frame]]] = {}
        self._touched: dict[str, list[Frame]] = {}
        for frame in (frame for net in reading.nets for frame in net.frames):
            for below, kinds, answer in frame.trace.kinds:
                self._kinds.setdefault(join(frame.path, below), []).append((kinds, answer, frame))
            for below, name in frame.trace.lacking:
                self._lacking.setdefault(join(frame.path, below), []).append((name, frame))
            for below in frame.trace.touched:
                self._touched.setdefault(join(frame.path, below), []).append(frame)

    def mistaken(self, path: str, kind: Callable[[], type[nn.Module]], generated: Frame | None = None) -> str:
        """A forward that asks for the class of a module, or for what it lacks, and would get another answer.

        Args:
            path: of the module.
            kind: the class that it is going to have.
            generated: a frame whose forward is generated, so that it has asked already.
        """
        kinds = [entry for entry in self._kinds.get(path, ()) if entry[-1] is not generated]
        lacking = [entry for entry in self._lacking.get(path, ()) if entry[-1] is not generated]
        looked = "" if generated is None else self._looked_at(path, generated)
        if not (kinds or lacking or looked):
            return ""
        new = kind()
        if looked and not issubclass(new, nn.Identity):  # what only goes is kept for who looks at it
            return looked
        for classes, answer, frame in kinds:
            if issubclass(new, classes) != answer:
                return f"the forward of {frame.path or 'the model'} asks for its class"
        for name, frame in lacking:
            if name in TAKEN and not issubclass(new, nn.Identity):
                return f"the forward of {frame.path or 'the model'} asks for its {name}"
        return ""

    def exactly(self, frame: Frame) -> str:
        """A forward that asks for the very class of the module of a frame, of which it could not be a subclass."""
        for kinds, answer, asking in self._kinds.get(frame.path, ()):
            if isinstance(kinds, Exactly) and answer:
                return f"the forward of {asking.path or 'the model'} asks for its class"
        return ""

    def _looked_at(self, path: str, home: Frame) -> str:
        """A caller of a frame that looks at a module whose name is given to another one in the frame's new forward."""
        at = path.rpartition(".")[0]
        while len(at) > len(home.path):
            for frame in self._touched.get(at, ()):
                if home not in frame.upwards():
                    return f"the forward of {frame.path or 'the model'} looks at {at}"
            at = at.rpartition(".")[0]
        return ""

    def of_class(self, frame: Frame) -> str:
        """A forward further up that uses a name which the class of a module, or one of its children, defines."""
        kind: type = type(frame.module)
        own, inside = _defined(kind), frame.path + "."
        for around in frame.upwards():
            if around is not frame and any(
                (join(around.path, t) + ".").startswith(inside) for t in around.trace.touched
            ):
                return f"the forward of {around.path or 'the model'} looks into the module"
        module, path = self._model, ""
        for name in frame.path.split("."):
            above: type = type(module)
            used = own & _used(above) if own else own
            if used:
                return f"the methods of {path or 'the model'} use the name {min(used)}, which its class defines"
            child = module._modules.get(name)
            if child is None:
                break
            module, path = child, join(path, name)
        return ""


def noticed(
    home: Frame,
    formula: Affine,
    members: Iterable[Value],
    operations: Mapping[Value, Operation],
    mistaken: Callable[[str, Callable[[], type[nn.Module]], Frame | None], str],
) -> str:
    """Which other forward would notice that children are gone, or of another class, once that of ``home`` is new."""
    children = [v for v in members if v.module is not None and v in operations]
    heirs = [v for v in children if not all(conv.diagonal for conv in operations[v].terms.values())] or children

    def heir() -> type[nn.Module]:
        root, conv = next(iter(formula.terms.items()))
        return kind_of(replace(formula, terms={root: conv}))

    for value in children:
        reason = mistaken(value.path, heir, home) if value in heirs else ""
        if not reason and heirs != [value]:
            reason = mistaken(value.path, lambda: nn.Identity, home)
        if reason:
            return reason
    return ""


@lru_cache(maxsize=MOST)
def _defined(kind: type) -> frozenset[str]:
    """What a class and its bases define beside what every module has."""
    bases = (base for base in kind.__mro__ if not base.__module__.startswith("torch.nn.modules") and base is not object)
    return frozenset(name for base in bases for name in vars(base) if not name.startswith("__")) - OWN


@lru_cache(maxsize=MOST)
def _used(kind: type) -> frozenset[str]:
    """Names and strings in the code of a forward, and of the methods that are run with it or instead of it."""
    return frozenset(name for code in codes_of(kind) for name in (*names(code), *strings(code)))
