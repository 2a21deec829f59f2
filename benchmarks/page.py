"""Tables and texts of docs/speed.md, between the marks of the script that writes them."""

from collections.abc import Iterable, Sequence

from matplotlib import rcParams
from matplotlib.figure import Figure

from benchmarks import ROOT
from benchmarks.cells import Results
from benchmarks.marks import put

PAGE = ROOT / "docs" / "speed.md"
IMAGES = ROOT / "docs" / "images"
ABSENT = "Run `make bench`."


def publish(script: str, text: str, on_page: bool) -> None:
    """Put a text on the page, or print it."""
    if on_page:
        put(PAGE, f"figures: benchmarks/{script}.py", text.strip())
    else:
        print(text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; all columns but the first are aligned to the right.

    >>> print(table(("net", "ms"), [("a", 1)]))
    | net | ms |
    |---|---:|
    | a | 1 |
    """
    lines = [head, *rows]
    cells = [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
    return "\n".join([cells[0], "|---|" + "---:|" * (len(head) - 1), *cells[1:]])


def machine(results: Results) -> str:
    """What was measured on, in one sentence."""
    about = dict(results.setup)
    where = f"{about.pop('machine')}, device {about.pop('device')}, {about.pop('threads')} threads"
    return f"Machine: {where}; {', '.join(f'{name} {version}' for name, version in about.items())}."


def failures(results: Results) -> list[str]:
    """What could not be measured, as a list in Markdown."""
    if not results.failed:
        return []
    return ["Not measured:", "", *(f"- {name}: `{error}`" for name, error in results.failed.items()), ""]


def save(figure: Figure, name: str) -> None:
    """Write a picture, the same one for the same figures."""
    IMAGES.mkdir(exist_ok=True)
    rcParams["svg.hashsalt"] = name
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
