"""Put the fused operations into the model: all at once, or nothing."""

import itertools
from collections.abc import Iterable
from typing import final

from torch import nn

from reparam.graph.edit import Edit
from reparam.graph.guard import OfRank
from reparam.graph.modules import Fused
from reparam.graph.net import Frame, Net, Value
from reparam.graph.placing import Mode
from reparam.graph.statistic_norms import bare_module
from reparam.graph.structures import values_in
from reparam.graph.swap import State, carry_attributes, homes_of, replace_module
from reparam.graph.used import Used, called


@final
class Emitter:
    """Collects the changes of all regions of a model and makes them."""

    def __init__(self, model: nn.Module, nets: Iterable[Net]) -> None:
        self.model = model
        self.nets = list(nets)
        self.edited: dict[Frame, Edit] = {}

    def add(self, fused: Fused) -> None:
        """Note the changes that a region needs; nothing is changed yet."""
        where = fused.place
        if where.mode is Mode.EDIT:
            self._edit(where.frame).regions.append(fused)
        for value, caller in where.idle.items():
            for frame in itertools.islice(where.frame.upwards(), 1, None):
                self._edit(frame).idle.add(value)
                if frame is caller:
                    break
        for value in where.passed:
            if value.module is None:
                self._edit(value.frame).passed.append((fused.plan, value))
        for norm in where.bared:
            if norm.module is None:
                self._edit(norm.frame).bared.append(norm)

    def _edit(self, frame: Frame) -> Edit:
        return self.edited.setdefault(frame, Edit(frame))

    def apply(self, regions: Iterable[Fused], dropped: Iterable[Value] = ()) -> None:
        """Make all changes, or none; ``dropped`` modules become identities."""
        before = [State(module) for module in self.model.modules()]
        try:
            self._apply(list(regions), list(dropped))
        except BaseException:
            for state in before:
                state.restore()
            raise

    def _apply(self, regions: list[Fused], dropped: list[Value]) -> None:
        for fused in regions:
            self.add(fused)
        homes = homes_of(self.model)
        for fused in regions:
            where = fused.place
            for value in where.passed:
                if value.module is None:
                    continue
                if value.frame in self.edited and value.frame.generates(value):
                    self.edited[value.frame].passed.append((fused.plan, value))
                else:
                    rank = fused.plan.operations[value].rank_if_gone
                    nothing = (nn.Identity() if rank is None else OfRank(rank)).train(value.module.training)
                    carry_attributes(value.module, nothing)
                    replace_module(homes, value.module, nothing)
            if where.mode is not Mode.EDIT:
                (module,) = fused.modules.values()
                assert module is not None
                old = where.at.module if where.mode is Mode.SWAP else where.container and where.container.module
                assert isinstance(old, nn.Module)
                carry_attributes(old, module)
                replace_module(homes, old, module)
        for norm in dict.fromkeys(norm for fused in regions for norm in fused.place.bared):
            if norm.module is not None:
                bare = bare_module(norm.module)
                carry_attributes(norm.module, bare)
                replace_module(homes, norm.module, bare)
        for value in dropped:
            assert value.module is not None
            nothing = nn.Identity().train(value.module.training)
            carry_attributes(value.module, nothing)
            replace_module(homes, value.module, nothing)
        returned = _returned_for_nothing(regions)
        for frame in sorted({**self.edited, **returned}, key=lambda frame: sum(1 for _ in frame.upwards())):
            if frame in self.edited or called(frame):
                self._edit(frame).run(returned.get(frame, ()))
        used = Used(self.nets, self.edited)
        for edit in self.edited.values():
            edit.install(used, homes)


def _returned_for_nothing(regions: Iterable[Fused]) -> dict[Frame, list[Value]]:
    """What calls return though it was computed anew further up, in all regions that it disappeared into."""
    inside: dict[Value, list[Fused]] = {}
    for fused in regions:
        for value in fused.plan.absorbed(fused.value):
            inside.setdefault(value, []).append(fused)
    found: dict[Frame, list[Value]] = {}
    for value, around in inside.items():
        for frame in value.frame.upwards():
            if frame.repeated or not all(_is_above(fused, value, frame) for fused in around):
                break
            if frame.parent is None or frame.call is None:
                break
            if value in values_in(frame.parent.env[frame.call]):
                found.setdefault(frame, []).append(value)
    return found


def _is_above(fused: Fused, value: Value, frame: Frame) -> bool:
    """Whether a region that took up a value is computed by a caller of ``frame``."""
    where = fused.place
    callers = itertools.islice(frame.upwards(), 1, None)
    return where.mode is Mode.EDIT and value not in where.passed and where.frame in callers
