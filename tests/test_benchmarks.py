"""Times, cells, files and tables of the benchmarks; nothing here says how fast anything is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from nets import Block, ready
from torch import nn

for package in ("matplotlib", "pebble", "scipy", "timm", "tqdm", "typer"):
    pytest.importorskip(package, reason="needs the extras 'test', 'examples' and 'zoo'")

from benchmarks import limit, marks, outputs, page, paper  # noqa: E402 (what they need comes first)
from benchmarks.cells import Results, Settings, run, settings  # noqa: E402
from benchmarks.paired import FEWEST_ROUNDS, milliseconds, ratio, time_forms  # noqa: E402
from benchmarks.phases import PHASES, phases  # noqa: E402
from benchmarks.runtimes import RUNTIMES  # noqa: E402
from benchmarks.subjects import SUBJECTS  # noqa: E402

# --- statistics -------------------------------------------------------------------------------------------------------


def test_a_ratio_is_formed_within_each_round() -> None:
    slow_moment = [1.0, 1.0, 1.0, 1.0, 100.0, 1.0, 1.0]
    found = ratio([2 * t for t in slow_moment], slow_moment)
    assert (found.median, found.low, found.high) == (2, 2, 2)


def test_the_interval_is_that_of_the_order_statistics() -> None:
    """Of seven values, the second and the sixth would hold the median with 87.5% only: it takes all of them."""
    found = ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 7)
    assert (found.low, found.median, found.high) == (1, 4, 7)


def test_too_few_rounds_have_no_interval() -> None:
    found = ratio([0.5, 0.5], [1.0, 1.0])
    assert not found.known
    assert not found.below_one
    assert str(found) == "0.50"


def test_slower_is_what_lies_below_one_as_a_whole() -> None:
    assert ratio([0.9] * 7, [1.0] * 7).below_one
    assert not ratio([0.9] * 6 + [1.1], [1.0] * 7).below_one


def test_forms_are_timed_in_turn() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name) or time.sleep(0.002)) for name in ("a", "b")}
    times = time_forms(runs, seconds=0.0, threads=1)
    assert {len(found) for found in times.values()} == {FEWEST_ROUNDS}
    assert all(t > 0.0019 for found in times.values() for t in found)
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["a", "b"] * FEWEST_ROUNDS


@pytest.mark.parametrize(("seconds", "shown"), [(1.234567, "1235"), (0.0123456, "12.3"), (0.000123456, "0.123")])
def test_three_digits_of_milliseconds(seconds: float, shown: str) -> None:
    assert milliseconds([seconds]) == shown


# --- cells ------------------------------------------------------------------------------------------------------------


def cell(chosen: Settings, what: str, journal: str) -> dict[str, Any]:
    """Measured in another process."""
    with Path(journal).open("a") as file:
        file.write(f"{what}\n")
    if what == "raises":
        raise ValueError("a runtime\nfailed")
    if what == "ends":
        os._exit(7)
    if what == "hangs":
        time.sleep(600)
    return {"found": what}


@pytest.mark.slow
def test_a_run_survives_its_cells_and_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    cells = [(what, (what, str(journal))) for what in ("good", "raises", "ends", "hangs", "last")]
    chosen = Settings(timeout=15)
    first = Results.resumed(tmp_path / "results.json", {"machine": "a"})
    run(cells, cell, first, chosen)
    assert first.good == {"good": {"found": "good"}, "last": {"found": "last"}}
    assert first.failed == {
        "raises": "ValueError: a runtime failed",
        "ends": "the process ended with code 7",
        "hangs": "more than 15 s",
    }
    again = Results.resumed(tmp_path / "results.json", {"machine": "a"})
    assert again.cells == first.cells
    run(cells[:2], cell, again, chosen)  # what was measured is kept, what failed is tried again
    assert journal.read_text().split() == ["good", "raises", "ends", "hangs", "last", "raises"]


def test_results_of_another_setup_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, {"threads": 1}).put("net", {"seconds": 1})
    assert Results.resumed(path, {"threads": 1}).cells == {"net": {"seconds": 1}}
    assert Results.resumed(path, {"threads": 2}).cells == {}
    assert Results.resumed(path, {"threads": 1}, fresh=True).cells == {}


def test_no_cell_is_begun_after_the_time(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {})
    run([("good", ("good", str(tmp_path / "journal")))], cell, results, Settings(minutes=-1))
    assert results.cells == {}


def test_quick_runs_leave_what_is_committed(tmp_path: Path) -> None:
    quick = settings("", minutes=1, seconds=4, arguments=["--quick", "--threads", "1"])
    assert quick.out is not None
    assert "results" not in quick.file("outputs").parts
    assert quick.seconds == 0.5
    assert settings("", 1, 4, ["--out", str(tmp_path)]).file("x") == tmp_path / "x.json"
    whole = settings("", minutes=1, seconds=4, arguments=[])
    assert (whole.out, whole.seconds) == (None, 4)
    assert len(outputs.cells(quick)) < len(outputs.cells(whole)) == len(SUBJECTS) * len(RUNTIMES) * 2


def test_phases_are_measured_and_nothing_stays_patched() -> None:
    places = [place for phase in PHASES.values() for place in phase]
    before = [vars(home)[name] for home, name in places]
    found = phases(ready(nn.Sequential(Block(), Block())), rounds=3)
    assert all(after is old for after, old in zip((vars(h)[n] for h, n in places), before, strict=True))
    assert {name for name, value in found.items() if value > 0} >= {"reading", "planning", "weights", "check", "all"}
    assert all(found[name] <= found["all"] for name in PHASES)


# --- the page ---------------------------------------------------------------------------------------------------------


def results(tmp_path: Path, author: float) -> Results:
    seconds = {"unfused": [2.0] * 7, "fused": [1.0] * 7, "author": [author] * 7}
    counts = {"convs": 1, "norms": 0, "adds": 0, "kernels": 2}
    found = Results(tmp_path / "results.json", {"machine": "a machine", "device": "cpu", "threads": 2, "torch": "2"})
    found.put(
        outputs.key("RepVGG-A0", "eager", 1),
        {
            "counts": dict.fromkeys(seconds, counts),
            "errors": dict.fromkeys(seconds, 1e-7),
            "seconds": seconds,
        },
    )
    found.put(outputs.key("RepVGG-A0", "OpenVINO", 8), {"error": "crashed"})
    return found


def test_text_of_the_outputs(tmp_path: Path) -> None:
    shown = outputs.text(results(tmp_path, author=1.0))
    assert "1 comparisons; the fused net is faster beyond the noise in 0, slower beyond the noise in 0" in shown
    assert "| RepVGG-A0 | 2.00 (2.00–2.00) | – | – | – | – | – |" in shown
    assert "| RepVGG-A0 (repvgg-pytorch) | 1.00 (1.00–1.00) | –" in shown
    assert "| RepVGG-A0 | 1000 | –" in shown
    assert "1/0/0/2 → 1/0/0/2" in shown
    assert "- RepVGG-A0 | OpenVINO | 8: `crashed`" in shown
    assert "a machine, device cpu, 2 threads; torch 2." in shown


def test_a_slower_fused_net_is_named(tmp_path: Path) -> None:
    shown = outputs.text(results(tmp_path, author=0.9))
    assert "slower beyond the noise in 1 (by chance alone, 0.0 of each are expected)" in shown
    assert ": RepVGG-A0, eager, 1: 0.90 (0.90–0.90)." in shown


def test_pictures_are_the_same_for_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    for _ in range(2):
        page.save(outputs.picture(results(tmp_path, 1.0)), "picture")
        written.append((tmp_path / "picture.svg").read_bytes())
    assert written[0] == written[1]


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    page = "a\n<!-- table: one.py -->\n{}<!-- /table -->\nb\n<!-- table: two.py -->\n<!-- /table -->\nc\n"
    path.write_text(page.format("old\n"))
    marks.put(path, "table: one.py", r"new \1")  # no reference to a group
    assert path.read_text() == page.format("new \\1\n")
    assert marks.shown(path, "table: one.py") == "new \\1\n"
    assert marks.shown(path, "table: two.py") == ""
    with pytest.raises(ValueError, match=r"one block between <!-- table: three\.py --> and <!-- /table -->, found 0"):
        marks.put(path, "table: three.py", "")


@pytest.mark.parametrize(("name", "script"), [("outputs", outputs), ("paper", paper), ("limit", limit)])
def test_the_page_shows_the_committed_results(name: str, script: Any) -> None:
    text = script.text(Results.read(Settings().file(name)))
    assert marks.shown(page.PAGE, f"figures: benchmarks/{name}.py") == f"{text.strip()}\n"
