"""Structural re-parameterization of any PyTorch net: train with many branches, deploy one convolution."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam import cost, models, nn
    from reparam.algebra import Refusal
    from reparam.api import fuse, plan, receipt
    from reparam.checkpoints.deploy import load_deploy, save_deploy
    from reparam.checkpoints.read import load_checkpoint
    from reparam.cost import DEFAULT_COST, Cost, Work
    from reparam.errors import BlockError, CheckError, MissingPackageError, ReparamError, TrainingModeError
    from reparam.expansion import expand, restore
    from reparam.exporting.export import export
    from reparam.graph.lift import LIFTINGS
    from reparam.graph.lift.declared import Formula, declare
    from reparam.measure import measured
    from reparam.report import Plan, Receipt, Region
    from reparam.verification.result import Cause, Difference, Verification
    from reparam.verification.verify import verify
else:
    # Where each name comes from: it is imported when it is first used, so that `import reparam` takes no time.
    _HOMES = {
        "DEFAULT_COST": "reparam.cost",
        "LIFTINGS": "reparam.graph.lift",
        "BlockError": "reparam.errors",
        "Cause": "reparam.verification.result",
        "CheckError": "reparam.errors",
        "Cost": "reparam.cost",
        "Difference": "reparam.verification.result",
        "Formula": "reparam.graph.lift.declared",
        "MissingPackageError": "reparam.errors",
        "Plan": "reparam.report",
        "Receipt": "reparam.report",
        "Refusal": "reparam.algebra",
        "Region": "reparam.report",
        "ReparamError": "reparam.errors",
        "TrainingModeError": "reparam.errors",
        "Verification": "reparam.verification.result",
        "Work": "reparam.cost",
        "cost": "reparam.cost",
        "declare": "reparam.graph.lift.declared",
        "expand": "reparam.expansion",
        "expansion": "reparam.expansion",
        "export": "reparam.exporting.export",
        "fuse": "reparam.api",
        "load_checkpoint": "reparam.checkpoints.read",
        "load_deploy": "reparam.checkpoints.deploy",
        "measured": "reparam.measure",
        "models": "reparam.models",
        "nn": "reparam.nn",
        "plan": "reparam.api",
        "receipt": "reparam.api",
        "restore": "reparam.expansion",
        "save_deploy": "reparam.checkpoints.deploy",
        "verify": "reparam.verification.verify",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = import_module(_HOMES[name])
        value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES})


__all__ = [
    "DEFAULT_COST",
    "LIFTINGS",
    "BlockError",
    "Cause",
    "CheckError",
    "Cost",
    "Difference",
    "Formula",
    "MissingPackageError",
    "Plan",
    "Receipt",
    "Refusal",
    "Region",
    "ReparamError",
    "TrainingModeError",
    "Verification",
    "Work",
    "cost",
    "declare",
    "expand",
    "export",
    "fuse",
    "load_checkpoint",
    "load_deploy",
    "measured",
    "models",
    "nn",
    "plan",
    "receipt",
    "restore",
    "save_deploy",
    "verify",
]
