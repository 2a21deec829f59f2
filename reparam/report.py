"""What fusing a model would do: regions, and everything left alone with its reason."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from torch import nn

from reparam.algebra import Refusal

if TYPE_CHECKING:
    from reparam.graph.options import Options


@final
@dataclass(frozen=True, slots=True)
class Region:
    """One linear region before and after.

    Args:
        path: dotted path of the module in which the result stands; empty for the model itself.
        before: the operations that are replaced.
        after: the operations that replace them.
        params_before: their parameters, with norm statistics not counted.
        params_after: parameters of the replacement.
        macs_before: multiply-adds per output position of the region.
        macs_after: the same of the replacement.
        how: whether a child, the module or its forward is replaced.
        error: largest relative difference that was measured; None if it was not.
    """

    path: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    params_before: int
    params_after: int
    macs_before: float
    macs_after: float
    how: str
    error: float | None = None

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for name in self.before:
            counts[name] = counts.get(name, 0) + 1
        before = ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())
        after = " + ".join(self.after)
        error = "" if self.error is None else f"; error {self.error:.0e}"
        return (
            f"{self.path or '(model)'}: {before} -> {after}"
            f" [parameters {self.params_before:,} -> {self.params_after:,};"
            f" MACs per position {self.macs_before:,.0f} -> {self.macs_after:,.0f}{error}]"
        )


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """All regions of a model and all refusals.

    Args:
        regions: what is fused.
        left: what is left alone, with the reason.
        boundaries: what stands between the regions, one refusal for each kind of operation that is not linear.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> plan = reparam.plan(net)
        >>> plan.regions[0].before
        ('conv 3x3', 'batch norm')
    """

    regions: tuple[Region, ...]
    left: tuple[Refusal, ...]
    model: nn.Module = field(repr=False, compare=False)
    options: "Options" = field(repr=False, compare=False)
    _apply: Callable[..., nn.Module] = field(repr=False, compare=False)
    boundaries: tuple[Refusal, ...] = ()

    def apply(self, *, inplace: bool = False, check: bool = True) -> nn.Module:
        """Fuse the model that was planned; the same as ``reparam.fuse``."""
        return self._apply(self.model, self.options, inplace=inplace, check=check)

    def __str__(self) -> str:
        lines = [f"{len(self.regions)} regions are fused:"]
        lines += [f"  {region}" for region in self.regions]
        lines.append(f"{len(self.left)} operations are left alone:")
        lines += [f"  {refusal}" for refusal in self.left]
        before = sum(region.params_before for region in self.regions)
        after = sum(region.params_after for region in self.regions)
        lines.append(f"parameters of the regions: {before:,} -> {after:,}")
        return "\n".join(lines)
