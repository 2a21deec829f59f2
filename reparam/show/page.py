"""A report as HTML: a fragment for notebooks, and a page with a picture."""

from collections.abc import Iterator
from html import escape
from typing import Final

from reparam.report import Report
from reparam.show.colours import colour
from reparam.show.outline import Branch, near_misses, outline
from reparam.show.text import headline, near_miss, reason, totals

STYLE: Final = """\
<style>
.reparam { font: 13px/1.5 system-ui, sans-serif; }
.reparam details { margin-left: 1.2em; }
.reparam summary { cursor: pointer; }
.reparam .region, .reparam .left { margin-left: 1.2em; }
.reparam .region { border-left: .5em solid; padding-left: .5em; }
.reparam .left { opacity: .7; }
.reparam .near { background: #fff3cd; color: #533f03; padding: .2em .6em; }
.reparam :target { outline: 2px solid #d00; }
</style>"""


def fragment(report: Report) -> str:
    """The report as HTML to put into a page."""
    parts = [STYLE, '<div class="reparam">', f"<p><b>{escape(headline(report))}</b><br>{escape(totals(report))}</p>"]
    near = list(near_misses(report))
    if near:
        parts.append("<p>Near misses, each of which one change of the model would let fuse:</p><ul>")
        parts += [f'<li class="near">{escape(near_miss(report, *found))}</li>' for found in near]
        parts.append("</ul>")
    parts += _branch(outline(report))
    parts.append("</div>")
    return "\n".join(parts)


def page(report: Report, picture: str, title: str) -> str:
    """A page: the picture, an SVG element, beside the list of regions; each links to the other."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(title)}</title>",
            "<style>body { display: flex; gap: 2em; } svg { max-width: 100%; height: auto; }"
            " .list { max-width: 44em; position: sticky; top: 0; align-self: flex-start; max-height: 100vh;"
            " overflow: auto; }</style></head><body>",
            f"<div>{picture}</div>",
            f'<div class="list">{fragment(report)}</div>',
            "</body></html>",
        ]
    )


def _branch(branch: Branch) -> Iterator[str]:
    rows = list(_rows(branch))
    if branch.path or rows:
        yield f"<details open><summary>{escape(branch.title)}</summary>"
        yield from rows
    for child in branch.children:
        yield from _branch(child)
    if branch.path or rows:
        yield "</details>"


def _rows(branch: Branch) -> Iterator[str]:
    for entry in branch.regions:
        number, *folded = entry.numbers
        anchors = "".join(f'<span id="list-{other}"></span>' for other in folded)
        text = escape(f"{entry.region.change} [{entry.region.numbers}]")
        yield (
            f'<div class="region" id="list-{number}" style="border-color: {colour(number)}">{anchors}'
            f'<a href="#region-{number}-before">{number}</a> {text}</div>'
        )
    for refusal in branch.left:
        yield f'<div class="left">left alone: {escape(reason(refusal))}</div>'
