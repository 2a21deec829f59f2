"""Structural re-parameterization of any PyTorch net: train with many branches, deploy one convolution."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from reparam import cost, models
from reparam.algebra import Refusal
from reparam.api import fuse, plan
from reparam.cost import DEFAULT_COST, Cost, Work
from reparam.errors import CheckError, ReparamError, TrainingModeError
from reparam.graph.lift import LIFTINGS
from reparam.report import Plan, Region

if TYPE_CHECKING:
    from reparam import nn
    from reparam.expansion import expand, restore

__all__ = [
    "DEFAULT_COST",
    "LIFTINGS",
    "CheckError",
    "Cost",
    "Plan",
    "Refusal",
    "Region",
    "ReparamError",
    "TrainingModeError",
    "Work",
    "cost",
    "expand",
    "fuse",
    "models",
    "nn",
    "plan",
    "restore",
]

_LATER: Final = {
    "expand": "reparam.expansion",
    "restore": "reparam.expansion",
}  # what few programs need is imported when it is asked for


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in ("expansion", "nn"):
        return import_module(f"reparam.{name}")
    raise AttributeError(f"module 'reparam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
