"""What fusing a model would do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from torch import nn

from reparam.report.report import Report
from reparam.report.wiring import Wiring

if TYPE_CHECKING:
    from reparam.graph.options import Options
    from reparam.graph.weight_ranges import ChannelRanges


@final
@dataclass(frozen=True, slots=True)
class Plan(Report):
    """All regions of a model and all refusals.

    Args:
        regions: what would be fused.
        left: what would be left alone, with the reason; near misses first.
        model_type: class of the model.
        modules: classes of the modules that regions and refusals stand in, by path.
        boundaries: what stands between the regions, one refusal for each kind of operation that is not linear.
        wiring: the operations and what they read, before and after.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> plan = reparam.plan(net)
        >>> print(plan)
        Sequential: 1 region is fused, 0 operations are left alone
        regions:
          0 Conv2d: conv 3x3, batch norm -> conv 3x3 [parameters 240 -> 224; MACs per position 224 -> 216]
        totals: 2 operations -> 1; parameters 240 -> 224
        >>> plan.regions[0].before
        ('conv 3x3', 'batch norm')
    """

    wiring: Wiring = field(default_factory=Wiring, repr=False, compare=False)
    model: nn.Module = field(default_factory=nn.Identity, repr=False, compare=False)
    options: "Options | None" = field(default=None, repr=False, compare=False)

    def apply(self, *, inplace: bool = False, check: bool = True) -> nn.Module:
        """Fuse the model that was planned; the same as ``reparam.fuse``.

        Returns:
            The fused model; ``reparam.receipt`` tells what was done, with the measured error of each region.
        """
        from reparam.graph.fusing import apply
        from reparam.graph.options import Options

        return apply(self.model, self.options or Options(), inplace=inplace, check=check)

    def ranges(self) -> "tuple[ChannelRanges, ...]":
        """Weight ranges of every output channel, before and after, of every region: what quantization trips over.

        Returns:
            One entry per region that becomes an operation; regions whose value nothing reads come last and have none.

        Raises:
            ReparamError: weights are on the meta device.
        """
        from reparam.graph.weight_ranges import weight_ranges

        return weight_ranges(self)

    def draw(self, file: str | Path, *, module: str = "") -> Path:
        """Draw the operations before and after, side by side, regions coloured, repeated blocks once.

        Args:
            file: ends in ``.svg``, ``.png``, or ``.html`` (the picture, linked to the list of regions).
            module: dotted path of the module to draw, with nothing folded in it; empty: the model.

        Returns:
            The path of the file.

        Raises:
            ReparamError: another ending, no folder to write into, no such module, or nothing to draw.
            MissingPackageError: the extra ``draw`` is not installed.
        """
        from reparam.show.picture import draw

        return draw(self, Path(file), module)

    def draw_ranges(self, file: str | Path) -> Path:
        """Draw a heat map of ``ranges()``, before and after.

        Args:
            file: a name that matplotlib knows how to write: ``.png``, ``.svg``, ``.pdf``.

        Returns:
            The path of the file.

        Raises:
            ReparamError: another ending, no folder to write into, no region, or weights on the meta device.
            MissingPackageError: the extra ``draw`` is not installed.
        """
        from reparam.show.heat import draw_ranges

        return draw_ranges(self.ranges(), Path(file))
