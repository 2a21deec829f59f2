"""Pictures: what is drawn, that it is valid and linked to the list, and what is said when it cannot be drawn."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Block, C, conv, conv_norm, ready
from test_reports import HOSTILE, NETS, Page, hostile
from torch import Tensor, nn

import reparam
from reparam import Plan
from reparam.models import RepVGG, repvgg_a0
from reparam.show.fold import fold

pytest.importorskip("pygraphviz", reason="needs the extra 'draw'")

SVG = "{http://www.w3.org/2000/svg}"
PNG = b"\x89PNG\r\n\x1a\n"
every_net = pytest.mark.parametrize("build", [NETS[name] for name in NETS], ids=NETS)


def drawn(plan: Plan, tmp_path: Path, **options: Any) -> ElementTree.Element:
    file = plan.draw(tmp_path / "net.svg", **options)
    return ElementTree.parse(file).getroot()


def classes(root: ElementTree.Element) -> Counter[str]:
    return Counter(word for element in root.iter() for word in element.get("class", "").split())


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


@every_net
def test_every_region_is_drawn_on_both_sides(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    plan = reparam.plan(ready(build()))
    root = drawn(plan, tmp_path)
    assert root.tag == f"{SVG}svg"
    found = classes(root)
    for number, region in enumerate(plan.regions):
        assert found[f"region-{number}"] == (2 if region.result else 1)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len({*ids})
    for region in plan.regions:
        assert all(str(kernel) in " ".join(texts(root)) for kernel in region.result)


@every_net
def test_every_operation_of_a_region_is_drawn_before_and_its_result_after(build: Callable[[], nn.Module]) -> None:
    plan = reparam.plan(ready(build()))
    for number, region in enumerate(plan.regions):
        before = [node for node in plan.wiring.before.values() if node.region == number]
        after = [node for node in plan.wiring.after.values() if node.region == number]
        own = Counter(step.label for step in region.steps if not step.again)
        missing = own - Counter(node.label for node in before)
        assert not missing or (missing == {"batch norm": 1} and region.path == "right"), "one norm behind a join"
        assert [node.label for node in after] == [str(kernel) for kernel in region.result]
    for side in (plan.wiring.before, plan.wiring.after):
        keys = list(side)
        assert all(
            source in side and keys.index(source) < keys.index(key) for key in keys for source in side[key].inputs
        )


def test_a_block_before_and_after() -> None:
    """One block in full: who reads whom."""
    plan = reparam.plan(ready(Block()))

    def edges(side: Any) -> set[tuple[str, str]]:
        names = {key: f"{node.label} {node.path}".strip() for key, node in side.items()}
        return {(names[source], names[key]) for key, node in side.items() for source in node.inputs}

    assert edges(plan.wiring.before) == {
        ("input x", "conv 3x3 dense.0"),
        ("conv 3x3 dense.0", "batch norm dense.1"),
        ("input x", "conv 1x1 point.0"),
        ("conv 1x1 point.0", "batch norm point.1"),
        ("input x", "batch norm skip"),
        ("batch norm dense.1", "add"),
        ("batch norm point.1", "add"),
        ("add", "add"),
        ("batch norm skip", "add"),
        ("add", "ReLU act"),
    }
    assert edges(plan.wiring.after) == {("input x", "conv 3x3"), ("conv 3x3", "ReLU act")}


# --- folding ----------------------------------------------------------------------------------------------------------


def test_repeated_blocks_are_drawn_once(tmp_path: Path) -> None:
    plan = reparam.plan(repvgg_a0().eval())
    root = drawn(plan, tmp_path)
    words = texts(root)
    assert words.count("stages.3.1 … stages.3.13 (×13)") == 2, "before and after"
    assert words.count("stages.2.1 … stages.2.3 (×3)") == 2
    found = classes(root)
    assert all(found[f"region-{number}"] == 2 for number in range(len(plan.regions)))
    assert found["node"] < 90, "readable as a whole"
    assert len(plan.wiring.before) == 169


def test_folding_keeps_what_reads_the_last_block() -> None:
    plan = reparam.plan(ready(nn.Sequential(*(Block() for _ in range(5)), nn.Tanh(), conv_norm(3))))
    for side in fold(plan.wiring.before, plan.wiring.after, plan.regions, ""):
        assert side.blocks == {"0": ("0", "1", "2", "3", "4")}
        (tanh,) = [node for node in side.nodes.values() if node.label == "Tanh"]
        assert [side.nodes[key].label for key in tanh.inputs] == ["ReLU"]
        assert all(source in side.nodes for node in side.nodes.values() for source in node.inputs)


class Dense(nn.Module):
    """Blocks each of which reads all earlier results: alike, but no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[2](second) * first


class Parallel(nn.Module):
    """Blocks beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) * self.blocks[1](x) * self.blocks[2](x)


@pytest.mark.parametrize(
    "build",
    [
        Parallel,
        lambda: nn.Sequential(Block(), Block(stride=2)),
        lambda: nn.Sequential(Block(), nn.Tanh(), Block()),
        lambda: nn.Sequential(Block(C), nn.Sequential(Block(C), nn.Tanh())),
    ],
    ids=["parallel", "another stride", "something between", "something behind"],
)
def test_what_is_no_chain_of_equal_blocks_is_not_folded(build: Callable[[], nn.Module]) -> None:
    plan = reparam.plan(ready(build()))
    for side, whole in zip(
        fold(plan.wiring.before, plan.wiring.after, plan.regions, ""),
        (plan.wiring.before, plan.wiring.after),
        strict=True,
    ):
        assert side.blocks == {}
        assert side.nodes == whole


def test_a_value_that_is_read_twice_ends_a_fold() -> None:
    plan = reparam.plan(ready(Dense()))
    before, _ = fold(plan.wiring.before, plan.wiring.after, plan.regions, "")
    assert before.blocks == {"blocks.1": ("blocks.1", "blocks.2")}


# --- one module -------------------------------------------------------------------------------------------------------


def test_one_module_with_what_it_reads(tmp_path: Path) -> None:
    plan = reparam.plan(ready(RepVGG((1, 2), (8, 16), (2, 2), num_classes=3)))
    words = texts(drawn(plan, tmp_path, module="stages.1.1"))
    assert words.count("before: stages.1.1") == words.count("after: stages.1.1") == 1
    assert words.count("conv 3x3") == 2, "once on each side"
    assert words.count("conv 1x1") == 1
    assert words.count("stages.1.0.act") == 2, "what it reads is named"
    assert "linear" not in words


def test_a_module_that_is_not_there_is_refused(tmp_path: Path) -> None:
    plan = reparam.plan(ready(Block()))
    with pytest.raises(reparam.ReparamError) as info:
        plan.draw(tmp_path / "net.svg", module="dens")
    assert str(info.value) == (
        "expected the path of a module that the forward of Block uses, found 'dens': take one from named_modules()"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_what_their_names_say(tmp_path: Path) -> None:
    plan = reparam.plan(ready(Block()))
    assert plan.draw(tmp_path / "net.png").read_bytes().startswith(PNG)
    assert plan.draw(str(tmp_path / "net.svg")).read_bytes().startswith(b"<?xml")
    assert plan.draw(tmp_path / "net.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert plan.draw_ranges(tmp_path / "ranges.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["net.pdf", "net", "net.svgz"])
def test_other_endings_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.plan(ready(Block())).draw(tmp_path / name)
    assert str(info.value) == f"expected a file that ends in .svg, .png, .html, found {name!r}: give it an ending"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [NETS["mixed"], NETS["repvgg"], hostile], ids=["mixed", "repvgg", "hostile"])
def test_a_page_links_picture_and_list(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    plan = reparam.plan(ready(build()))
    page = Page(plan.draw(tmp_path / "net.html").read_text(encoding="utf-8"))
    assert page.links
    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids}, "a link leads nowhere"
    assert {f"list-{number}" for number in range(len(plan.regions))} <= {*page.ids}
    assert not any(link.startswith(("http", "//")) for link in page.links), "a page needs nothing from elsewhere"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    plan = reparam.plan(ready(hostile()))
    root = drawn(plan, tmp_path)
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert any(HOSTILE in words for words in texts(root)), texts(root)
    page = Page(plan.draw(tmp_path / "net.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags


def test_functions_without_a_name_are_drawn(tmp_path: Path) -> None:
    """Graphviz takes a label between angle brackets for HTML."""
    plan = reparam.plan(ready(nn.Sequential(conv_norm(3))))
    node = next(iter(plan.wiring.before.values()))
    labelled = {0: type(node)("<lambda>", "", ()), 1: type(node)("<b>&amp;\\n", "", (0,))}
    wiring = type(plan.wiring)(labelled, labelled)
    words = texts(drawn(Plan((), (), "Net", wiring=wiring), tmp_path))
    assert [word.strip() for word in words if "<" in word] == ["<lambda>", "<b>&amp;\\n"] * 2


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = reparam.plan(ready(Block()))
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(reparam.MissingPackageError, match=r"package pygraphviz, .* pip install 'reparam\[draw\]'"):
        plan.draw(tmp_path / "net.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(reparam.MissingPackageError, match=r"package matplotlib, .* pip install 'reparam\[draw\]'"):
        plan.draw_ranges(tmp_path / "net.png")


# --- ranges of weights ------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_weights() -> None:
    model = ready(nn.Sequential(Block(), nn.Sequential(nn.ConvTranspose2d(C, 4, 2, 2), nn.BatchNorm2d(4))))
    block, upsampling = reparam.plan(model).ranges()
    fused = reparam.fuse(model)
    largest = lambda weight, dims: weight.abs().amax(dims).tolist()  # noqa: E731
    assert block.before == tuple(largest(model[0].dense[0].weight, (1, 2, 3)))
    assert block.after == pytest.approx(largest(fused[0].dense.weight, (1, 2, 3)), rel=1e-12)
    assert upsampling.before == tuple(largest(model[1][0].weight, (0, 2, 3)))
    assert upsampling.after == pytest.approx(largest(fused[1][0].weight, (0, 2, 3)), rel=1e-12)
    values = sorted(block.after)
    assert block.spread_after == pytest.approx(values[-1] / ((values[2] + values[3]) / 2))


def test_ranges_are_of_the_weights_of_now() -> None:
    model = ready(Block())
    plan = reparam.plan(model)
    (old,) = plan.ranges()
    with torch.no_grad():
        model.dense[0].weight.mul_(2)
    (new,) = plan.ranges()
    assert new.before == pytest.approx([2 * value for value in old.before])


def test_ranges_that_cannot_be_drawn(tmp_path: Path) -> None:
    plan = reparam.plan(nn.Sequential(nn.ReLU()).eval())
    assert plan.ranges() == ()
    with pytest.raises(reparam.ReparamError, match="expected a plan with regions, found none: nothing is fused"):
        plan.draw_ranges(tmp_path / "ranges.png")
    with torch.device("meta"):
        model = nn.Sequential(conv(3), nn.BatchNorm2d(C)).eval()
    with pytest.raises(reparam.ReparamError, match="found weights on the meta device at 0: load the weights before"):
        reparam.plan(model).ranges()
    silent = ready(nn.Sequential(conv(3), nn.BatchNorm2d(C)))
    with torch.no_grad():
        silent[0].weight.zero_()
    assert reparam.plan(silent).draw_ranges(tmp_path / "zeros.png").exists()
