"""What the forwards of a model read."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import final

from reparam.graph.net import Frame, Net


@final
class Used:
    """Dotted paths of what the forwards of a model read."""

    def __init__(self, nets: Iterable[Net], edited: Collection[Frame]) -> None:
        paths: set[str] = set()
        nets = list(nets)
        idle = makers_only(nets, edited)
        for net in nets:
            if net.root.path in idle:
                continue
            for frame in net.frames:
                if frame in edited or not called(frame):
                    continue
                names = {str(n.target) for n in frame.trace.graph.nodes if n.op in ("call_module", "get_attr")}
                read = set(frame.trace.read.values()) - frame.trace.types_read
                paths |= {join(frame.path, name) for name in names | read}
                paths |= {join(frame.path, name) for name in frame.trace.touched}
        self._above = {above for path in paths for above in (*_prefixes(path), path)}

    def below(self, path: str) -> bool:
        """Whether ``path`` or something below it is read."""
        return path in self._above


def makers(edited: Iterable[Frame]) -> set[str]:
    """Modules whose parameters the old forwards read to make weights, which are constants of the new forwards."""
    return {
        join(frame.path, name.rpartition(".")[0])
        for frame in edited
        for name in frame.trace.read.values()
        if "." in name
    }


def makers_only(nets: Iterable[Net], edited: Iterable[Frame]) -> set[str]:
    """Roots of nets that nothing calls on data, and that only made such weights, for forwards of other nets."""
    nets = list(nets)
    called: set[str] = set()
    owners: dict[Frame, Net] = {}
    for net in nets:
        for frame in net.frames:
            owners[frame] = net
            called |= {join(frame.path, str(n.target)) for n in frame.trace.graph.nodes if n.op == "call_module"}
    made: defaultdict[str, set[Net]] = defaultdict(set)
    above: defaultdict[str, set[Net]] = defaultdict(set)
    for frame in edited:
        for maker in makers([frame]):
            made[maker].add(owners[frame])
            for path in (*_prefixes(maker), maker):
                above[path].add(owners[frame])
    found: set[str] = set()
    for net in nets:
        root = net.root.path
        if root and root not in called:
            readers = above.get(root, set()).union(*(made.get(path, ()) for path in _prefixes(root)))
            if readers - {net}:
                found.add(root)
    return found


def _prefixes(path: str) -> Iterator[str]:
    return (path[:at] for at, letter in enumerate(path) if letter == ".")


def called(frame: Frame) -> bool:
    """Whether the call of a frame is still there."""
    while frame.parent is not None and frame.call is not None:
        if frame.call._erased:
            return False
        frame = frame.parent
    return True


def join(path: str, name: str) -> str:
    """Path of a descendant."""
    return f"{path}.{name}" if path else name
