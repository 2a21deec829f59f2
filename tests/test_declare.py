"""`reparam.declare`: what a user says is linear is fused if the formula is right, and left alone if it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import count, ready, same
from torch import Tensor, nn

import reparam
from reparam.errors import ReparamError

SIZES = (7, 12, 33)


@torch.library.custom_op("reparam_tests::box", mutates_args=())
def box(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.avg_pool1d(x, size, 1, size // 2)


@box.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return torch.empty_like(x)


class Spectral(nn.Module):
    """A causal depthwise convolution as a product of spectra: no operation of it is linear by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1] + self.taps.shape[-1] - 1
        spectrum = torch.fft.rfft(x, length) * torch.fft.rfft(self.taps, length)
        return torch.fft.irfft(spectrum, length)[..., : x.shape[-1]]


class Subclass(Spectral):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def spectral(module: Spectral, x: Any) -> reparam.Formula:
    channels, taps = module.taps.shape
    return reparam.Formula(module.taps.flip(1)[:, None], padding=((taps - 1, 0),), groups=channels)


def boxed(x: Any, size: int) -> reparam.Formula:
    weight = torch.full((x.channels, 1, size), 1 / size, dtype=torch.float64)
    return reparam.Formula(weight, padding=size // 2, groups=x.channels)


DECLARED = (*reparam.LIFTINGS, reparam.declare(Spectral, spectral), reparam.declare(box, boxed))


class Net(nn.Module):
    """A declared branch, a convolution and the input itself, then a norm."""

    def __init__(self, kind: type[Spectral] = Spectral) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv1d(4, 4, 1), kind(4)
        self.point, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(self.norm(self.branch(x) + self.point(x) + x))


class Boxes(nn.Module):
    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv1d(4, 4, 3, padding=1), size

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(y - box(y, size=self.size))


def signal(length: int = 12, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def refusal(model: nn.Module, *declared: Any, **options: Any) -> reparam.Refusal:
    """The one refusal of a declaration."""
    plan = reparam.plan(model, liftings=(*reparam.LIFTINGS, *declared), **options)
    (found,) = (refusal for refusal in plan.left if refusal.rule == "declared")
    return found


@pytest.mark.parametrize("length", SIZES)
def test_a_declared_module_is_a_branch_like_any_other(length: int) -> None:
    net = ready(Net())
    fused = reparam.fuse(net, liftings=DECLARED)
    assert {name for name, _ in fused.named_children()} == {"stem", "branch"}
    found = count(fused, signal())
    assert (found["conv"], found["norm"], found["add"]) == (2, 0, 0)
    same(net, fused, signal(length))


@pytest.mark.parametrize("length", SIZES)
def test_a_declared_operator_gets_its_arguments(length: int) -> None:
    net = ready(Boxes())
    fused = reparam.fuse(net, liftings=DECLARED)
    (region,) = reparam.receipt(fused).regions
    assert "declared conv 5" in region.before
    assert region.after == ("conv 5, groups 4",)
    same(net, fused, signal(length))


def test_a_padded_convolution_and_a_padding_operator_are_not_put_into_each_other() -> None:
    """The border rule holds for declared formulas, too: here the operator pads what the convolution gives."""
    plan = reparam.plan(ready(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), Boxed()).eval()), liftings=DECLARED)
    assert not plan.regions
    assert plan.left[0].rule == "border_rule"


class Boxed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return box(x, 3)


def test_nothing_is_registered() -> None:
    net = ready(Net())
    reparam.fuse(net, liftings=DECLARED)
    assert not any("declared" in region.before for region in reparam.plan(net).regions)
    assert isinstance(reparam.fuse(net).branch, Spectral)


def test_a_subclass_is_not_what_was_declared() -> None:
    net = ready(Net(Subclass))
    fused = reparam.fuse(net, liftings=DECLARED)
    assert type(fused.branch) is Subclass
    same(net, fused, signal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_folded_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    net = ready(Net()).to(dtype)
    exact = reparam.fuse(net.double(), liftings=DECLARED)
    fused = reparam.fuse(net.to(dtype), liftings=DECLARED)
    assert torch.equal(fused.branch[-1].weight, exact.branch[-1].weight.to(dtype))  # behind a pad of one side


def test_structure_is_known_on_the_meta_device() -> None:
    with torch.device("meta"):
        planned = reparam.fuse(Net().eval(), liftings=DECLARED)
    wanted = reparam.fuse(ready(Net()), liftings=DECLARED)
    assert {k: v.shape for k, v in planned.state_dict().items()} == {
        k: v.shape for k, v in wanted.state_dict().items()
    }


class Halves(nn.Module):
    """A linear layer of its own kind, on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(x[..., :2], self.a, ([-1], [1])) + torch.tensordot(x[..., 2:], self.b, ([-1], [1]))


def halves(module: Halves, x: Any) -> reparam.Formula:
    return reparam.Formula(torch.cat([module.a, module.b], 1))


def test_a_declared_matrix_acts_on_the_last_axis() -> None:
    net = ready(nn.Sequential(Halves(), nn.Linear(3, 5)))
    fused = reparam.fuse(net, liftings=(*reparam.LIFTINGS, reparam.declare(Halves, halves)))
    assert [type(layer) for layer in fused] == [nn.Identity, nn.Linear]
    same(net, fused, torch.randn(2, 4).double())
    same(net, fused, torch.randn(2, 7, 4).double())


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_wrong_formula_is_found_and_the_rest_is_fused() -> None:
    wrong = reparam.declare(Spectral, lambda module, x: reparam.Formula(module.taps[:, None], padding=1, groups=4))
    net = ready(Net())
    found = refusal(net, wrong)
    assert found.path == "branch"
    assert found.condition.startswith("its formula differs from it by ")
    assert found.remedy == "repair the formula"
    fused = reparam.fuse(net, liftings=(*reparam.LIFTINGS, wrong))
    assert isinstance(fused.branch, Spectral)
    same(net, fused, signal())


def test_a_shift_by_one_tap_at_the_border_only_is_found() -> None:
    """Right inside, wrong at one end: the length is right, and the padding circular instead of zero."""

    def circular(module: Spectral, x: Any) -> reparam.Formula:
        right = spectral(module, x)
        return reparam.Formula(right.weight, padding=right.padding, groups=right.groups, padding_mode="circular")

    assert refusal(ready(Net()), reparam.declare(Spectral, circular)).remedy == "repair the formula"


def test_a_formula_of_another_size_is_found() -> None:
    short = reparam.declare(Spectral, lambda module, x: reparam.Formula(module.taps.flip(1)[:, None], groups=4))
    assert "its formula gives the shape" in refusal(ready(Net()), short).condition


def test_numbers_that_were_rounded_are_named() -> None:
    single = reparam.declare(box, lambda x, size: reparam.Formula(torch.full((4, 1, 5), 0.2), padding=2, groups=4))
    assert refusal(ready(Boxes()), single).remedy == "give its numbers in float64"


def test_a_formula_may_refuse() -> None:
    def odd(x: Any, size: int) -> Any:
        return boxed(x, size) if size % 2 else reparam.Refusal("declared", "its size is even", "use an odd one")

    found = refusal(ready(Boxes(4)), reparam.declare(box, odd))
    assert (found.condition, found.remedy) == ("its size is even", "use an odd one")


def test_none_leaves_it_to_others() -> None:
    plan = reparam.plan(ready(Boxes()), liftings=(*reparam.LIFTINGS, reparam.declare(box, lambda x, size: None)))
    assert not plan.regions
    assert {refusal.rule for refusal in plan.left} == {"scale"}


def test_unknown_channels_need_an_example() -> None:
    net = ready(nn.Sequential(Boxed(), nn.Identity(), nn.ReLU()))
    declared = reparam.declare(box, boxed)
    assert refusal(net, declared).condition == "the channels of its input are not known"


def test_training_mode_hooks_and_sharing_are_looked_at() -> None:
    def rules(net: nn.Module) -> set[str]:
        return {refusal.rule for refusal in reparam.plan(net, liftings=DECLARED).left if refusal.path == "branch"}

    net = ready(Net())
    net.branch.train()
    assert refusal(net, DECLARED[-2]).condition == "it is in training mode"
    net.branch.eval()
    handle = net.branch.register_forward_hook(lambda *_: None)
    assert rules(net) == {"hooks"}
    handle.remove()
    assert rules(net) == set()


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.add = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), TwoInputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.a(x), self.b(x))


def test_two_inputs_are_no_formula() -> None:
    declared = reparam.declare(TwoInputs, lambda module, x, y: reparam.Formula(torch.eye(4)[..., None]))
    assert refusal(ready(Adds()), declared).condition.startswith("2 of its arguments depend on the input")


def test_a_module_that_does_not_run_on_random_input_is_left_alone() -> None:
    class OneSize(Spectral):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 12:
                raise ValueError("12 samples are needed")
            return super().forward(x)

    declared = reparam.declare(OneSize, spectral)
    net = ready(Net(OneSize))
    assert "12 samples are needed" in refusal(net, declared).condition
    same(net, reparam.fuse(net, liftings=(*reparam.LIFTINGS, declared)), signal())


# --- errors of the user -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (nn.ReLU, "expected a module class of yours, found ReLU"),
        (lambda x: x, "a plain function is read through"),
        ("Blur", "expected a class of modules or an operator, found str"),
        (Spectral(4), "expected a class of modules or an operator, found Spectral"),
    ],
)
def test_what_cannot_be_declared(kind: Any, message: str) -> None:
    with pytest.raises(ReparamError, match=message):
        reparam.declare(kind, boxed)


def test_a_formula_is_a_function() -> None:
    with pytest.raises(ReparamError, match="expected formula to be a function, found Formula"):
        reparam.declare(Spectral, reparam.Formula(torch.eye(3)))  # type: ignore[arg-type]


def test_a_formula_that_fails_says_where() -> None:
    failing = reparam.declare(Spectral, lambda module, x: module.kernel)
    message = r"^expected the formula .* to describe Spectral at branch, found that it raises AttributeError.*kernel"
    with pytest.raises(ReparamError, match=message):
        reparam.plan(ready(Net()), liftings=(*reparam.LIFTINGS, failing))
    other = reparam.declare(Spectral, lambda module, x: module.taps)
    with pytest.raises(ReparamError, match=r"Spectral at branch to return a reparam.Formula.*, found Parameter"):
        reparam.plan(ready(Net()), liftings=(*reparam.LIFTINGS, other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3)}, "expected a weight"),
        ({"weight": torch.ones(3, 1, 3), "groups": 2}, "of 2 groups"),
        ({"weight": torch.ones(3, 1, 3), "bias": torch.ones(2)}, "expected a bias of shape"),
    ],
)
def test_formulas_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ReparamError, match=message):
        reparam.Formula(**arguments)
