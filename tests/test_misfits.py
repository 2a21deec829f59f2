"""What `expand` and `restore` cannot work with is an error that names the place, what was found, and what to do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import difference, images, ready, same, snapshot
from torch import nn

import reparam
from reparam.expansion import survey
from reparam.nn import Branch, Geometry, MultiBranch, UnfitError


def stack() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
    )


def branched() -> nn.Module:
    return reparam.expand(stack().eval(), "repvgg", preserve=False)


# --- branches of the user's -------------------------------------------------------------------------------------------


def conv(geometry: Geometry, *arguments: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(geometry.in_channels, geometry.out_channels, *arguments, **options)


class Choosing(nn.Module):
    """Looks at the data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


class Activated(Choosing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu()


def constant(geometry: Geometry, _: Any) -> nn.Module:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(geometry.out_channels, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value

    return Constant()


OWN: dict[str, tuple[Callable[[Geometry, Any], Any], str]] = {
    "raises": (
        lambda g, norm: 1 / 0,
        r"a module for Geometry\(.*raises ZeroDivisionError: division by zero; raise reparam.nn.UnfitError in it where",
    ),
    "returns nothing": (lambda g, norm: None, "expected its function to return a module, found NoneType"),
    "not linear": (
        lambda g, norm: nn.Sequential(conv(g, 1), nn.ReLU()),
        "expected an affine map of its input, found one that is not: its part 1; let its function raise",
    ),
    "another stride": (
        lambda g, norm: conv(g, 1, stride=2), r"can be summed .*strides differ: \(1, 1\) and \(2, 2\).*UnfitError"
    ),
    "another length": (lambda g, norm: conv(g, 3), "can be summed with the convolution, found another one"),
    "more taps": (lambda g, norm: conv(g, 5, padding=2), "some of the 9 of the convolution, found a sum of 25"),
    "taps in between": (
        lambda g, norm: conv(g, (3, 1), padding=(2, 0), dilation=(2, 1)), "some of the 9 .* found a sum of 15"
    ),
    "no input": (constant, "expected one forward that can be read and uses its input"),
    "not readable": (
        lambda g, norm: Choosing(conv(g, 1)),
        "expected one forward that can be read and uses its input, found another module",
    ),
    "not linear inside": (
        lambda g, norm: Activated(conv(g, 1)), "expected an affine map of its input, found one that is not: its part"
    ),
}  # fmt: skip


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("case", OWN)
def test_branches_that_do_not_fit_are_named(case: str, preserve: bool) -> None:
    make, message = OWN[case]
    net = stack().eval()
    before = snapshot(net)
    for _ in range(2):
        with pytest.raises(reparam.ReparamError, match=f"^3: branch mine: .*{message}"):
            reparam.expand(net, [Branch("mine", make)], where=("3",), preserve=preserve, inplace=True)
    assert difference(before, snapshot(net)) == 0


def test_a_branch_may_say_that_it_does_not_fit() -> None:
    def square(geometry: Geometry, norm: Any) -> nn.Module:
        if geometry.in_channels != geometry.out_channels:
            raise UnfitError("only for as many outputs as inputs")
        return conv(geometry, 1, bias=False)

    net = ready(stack())
    found = survey(net, [Branch("square", square)])
    assert (found.chosen, found.left) == ({"3": ("square",)}, {"0": "square: only for as many outputs as inputs"})
    same(net, reparam.expand(net, [Branch("square", square)]), images(channels=3))


def test_a_branch_with_a_norm_fits() -> None:
    """Its function makes it in training mode, in which a norm is not affine."""

    def normed(geometry: Geometry, norm: Any) -> nn.Module:
        return nn.Sequential(conv(geometry, 1, bias=False), norm(geometry.out_channels))

    net = ready(stack())
    for preserve in (True, False):
        expanded = reparam.expand(net, [Branch("normed", normed)], preserve=preserve)
        assert type(expanded[3].branches["normed"][1]) is nn.BatchNorm2d
    same(net, reparam.expand(net, [Branch("normed", normed)]), images(channels=3))


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_names_that_no_module_can_have(name: str) -> None:
    with pytest.raises(reparam.ReparamError, match=f"of a branch that a module can have, found {name!r}: take one"):
        Branch(name, lambda g, norm: nn.Identity())


# --- numbers ----------------------------------------------------------------------------------------------------------


def spoilt(key: str, value: float) -> nn.Module:
    net = ready(stack())
    net.state_dict()[key].view(-1)[0] = value
    return net


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("3.weight", float("nan"), "^3: expected finite numbers, found NaN or infinity in its weight: load other"),
        ("4.running_var", float("inf"), "^the batch norm behind 3: .* infinity in its running_var"),
        ("4.weight", float("nan"), "^the batch norm behind 3: .* infinity in its weight"),
        ("4.running_var", -1.0, "^the batch norm behind 3: expected variances of at least 0, found -1"),
    ],
)
def test_weights_that_cannot_be_preserved_are_named(key: str, value: float, message: str) -> None:
    net = spoilt(key, value)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(reparam.ReparamError, match=message):
        reparam.expand(net, "repvgg", inplace=True)
    assert all(torch.equal(now.nan_to_num(), before[name].nan_to_num()) for name, now in net.state_dict().items())
    assert isinstance(reparam.expand(net, "repvgg", preserve=False)[3], MultiBranch)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_a_norm_left_in_training_mode_stays_behind_the_sum() -> None:
    net = ready(stack())
    net[4].train()
    x = images(channels=3)
    wanted = copy.deepcopy(net)(x)
    expanded = reparam.expand(net, "repvgg")
    assert expanded[4].training
    assert type(expanded[4]) is nn.BatchNorm2d
    assert not any(isinstance(module, nn.BatchNorm2d) for module in expanded[3].modules())
    assert difference(wanted, expanded(x)) < 1e-10


def test_the_mode_of_nets_given_to_restore_does_not_matter() -> None:
    torch.manual_seed(0)
    fused = reparam.fuse(ready(branched()))
    restored = reparam.restore(copy.deepcopy(fused).train(), lambda: branched().train())
    assert not any(module.training for module in restored.modules())
    same(fused, restored, images(channels=3))


# --- what cannot be restored ------------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    return dict(reparam.fuse(branched()).state_dict())


RESTORED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "not fused": (branched, branched, "missing: 0.weight, .*not known: 0.main.conv.weight"),
    "a path": (lambda: "net.pth", branched, r"^expected a net that reparam.fuse made, or its .*, found str"),
    "nested": (lambda: {"model": state()}, branched, "^model: expected a tensor, found dict: pass a state_dict"),
    "arrays": (lambda: {k: v.numpy() for k, v in state().items()}, branched, "^0.weight: expected a tensor, .*ndarray"),
    "meta": (lambda: {k: v.to("meta") for k, v in state().items()}, branched, "^0.weight: .*found a meta tensor"),
    "integers": (
        lambda: {k: v.char() for k, v in state().items()}, branched, "not in floating point: 0.weight, 0.bias, 3.weight"
    ),
    "not finite": (
        lambda: {k: v / 0 for k, v in state().items()}, branched,
        r"^[03]\.\w+: expected finite numbers, found NaN or infinity: load other weights",
    ),
    "no module": (state, lambda: None, "^expected build to return an nn.Module, found NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESTORED)
def test_what_cannot_be_restored_is_explained(case: str) -> None:
    fused, build, message = RESTORED[case]
    with pytest.raises(reparam.ReparamError, match=message):
        reparam.restore(fused(), build)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantized_nets_are_named() -> None:
    quantized = pytest.importorskip("torch.ao.nn.qat")
    config = torch.ao.quantization.default_qconfig
    fused = nn.Sequential(nn.Sequential(quantized.Conv2d(6, 6, 3, qconfig=config)))
    message = r"^0\.0: expected a fused net in floating point, found the quantized torch\.ao\..*Conv2d: restore before"
    with pytest.raises(reparam.ReparamError, match=message):
        reparam.restore(fused, lambda: nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 3))))


def test_buffers_that_are_not_fused_may_be_infinite() -> None:
    """As masks of attention are."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.register_buffer("mask", torch.full((6, 1, 1), float("-inf")))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.maximum(self.norm(self.conv(x)), self.mask)

    fused = reparam.fuse(ready(Masked()))
    same(fused, reparam.restore(fused, Masked), images(channels=3))
