"""Structural re-parameterization of any PyTorch net: train with many branches, deploy one convolution."""

from reparam import cost, models
from reparam.algebra import Refusal
from reparam.api import fuse, plan
from reparam.cost import DEFAULT_COST, Cost, Work
from reparam.errors import CheckError, ReparamError, TrainingModeError
from reparam.graph.lift import LIFTINGS
from reparam.measure import measured
from reparam.report import Plan, Region

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
    "fuse",
    "measured",
    "models",
    "plan",
]
