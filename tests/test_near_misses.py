"""Near misses: each comes with the one change of the model that lifts it, and after that change it fuses.

A near miss is a claim about another model. So each case builds that model, too, and counts what is left of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import C, conv, images, owned, ready, same
from torch import Tensor, nn

import reparam
from reparam import Plan, Refusal, cost

X = images()


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(C)


class Two(nn.Module):
    """A sum of two branches of one input."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x) + self.second(x))


class Reads(nn.Module):
    """A convolution and a norm; with `twice`, the value between them is read once more."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = conv(3), norm(), twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + torch.relu(y if self.twice else x)


class Calls(nn.Module):
    """Two calls of one convolution, or of two."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = conv(3)
        self.second = self.first if shared else conv(3)
        self.norms = nn.ModuleList([norm(), norm()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norms[0](self.first(x))) * self.norms[1](self.second(torch.relu(x)))


class Writes(nn.Module):
    """The input of a convolution, written to before the norm behind it runs."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.in_place = conv(3), norm(), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x = x.mul_(2) if self.in_place else x.mul(2)
        return self.norm(y) + x.tanh()


class Frozen(nn.Module):
    """A convolution without gradients, and a norm with them."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.frozen = conv(3), norm(), frozen

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            y = self.conv(x)
        return self.norm(y)


def norm_in_training(training: bool) -> nn.Module:
    model = ready(nn.Sequential(conv(3), norm(), nn.ReLU()))
    model[1].train(training)
    return model


def hooked(hook: bool) -> nn.Module:
    model = nn.Sequential(conv(3), norm())
    if hook:
        model[0].register_forward_hook(lambda *_: None)
    return model


CASES: dict[str, tuple[str, Callable[[bool], nn.Module], str]] = {
    # rule; the model that misses (True) and the changed one (False); words of the remedy
    "norm in training mode": ("norm", norm_in_training, "call eval() on it"),
    "norm without statistics": (
        "norm",
        lambda missed: nn.Sequential(conv(3), nn.BatchNorm2d(C, track_running_stats=not missed), nn.ReLU()),
        "track_running_stats=True",
    ),
    "read twice": ("used_elsewhere", Reads, "read it once"),
    "shared": ("shared", Calls, "give every caller a module of its own"),
    "written in place": ("in_place", Writes, "use the operation that copies"),
    "two modes": ("mode", Frozen, "run both under one mode"),
    "hook": ("hooks", hooked, "remove it before fusing"),
    "bias before a padded convolution": (
        "border_rule",
        lambda missed: nn.Sequential(conv(1, bias=missed), conv(3)),
        "drop the bias",
    ),
    "padding behind instead of in front": (
        "border_rule",
        lambda missed: (
            nn.Sequential(nn.Conv2d(C, 24, 3, padding=1, bias=False), conv(3, 24, 4))
            if missed
            else nn.Sequential(nn.Conv2d(C, 24, 3, padding=2, bias=False), conv(3, 24, 4, padding=0))
        ),
        "pad the input of the first operation",
    ),
    "bias before a transposed convolution": (
        "border_rule",
        lambda missed: nn.Sequential(conv(1, bias=missed), nn.ConvTranspose2d(C, C, 2, stride=2)),
        "drop the bias before it",
    ),
    "borders": (
        "branch_sum",
        lambda missed: Two(conv(3, padding_mode="reflect" if missed else "zeros"), conv(5)),
        "give the branches one padding mode",
    ),
    "sizes": (
        "branch_sum",
        lambda missed: Two(
            nn.AvgPool2d(2) if missed else nn.AvgPool2d(3, 2, 1), nn.Conv2d(C, C, 3, stride=2, padding=1)
        ),
        "pad the branches so that their sizes agree",
    ),
    "strides": (
        "branch_sum",
        lambda missed: Two(conv(3), nn.Conv2d(C, C, 1, stride=2 if missed else 1)),
        "give the branches one stride",
    ),
    "channels": (
        "branch_sum",
        lambda missed: Two(conv(3), nn.Conv2d(C, 1 if missed else C, 3, padding=1)),
        "give the branches the same channels",
    ),
    "partial window": (
        "pool_is_conv",
        lambda missed: nn.Sequential(conv(1), nn.AvgPool2d(2, ceil_mode=missed)),
        "use ceil_mode=False",
    ),
    "divisor at the border": (
        "pool_is_conv",
        lambda missed: Two(nn.AvgPool2d(3, 1, 1, count_include_pad=not missed), conv(3)),
        "use count_include_pad=True",
    ),
    "slope": (
        "activation",
        lambda missed: nn.Sequential(conv(3), nn.LeakyReLU(0.9 if missed else 1.0), norm()),
        "train it towards 1",
    ),
}
RUNS_ON = {"sizes": (8, 12), "strides": (1, 1)}  # sizes of branches that differ agree for some sizes of the input


def made(name: str, missed: bool) -> nn.Module:
    model = CASES[name][1](missed)
    return model if name == "norm in training mode" else ready(model)


def operations(model: nn.Module) -> int:
    """Operations that are left: calls of modules that compute something, norms in training mode included."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.AvgPool2d)
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_a_near_miss_is_listed_first_with_its_remedy(name: str) -> None:
    rule, _, remedy = CASES[name]
    plan = reparam.plan(made(name, True))
    assert rule in {refusal.rule for refusal in plan.near_misses}, str(plan)
    assert any(remedy in refusal.remedy for refusal in plan.near_misses if refusal.rule == rule)
    assert plan.left[: len(plan.near_misses)] == plan.near_misses, "near misses come first"
    headings = str(plan).splitlines()
    assert headings[1] == "near misses, each of which one change of the model would let fuse:"
    assert all(f"{miss.rule} ({' -> '.join(miss.operands)})" in str(plan) for miss in plan.near_misses)


@pytest.mark.parametrize("name", CASES)
def test_the_change_lets_it_fuse(name: str) -> None:
    missed, changed = made(name, True), made(name, False)
    left = operations(reparam.fuse(missed))
    fused = reparam.fuse(changed)
    assert operations(fused) < left, f"{operations(fused)} operations are left of the changed model, {left} before"
    assert CASES[name][0] not in {refusal.rule for refusal in reparam.plan(changed).near_misses}
    x = images(RUNS_ON.get(name, (9, 11)))
    if name != "norm in training mode":
        same(missed, reparam.fuse(missed), x)
    same(changed, fused, x)


FAR: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "dearer by its size": ("border_rule", lambda: nn.Sequential(conv(3, bias=False), conv(3)), {}),
    "dearer": ("cost", lambda: nn.Sequential(conv(3, groups=C, bias=False), conv(1, C, 12)), {}),
    "excluded": ("excluded", lambda: nn.Sequential(conv(3), norm()), {"exclude": ("0",)}),
    "two data": ("scale", lambda: Gate(), {}),
    "lonely norm": ("norm", lambda: nn.Sequential(nn.ReLU(), norm(), nn.ReLU()), {}),
    "read twice, and dearer": ("used_elsewhere", lambda: ReadsNarrow(), {}),
}


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = conv(3), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.sigmoid(self.gate(x))


class ReadsNarrow(nn.Module):
    """A bottleneck whose narrow value is read twice: merged, its second convolution would be wide."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = conv(1, C, 1), conv(1, 1, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.up(y) * torch.sigmoid(y)


@pytest.mark.parametrize("name", FAR)
def test_what_no_change_of_the_model_lets_fuse_is_no_near_miss(name: str) -> None:
    rule, build, options = FAR[name]
    plan = reparam.plan(ready(build()), **options)
    assert rule in {refusal.rule for refusal in plan.left}, str(plan)
    assert plan.near_misses == (), str(plan)


def test_the_cost_policy_decides_which_refusals_are_near() -> None:
    """Two padded 3x3 convolutions: with a policy that counts operations, the 5x5 would be taken."""
    model = ready(nn.Sequential(conv(3, bias=False), conv(3)))
    assert [miss.rule for miss in reparam.plan(model, cost=cost.always).near_misses] == ["border_rule"]


def test_a_norm_that_stays_is_found_by_its_path_and_shown_with_what_it_stays_for() -> None:
    plan = reparam.plan(ready(Reads(True)))
    assert [miss.path for miss in plan.near_misses] == ["conv", "norm"]
    (line,) = [line for line in str(plan).splitlines() if "used_elsewhere" in line]
    assert line.startswith("  conv Conv2d: used_elsewhere (Conv2d -> BatchNorm2d): its value is also read by relu")
    assert line.endswith("; to fuse: read it once; also at norm")


# --- sums of branches -------------------------------------------------------------------------------------------------


def sums(plan: Plan) -> list[Refusal]:
    return [refusal for refusal in plan.left if refusal.rule == "branch_sum"]


def conv_norm(*arguments: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(*arguments, **options), norm())


@pytest.mark.parametrize(
    ("build", "condition"),
    [
        (
            lambda: Two(conv(3, padding_mode="reflect"), conv(3)),
            "borders are extended differently: reflect and zeros; the other branch is Conv2d at second",
        ),
        (
            lambda: Two(conv_norm(3, padding_mode="circular"), conv_norm(3)),
            "borders are extended differently: circular and zeros; the other branch is BatchNorm2d at second.1",
        ),
        (
            lambda: Two(nn.AvgPool2d(2), nn.Conv2d(C, C, 3, stride=2, padding=1)),
            "output sizes differ or agree for some input sizes only (slack (-1, -1) and (0, 0))"
            "; the other branch is Conv2d at second",
        ),
        (
            lambda: Two(
                nn.Sequential(nn.AvgPool2d(2), conv(1), norm()),
                nn.Sequential(nn.Conv2d(C, C, 3, stride=2, padding=1), norm()),
            ),
            "output sizes differ or agree for some input sizes only (slack (-1, -1) and (0, 0))"
            "; the other branch is BatchNorm2d at second.1",
        ),
    ],
    ids=["borders", "borders behind norms", "pool and stride", "pool, projection and stride"],
)
def test_a_sum_that_stays_is_listed_once_with_its_true_reason(build: Callable[[], nn.Module], condition: str) -> None:
    model = ready(build())
    plan = reparam.plan(model)
    assert [refusal.condition.replace("(0, 0) and (-1, -1)", "(-1, -1) and (0, 0)") for refusal in sums(plan)] == [
        condition
    ]
    assert sums(plan)[0].operands[-1] == "add"
    assert sums(plan)[0].near
    same(model, reparam.fuse(model), images((8, 12)))
    assert owned(reparam.fuse(model))["convs"] == owned(model)["convs"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Two(conv(3), nn.MaxPool2d(3, 1, 1)),
        lambda: Two(conv(3), nn.Sequential(nn.ReLU(), conv(3))),
        lambda: Two(conv(3), conv(1)),
    ],
    ids=["a branch that is not linear", "another input", "branches that merge"],
)
def test_other_sums_are_not_listed(build: Callable[[], nn.Module]) -> None:
    assert reparam.plan(ready(build())).left == ()


class PadsByConstant(nn.Module):
    """A border of a constant, which only weights can compare with what it pads, inside a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = conv(3), conv(1), conv(3, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.pad(self.inner(x), [1] * 4, value=0.5)
        return torch.relu(self.first(x) + self.last(y))


def test_a_constant_border_inside_a_sum_is_planned() -> None:
    model = ready(PadsByConstant())
    plan = reparam.plan(model)
    assert sums(plan) == []
    same(model, plan.apply(), X)


def test_three_branches_of_which_two_merge() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3), conv(1), conv(3, padding_mode="replicate")

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(x) + self.c(x))

    model = ready(Three())
    plan = reparam.plan(model)
    (refusal,) = sums(plan)
    assert refusal.near
    assert "replicate" in refusal.condition
    assert owned(plan.apply())["convs"] == 2
    same(model, plan.apply(), X)
