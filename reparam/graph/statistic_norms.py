"""Norms that use statistics of their input: layer, group and root-mean-square norm.

    y = gamma * n(x) + beta,      n not linear,      gamma and beta one number per channel

``n`` stays as it is; ``gamma`` and ``beta`` are a scale and shift like any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor, fx, nn

from reparam.algebra import diagonal
from reparam.cost import Work
from reparam.graph.calls import argument, name_of, plain_name, stock
from reparam.graph.lift.base import full, numbers_of
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.space import Space

FUNCTIONS: Final[Mapping[str, tuple[int, int | None]]] = {  # where gamma and beta stand among the arguments
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "rms_norm": (2, None),
}
BARE: Final[Mapping[type, Callable[[Any], nn.Module]]] = {
    nn.LayerNorm: lambda norm: nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False),
    nn.GroupNorm: lambda norm: nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False),
    nn.RMSNorm: lambda norm: nn.RMSNorm(norm.normalized_shape, norm.eps, elementwise_affine=False),
}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """Scale and shift at the end of a norm.

    Args:
        gamma: ``(channels,)``; None if there is none.
        beta: the same.
    """

    gamma: Tensor | None
    beta: Tensor | None

    @property
    def work(self) -> Work:
        """What goes with it: parameters alone, for the kernel of the norm multiplies and adds in the same pass."""
        return Work(parameters=sum(t.numel() for t in (self.gamma, self.beta) if t is not None))

    def operation(self, norm: Value, space: Space) -> Operation:
        """The scale and shift as an affine formula of the bare norm, which is known by the same value."""
        gamma, beta = self.gamma, self.beta
        conv = diagonal(space.channels, space.axes)
        weight = full(space.channels, 1.0) if gamma is None else numbers_of(lambda: gamma.reshape(-1))
        bias = None if beta is None else numbers_of(lambda: beta.reshape(-1))
        return Operation("scale and shift of a norm", {norm: conv}, {norm: weight}, bias)


def tail_of(value: Value, space: Space | None) -> Tail | None:
    """Scale and shift of a norm with statistics of its input; None for other operations and for a bare norm.

    Args:
        value: the operation.
        space: of its value: a layer norm has its channels last, over which alone it must go; a group norm before them.
    """
    kind, name = stock(value.module), name_of(value)
    if kind in BARE:
        gamma, beta = (getattr(value.module, part, None) for part in ("weight", "bias"))
        groups = kind is nn.GroupNorm
    elif name in FUNCTIONS and isinstance(value.args[0] if value.args else None, Value):
        first, second = FUNCTIONS[name]
        gamma = argument(value, first, "weight")
        beta = None if second is None else argument(value, second, "bias")
        groups = name == "group_norm"
    else:
        return None
    given = [part for part in (gamma, beta) if part is not None]
    if space is None or not given or (space.axes > 0) != groups:
        return None
    fits = all(isinstance(part, Tensor) and tuple(part.shape) == (space.channels,) for part in given)
    return Tail(gamma, beta) if fits else None


def bare_module(norm: nn.Module) -> nn.Module:
    """The same norm without scale and shift."""
    kind = stock(norm)
    assert kind is not None
    return BARE[kind](norm).train(norm.training)


def bare_call(node: fx.Node) -> None:
    """Take scale and shift out of the arguments of a call, in place."""
    at = [place for place in FUNCTIONS[plain_name(node.target)] if place is not None]
    node.args = tuple(None if i in at else argument for i, argument in enumerate(node.args))
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("weight", "bias")}
