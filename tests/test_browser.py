"""Pictures and pages in a real browser: what is painted, and where links lead."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import ready
from torch import nn

import reparam
from reparam.models import RepVGG
from reparam.show.colours import colour

pytest.importorskip("pygraphviz", reason="needs the extra 'draw'")
image = pytest.importorskip("matplotlib.image", reason="needs the extra 'draw'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(NAMES)}")
PROBE = """
<script>
const box = element => { const r = element.getBoundingClientRect(); return r.width * r.height; };
const target = a => a.getAttribute('href') || a.getAttribute('xlink:href');
const links = [...document.querySelectorAll('a')].map(target).filter(Boolean);
const found = {
  links: links,
  dead: links.filter(link => !link.startsWith('#') || !document.getElementById(link.slice(1))),
  flat: [...document.querySelectorAll('svg g[id^=region]')].filter(group => box(group) < 100).map(group => group.id),
  drawn: document.querySelectorAll('svg g[id^=region]').length,
  titles: [...document.querySelectorAll('svg g.cluster text')].map(text => text.textContent),
  requests: performance.getEntriesByType('resource').length,
};
document.body.textContent = 'found: ' + JSON.stringify(found) + ' :found';
</script>
"""


def browse(page: Path, *options: str) -> str:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={page.parent}/user")
    command = [str(BROWSER), *flags, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(page: Path, width: int, height: int) -> np.ndarray[Any, Any]:
    """What the browser paints: (height, width, 3) in 0 … 255."""
    shot = page.with_suffix(".shot.png")
    browse(page, f"--window-size={width},{height}", f"--screenshot={shot}")
    painted: np.ndarray[Any, Any] = (image.imread(shot)[..., :3] * 255).round().astype(np.uint8)
    return painted


def area(painted: np.ndarray[Any, Any], code: str) -> int:
    """How many pixels have a colour exactly."""
    return int((painted == [int(code[at : at + 2], 16) for at in (1, 3, 5)]).all(-1).sum())


def probed(page: Path) -> dict[str, Any]:
    """What the browser made of a page, asked in the page."""
    copy = page.with_name("probe.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (answer,) = re.findall("<body>found: (.*?) :found", browse(copy, "--dump-dom"), re.DOTALL)
    found: dict[str, Any] = json.loads(unescape(answer))
    return found


@pytest.fixture(scope="module")
def plan() -> reparam.Plan:
    return reparam.plan(ready(RepVGG((1, 3), (8, 16), (2, 2), num_classes=3)))


@pytest.mark.parametrize("ending", [".svg", ".html"])
def test_regions_are_painted_in_their_colours(plan: reparam.Plan, ending: str, tmp_path: Path) -> None:
    painted = pixels(plan.draw(tmp_path / f"net{ending}"), 1400, 1400)
    assert area(painted, "#ffffff") < 0.95 * painted[..., 0].size
    for number in (0, 1, 2):  # the third is that of the folded blocks
        assert area(painted, colour(number)) > 5000, f"region {number} is not seen"
    assert area(painted, colour(5)) == 0, "a colour of no region"
    one = pixels(plan.draw(tmp_path / f"one{ending}", module="stages.0"), 1400, 1400)
    assert area(one, colour(0)) > 5000
    assert [area(one[:, :650], colour(number)) for number in (1, 2)] == [0, 0], "only one module is drawn"


def test_links_lead_to_what_is_seen(plan: reparam.Plan, tmp_path: Path) -> None:
    found = probed(plan.draw(tmp_path / "net.html"))
    assert found["dead"] == found["flat"] == []
    assert found["drawn"] == 6, "three regions are drawn, before and after"
    assert {f"#list-{number}" for number in (0, 1, 2)} <= {*found["links"]}
    assert {f"#region-{number}-before" for number in (0, 1, 2)} <= {*found["links"]}
    assert found["titles"].count("stages.1.1 … stages.1.2 (×2)") == 2
    assert found["requests"] == 0, "a page needs nothing from elsewhere"


def test_names_are_no_markup(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert('x')>&lt;b&gt;"
    model = ready(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    model.add_module(name, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    page = reparam.plan(model.eval()).draw(tmp_path / "net.html")
    dom = browse(page, "--dump-dom")
    assert "<img" not in dom
    assert "<title>Sequential" in dom
    assert escape(name, quote=False) in dom
