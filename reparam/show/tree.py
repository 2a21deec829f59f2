"""A report as a coloured tree, with rich."""

from typing import IO, TYPE_CHECKING

from reparam.errors import MissingPackageError
from reparam.report import Report
from reparam.show.outline import Branch, near_misses, outline
from reparam.show.text import headline, near_miss, rows, totals

if TYPE_CHECKING:
    from rich.tree import Tree


def tree(report: Report) -> "Tree":
    """The report as a tree for a terminal.

    Raises:
        MissingPackageError: rich is not installed.
    """
    try:
        from rich.text import Text
        from rich.tree import Tree
    except ImportError as error:
        raise MissingPackageError.of("rich", "draws coloured trees", "cli") from error
    root = Tree(Text(headline(report), style="bold"))
    near = list(near_misses(report))
    if near:
        misses = root.add(
            Text("near misses, each of which one change of the model would let fuse", style="bold yellow")
        )
        for refusal, paths in near:
            misses.add(Text(near_miss(report, refusal, paths), style="yellow"))

    def grow(parent: Tree, branch: Branch) -> None:
        here = parent
        found = list(rows(branch))
        if branch.path or found:
            here = parent.add(Text(branch.title, style="bold" if found else ""))
            for row, is_region in found:
                here.add(Text(row, style="green" if is_region else "dim"))
        for child in branch.children:
            grow(here, child)

    grow(root, outline(report))
    root.add(Text(f"totals: {totals(report)}", style="bold"))
    return root


def show(report: Report, file: IO[str] | None) -> None:
    """Print a report, with rich if it is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(report, file=file)
        return
    Console(file=file).print(tree(report))
