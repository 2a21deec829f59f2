"""What a plan shows: every region, the numbers of the nets, data that survives JSON, text that is escaped."""

from __future__ import annotations

import html.parser
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Block, C, conv, conv_norm, images, ready, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import reparam
from reparam import Plan
from reparam.graph.options import Options
from reparam.graph.session import Session
from reparam.models import RepVGG
from reparam.report import Footprint
from reparam.show.outline import Branch, outline

HOSTILE = "<script>alert('x')</script>&|*`"


class Mixed(nn.Module):
    """Regions of every kind: children, whole modules, generated forwards; a gate; a norm that goes through a join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)), Block(stride=2))
        self.left, self.right = conv(1), conv(3)
        self.norm = nn.BatchNorm2d(2 * C)
        self.gate = conv(1, 2 * C, 2 * C)
        self.head = nn.Linear(2 * C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        x = self.norm(torch.cat((self.left(x), self.right(x)), dim=1))
        x = x * torch.sigmoid(self.gate(x))
        return self.head(x.mean((2, 3)))


class Spread(nn.Module):
    """A norm that goes into two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(C), conv(1), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.relu(self.first(y)) + torch.sigmoid(self.second(y))


class Made(nn.Module):
    """A weight that is made from two parameters, and a scale that is a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(C, C, 3, 3))
        self.weight = nn.Parameter(torch.randn(C, C, 3, 3))
        self.scale = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight * self.mask.sigmoid(), padding=1)
        return torch.relu(y * self.scale.view(1, -1, 1, 1))


class Unread(nn.Module):
    """A norm whose value nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(C), conv_norm(3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.conv(x)


class Decides(nn.Module):
    """A forward that branches on its input, with blocks inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x) if x.sum() > 0 else self.inner[1](x)


NETS: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "mixed": Mixed,
    "spread": Spread,
    "made": Made,
    "unread": Unread,
    "decides": lambda: nn.Sequential(Decides(), conv_norm(1)),
    "repvgg": lambda: RepVGG((2, 4, 1), (8, 16, 16), (2, 2, 1), num_classes=3),
    "nothing": lambda: nn.Sequential(nn.ReLU()),
}
every_net = pytest.mark.parametrize("build", NETS.values(), ids=NETS)


def inputs(model: nn.Module) -> Tensor:
    return images((12, 8), channels=3 if isinstance(model, RepVGG) else C)


def planned(build: Callable[[], nn.Module], sized: bool = False) -> tuple[nn.Module, Plan]:
    model = ready(build())
    return model, reparam.plan(model, example_inputs=inputs(model) if sized else None)


def flat(branch: Branch) -> Iterator[Branch]:
    yield branch
    for child in branch.children:
        yield from flat(child)


# --- the tree ---------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("sized", [False, True])
def test_the_tree_names_every_region_and_refusal_once(build: Callable[[], nn.Module], sized: bool) -> None:
    model, plan = planned(build, sized)
    numbers = [number for branch in flat(outline(plan)) for entry in branch.regions for number in entry.numbers]
    assert sorted(numbers) == list(range(len(plan.regions)))
    text = str(plan)
    for branch in flat(outline(plan)):
        for entry in branch.regions:
            assert f"{branch.title}: {entry.region.change} [{entry.region.numbers}]" in text
            folded = {plan.regions[number].path for number in entry.numbers}
            assert len(folded) == len(entry.numbers)
            assert branch.path in folded
    for refusal in plan.left:
        assert str(refusal.at("", *refusal.operands)) in text
    assert type(model).__name__ in text.splitlines()[0]


def test_equal_siblings_are_one_line() -> None:
    model = ready(RepVGG((1, 5), (8, 16), (2, 2), num_classes=3))
    plan = reparam.plan(model)
    (line,) = [line for line in str(plan).splitlines() if "…" in line]
    assert line.startswith("      stages.1.1 … stages.1.4 (×4) RepVGGBlock: conv 3x3, 3 batch norm, conv 1x1, 2 add ->")
    assert len(plan.regions) == 6, "the data is not folded"
    assert len(plan.to_dict()["regions"]) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "skip", nn.Identity()),
        lambda block: block.dense[1].train(),
        lambda block: setattr(block, "dense", conv_norm(5)),
    ],
    ids=["another operation", "another refusal", "another kernel"],
)
def test_siblings_that_differ_are_not_folded(change: Callable[[Any], Any]) -> None:
    model = ready(nn.Sequential(*(Block() for _ in range(4))))
    assert len(outline(reparam.plan(model)).children) == 1
    change(model[2])
    titles = [branch.title for branch in outline(reparam.plan(model)).children]
    assert titles[0] == "0 … 1 (×2) Block"
    assert titles[1:2] != ["2 … 3 (×2) Block"]
    assert titles[-1] == "3 Block"


def test_equal_near_misses_are_one_line() -> None:
    model = ready(nn.Sequential(*(nn.Sequential(conv(1), conv(3), nn.ReLU()) for _ in range(6))))
    for block in model:
        block[0].bias = nn.Parameter(torch.randn(C, dtype=torch.float64))
    plan = reparam.plan(model)
    assert len(plan.near_misses) == 6
    (line,) = [line for line in str(plan).splitlines() if "border_rule" in line]
    assert line.startswith("  0.0 Conv2d: border_rule (Conv2d -> Conv2d): a value with a bias is padded by zeros")
    assert line.endswith("; also at 1.0, 2.0, 3.0 and 2 more")
    assert line.strip() in " ".join(Page(plan._repr_html_()).text.split())


def test_a_folded_receipt_shows_the_largest_error() -> None:
    receipt = reparam.receipt(reparam.fuse(ready(nn.Sequential(*(Block() for _ in range(4))))))
    (branch,) = outline(receipt).children
    assert branch.regions[0].region.error == max(region.error for region in receipt.regions)


def test_text_does_not_depend_on_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = planned(Mixed)
    text, coloured, plain = str(plan), io.StringIO(), io.StringIO()
    plan.show(coloured)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich.tree", None)
    plan.show(plain)
    assert plain.getvalue() == f"{text}\n"
    assert str(plan) == text
    with pytest.raises(reparam.MissingPackageError, match=r"package rich, .* pip install 'reparam\[cli\]'"):
        plan.__rich__()
    words = " ".join(re.sub(r"[├└─│]", " ", coloured.getvalue()).split())
    for branch in flat(outline(plan)):
        for entry in branch.regions:
            assert f"{branch.title} {entry.region.change} [{entry.region.numbers}]" in words


# --- numbers ----------------------------------------------------------------------------------------------------------


@every_net
def test_totals_are_those_of_the_nets(build: Callable[[], nn.Module]) -> None:
    model, plan = planned(build)
    fused = plan.apply()
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, fused)]
    assert sizes[0] - sizes[1] == plan.totals.params_before - plan.totals.params_after
    assert plan.totals.operations_after == sum(len(region.result) for region in plan.regions)


def test_an_operation_of_two_regions_counts_once() -> None:
    _, plan = planned(Spread)
    first, second = plan.regions
    assert first.params_before == second.params_before == C * C + 2 * C
    assert [step.again for step in second.steps] == [True, False]
    assert plan.totals.params_before == 2 * C * C + 2 * C
    assert plan.totals.operations_before == 3


def test_a_norm_behind_a_join_is_shared_among_the_operations_in_front() -> None:
    _, plan = planned(Mixed)
    left, right = (next(r for r in plan.regions if r.path == path) for path in ("left", "right"))
    assert left.before == ("conv 1x1", "batch norm")
    assert right.before == ("conv 3x3", "batch norm")
    assert left.params_before == C * C + 2 * C
    assert right.params_before == 9 * C * C + 2 * C
    assert left.macs_before == C * C + C


class Written(TorchDispatchMode):
    """Multiply-adds of norms and pools, and bytes that the operations of regions write, counted while they run."""

    WRITERS = ("convolution", "batch_norm", "add", "addmm", "mul", "avg_pool2d")

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].strip("_")
        first = result[0] if isinstance(result, tuple) else result
        if "batch_norm" in name:
            self.macs += first.numel()
            self.bytes += first.numel() * first.element_size()
        elif name in self.WRITERS:
            if name == "avg_pool2d":  # one multiply-add per element of the window
                self.macs += first.numel() * args[1][0] * args[1][1]
            self.bytes += first.numel() * first.element_size()
        return result


@torch.no_grad()
def measured(model: nn.Module, x: Tensor) -> Footprint:
    """Multiply-adds and written bytes of a net, counted while it runs."""
    with FlopCounterMode(display=False) as flops:
        model(x)
    with Written() as written:
        model(x)
    return Footprint(flops.get_total_flops() // 2 + written.macs, written.bytes)


@pytest.mark.parametrize("size", [(12, 8), (9, 11)])
@pytest.mark.parametrize("build", [Block, lambda: Block(stride=2), lambda: Chain(), lambda: Pooled()])
def test_work_at_an_example_is_that_of_a_run(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    """Nets that are one region as a whole: all of their work is the region's."""
    model, x = ready(build()), images(size)
    plan = reparam.plan(model, example_inputs=x)
    (region,) = plan.regions
    before, after = measured(model, x), measured(plan.apply(), x)
    assert region.footprint_before == before
    assert region.footprint_after == after
    assert (plan.totals.footprint_before, plan.totals.footprint_after) == (before, after)
    assert f"MACs {before.macs:,} -> {after.macs:,}" in str(plan)


class Chain(nn.Module):
    """Functions between the operations, whose sizes no call of a module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, 3, 3))
        self.last = nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, _ = x.tanh().split([x.shape[0], 0])
        return self.last(F.conv2d(x, self.weight, stride=2))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = conv(3), nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pool(x)


def test_work_of_many_regions_is_that_of_a_run() -> None:
    model = ready(RepVGG((2, 4, 1), (8, 16, 16), (2, 2, 1), num_classes=3))
    x = inputs(model)
    plan = reparam.plan(model, example_inputs=x)
    head = 2 * 16 * 3  # the linear layer, which is in no region: multiply-adds of two images
    for net, found in ((model, plan.totals.footprint_before), (plan.apply(), plan.totals.footprint_after)):
        whole = measured(net, x)
        assert found == Footprint(whole.macs - head, whole.activations - 2 * 3 * x.element_size())


def test_work_is_not_claimed_without_sizes() -> None:
    _, plan = planned(Mixed)
    assert all(region.footprint_before is region.footprint_after is None for region in plan.regions)
    assert plan.totals.footprint_before is None
    model = ready(nn.Sequential(Decides(), conv_norm(1)))
    plan = reparam.plan(model, example_inputs=images())
    known = {region.path: region.footprint_before is not None for region in plan.regions}
    assert sorted(known.values()) == [False, True, True], "one of two blocks does not run"
    assert plan.totals.footprint_before is None


# --- data -------------------------------------------------------------------------------------------------------------


@every_net
def test_data_is_json_and_holds_all(build: Callable[[], nn.Module]) -> None:
    model, plan = planned(build, sized=True)
    record = json.loads(json.dumps(plan.to_dict()))
    assert record == plan.to_dict(), "something is no plain data"
    assert [region["path"] for region in record["regions"]] == [region.path for region in plan.regions]
    assert [(entry["rule"], entry["near"]) for entry in record["left"]] == [(r.rule, r.near) for r in plan.left]
    assert {*record["modules"]} <= {path for path, _ in model.named_modules()}
    for region, found in zip(plan.regions, record["regions"], strict=True):
        assert found["before"] == [step["label"] for step in found["steps"]] == list(region.before)
        assert found["after"] == list(region.after)


@every_net
def test_a_kernel_is_that_of_the_module_that_is_made(build: Callable[[], nn.Module]) -> None:
    _, plan = planned(build)
    fused = dict(plan.apply().named_modules())
    for region in plan.regions:
        if not region.result:
            assert region.after == ("nothing, for its value is not read",)
            assert type(fused[region.path]) is nn.Identity
            continue
        (kernel,) = region.result
        (module,) = [m for p, m in fused.items() if p.startswith(region.path) and isinstance(m, nn.Conv2d)][
            :1
        ]  # the first below the path: the regions of these nets have one each
        assert (kernel.kernel, kernel.stride) == (module.kernel_size, module.stride)
        assert (kernel.dilation, kernel.groups) == (module.dilation, module.groups)
        assert (kernel.in_channels, kernel.out_channels) == (module.in_channels, module.out_channels)
        assert kernel.padding == tuple((p, p) for p in module.padding)


@every_net
def test_looking_changes_nothing(build: Callable[[], nn.Module], tmp_path: Any) -> None:
    model = ready(build())
    before, seed = snapshot(model), torch.get_rng_state()
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
    plan = reparam.plan(model, example_inputs=inputs(model))
    for look in (str, Plan.to_markdown, Plan.to_dict, Plan._repr_html_, Plan.__rich__, Plan.ranges):
        look(plan)
    plan.draw(tmp_path / "net.svg")
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])
    assert attributes == {path: sorted(vars(module)) for path, module in model.named_modules()}
    assert torch.equal(torch.get_rng_state(), seed)
    assert str(plan) == str(reparam.plan(model, example_inputs=inputs(model)))


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions are called: what stands in for time, and is the same on every machine."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("block", [Block, lambda: nn.Sequential(conv(1), nn.BatchNorm2d(C), conv(3), nn.ReLU())])
@pytest.mark.parametrize("look", [Plan.__str__, Plan.to_dict, Plan._repr_html_, Plan.to_markdown])
def test_looking_takes_linear_time(block: Callable[[], nn.Module], look: Callable[[Plan], Any]) -> None:
    plans = [reparam.plan(ready(nn.Sequential(*(block() for _ in range(n))))) for n in (30, 60)]
    few, many = (calls_of(lambda plan=plan: look(plan)) for plan in plans)
    assert many < 2.2 * few, f"{few} calls for 30 blocks, {many} for 60"


@pytest.mark.parametrize("block", [Block, lambda: nn.Sequential(conv(1), nn.BatchNorm2d(C), conv(3), nn.ReLU())])
def test_describing_takes_linear_time(block: Callable[[], nn.Module]) -> None:
    """What a plan needs besides the search itself."""
    counts = []
    for n in (30, 60):
        session = Session(ready(nn.Sequential(*(block() for _ in range(n)))), Options())
        counts.append(calls_of(session.plan))
    assert counts[1] < 2.2 * counts[0], counts


# --- pages and tables -------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; every tag that is opened is closed."""

    VOID = ("br", "meta")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], f"{self._open} is not closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("href", "xlink:href") if key in given]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile() -> nn.Module:
    """Names of modules, classes and functions that mean something to HTML, Markdown and Graphviz."""
    kind = type(HOSTILE, (Block,), {})
    model = nn.Sequential()
    model.add_module(HOSTILE, kind())
    model.add_module('"\\N}{', nn.Sequential(conv(1), nn.BatchNorm2d(C), conv(3)))
    return model


@every_net
def test_a_notebook_shows_every_region(build: Callable[[], nn.Module]) -> None:
    _, plan = planned(build)
    page = Page(plan._repr_html_())
    assert {f"list-{number}" for number in range(len(plan.regions))} <= {*page.ids}
    assert len(page.ids) == len({*page.ids})
    for branch in flat(outline(plan)):
        for entry in branch.regions:
            assert f"{entry.region.change} [{entry.region.numbers}]" in page.text


def test_names_are_escaped() -> None:
    plan = reparam.plan(ready(hostile()))
    page = Page(plan._repr_html_())
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert '"\\N}{' in page.text
    markdown = plan.to_markdown()
    assert "<script>" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}, "a name has cells of its own"


@every_net
def test_markdown_has_a_row_for_every_line_of_the_tree(build: Callable[[], nn.Module]) -> None:
    _, plan = planned(build)
    rows = [line for line in plan.to_markdown().splitlines() if line.startswith("| ") and "| module |" not in line]
    branches = list(flat(outline(plan)))
    assert len(rows) == sum(len(branch.regions) + len(branch.left) for branch in branches)
    bullets = [line for line in plan.to_markdown().splitlines() if line.startswith("- ")]
    assert bool(bullets) == bool(plan.near_misses)
