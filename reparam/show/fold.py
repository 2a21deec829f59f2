"""Repeated blocks of a picture: children of one module that are alike and stand in a chain are drawn once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from reparam.report import Node, Region

Nodes = Mapping[int, Node]


@final
@dataclass(slots=True)
class Drawn:
    """What is drawn of one side.

    Args:
        nodes: by key.
        blocks: paths of the folded blocks, by the path of the first, which is drawn.
    """

    nodes: dict[int, Node]
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)


def within(path: str, module: str) -> bool:
    """Whether a path is that of a module or of something below it."""
    return not module or path == module or path.startswith(f"{module}.")


def fold(before: Nodes, after: Nodes, regions: Sequence[Region], module: str) -> tuple[Drawn, Drawn]:
    """The nodes below ``module`` on both sides, repeated blocks once."""
    sides = tuple(Drawn({k: n for k, n in side.items() if within(n.path, module)}) for side in (before, after))
    pending = [module]
    while pending:
        parent = pending.pop()
        children = _children(sides[0].nodes, parent)
        if not children and sides[1].nodes:
            continue
        runs = _runs(children, [_Blocks(side.nodes, parent, regions) for side in sides])
        for run in runs:
            if len(run) > 1:
                for side in sides:
                    _drop(side, run)
            if run[0] != parent:
                pending.append(run[0])
    return sides[0], sides[1]


def _children(nodes: Nodes, parent: str) -> list[str]:
    """Paths of the children of a module, in order of their first operation."""
    return list(dict.fromkeys(child for node in nodes.values() if (child := _child(node.path, parent)) is not None))


def _child(path: str, parent: str) -> str | None:
    """The child of a module in which a path lies."""
    if path == parent or not within(path, parent):
        return None
    start = len(parent) + 1 if parent else 0
    end = path.find(".", start)
    return path if end < 0 else path[:end]


@final
class _Blocks:
    """The children of one module as parts of a graph."""

    def __init__(self, nodes: Nodes, parent: str, regions: Sequence[Region]) -> None:
        self.nodes = nodes
        self.regions = regions
        self.owner = {key: _child(node.path, parent) for key, node in nodes.items()}
        self.keys: dict[str, list[int]] = {}
        self.readers: dict[int, list[int]] = {}
        for key, node in nodes.items():
            child = self.owner[key]
            if child is not None:
                self.keys.setdefault(child, []).append(key)
            for source in node.inputs:
                self.readers.setdefault(source, []).append(key)

    def signature(self, child: str) -> Any:
        """What makes two children alike: operations, sizes, and how they read each other."""
        keys = self.keys.get(child, [])
        place = {key: at for at, key in enumerate(keys)}
        numbers: dict[int, int] = {}
        found = []
        for key in keys:
            node = self.nodes[key]
            region: Any = None
            if node.region is not None:
                of = self.regions[node.region]
                region = (numbers.setdefault(node.region, len(numbers)), of.result, of.params_before, of.before)
            found.append((node.path[len(child) :], node.label, [place.get(key) for key in node.inputs], region))
        return found

    def follows(self, first: str, second: str) -> bool:
        """Whether ``second`` reads one value, of ``first``, which hands on nothing else."""
        inputs = self.entries(second)
        outputs = self.exits(first)
        return len(inputs) == 1 and inputs == outputs

    def entries(self, child: str) -> set[int]:
        """Keys outside of a child that it reads."""
        return {
            key for own in self.keys.get(child, ()) for key in self.nodes[own].inputs if self.owner.get(key) != child
        }

    def exits(self, child: str) -> set[int]:
        """Keys of a child that others read."""
        keys = self.keys.get(child, ())
        return {own for own in keys if any(self.owner[key] != child for key in self.readers.get(own, ()))}


def _runs(children: list[str], sides: Sequence[_Blocks]) -> list[list[str]]:
    """Children in runs that are alike and follow each other on both sides."""
    runs: list[list[str]] = []
    last: Any = None
    for child in children:
        signature = [side.signature(child) for side in sides]
        joins = runs and signature == last and all(side.follows(runs[-1][-1], child) for side in sides)
        if joins and all(len(side.entries(runs[-1][0])) == 1 for side in sides):
            runs[-1].append(child)
        else:
            runs.append([child])
        last = signature
    return runs


def _drop(side: Drawn, run: list[str]) -> None:
    """Keep the first of a run; what read the last reads the first."""
    first = [key for key, node in side.nodes.items() if within(node.path, run[0])]
    last = [key for key, node in side.nodes.items() if within(node.path, run[-1])]
    stands_for = dict(zip(last, first, strict=True))
    gone = {key for key, node in side.nodes.items() for path in run[1:] if within(node.path, path)}
    moved: Callable[[int], int] = lambda key: stands_for.get(key, key)  # noqa: E731
    side.nodes = {
        key: replace(node, inputs=tuple(map(moved, node.inputs))) for key, node in side.nodes.items() if key not in gone
    }
    side.blocks[run[0]] = tuple(run)
