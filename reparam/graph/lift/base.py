"""What liftings share: what is known about a net, and how arguments become numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import SimpleNamespace
from typing import Any, Self, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from reparam.algebra import Conv, Ints, Refusal, identity
from reparam.algebra.sources import precise
from reparam.graph.clones import precise_copy, precise_tensor
from reparam.graph.effects import Effects
from reparam.graph.examples import Call
from reparam.graph.net import Frame, Net, Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.rank_rules import UNKNOWN, Rank
from reparam.graph.ranks import infer_ranks
from reparam.graph.shapes import Shape, shapes_of
from reparam.graph.snapshot import Snapshot
from reparam.graph.space import Space
from reparam.graph.spaces import fits, infer

Lifted = Operation | Refusal | None


@final
@dataclass(frozen=True, slots=True)
class Known:
    """What is known about a net before its operations are lifted."""

    spaces: Mapping[Value, Space]
    effects: Effects
    ranks: Mapping[Value, Rank] = field(default_factory=dict)
    shapes: Mapping[Value, Shape] = field(default_factory=dict)
    one_size: bool = False

    @classmethod
    def of(cls, net: Net, calls: Mapping[str, list[Call]] | None = None, *, one_size: bool = False) -> Self:
        """What the code of a net fixes, and the sizes of one run, which may be the only ones (``one_size``)."""
        shapes = shapes_of(net, calls)
        ranks = infer_ranks(net, shapes)
        return cls(infer(net, ranks, shapes), Effects(net), ranks, shapes, one_size)

    def space(self, value: object) -> Space | None:
        """Space of a value, if known."""
        return self.spaces.get(value) if isinstance(value, Value) else None

    def lengths(self, value: object, axes: int) -> Ints | None:
        """Sizes of the last ``axes`` axes of a value in the example; None without one."""
        shape = self.shapes.get(value) if isinstance(value, Value) else None
        return None if shape is None or len(shape) < axes else shape[len(shape) - axes :]

    def rank(self, value: object) -> Rank:
        """Bounds of the rank of a value."""
        return self.ranks.get(value, UNKNOWN) if isinstance(value, Value) else UNKNOWN


Lifting = Callable[[Value, Known], Lifted]


def per_axis(value: Any, axes: int) -> Ints:
    """One entry per axis of an argument that may be a single number."""
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


def depends_on_input(option: object) -> bool:
    """Whether an argument is computed from the input, or one of its entries is."""
    return any(isinstance(item, Value) for item in (option if isinstance(option, list | tuple) else (option,)))


def numbers_of(read: Callable[[], Tensor | None]) -> Numbers:
    """The numbers of a tensor that is read when they are asked for."""

    def numbers() -> Tensor:
        value = read()
        assert value is not None
        return value.detach().cpu() if value.device.type == "mps" else value.detach()

    return numbers


def weight_of(module: nn.Module) -> Numbers:
    """The weight that a module uses in eval mode, in float64 where a hook or a parametrization generates it."""

    def weight() -> Tensor | None:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and hook.name == "weight":
                made: Tensor = hook.compute_weight(_held(module))
                return made
            if isinstance(hook, SpectralNorm) and hook.name == "weight":
                made = hook.compute_weight(_held(module), do_power_iteration=False)
                return made
        if parametrize.is_parametrized(module, "weight") and not any(t.is_meta for t in module.parameters()):
            return precise_copy(module).weight  # type: ignore[return-value]
        return module.weight  # type: ignore[return-value]

    return numbers_of(weight)


def _held(module: nn.Module) -> Any:
    """The parameters and buffers of a module, by name, in float64."""
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return SimpleNamespace(**{name: tensor if tensor.is_meta else precise_tensor(tensor) for name, tensor in held})


def bias_of(module: nn.Module) -> Numbers | None:
    """The bias of a module; None if it has none."""
    return None if getattr(module, "bias", None) is None else numbers_of(lambda: module.bias)  # type: ignore[arg-type, return-value]


def generated(value: Value, tensor: Tensor) -> bool:
    """Whether a tensor that a function is given was computed in a forward, more than read or viewed."""
    base = tensor._base if tensor._base is not None else tensor
    frame: Frame | None = value.frame
    while frame is not None:
        name = frame.trace.read.get(id(base), frame.trace.read.get(id(tensor)))
        if name is not None:
            return name.startswith("_constant")
        frame = frame.parent
    return False


def shape_text(kernel: Ints) -> str:
    """``3x3``."""
    return "x".join(map(str, kernel))


def full(channels: int, number: float) -> Numbers:
    """One number for every channel, ``(channels,)``."""
    return lambda: torch.full((channels,), number, dtype=torch.float64)


def constant_vector(constant: Any, value: Value, known: Known) -> Numbers | None:
    """A constant that meets a value, as one number per channel, ``(channels,)``; None if it is not."""
    space = known.space(value)
    if isinstance(constant, bool) or not isinstance(constant, Real | Tensor) or space is None or space.channels == 0:
        return None
    if not isinstance(constant, Tensor):
        return full(space.channels, float(constant))
    if not fits(constant, space, known.rank(value).least) or constant.is_complex():
        return None
    channels = space.channels
    return lambda: precise(constant).reshape(-1).expand(channels)


def identity_of(value: Value, known: Known) -> Conv:
    """The identity on a value."""
    space = known.space(value)
    return identity(0, 0) if space is None else identity(space.channels, space.axes)


def passed(value: Value, known: Known) -> Operation:
    """``value`` itself."""
    return Operation("identity", {value: identity_of(value, known)}, {})


def changing_weights(module: nn.Module) -> str:
    """Why weights that parametrizations compute may be others when the module runs; empty if they are not."""
    if not parametrize.is_parametrized(module):
        return ""
    if module.training:
        return "the module is in training mode"
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    snapshot = Snapshot(parametrizations)
    for part in parametrizations.modules():
        snapshot.add(part)
    before = {name: (buffer, buffer.clone()) for name, buffer in parametrizations.named_buffers() if not buffer.is_meta}
    try:
        with torch.no_grad():
            for weights in parametrizations.values():
                weights()
    except Exception:  # user code; or an iterator that it uses, which is out of reach
        snapshot.restore(before)
        return "its parametrization cannot be run by itself"
    changed = snapshot.restore(before)
    return "its parametrization changes when it runs" if changed or snapshot.cached else ""
