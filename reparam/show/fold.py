"""Repeated blocks of a picture: children of one module that are alike and stand in a chain are drawn once."""

from collections.abc import Mapping, Sequence
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
    sides = [Drawn({k: n for k, n in side.items() if within(n.path, module)}) for side in (before, after)]
    readers = [_readers(side.nodes) for side in sides]
    pending = [(module, [list(side.nodes) for side in sides])]
    while pending:
        parent, keys = pending.pop()
        blocks = [
            _Blocks(side.nodes, [key for key in own if key in side.nodes], read, parent, regions)
            for side, own, read in zip(sides, keys, readers, strict=True)
        ]
        for run in _runs(list(dict.fromkeys([*blocks[0].keys, *blocks[1].keys])), blocks):
            pending.append((run[0], [block.keys.get(run[0], []) for block in blocks]))
            if len(run) > 1:
                for side, block in zip(sides, blocks, strict=True):
                    _drop(side, run, block)
                readers = [_readers(side.nodes) for side in sides]
    return sides[0], sides[1]


def _readers(nodes: Nodes) -> dict[int, list[int]]:
    """The nodes that read each node."""
    readers: dict[int, list[int]] = {}
    for key, node in nodes.items():
        for source in node.inputs:
            readers.setdefault(source, []).append(key)
    return readers


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

    def __init__(
        self, nodes: Nodes, own: list[int], readers: Mapping[int, list[int]], parent: str, regions: Sequence[Region]
    ) -> None:
        self.nodes = nodes
        self.regions = regions
        self.readers = readers
        self.owner: dict[int, str] = {}
        self.keys: dict[str, list[int]] = {}
        for key in own:
            child = _child(nodes[key].path, parent)
            if child is not None:
                self.owner[key] = child
                self.keys.setdefault(child, []).append(key)

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
        """Whether ``second`` reads one value, of ``first``, which hands on nothing else and to nothing else."""
        inputs = self.entries(second)
        return len(inputs) == 1 and inputs == self.exits(first) and self.readers_of(inputs) <= {first, second}

    def entries(self, child: str) -> set[int]:
        """Keys outside of a child that it reads."""
        return {
            key for own in self.keys.get(child, ()) for key in self.nodes[own].inputs if self.owner.get(key) != child
        }

    def exits(self, child: str) -> set[int]:
        """Keys of a child that others read."""
        return {own for own in self.keys.get(child, ()) if self.readers_of({own}) - {child}}

    def readers_of(self, keys: set[int]) -> set[str | None]:
        """The children that read some of the keys; None: something else does."""
        return {self.owner.get(key) for own in keys for key in self.readers.get(own, ())}


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


def _drop(side: Drawn, run: list[str], blocks: _Blocks) -> None:
    """Keep the first of a run; what read the last reads the first."""
    stands_for = dict(zip(blocks.keys.get(run[-1], ()), blocks.keys.get(run[0], ()), strict=True))
    for path in run[1:]:
        for key in blocks.keys.get(path, ()):
            del side.nodes[key]
    for key, node in side.nodes.items():
        if any(source in stands_for for source in node.inputs):
            side.nodes[key] = replace(node, inputs=tuple(stands_for.get(source, source) for source in node.inputs))
    side.blocks[run[0]] = tuple(run)
