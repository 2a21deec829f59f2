"""The plan: what it says of each region, what it leaves alone and why, and that it is what `fuse` does."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import SIZES, Block, C, conv, conv_norm, count, difference, images, is_fused, owned, ready, same, snapshot
from torch import Tensor, nn

import reparam
from reparam import Plan, Refusal, Region, cost
from reparam.models import RepVGG, RepVGGBlock

X = images()


def refusals(plan: Plan, rule: str) -> list[Refusal]:
    return [refusal for refusal in plan.left if refusal.rule == rule]


def fused_as_planned(model: nn.Module, x: Tensor = X, **options: Any) -> tuple[Plan, nn.Module]:
    """The plan and the net that it gives, compared with the original and with the number of regions."""
    plan = reparam.plan(model, **options)
    fused = plan.apply()
    same(model, fused, x)
    return plan, fused


# --- what is printed --------------------------------------------------------------------------------------------------


PRINTED = """\
RepVGG: 3 regions are fused, 0 operations are left alone
regions:
  stages Sequential
    stages.0.0 RepVGGBlock: conv 3x3, 2 batch norm, conv 1x1, add -> conv 3x3, stride 2x2 [parameters 272 -> 224; \
MACs per position 256 -> 216]
    stages.1 Sequential
      stages.1.0 RepVGGBlock: conv 3x3, 2 batch norm, conv 1x1, add -> conv 3x3, stride 2x2 [parameters 1,344 -> \
1,168; MACs per position 1,312 -> 1,152]
      stages.1.1 RepVGGBlock: conv 3x3, 3 batch norm, conv 1x1, 2 add -> conv 3x3 [parameters 2,656 -> 2,320; MACs per \
position 2,608 -> 2,304]
totals: 17 operations -> 3; parameters 4,272 -> 3,712"""


def test_a_printed_plan() -> None:
    assert str(reparam.plan(RepVGG((1, 2), (8, 16), (2, 2), num_classes=3).eval())) == PRINTED


def test_a_region_holds_what_is_printed() -> None:
    plan = reparam.plan(ready(nn.Sequential(Block(), Block(stride=2))))
    assert all(isinstance(region, Region) for region in plan.regions)
    first, second = plan.regions
    assert (first.path, second.path) == ("0", "1")
    assert sorted(first.before) == ["add", "add", "batch norm", "batch norm", "batch norm", "conv 1x1", "conv 3x3"]
    assert sorted(second.before) == ["add", "batch norm", "batch norm", "conv 1x1", "conv 3x3"]
    assert first.after == ("conv 3x3",)
    assert second.after == ("conv 3x3, stride 2x2",)
    # Weights, and two per channel of a norm; then weights and a bias.
    assert first.params_before == 9 * C * C + C * C + 3 * 2 * C
    assert second.params_before == 9 * C * C + C * C + 2 * 2 * C
    assert first.params_after == second.params_after == 9 * C * C + C
    # Multiply-adds per position of the result: of a norm, one per channel.
    assert first.macs_before == 9 * C * C + C * C + 3 * C
    assert second.macs_before == 9 * C * C + C * C + 2 * C
    assert first.macs_after == second.macs_after == 9 * C * C


@pytest.mark.parametrize(
    ("build", "before", "after"),
    [
        (lambda: conv_norm(3, 8, 8, groups=4), {"conv 3x3", "batch norm"}, "conv 3x3, groups 4"),
        (lambda: conv_norm(3, 8, 8, dilation=2, padding=2), {"conv 3x3", "batch norm"}, "conv 3x3, dilation 2x2"),
        (lambda: nn.Sequential(nn.Conv1d(8, 8, 5), nn.BatchNorm1d(8)), {"conv 5", "batch norm"}, "conv 5"),
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), {"linear", "batch norm"}, "linear 8 -> 4"),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4)),
            {"transposed conv 2x2", "batch norm"},
            "transposed conv 2x2, stride 2x2",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.AvgPool2d(2)),
            {"conv 3x3", "average pool 2x2"},
            "conv 4x4, stride 2x2",
        ),
    ],
    ids=["groups", "dilation", "1d", "linear", "transposed", "pool"],
)
def test_operations_are_named(build: Callable[[], nn.Module], before: set[str], after: str) -> None:
    (region,) = reparam.plan(ready(build())).regions
    assert set(region.before) == before
    assert region.after == (after,)


def test_the_printed_totals_are_those_of_the_nets() -> None:
    """Parameters of the regions before and after differ by what the nets differ by."""
    model = ready(nn.Sequential(Block(), nn.ReLU(), conv_norm(3), nn.Conv2d(C, 4, 1)))
    plan = reparam.plan(model)
    fused = plan.apply()
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, fused)]
    before, after = (sum(getattr(region, f"params_{when}") for region in plan.regions) for when in ("before", "after"))
    assert before - after == sizes[0] - sizes[1]
    operations = sum(len(region.before) for region in plan.regions)
    totals = f"totals: {operations} operations -> {len(plan.regions)}; parameters {before:,} -> {after:,}"
    assert str(plan).splitlines()[-1] == totals


def test_the_model_itself_is_named() -> None:
    (region,) = reparam.plan(ready(Block())).regions
    assert region.path == ""
    assert str(region).startswith("(model): conv 3x3, 3 batch norm, conv 1x1, 2 add -> conv 3x3 [parameters 396")


def test_a_plan_of_nothing() -> None:
    for model in (nn.ReLU().eval(), nn.Sequential().eval(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()):
        plan = reparam.plan(model)
        assert plan.regions == plan.left == ()
        assert str(plan) == f"{type(model).__name__}: 0 regions are fused, 0 operations are left alone"


# --- what is left alone, and why --------------------------------------------------------------------------------------


def point_then_dense(**options: Any) -> nn.Sequential:
    return nn.Sequential(conv(1), nn.BatchNorm2d(C), conv(3, **options), nn.BatchNorm2d(C))


def test_a_padded_convolution_after_a_norm_is_left_because_of_the_border() -> None:
    """The zeros of the padding are no values of the norm, whose value outside is its shift."""
    model = ready(point_then_dense())
    plan, fused = fused_as_planned(model)
    assert [type(module) for module in fused] == [nn.Conv2d, nn.Identity, nn.Conv2d, nn.Identity]
    assert [region.path for region in plan.regions] == ["0", "2"]
    (refusal,) = plan.left
    assert refusal.rule == "border_rule"
    assert refusal.path == "1"
    assert refusal.operands[0] == "BatchNorm2d"
    assert refusal.condition == "a value with a bias is padded by zeros, and the formula gives the bias there"
    assert refusal.remedy == "pad the input of the first operation, pad by the bias, or drop the bias"
    assert refusal.near
    assert f"  1 BatchNorm2d: {refusal.at('', *refusal.operands)}" in str(plan).splitlines()
    for policy in (cost.always, cost.macs, cost.parameters, cost.traffic):
        assert refusals(reparam.plan(model, cost=policy), "border_rule"), "no policy makes an inexact merge"
        assert sum(isinstance(module, nn.Conv2d) for module in reparam.fuse(model, cost=policy)) == 2


def test_the_merge_that_is_left_would_be_wrong() -> None:
    """The chain merged as if its padding were in front: right inside, wrong at the border."""
    model = ready(point_then_dense())
    in_front = ready(nn.Sequential(nn.ZeroPad2d(1), *point_then_dense(padding=0)))
    for old, new in zip(model, in_front[1:], strict=True):
        new.load_state_dict(old.state_dict())
    merged = reparam.fuse(in_front)
    assert owned(merged)["convs"] == 1
    with torch.no_grad():
        error = (model(X) - merged(X)).abs()
    assert error[:, :, 1:-1, 1:-1].max() < 1e-10
    assert error.max() > 0.1


class PadsByShift(nn.Module):
    """A norm, then a border of the value that the norm gives for zeros: by slice assignment, as DBB writes it."""

    def __init__(self, channels: int = C, pad: int = 1) -> None:
        super().__init__()
        self.norm, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        y, norm, pad = self.norm(x), self.norm, self.pad
        shift = norm.bias.detach() - norm.running_mean * norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        y = F.pad(y, [pad] * 4)
        shift = shift.view(1, -1, 1, 1)
        y[:, :, 0:pad, :] = shift
        y[:, :, -pad:, :] = shift
        y[:, :, :, 0:pad] = shift
        y[:, :, :, -pad:] = shift
        return y


def test_the_same_chain_padded_by_the_shift_is_merged() -> None:
    model = ready(nn.Sequential(conv(1), PadsByShift(), conv(3, padding=0), nn.BatchNorm2d(C)))
    plan, fused = fused_as_planned(model)
    for size in SIZES:
        same(model, fused, images(size))
    assert plan.left == (), str(plan)
    (region,) = plan.regions
    assert region.after == ("conv 3x3",)
    assert {"conv 1x1", "conv 3x3", "batch norm"} <= set(region.before)
    assert owned(fused)["norms"] == 0
    assert {key: value for key, value in count(fused, X).items() if key in ("conv", "norm", "convs", "calls")} == {
        "conv": 1,
        "norm": 0,
        "convs": 1,
        "calls": 1,
    }


def test_a_border_of_another_value_is_not_merged() -> None:
    class PadsByTwice(PadsByShift):
        def forward(self, x: Tensor) -> Tensor:
            y, pad = F.pad(self.norm(x), [self.pad] * 4), self.pad
            y[:, :, :pad] = y[:, :, -pad:] = y[..., :pad] = y[..., -pad:] = 2 * self.norm.bias.view(1, -1, 1, 1)
            return y

    model = ready(nn.Sequential(conv(1), PadsByTwice(), conv(3, padding=0), nn.BatchNorm2d(C)))
    _, fused = fused_as_planned(model)
    assert count(fused, X)["conv"] == 2


def separable() -> nn.Sequential:
    return nn.Sequential(conv(3, 16, 16, groups=16), conv(1, 16, 32))


def separable_norms() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 16, 16, groups=16), nn.BatchNorm2d(16), conv(1, 16, 32), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
    )


def reduce_expand() -> nn.Sequential:
    return nn.Sequential(conv(1, 16, 4), conv(1, 4, 16))


def low_rank() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 32))


def expand_reduce() -> nn.Sequential:
    return nn.Sequential(conv(1, 4, 16), conv(1, 16, 4))


DEARER = {  # net, its input, the paths of the pair, MACs before and after at one position
    "depthwise_pointwise": (separable, (2, 16, 9, 11), "0", 9 * 16 + 16 * 32, 9 * 16 * 32),
    "pointwise_depthwise": (
        lambda: nn.Sequential(conv(1, 8, 16), conv(3, 16, 16, groups=16)),
        (2, 8, 9, 11),
        "0",
        8 * 16 + 9 * 16,
        9 * 8 * 16,
    ),
    "with_norms": (separable_norms, (2, 16, 9, 11), "1", 9 * 16 + 16 * 32, 9 * 16 * 32),
    "reduce_expand": (reduce_expand, (2, 16, 9, 11), "0", 2 * 4 * 16, 16 * 16),
    "low_rank": (low_rank, (5, 32), "0", 2 * 4 * 32, 32 * 32),
    "two_3x3": (
        lambda: nn.Sequential(conv(3, padding=0), conv(3, padding=0)),
        (2, C, 9, 11),
        "0",
        2 * 9 * C * C,
        25 * C * C,
    ),
}


@pytest.mark.parametrize("name", DEARER)
def test_what_is_dearer_merged_is_left_because_of_its_cost(name: str) -> None:
    build, shape, path, before, after = DEARER[name]
    model = ready(build())
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan, fused = fused_as_planned(model, x)
    layers = (nn.Conv2d, nn.Linear)
    assert sum(isinstance(module, layers) for module in fused) == 2
    (refusal,) = plan.left
    assert (refusal.rule, refusal.path) == ("cost", path)
    ratio = float(re.search(r"costs (\d+\.\d\d) times as much", refusal.condition)[1])
    assert 1 < ratio <= after / before + 0.01  # traffic, which is saved, counts as well
    assert refusal.remedy
    if "relu" not in str(model).lower():
        merged = reparam.plan(model, cost=cost.always).apply()
        assert sum(isinstance(module, layers) for module in merged) == 1, "it could have been merged"
        same(model, merged, x)


def test_what_is_cheaper_merged_is_merged() -> None:
    plan, fused = fused_as_planned(ready(expand_reduce()), images(channels=4))
    assert plan.left == ()
    assert plan.regions[0].before == ("conv 1x1", "conv 1x1")
    assert plan.regions[0].macs_before == 2 * plan.regions[0].macs_after * 4
    assert owned(fused)["convs"] == 1


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = conv(3), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(self.conv(x))) + self.second(self.conv(x)).tanh()


def training_norm() -> nn.Module:
    model = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), Block())
    return model


@pytest.mark.parametrize(
    ("build", "prepare", "path"),
    [
        (training_norm, lambda model: model[1].train(), "1"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C), nn.ReLU(), Block()), lambda model: None, "1"),
        (
            lambda: nn.Sequential(conv(3), nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU(), Block()),
            lambda model: None,
            "1",
        ),
        (lambda: nn.Sequential(conv(3), nn.GroupNorm(2, C), nn.ReLU(), Block()), lambda model: None, None),
        (
            lambda: nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), Block()),
            lambda model: model[0].register_forward_hook(lambda module, inputs, output: output + 1),
            "0",
        ),
    ],
    ids=["training", "lonely", "no_statistics", "group_norm", "hook"],
)
def test_a_norm_that_stays_is_listed(
    build: Callable[[], nn.Module], prepare: Callable[[Any], Any], path: str | None
) -> None:
    model = ready(build())
    prepare(model)
    plan, fused = reparam.plan(model), reparam.fuse(model)
    assert is_fused(fused[3])
    assert [region.path for region in plan.regions] == ["3"]
    if path is not None:
        assert path in [refusal.path for refusal in plan.left], [str(refusal) for refusal in plan.left]
    if not model[1].training:
        same(model, fused, X)
    assert type(fused[1]) is type(model[1])


def test_every_norm_of_a_shared_convolution_is_listed() -> None:
    model = ready(Reused())
    plan, fused = fused_as_planned(model)
    assert plan.regions == ()
    assert {refusal.path for refusal in plan.left} >= {"first", "second"}
    assert owned(fused) == owned(model)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


class Loops(Decides):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = x - 1
        return self.inner(x)


@pytest.mark.parametrize(
    ("build", "rule", "line"),
    [(Decides, "branches", "self.inner(x) if x.sum() > 0 else x"), (Loops, "unread", "while x.sum() > 0:")],
)
def test_a_forward_that_depends_on_its_data_is_listed_with_its_line(
    build: type[nn.Module], rule: str, line: str
) -> None:
    plan = reparam.plan(ready(nn.Sequential(Block(), build())))
    (refusal,) = refusals(plan, rule)
    assert refusal.path == "1"
    assert line in refusal.condition
    assert "test_plan.py:" in refusal.condition
    assert refusal.remedy
    assert {region.path for region in plan.regions} == {"0", "1.inner.0"}


def test_a_refusal_reads_as_a_sentence() -> None:
    (refusal,) = reparam.plan(ready(reduce_expand())).left
    assert str(refusal).startswith("0: cost (Conv2d -> Conv2d): the merged operation costs 1.71 times as much; to fuse")
    assert str(refusal).endswith(refusal.remedy)


# --- control flow -----------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Its forward looks at its data three times; RepVGG blocks are all it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = RepVGGBlock(C, C)
        self.left, self.right = RepVGGBlock(C, C), nn.Sequential(RepVGGBlock(C, C), RepVGGBlock(C, C, groups=2))
        self.loop = nn.ModuleList([RepVGGBlock(C, C), RepVGGBlock(C, C)])
        self.last = RepVGGBlock(C, 2 * C, 2, squeeze_excite=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.left(x) if x.mean() > 1 else self.right(x)
        for block in self.loop:
            x = block(x)
            if x.max() > 40:
                break
        while x.abs().max() > 1:
            x = x / 2
        return self.last(x)


def test_all_blocks_of_a_net_that_branches_on_its_data_are_fused() -> None:
    model = ready(Branches())
    plan, fused = fused_as_planned(model)
    paths = {"stem", "left", "right.0", "right.1", "loop.0", "loop.1", "last"}
    assert {region.path for region in plan.regions} == paths
    assert [refusal.path for refusal in refusals(plan, "unread")] == [""]
    assert type(fused) is Branches
    found = owned(fused)
    assert (found["convs"], found["norms"]) == (7, 0)
    assert all(owned(fused.get_submodule(path))["convs"] == 1 for path in paths)
    ways = set()
    for scale in (0.01, 1, 3, 100):
        ways.add(count(model, X * scale)["norm"])
        same(model, fused, X * scale)
        after = count(fused, X * scale)
        assert after["norm"] == after["add"] == 0
    assert len(ways) > 1, "the inputs took one way only"


# --- purity, and the same as fuse -------------------------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by identity, and the order of all."""
    return {
        name: [
            (key, list(value.items()) if isinstance(value, dict) else id(value), type(value))
            for key, value in vars(module).items()
        ]
        for name, module in model.named_modules()
    }


NETS: list[Callable[[], nn.Module]] = [
    Block,
    Branches,
    Reused,
    separable_norms,
    point_then_dense,
    lambda: RepVGG((1, 2, 1), (8, 16, 16), (1, 2, 1), {2: 2}, squeeze_excite=False, num_classes=4, in_channels=C),
    lambda: nn.Sequential(conv(1), PadsByShift(), conv(3, padding=0), nn.BatchNorm2d(C)),
]
NAMES = ["block", "branches", "reused", "separable", "border", "repvgg", "pads"]
every_net = pytest.mark.parametrize("build", NETS, ids=NAMES)


def inputs(model: nn.Module) -> Tensor:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return images(channels=first.in_channels)


@every_net
def test_a_plan_changes_nothing(build: Callable[[], nn.Module]) -> None:
    model = ready(build())
    x = inputs(model)
    with torch.no_grad():
        output = model(x)
    before, attributes = snapshot(model), everything(model)
    kinds = [type(module) for module in model.modules()]
    versions = {key: tensor._version for key, tensor in model.state_dict(keep_vars=True).items()}
    plan = reparam.plan(model)
    text = str(plan)
    plan.apply()
    assert difference(before, snapshot(model)) == 0
    assert everything(model) == attributes
    assert [type(module) for module in model.modules()] == kinds
    assert {key: tensor._version for key, tensor in model.state_dict(keep_vars=True).items()} == versions
    with torch.no_grad():
        assert torch.equal(model(x), output)
    assert str(plan) == text
    assert str(reparam.plan(model)) == text, "a second plan differs"


@every_net
@pytest.mark.parametrize(
    "options",
    [{}, {"cost": cost.always}, {"exclude": ("*.1", nn.Linear)}],
    ids=["default", "cost", "exclude"],
)
def test_applying_a_plan_is_fusing(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = ready(build())
    plan = reparam.plan(model, **options)
    applied, fused = plan.apply(), reparam.fuse(model, **options)
    assert type(applied) is type(fused)
    assert [(name, repr(module)) for name, module in applied.named_modules()] == [
        (name, repr(module)) for name, module in fused.named_modules()
    ]
    assert difference(applied.state_dict(), fused.state_dict()) == 0
    x = inputs(model)
    with torch.no_grad():
        assert torch.equal(applied(x), fused(x))
    removed = sum(region.params_before - region.params_after for region in plan.regions)
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, applied)]
    assert sizes[0] - sizes[1] == removed, "the plan and the fused net differ"


def test_a_plan_is_applied_in_place() -> None:
    model = ready(nn.Sequential(Block(), Block()))
    with torch.no_grad():
        output = model(X)
    assert reparam.plan(model).apply(inplace=True) is model
    assert is_fused(model[0])
    assert is_fused(model[1])
    with torch.no_grad():
        assert difference(output, model(X)) < 1e-10


def test_a_plan_takes_the_weights_of_the_time_when_it_is_applied() -> None:
    model = ready(Block())
    plan = reparam.plan(model)
    ready(model, seed=5)
    same(model, plan.apply(), X)


def test_a_plan_of_a_model_that_went_back_to_training_is_not_applied() -> None:
    model = ready(Block())
    plan = reparam.plan(model)
    model.train()
    with pytest.raises(reparam.TrainingModeError, match=r"call model\.eval\(\) first"):
        plan.apply()


def test_two_plans_of_one_net_are_equal() -> None:
    first, second = (reparam.plan(ready(Branches(), seed=seed)) for seed in (0, 1))
    assert first == second
    assert first != reparam.plan(ready(Block()))


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@every_net
def test_the_mode_of_the_caller_changes_nothing(build: Callable[[], nn.Module], mode: Callable[[], Any]) -> None:
    model = ready(build())
    expected, plan = reparam.fuse(model), str(reparam.plan(model))
    with mode():
        fused, planned = reparam.fuse(model), str(reparam.plan(model))
    assert planned == plan
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert difference(expected.state_dict(), fused.state_dict()) == 0
    assert all(parameter.requires_grad for parameter in fused.parameters())


# --- exclude ----------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two blocks with names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": Block(), "second": Block()})
        self.head = nn.Sequential(conv(1), nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["second"](self.body["first"](x)))


class MyNorm(nn.BatchNorm2d):
    """A norm of one's own."""


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("body.first",), {"body.first"}),
        (("body.*",), {"body.first", "body.second"}),
        (("*.second*",), {"body.second"}),
        (("body.first.*", "head.?"), {"body.first", "head"}),
        ((Block,), {"body.first", "body.second"}),
        ((nn.Sequential, nn.BatchNorm2d), {"body.first", "body.second", "head"}),
        ((lambda path, module: path.startswith("head"),), {"head"}),
        ((lambda path, module: isinstance(module, Block) and path.endswith("first"),), {"body.first"}),
        (["body.second", Block, lambda path, module: False], {"body.first", "body.second"}),
        (("*",), {"body.first", "body.second", "head"}),
        ((nn.Module,), {"body.first", "body.second", "head"}),
        (("nothing.*", nn.Conv3d, lambda path, module: False), set()),
        ((), set()),
    ],
    ids=[
        "path",
        "star",
        "stars",
        "children",
        "type",
        "types",
        "predicate",
        "predicate_of_both",
        "mixed_list",
        "all_paths",
        "all_types",
        "no_match",
        "empty",
    ],
)
def test_excluded_modules_stay_as_they_are(exclude: Iterable[Any], left: set[str]) -> None:
    model = ready(Pair())
    plan, fused = fused_as_planned(model, exclude=exclude)
    for path in ("body.first", "body.second", "head"):
        old, new = model.get_submodule(path), fused.get_submodule(path)
        if path in left:
            assert str(new) == str(old)
            assert difference(old.state_dict(), new.state_dict()) == 0
            reasons = [refusal for refusal in plan.left if refusal.path.startswith(path)]
            assert {refusal.rule for refusal in reasons} == {"excluded"}, reasons
        else:
            assert is_fused(new)
    assert bool(refusals(plan, "excluded")) == bool(left)
    assert all("exclude" in refusal.condition for refusal in refusals(plan, "excluded"))


@pytest.mark.parametrize(
    "exclude",
    [("1",), (nn.BatchNorm2d,), (MyNorm,), (lambda path, module: isinstance(module, MyNorm),)],
    ids=["pattern", "type", "subclass", "predicate"],
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, MyNorm])
def test_a_norm_alone_is_excluded(exclude: Any, norm: type[nn.Module]) -> None:
    """A norm is the last operation of its region: it must not be the one that is asked least."""
    model = ready(nn.Sequential(conv(3), norm(C), nn.ReLU(), conv(1)))
    plan, fused = fused_as_planned(model, exclude=exclude)
    excluded = norm is MyNorm or exclude[0] in ("1", nn.BatchNorm2d)
    assert isinstance(fused[1], nn.BatchNorm2d) == excluded
    assert bool(refusals(plan, "excluded")) == excluded
    assert torch.equal(fused[0].weight, model[0].weight) == excluded


@pytest.mark.parametrize("part", ["dense", "point", "skip", "dense.0", "dense.1", "point.1"])
def test_part_of_a_block_is_excluded(part: str) -> None:
    """The rest is still merged, and the part is bit for bit what it was."""
    model = ready(Block())
    plan, fused = fused_as_planned(model, exclude=(part,))
    assert str(fused.get_submodule(part)) == str(model.get_submodule(part))
    assert difference(model.get_submodule(part).state_dict(), fused.get_submodule(part).state_dict()) == 0
    assert refusals(plan, "excluded")
    assert owned(fused)["norms"] < 3


ONLY: list[tuple[Any, set[str]]] = [
    (("body.first",), {"body.first"}),
    (("body.*",), {"body.first", "body.second"}),
    ((Block,), {"body.first", "body.second"}),
    (["head", lambda path, module: path == "body.second"], {"body.second", "head"}),
    (("",), {"body.first", "body.second", "head"}),
    (("*",), {"body.first", "body.second", "head"}),
    ((), set()),
    (("nothing",), set()),
    (None, {"body.first", "body.second", "head"}),
]


@pytest.mark.parametrize(
    ("only", "done"),
    ONLY,
    ids=["path", "star", "type", "mixed_list", "root", "all_paths", "empty", "no_match", "none"],
)
def test_only_these_modules_are_fused(only: Any, done: set[str]) -> None:
    model = ready(Pair())
    plan, fused = fused_as_planned(model, only=only)
    for path in ("body.first", "body.second", "head"):
        old, new = model.get_submodule(path), fused.get_submodule(path)
        if path in done:
            assert is_fused(new)
        else:
            assert str(new) == str(old)
            assert difference(old.state_dict(), new.state_dict()) == 0
            reasons = [refusal for refusal in plan.left if refusal.path.startswith(path)]
            assert {refusal.rule for refusal in reasons} == {"excluded"}, reasons
            assert all(refusal.remedy == "name it in only" for refusal in reasons)


def test_only_and_exclude() -> None:
    fused = reparam.fuse(ready(Pair()), only=(Block,), exclude=("*.first",))
    assert [is_fused(part) for part in (fused.body["first"], fused.body["second"], fused.head)] == [False, True, False]


def test_only_reaches_into_what_cannot_be_read() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) if x.sum() > 0 else self.blocks[1](x)

    model = ready(nn.Sequential(Branching(), Block()))
    fused = reparam.fuse(model, only=(Branching,))
    assert [is_fused(part) for part in (*fused[0].blocks, fused[1])] == [True, True, False]


class QaBlock(nn.Module):
    """QARepVGG (arXiv 2212.01593): one norm on the 3x3 branch, one behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point, self.after = conv_norm(3), conv(1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.after(self.dense(x) + self.point(x) + x))


@pytest.mark.parametrize("option", [{"exclude": ("*after",)}, {"exclude": (lambda path, _: path.endswith("after"),)}])
def test_partial_fusion_keeps_the_norm_behind_the_sum(option: dict[str, Any]) -> None:
    """As QARepVGG is trained on in quantization: one convolution and its norm, both with gradients."""
    model = ready(nn.Sequential(QaBlock(), QaBlock()))
    _, fused = fused_as_planned(model, **option)
    x = images()
    assert difference(model(x), fused(x)) < 1e-10
    for old, block in zip(model, fused, strict=True):
        assert owned(block) == {"convs": 1, "linears": 0, "norms": 1}
        assert difference(old.after.state_dict(), block.after.state_dict()) == 0
    fused.train()
    before = copy.deepcopy(fused.state_dict())
    optimiser = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(x).square().mean().backward()
    assert all(p.is_leaf and p.requires_grad and p.grad is not None for p in fused.parameters())
    optimiser.step()
    same = {key for key, value in fused.state_dict().items() if torch.allclose(value, before[key], rtol=1e-9, atol=0)}
    assert all(key.startswith(("0.dense", "1.dense")) and key.endswith(".bias") for key in same), same
    assert sum(key not in same for key in before) >= 12  # a norm undoes the bias before it


def test_fused_convolutions_are_trainable() -> None:
    fused = reparam.fuse(ready(nn.Sequential(Block(), Block())))
    x = images()
    before = fused(x).square().mean()
    before.backward()
    assert all(p.is_leaf and p.requires_grad and p.grad.abs().sum() > 0 for p in fused.parameters())
    torch.optim.SGD(fused.parameters(), lr=1e-3).step()
    assert fused(x).square().mean() < before


# --- cost policies ----------------------------------------------------------------------------------------------------


DECISIONS = {  # policy -> which of the nets below it merges
    "macs_and_traffic": {"expand", "pool", "block"},
    "macs": {"expand", "pool", "block"},
    "traffic": {"expand", "pool", "block", "separable", "reduce", "3x3"},
    "parameters": {"expand", "block"},
    "always": {"expand", "pool", "block", "separable", "reduce", "3x3"},
}
DECIDED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "expand": (expand_reduce, 4),
    "pool": (lambda: nn.Sequential(conv(3), nn.AvgPool2d(2)), C),
    "block": (Block, C),
    "separable": (separable, 16),
    "reduce": (reduce_expand, 16),
    "3x3": (lambda: nn.Sequential(conv(3, padding=0), conv(3, padding=0)), C),
}


@pytest.mark.parametrize("policy", DECISIONS)
@pytest.mark.parametrize("name", DECIDED)
def test_policies_decide(policy: str, name: str) -> None:
    build, channels = DECIDED[name]
    model = ready(build())
    plan, fused = fused_as_planned(model, images(channels=channels), cost=getattr(cost, policy))
    merged = name in DECISIONS[policy]
    assert len(plan.regions) == merged
    assert bool(refusals(plan, "cost")) == (not merged)
    found = owned(fused)
    assert found["convs"] == (1 if merged or name == "pool" else 2)
    assert found["norms"] == 0
    if name == "pool":
        assert type(fused[1]) is (nn.Identity if merged else nn.AvgPool2d)


def test_the_default_policy() -> None:
    assert reparam.DEFAULT_COST is cost.macs_and_traffic
    model = ready(separable_norms())
    assert reparam.plan(model) == reparam.plan(model, cost=cost.macs_and_traffic)


def test_a_policy_of_ones_own() -> None:
    """It is given the work of what is compared, and every number that it needs."""
    seen: list[reparam.Work] = []

    def launches(work: reparam.Work) -> float:
        seen.append(work)
        return work.launches

    model = ready(reduce_expand())
    plan, fused = fused_as_planned(model, images(channels=16), cost=launches)
    assert len(plan.regions) == 1
    assert owned(fused)["convs"] == 1
    assert reparam.Work(macs=128.0, traffic=40.0, parameters=128, launches=2, convolutions=2) in seen
    assert reparam.Work(macs=256.0, traffic=32.0, parameters=256, launches=1, convolutions=1) in seen


def test_a_policy_that_never_gains_leaves_all() -> None:
    model = ready(Block())
    plan, fused = fused_as_planned(model, cost=lambda work: 0.0)
    assert plan.regions == ()
    assert owned(fused) == owned(model)
    assert {refusal.rule for refusal in plan.left} == {"cost"}


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [reparam.fuse, reparam.plan])
@pytest.mark.parametrize(
    ("model", "found"),
    [
        (None, "NoneType"),
        (Block, "type"),
        (Block().state_dict(), "OrderedDict"),
        ([Block()], "list"),
        (torch.relu, "builtin_function_or_method"),
        ("block.pt", "str"),
    ],
    ids=["none", "class", "state_dict", "list", "function", "path"],
)
def test_what_is_no_module_is_refused(verb: Callable[..., Any], model: Any, found: str) -> None:
    with pytest.raises(reparam.ReparamError, match=rf"expected an nn\.Module, found {found}: pass the model itself"):
        verb(model)


@pytest.mark.parametrize("verb", [reparam.fuse, reparam.plan])
def test_a_model_in_training_mode_is_refused(verb: Callable[..., Any]) -> None:
    with pytest.raises(reparam.TrainingModeError) as info:
        verb(Block())
    assert str(info.value) == (
        "expected a model in eval mode, found Block in training mode, where batch norms use the statistics of the "
        "batch: call model.eval() first"
    )
    assert isinstance(info.value, reparam.ReparamError)
    assert isinstance(info.value, ValueError)


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # options, and what the message must say: the argument, what was found, and what to write instead
    "exclude_one_pattern": ({"exclude": "body.first"}, ("exclude", "'body.first'", "('body.first',)")),
    "exclude_one_type": ({"exclude": nn.BatchNorm2d}, ("exclude", "BatchNorm2d", "tuple")),
    "exclude_one_predicate": ({"exclude": lambda path, module: True}, ("exclude", "function", "tuple")),
    "exclude_a_number": ({"exclude": 3}, ("exclude", "int", "tuple")),
    "exclude_none": ({"exclude": None}, ("exclude", "NoneType", "tuple")),
    "exclude_a_module": ({"exclude": (nn.ReLU(),)}, ("exclude", "ReLU")),
    "exclude_of_numbers": ({"exclude": ("head", 3)}, ("exclude", "int")),
    "only_one_pattern": ({"only": "body.first"}, ("only", "'body.first'", "only=('body.first',)")),
    "only_a_number": ({"only": 3}, ("only", "int", "tuple")),
    "exclude_of_no_module_type": ({"exclude": (int,)}, ("exclude", "int")),
    "cost_none": ({"cost": None}, ("cost", "NoneType", "Work")),
    "cost_by_name": ({"cost": "macs"}, ("cost", "'macs'", "reparam.cost.macs")),
    "cost_a_number": ({"cost": 3}, ("cost", "int", "Work")),
    "cost_without_a_number": ({"cost": lambda work: None}, ("cost", "NoneType", "number")),
    "cost_not_a_number": ({"cost": lambda work: float("nan")}, ("cost", "nan")),
    "liftings_none": ({"liftings": None}, ("liftings", "NoneType", "reparam.LIFTINGS")),
    "liftings_one": ({"liftings": lambda value: None}, ("liftings", "function", "reparam.LIFTINGS")),
    "liftings_of_numbers": ({"liftings": (*reparam.LIFTINGS, 3)}, ("liftings", "int")),
}


@pytest.mark.parametrize("verb", [reparam.fuse, reparam.plan])
@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_with_the_remedy(verb: Callable[..., Any], name: str) -> None:
    options, words = BAD[name]
    model = ready(Pair())
    before = snapshot(model)
    with pytest.raises(reparam.ReparamError) as info:
        verb(model, **options)
    assert [word for word in words if word not in str(info.value)] == [], str(info.value)
    assert difference(before, snapshot(model)) == 0


@pytest.mark.parametrize("verb", [reparam.fuse, reparam.plan])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(2, C + 1, 9, 9, dtype=torch.float64), ("tensor(2, 7, 9, 9)", "RuntimeError", "channels")),
        (images().float(), ("tensor(2, 6, 9, 11)", "RuntimeError", "should be the same")),
        ({"image": X}, ("'image': 'tensor(2, 6, 9, 11)'", "TypeError", "unexpected keyword argument 'image'")),
        ((), ("TypeError", "missing 1 required positional argument: 'x'")),
        ("image.png", ("'image.png'", "TypeError")),
    ],
    ids=["channels", "dtype", "name", "none", "path"],
)
def test_example_inputs_that_do_not_fit_are_refused(
    verb: Callable[..., Any], given: Any, words: tuple[str, ...]
) -> None:
    model = ready(Pair())
    before = snapshot(model)
    with pytest.raises(reparam.ReparamError, match="expected example_inputs on which the model runs, found") as info:
        verb(model, example_inputs=given)
    assert [word for word in words if word not in str(info.value)] == [], str(info.value)
    assert difference(before, snapshot(model)) == 0


def test_example_inputs_are_not_written_to() -> None:
    model = ready(nn.Sequential(nn.ReLU(inplace=True), Block()))
    x = images()
    plan = reparam.plan(model, example_inputs=x)
    assert torch.equal(x, images())
    assert [str(refusal) for refusal in plan.left] == [str(refusal) for refusal in reparam.plan(model).left]
    assert [region.change for region in plan.regions] == [region.change for region in reparam.plan(model).regions]
    assert is_fused(reparam.fuse(model, example_inputs=x)[1])
    assert torch.equal(x, images())


def test_an_error_of_a_predicate_or_policy_is_not_hidden() -> None:
    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError("mine")

    for options in ({"exclude": (fails,)}, {"cost": fails}):
        with pytest.raises(ZeroDivisionError, match="mine"):
            reparam.plan(ready(Pair()), **options)


@pytest.mark.parametrize("verb", [reparam.fuse, reparam.plan])
def test_options_have_names(verb: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        verb(ready(Block()), True)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        verb(ready(Block()), excluded=())
