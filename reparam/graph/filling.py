"""Put the weights into a model that was fused in place, one region after the other.

By then every weight was computed, checked and let go of once, and the model holds the new modules without their
weights. The old ones are only needed by the regions that they go into, and are freed with the last of these: the
memory that fusing needs is that of one region.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import nn

from reparam.graph.modules import Fused, built
from reparam.graph.net import Net, Value
from reparam.graph.summary import region_members

_NOTHING: Final = nn.Identity()


def empty(fused: Fused) -> None:
    """Take the weights out of the modules of a region; their shapes stay."""
    for module in _parts(fused):
        for name, weight in module._parameters.items():
            if weight is not None:
                hollow = torch.empty_like(weight, device="meta")
                module._parameters[name] = nn.Parameter(hollow, requires_grad=weight.requires_grad)


def fill(regions: Sequence[Fused], nets: Iterable[Net]) -> None:
    """Compute the weights of all regions of a model that holds their modules, and let go of what they came from.

    An interruption waits for the last one, and where memory runs out, it is tried once more: the model has modules
    without weights until then.
    """
    _forget(nets)
    readers: Counter[Value] = Counter(v for fused in regions for v in region_members(fused.plan, fused.value))
    interrupted: KeyboardInterrupt | None = None
    for fused in regions:
        try:
            _fill(fused)
        except (KeyboardInterrupt, MemoryError) as stop:
            if isinstance(stop, KeyboardInterrupt):
                interrupted = stop
            gc.collect()
            _fill(fused)
        members = list(region_members(fused.plan, fused.value))
        readers.subtract(members)
        for member in members:
            if not readers[member]:
                del fused.plan.operations[member]
                member.module, member.args, member.kwargs = None, (), {}
    if interrupted is not None:
        raise interrupted


def _fill(fused: Fused) -> None:
    weights = built(fused.plan.numbers(fused.value), fused.kind)
    for root, module in fused.modules.items():
        new = weights[root]
        if module is not None and new is not None:
            for part, computed in zip(module.modules(), new.modules(), strict=True):
                part._parameters.update(computed._parameters)


def _parts(fused: Fused) -> list[nn.Module]:
    return [part for module in fused.modules.values() if module is not None for part in module.modules()]


def _forget(nets: Iterable[Net]) -> None:
    """Let go of the modules and tensors that were read."""
    for net in nets:
        for frame in net.frames:
            frame.module = _NOTHING
            frame.trace = replace(frame.trace, module=_NOTHING, tensors={}, sharers=[])
