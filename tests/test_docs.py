"""The documentation is right: its code runs, its links lead somewhere, its tables are what the scripts say.

Every ```python block is run, all of one page in one namespace, from a seed of 0. A block that holds `>>>` is a doctest:
its output is compared, white space aside, so that a page may wrap long lines; `...` stands for anything.
"""

import doctest
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import reparam
from benchmarks.marks import shown

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
RULE_NAMES = re.compile(r"(?:\bRefusal\(\s*|^RULE = )\"([a-z_]+)\"", re.MULTILINE)
LOOSE = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
GENERATED = {"blocks.md", "zoo.md"}  # written by docs/make_blocks.py and benchmarks/zoo.py
NEVER_LISTED = {"boundary"}  # inside the planner: an operation that is not linear, which needs no reason in a plan

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Python blocks of a page with the number of the line above them."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match["language"] == "python":
            yield text.count("\n", 0, match.start("text")), match["text"]


def outside_code(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as mkdocs and GitHub make them."""
    titles = (match["title"] for match in HEADING.finditer(outside_code(page)))
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def script(path: str) -> ModuleType:
    """A script of this repository as a module."""
    name = f"script_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@each_page
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pickle looks classes up there
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=LOOSE)
    report: list[str] = []
    for line, text in blocks(page):
        if ">>>" not in text:
            exec(compile("\n" * line + text, str(page), "exec"), module.__dict__)
            continue
        test = doctest.DocTestParser().get_doctest(text, module.__dict__, f"{page.name}", str(page), line)
        test.globs = module.__dict__  # not a copy: later blocks see what this one defines
        runner.run(test, out=report.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@each_page
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(outside_code(page)):
        path, _, anchor = match["target"].partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        target = page.parent / path if path else page
        assert target.exists() or target.name in GENERATED, f"{page.name} links to {path}, which does not exist"
        assert page.parent != ROOT / "docs" or target.parent == page.parent, f"{page.name} links out of docs/: {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {match['target']}: no such heading"


def test_navigation_names_the_pages() -> None:
    listed = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {*listed} - GENERATED == {page.name for page in PAGES[1:]} - GENERATED
    assert len(listed) == len({*listed})


def test_every_rule_has_a_section_of_refusals() -> None:
    rules: set[str] = set()
    for file in (ROOT / "reparam").rglob("*.py"):
        rules |= set(RULE_NAMES.findall(file.read_text(encoding="utf-8")))
    sections = anchors(ROOT / "docs" / "refusals.md")
    assert rules - NEVER_LISTED - sections == set(), "rules of the code that docs/refusals.md does not show"
    assert {name for name in sections if "_" in name} - rules == set(), "sections about rules that are gone"


def test_every_lifting_is_named() -> None:
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    missing = [lifting.__name__ for lifting in reparam.LIFTINGS if f"`{lifting.__name__}`" not in page]
    assert not missing, f"docs/rules.md does not name {missing}"


def test_table_of_wrong_formulas_is_current() -> None:
    assert script("benchmarks/peers.py").table() in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")


def test_figures_are_those_of_the_committed_run() -> None:
    figures = script("benchmarks/figures.py")
    if figures.RESULTS.is_file():
        pytest.importorskip("matplotlib", reason="needs the extra 'examples'")
    assert shown(figures.README, figures.BLOCK) == figures.block()
