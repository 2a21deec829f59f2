"""Structural re-parameterization of any PyTorch net: train with many branches, deploy one convolution."""

from reparam import cost, models
from reparam.algebra import Refusal
from reparam.api import fuse, plan, receipt
from reparam.cost import DEFAULT_COST, Cost, Work
from reparam.errors import CheckError, ReparamError, TrainingModeError
from reparam.graph.lift import LIFTINGS
from reparam.report import Plan, Receipt, Region

__all__ = [
    "DEFAULT_COST",
    "LIFTINGS",
    "CheckError",
    "Cost",
    "Plan",
    "Receipt",
    "Refusal",
    "Region",
    "ReparamError",
    "TrainingModeError",
    "Work",
    "cost",
    "fuse",
    "models",
    "plan",
    "receipt",
]
