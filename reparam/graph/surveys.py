"""What forwards learn of all that a module consists of: how many children it has, and which parameters.

A forward that goes through the children of a module, or counts them, finds others once some have vanished.
"""

from collections.abc import Callable
from typing import NamedTuple, final

from torch import nn

from reparam.graph.going_through import Survey
from reparam.graph.net import Frame, Reading, Value
from reparam.graph.placing import Mode, Place
from reparam.graph.used import join


class _Entry(NamedTuple):
    survey: Survey
    reader: Frame


@final
class Surveys:
    """What all forwards of a model that was read know of modules as a whole."""

    def __init__(self, reading: Reading, model: nn.Module) -> None:
        self._model = model
        self._at: dict[str, list[_Entry]] = {}
        for frame in (frame for net in reading.nets for frame in net.frames):
            for survey in frame.trace.surveys:
                path = join(frame.path, survey.path) if survey.path else frame.path
                self._at.setdefault(path, []).append(_Entry(survey, frame))

    def of_replaced(self, frame: Frame) -> str:
        """A forward that would miss what the module of a frame consists of, were it one operation; empty if none."""
        inside = f"{frame.path}."
        for path, entries in self._at.items():
            above = f"{path}.".startswith(inside)
            for survey, reader in entries:
                known = above or (survey.deep and (not path or inside.startswith(f"{path}.")))
                if known and frame not in reader.upwards():
                    return _said(reader, path)
        return ""

    def missing(self, value: Value, where: Place, stays: Callable[[Frame], bool]) -> str:
        """A forward that would notice that a module vanishes, or has other parameters; empty if none would.

        Args:
            value: what calls the module.
            where: what stands in its place.
            stays: whether the forward of a call is still run, and is what it was.
        """
        if not self._at or value.module is None:
            return ""
        home = where.frame.path if where.mode is Mode.EDIT else None
        within = f"{home}." if home else home  # what is below its path goes
        path, child = value.path, ""
        while True:
            for survey, reader in self._at.get(path, ()):
                goes = within is not None and bool(child) and value.path.startswith(within)
                near = goes and f"{path}.".startswith(within or "") and not self._keeps_places(path)
                counted = goes and (survey.deep or near) and not survey.tensors
                if (counted or (survey.tensors and (survey.deep or not child))) and stays(reader):
                    return _said(reader, path)
            if not path:
                return ""
            path, _, child = path.rpartition(".")

    def _keeps_places(self, path: str) -> bool:
        """Whether a module has as many children when some of them are gone."""
        return isinstance(self._model.get_submodule(path), nn.Sequential | nn.ModuleList)


def _said(reader: Frame, path: str) -> str:
    return f"the forward of {reader.path or 'the model'} goes through all of {path or 'the model'}"
