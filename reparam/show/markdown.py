"""A report as Markdown tables."""

import html
from collections.abc import Iterator

from reparam.report import Report
from reparam.report.region import Region
from reparam.show.outline import Branch, near_misses, outline
from reparam.show.text import headline, near_miss, reason, totals


def markdown(report: Report) -> str:
    """Near misses, regions, and what else is left alone."""
    lines = [f"**{cell(headline(report))}**", "", f"Totals: {cell(totals(report))}", ""]
    near = list(near_misses(report))
    if near:
        lines += ["Near misses, each of which one change of the model would let fuse:", ""]
        lines += [f"- {cell(near_miss(report, refusal, paths))}" for refusal, paths in near]
        lines.append("")
    branches = list(_flat(outline(report)))
    regions = [(branch, entry.region) for branch in branches for entry in branch.regions]
    if regions:
        lines += ["| module | before | after | numbers |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(map(cell, _region(*pair)))} |" for pair in regions]
        lines.append("")
    left = [(branch, refusal) for branch in branches for refusal in branch.left]
    if left:
        lines += ["| module | left alone, because |", "|---|---|"]
        lines += [f"| {cell(branch.title)} | {cell(reason(refusal))} |" for branch, refusal in left]
        lines.append("")
    return "\n".join(lines)


def _region(branch: Branch, region: Region) -> tuple[str, str, str, str]:
    before, _, after = region.change.rpartition(" -> ")
    return branch.title, before, after, region.numbers


def _flat(branch: Branch) -> Iterator[Branch]:
    yield branch
    for child in branch.children:
        yield from _flat(child)


def cell(text: str) -> str:
    """Text that means nothing to Markdown or HTML, on one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for sign in "\\`*_[]|~":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped
