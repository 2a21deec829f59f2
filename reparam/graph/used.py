"""What the forwards of a model read."""

from collections.abc import Container, Iterable
from typing import final

from reparam.graph.net import Frame, Net


@final
class Used:
    """Dotted paths of what the forwards of a model read."""

    def __init__(self, nets: Iterable[Net], edited: Container[Frame]) -> None:
        paths: set[str] = set()
        for net in nets:
            for frame in net.frames:
                if frame in edited or not _called(frame):
                    continue
                names = {str(n.target) for n in frame.trace.graph.nodes if n.op in ("call_module", "get_attr")}
                paths |= {join(frame.path, name) for name in names | set(frame.trace.read.values())}
                paths |= {join(frame.path, name) for name in frame.trace.touched}
        self._above = {path[:at] for path in paths for at in (*(i for i, c in enumerate(path) if c == "."), len(path))}

    def below(self, path: str) -> bool:
        """Whether ``path`` or something below it is read."""
        return path in self._above


def _called(frame: Frame) -> bool:
    """Whether the call of a frame is still there."""
    while frame.parent is not None and frame.call is not None:
        if frame.call._erased:
            return False
        frame = frame.parent
    return True


def join(path: str, name: str) -> str:
    """Path of a descendant."""
    return f"{path}.{name}" if path else name
