"""What liftings share: what is known about a net, and how arguments become numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, final

import torch
from torch import Tensor, nn

from reparam.algebra import Conv, Refusal, identity
from reparam.algebra.sources import precise
from reparam.graph.effects import Effects
from reparam.graph.net import Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.spaces import Space, narrow

Lifted = Operation | Refusal | None


@final
@dataclass(frozen=True, slots=True)
class Known:
    """What is known about a net before its operations are lifted."""

    spaces: Mapping[Value, Space]
    effects: Effects

    def space(self, value: object) -> Space | None:
        """Space of a value, if known."""
        return self.spaces.get(value) if isinstance(value, Value) else None


Lifting = Callable[[Value, Known], Lifted]


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


def detached(read: Callable[[], Tensor | None]) -> Numbers:
    def numbers() -> Tensor:
        value = read()
        assert value is not None
        return value.detach().cpu() if value.device.type == "mps" else value.detach()

    return numbers


def weight_of(module: nn.Module) -> Numbers:
    """The weight that a module uses in eval mode, also where a hook generates it."""
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return detached(lambda: hook.compute_weight(module))
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return detached(lambda: hook.compute_weight(module, do_power_iteration=False))
    return detached(lambda: module.weight)  # type: ignore[arg-type, return-value]


def shape_text(kernel: tuple[int, ...]) -> str:
    return "x".join(map(str, kernel))


def constant_vector(constant: Any, space: Space | None) -> Numbers | None:
    """A constant as one number per channel, ``(channels,)``; None if it is not."""
    if isinstance(constant, bool) or not isinstance(constant, Real | Tensor) or space is None or space.channels == 0:
        return None
    channels = space.channels
    if isinstance(constant, Tensor):
        if not narrow(constant, space) or constant.is_complex():
            return None
        return lambda: precise(constant).reshape(-1).expand(channels)
    number = float(constant)
    return lambda: torch.full((channels,), number, dtype=torch.float64)


def identity_of(known: Known, value: Value) -> Conv:
    space = known.space(value)
    return identity(0, 0) if space is None else identity(space.channels, space.axes)


def full(channels: int, number: float) -> Numbers:
    return lambda: torch.full((channels,), number, dtype=torch.float64)
