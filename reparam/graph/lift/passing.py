"""Operations that return their input, because of what they are or because of their parameters.

A leaky activation is ``max(x, 0) + slope min(x, 0)``: the identity iff the slope is 1. Slopes up to a quarter are meant
to be non-linear; a larger one is on its way to 1 (VanillaNet, arXiv 2305.12972, section 3.1), so its refusal names it.
"""

from math import inf
from typing import Any, Final

from torch import nn

from reparam.algebra import Refusal
from reparam.graph.calls import DROPOUTS, argument, name_of, stock, tensor_input
from reparam.graph.lift.base import Known, Lifted, passed
from reparam.graph.net import Value

ANNEALED: Final = (0.25, 1.0)
RETURNED: Final = frozenset(["contiguous", "clone", "alias"])


def passes_through(value: Value, known: Known) -> Lifted:
    """Identity, dropout in eval mode, and activations whose parameters make them the identity."""
    source = tensor_input(value)
    if source is None:
        return None
    slope = _slope(value)
    if slope is not None and ANNEALED[0] < slope < ANNEALED[1]:
        return Refusal("activation", f"its slope is {slope:g}, and only a slope of 1 is linear", "train it towards 1")
    same = slope == 1 or (_module_passes(value) if value.module is not None else _function_passes(value))
    return passed(source, known) if same else None


def _slope(value: Value) -> float | None:
    """Slope on negative numbers of a leaky activation without randomness."""
    module, kind, name = value.module, stock(value.module), name_of(value)
    if kind is nn.LeakyReLU:
        slope: Any = module.negative_slope  # type: ignore[union-attr]
    elif name == "leaky_relu":
        slope = argument(value, 1, "negative_slope", 0.01)
    elif kind is nn.RReLU:
        slope = None if module.training else (module.lower + module.upper) / 2  # type: ignore[union-attr, operator]
    elif name == "rrelu":
        bounds = argument(value, 1, "lower", 1 / 8), argument(value, 2, "upper", 1 / 3)
        training = argument(value, 3, "training", False)
        slope = sum(bounds) / 2 if training is False and all(isinstance(b, int | float) for b in bounds) else None
    else:
        slope = None
    return float(slope) if isinstance(slope, int | float) else None


def _module_passes(value: Value) -> bool:
    module, kind = value.module, stock(value.module)
    match module:
        case _ if kind is None:
            return False
        case nn.Identity():
            return True
        case nn.modules.dropout._DropoutNd():
            return not module.training or module.p == 0
        case nn.Hardtanh():
            return (module.min_val, module.max_val) == (-inf, inf)
        case nn.Threshold():
            return bool(module.threshold == -inf)
        case nn.Softshrink() | nn.Hardshrink():
            return bool(module.lambd == 0)
        case nn.PixelShuffle():
            return bool(module.upscale_factor == 1)
        case nn.PixelUnshuffle():
            return bool(module.downscale_factor == 1)
        case nn.ChannelShuffle():
            return bool(module.groups == 1)
    return False


def _function_passes(value: Value) -> bool:
    name = name_of(value)
    if name in RETURNED:
        return len(value.args) == 1
    if name == "getitem":
        return value.args[1] is Ellipsis
    if name in DROPOUTS:
        training = argument(value, 2, "training", value.kwargs.get("train", True))
        return training is False or _equals(argument(value, 1, "p", 0.5), 0)
    if name == "hardtanh":
        return _equals(argument(value, 1, "min_val", -1.0), -inf) and _equals(argument(value, 2, "max_val", 1.0), inf)
    if name == "clamp":
        return _equals(argument(value, 1, "min", -inf), -inf) and _equals(argument(value, 2, "max", inf), inf)
    if name in ("clamp_min", "clamp_max"):
        return _equals(argument(value, 1, name[-3:]), -inf if name == "clamp_min" else inf)
    if name == "threshold":
        return _equals(argument(value, 1, "threshold"), -inf)
    if name in ("softshrink", "hardshrink"):
        return _equals(argument(value, 1, "lambd", 0.5), 0)
    whole = name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
    return whole and len(value.args) == 2 and _equals(value.args[1], 1)


def _equals(argument: Any, number: float) -> bool:
    """Whether an argument is this number; an absent bound is an infinite one."""
    if argument is None:
        return abs(number) == inf
    return isinstance(argument, int | float) and argument == number
