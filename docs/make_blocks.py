"""Write docs/blocks.md from the market in tests/market.py.

python docs/make_blocks.py            writes the page
python docs/make_blocks.py --check    fails if the page is not current
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from market import SECTIONS, Count, Counts, Family, Source  # noqa: E402 (the path comes first)

PAGE = ROOT / "docs" / "blocks.md"
HEAD = """\
# Published blocks

{families} blocks and variants from {papers} publications, each as a small module of our own in `tests/market.py`.
The suite fuses every one of them and compares outputs at an odd and an even size in float64 and in float32, counts what
a run calls, and looks for the reason of whatever stays apart. This page is written by `python docs/make_blocks.py`.

Counts are calls in one run, before → after: convolutions and linear layers, batch norms, additions, scalings by a
constant.
"""
TABLE = """\

## {title}

| block | published | becomes | convs | norms | adds | scales | rules | left apart, because |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def number(count: Count) -> str:
    """A count as people write it."""
    if count is None:
        return "any"
    if isinstance(count, range):
        return f"{min(count)} to {max(count)}"
    return str(count)


def published(source: Source) -> str:
    """The paper, linked if it is on arXiv, and the code it is read from."""
    paper = f"[{source.paper}](https://arxiv.org/abs/{source.arxiv})" if source.arxiv else source.paper
    return f"{paper}; `{source.code}`" if source.code else paper


def changes(before: Counts, after: Counts) -> list[str]:
    """One cell per count."""
    cells = []
    for name in ("convs", "norms", "adds", "scales"):
        old, new = number(getattr(before, name)), number(getattr(after, name))
        cells.append(old if old == new else f"{old} → {new}")
    return cells


def row(family: Family) -> str:
    """One line of a table."""
    becomes = family.becomes + (" (needs `example_inputs`)" if family.example_inputs else "")
    why = family.why.text if family.why else ""
    counts = changes(family.before, family.after)
    cells = [family.name, published(family.source), becomes, *counts, ", ".join(family.rules), why]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page."""
    families = [family for section in SECTIONS.values() for family in section]
    papers = {family.source.paper for family in families}
    text = HEAD.format(families=len(families), papers=len(papers))
    for title, section in SECTIONS.items():
        text += TABLE.format(title=title, rows="\n".join(map(row, section)))
    return text


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not current")
    if parser.parse_args().check:
        current = PAGE.exists() and PAGE.read_text() == page()
        print(f"{PAGE.relative_to(ROOT)} is {'current' if current else 'not current'}")
        return 0 if current else 1
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
