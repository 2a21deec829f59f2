"""What fusing a model did."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from torch import nn

from reparam.errors import ReparamError
from reparam.report.record import to_report
from reparam.report.report import Report

ATTRIBUTE = "_reparam_receipt"


@final
@dataclass(frozen=True, slots=True)
class Receipt(Report):
    """What was fused, with the error of each region, and what was left alone, with the reason.

    It differs from the plan where weights decide: a region of several data types, on several devices, with weights
    that are not finite, or that failed its check, is in ``left``.

    Args:
        regions: what was fused; ``error`` is what was measured, None if it was not.
        left: what was left alone, with the reason; near misses first.
        model_type: class of the model.
        modules: classes of the modules that regions and refusals stand in, by path.
        boundaries: what stands between the regions, one refusal for each kind of operation that is not linear.
    """

    def attach(self, model: nn.Module) -> None:
        """Keep the receipt in a fused model: as plain data, so that the model can be unpickled without this library."""
        vars(model)[ATTRIBUTE] = self.to_dict()

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The receipt that ``to_dict`` gave ``record``."""
        return cls(*to_report(record))

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The receipt of a fused model.

        Raises:
            ReparamError: the model holds none.
        """
        record = getattr(model, "__dict__", {}).get(ATTRIBUTE)
        if record is None:
            raise ReparamError(
                f"expected a model that reparam.fuse returned, found {type(model).__name__} without a receipt: fuse it,"
                " or ask the fused model itself (its parts, exported and scripted copies hold none)"
            )
        return cls.from_dict(record)
