"""What plans and receipts have in common: regions, refusals, totals, and ways to look at them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, final

from reparam.algebra import Refusal
from reparam.report.region import Footprint, Region

if TYPE_CHECKING:
    from rich.tree import Tree


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the regions of a report.

    Args:
        operations_before: operations that are replaced.
        operations_after: operations that replace them.
        params_before: parameters that are replaced; what several regions use counts once.
        params_after: parameters of the replacements.
        footprint_before: work at the size of the example inputs; None if that of a region is not known.
        footprint_after: the same of the replacements.
    """

    operations_before: int
    operations_after: int
    params_before: int
    params_after: int
    footprint_before: Footprint | None
    footprint_after: Footprint | None


@dataclass(frozen=True, slots=True)
class Report:
    """Regions and refusals of one model; the base of ``Plan`` and ``Receipt``.

    Args:
        regions: what is fused.
        left: what is left alone, with the reason; near misses first.
        model_type: class of the model.
        modules: classes of the modules that regions and refusals stand in, and of those around them, by path.
        boundaries: what stands between the regions, one refusal for each kind of operation that is not linear.
    """

    regions: tuple[Region, ...]
    left: tuple[Refusal, ...]
    model_type: str = ""
    modules: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    boundaries: tuple[Refusal, ...] = ()

    @property
    def near_misses(self) -> tuple[Refusal, ...]:
        """Refusals that one change of the model would lift."""
        return tuple(refusal for refusal in self.left if refusal.near)

    @property
    def totals(self) -> Totals:
        """Sums over the regions."""
        fresh = [step for region in self.regions for step in region.steps if not step.again]
        return Totals(
            operations_before=len(fresh),
            operations_after=sum(len(region.result) for region in self.regions),
            params_before=sum(step.parameters - step.shared for region in self.regions for step in region.steps),
            params_after=sum(region.params_after for region in self.regions),
            footprint_before=_sum([region.footprint_before for region in self.regions]),
            footprint_after=_sum([region.footprint_after for region in self.regions]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers, ready for ``json.dumps``; the keys are in docs/plan.md."""
        from reparam.report.record import of_report

        return of_report(self)

    def to_markdown(self) -> str:
        """Tables of the near misses, the regions, and what else is left alone."""
        from reparam.show.markdown import markdown

        return markdown(self)

    def show(self, file: IO[str] | None = None) -> None:
        """Print the report: as a coloured tree if ``rich`` is installed, as plain text otherwise.

        Args:
            file: where to; None: standard output.
        """
        from reparam.show.tree import show

        show(self, file)

    def __str__(self) -> str:
        from reparam.show.text import text

        return text(self)

    def __rich__(self) -> "Tree":
        from reparam.show.tree import tree

        return tree(self)

    def _repr_html_(self) -> str:
        from reparam.show.page import fragment

        return fragment(self)


def _sum(footprints: list[Footprint | None]) -> Footprint | None:
    known = [footprint for footprint in footprints if footprint is not None]
    if not known or len(known) < len(footprints):
        return None
    return Footprint(sum(f.macs for f in known), sum(f.activations for f in known))
