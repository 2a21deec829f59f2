"""The documentation as a site: it builds, needs nothing from elsewhere, and shows its figures and formulas."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FORMULA = re.compile(r"^```math$", re.MULTILINE)
FIGURE = re.compile(r"!\[[^\]]+\]\((\S+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
# Written into a page, and read from what the browser makes of it.
PROBE = """<script>addEventListener("load", () => {
  const seen = document.documentElement.dataset, math = [...document.querySelectorAll(".math math")];
  seen.images = [...document.images].filter(image => image.naturalWidth > 100).length;
  seen.formulas = math.filter(formula => formula.getBoundingClientRect().height > 12).length;
  seen.wide = math.filter(m => m.getBoundingClientRect().width > m.parentElement.clientWidth + 1).length;
})</script>"""


def text_of(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
SHOWN = [name for name in PAGES if FORMULA.search(text_of(name)) or FIGURE.search(text_of(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, strictly."""
    missing = [name for name in ("material", "mkdocstrings", "latex2mathml") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extra 'docs': {', '.join(missing)}")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def built(site: Path, name: str) -> Path:
    return site / "index.html" if name == "index" else site / name / "index.html"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_what_is_there_and_nothing_else(site: Path, name: str) -> None:
    page = built(site, name)
    for source in LOADED.findall(page.read_text(encoding="utf-8")):
        if source.startswith(("#", "data:")) or source.endswith("/"):
            continue
        assert not source.startswith(("http:", "https:", "//")), f"{name} loads {source}"
        assert (page.parent / html.unescape(source).partition("?")[0]).exists(), f"{name} loads {source}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_formulas_are_made_when_the_site_is_built(site: Path, name: str) -> None:
    page = built(site, name).read_text(encoding="utf-8")
    assert page.count('<div class="math"><math ') == len(FORMULA.findall(text_of(name)))
    assert "\\frac" not in page
    assert "\\sum" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_browser_shows_figures_formulas_and_headings(site: Path, name: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    page = built(site, name)
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--window-size=1280,2000", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, check=True, timeout=300)
    assert "Uncaught" not in done.stderr
    (root,) = re.findall(r"<html[^>]*>", done.stdout)
    seen = dict(re.findall(r'data-(images|formulas|wide)="(\d+)"', root))
    source = text_of(name)
    wanted = {"images": len(FIGURE.findall(source)), "formulas": len(FORMULA.findall(source)), "wide": 0}
    assert seen == {key: str(number) for key, number in wanted.items()}
    shown = re.sub(r"<[^>]+>", "", done.stdout)
    for heading in HEADING.findall(FENCED.sub("", source)):
        assert html.escape(heading.replace("`", ""), quote=False) in shown
