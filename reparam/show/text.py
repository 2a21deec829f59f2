"""A report as plain text."""

from collections.abc import Iterator
from typing import Final

from reparam.algebra import Refusal
from reparam.report import Report
from reparam.report.receipt import Receipt
from reparam.report.region import in_bytes
from reparam.show.outline import Branch, counted, near_misses, outline

SOME: Final = 3  # paths that are named of a near miss that is found in many places


def text(report: Report) -> str:
    """The whole report, one operation a line."""
    lines = [headline(report)]
    near = list(near_misses(report))
    if near:
        lines.append("near misses, each of which one change of the model would let fuse:")
        lines += [f"  {near_miss(report, refusal, paths)}" for refusal, paths in near]
    tree = outline(report)
    if tree.regions or tree.left or tree.children:
        lines.append(
            "regions:" if not any(not r.near for r in report.left) else "regions, and what else is left alone:"
        )
        lines += _lines(tree, 1)
    if report.regions:
        lines.append(f"totals: {totals(report)}")
    return "\n".join(lines)


def headline(report: Report) -> str:
    """One sentence."""
    regions, left = len(report.regions), len(report.left)
    verb = ("was" if regions == 1 else "were") if isinstance(report, Receipt) else ("is" if regions == 1 else "are")
    other = ("was" if left == 1 else "were") if isinstance(report, Receipt) else ("is" if left == 1 else "are")
    return (
        f"{report.model_type or 'model'}: {counted(regions, 'region')} {verb} fused,"
        f" {counted(left, 'operation')} {other} left alone"
    )


def near_miss(report: Report, refusal: Refusal, paths: tuple[str, ...]) -> str:
    """A near miss and where it is found."""
    first = f"{refusal.path or '(model)'} {report.modules.get(refusal.path, '')}".rstrip()
    others = [path or "(model)" for path in paths[1:]]
    more = ""
    if others:
        rest = f" and {len(others) - SOME} more" if len(others) > SOME else ""
        more = f"; also at {', '.join(others[:SOME])}{rest}"
    return f"{first}: {reason(refusal)}{more}"


def reason(refusal: Refusal) -> str:
    """Rule, operands, failed condition and remedy, without the place."""
    return str(refusal.at("", *refusal.operands))


def totals(report: Report) -> str:
    """Operations, parameters and work of all regions before and after."""
    sums = report.totals
    parts = [
        f"{counted(sums.operations_before, 'operation')} -> {sums.operations_after}",
        f"parameters {sums.params_before:,} -> {sums.params_after:,}",
    ]
    if sums.footprint_before is not None and sums.footprint_after is not None:
        old, new = sums.footprint_before, sums.footprint_after
        parts.append(f"MACs {old.macs:,} -> {new.macs:,}")
        parts.append(f"activations {in_bytes(old.activations)} -> {in_bytes(new.activations)}")
    return "; ".join(parts)


def rows(branch: Branch) -> Iterator[tuple[str, bool]]:
    """What stands in a branch itself: regions, then refusals; and whether it is a region."""
    for entry in branch.regions:
        region = entry.region
        yield f"{region.change} [{region.numbers}]", True
    for refusal in branch.left:
        yield f"left alone: {reason(refusal)}", False


def _lines(branch: Branch, depth: int) -> Iterator[str]:
    space = "  " * depth
    found = [row for row, _ in rows(branch)]
    if branch.path or found:
        if not found:
            yield f"{space}{branch.title}"
        for row in found:
            yield f"{space}{branch.title}: {row}"
        depth += 1
    for child in branch.children:
        yield from _lines(child, depth)
