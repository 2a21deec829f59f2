"""What scripts write into pages, between marks of their own.

A block named ``table: benchmarks/peers.py`` stands between ``<!-- table: benchmarks/peers.py -->`` and
``<!-- /table -->``.
"""

import re
from pathlib import Path


def filled(page: str, name: str, text: str) -> str:
    """A page with another text in one of its blocks.

    Raises:
        ValueError: the block is not there, or several times.

    Example:
        >>> filled("<!-- table: a.py -->\\nold\\n<!-- /table -->", "table: a.py", "new")
        '<!-- table: a.py -->\\nnew\\n<!-- /table -->'
    """
    text = text if text.endswith("\n") else f"{text}\n"
    found, number = _block(name).subn(lambda _: text, page)
    if number != 1:
        raise ValueError(f"expected one block between <!-- {name} --> and {_end(name)}, found {number}")
    return found


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands in a block of a page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def shown(page: Path, name: str) -> str:
    """What stands in a block of a page."""
    (text,) = _block(name).findall(page.read_text(encoding="utf-8"))
    return str(text)


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {re.escape(name)} -->\n).*?(?={re.escape(_end(name))})", re.DOTALL)


def _end(name: str) -> str:
    return f"<!-- /{name.partition(':')[0]} -->"
