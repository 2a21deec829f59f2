"""`reparam.expand`: blocks compute what the convolutions computed, `fuse` undoes them, and they can be trained."""

import copy
import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis.strategies import DrawFn
from nets import difference, images, ready, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.expansion import survey
from reparam.expansion.initial import GAIN
from reparam.nn import ChannelScale, MultiBranch, NormAndPad, Widened
from reparam.nn.geometry import CONVS, Geometry

PRESETS = tuple(reparam.nn.PRESETS)
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, (MultiBranch, Widened))}
    return {path: m for path, m in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def structure(model: nn.Module) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Types of all modules, geometries of convolutions however they are spelt, and the shapes of the state."""
    modules: dict[str, Any] = {}
    for path, module in model.named_modules():
        modules[path] = str(module) if not list(module.children()) else type(module).__name__
        if type(module) in CONVS.values():
            geometry = Geometry.of(module)
            dilation = tuple(d if k > 1 else 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
            mode = geometry.padding_mode if any((*geometry.lo, *geometry.hi)) else "zeros"
            modules[path] = replace(geometry, dilation=dilation, padding_mode=mode)
    return modules, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def round_trip(model: nn.Module, branches: Any, *inputs: Tensor, tolerance: float = 1e-10, **options: Any) -> nn.Module:
    """Expand and fuse: outputs are preserved, and the structure is that of the fused net; returns the expanded net."""
    before = snapshot(model)
    expanded = reparam.expand(model, branches, **options)
    assert difference(before, snapshot(model)) == 0, "the argument was modified"
    assert blocks(expanded)
    fused = reparam.fuse(expanded)
    for x in inputs:
        same(model, expanded, x, tolerance=tolerance)
        same(model, fused, x, tolerance=tolerance)
    assert structure(fused) == structure(reparam.fuse(model))
    return expanded


def plain(kernel: int = 3, channels: int = 6) -> nn.Sequential:
    """A stack as RepVGG is deployed: kxk convolutions and activations."""
    net = nn.Sequential()
    for stride in (1, 2, 1):
        conv = nn.Conv2d(channels, channels, kernel, stride, padding=kernel // 2, bias=False)
        net.extend([conv, nn.BatchNorm2d(channels), nn.ReLU()])
    return net


class UNet(nn.Module):
    """Two levels, a skip by concatenation, a head without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = F.interpolate(self.middle(fine), size=fine.shape[2:], mode="nearest")
        return self.head(self.up(torch.cat([fine, coarse], 1)))


# --- outputs and structure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plain_stack_makes_the_round_trip(preset: str) -> None:
    expanded = round_trip(ready(plain(5)), preset, images((13, 11)), images((12, 16)))
    assert set(blocks(expanded)) == {"0", "3", "6"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_segmentation_net_makes_the_round_trip(preset: str) -> None:
    if preset == "dilated":
        with pytest.raises(reparam.ReparamError, match="dilated"):
            reparam.expand(ready(UNet()), preset)
        return
    expanded = round_trip(ready(UNet()), preset, images((14, 18), channels=3))
    assert set(blocks(expanded)) == {"down.0", "middle.0", "up.0", "head"}


def test_the_branches_of_the_presets() -> None:
    """What the papers put beside a 3x3 (or 7x7) convolution, with norms where they have them."""

    def children(preset: str, conv: nn.Module) -> list[str]:
        made = reparam.nn.block(conv, preset, norm=nn.BatchNorm2d(conv.out_channels))
        return [name for name, _ in made.branches.named_children()] if isinstance(made, MultiBranch) else []

    dense, depthwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    strided, large = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 8, 13, padding=6, groups=8)
    assert children("repvgg", dense) == ["point", "identity"]
    assert children("repvgg", strided) == ["point"]
    assert children("acnet", dense) == ["vertical", "horizontal"]
    assert children("dbb", dense) == ["point", "point_then_kernel", "average"]
    assert children("dbb", depthwise) == ["point_then_kernel", "average"]
    assert children("mobileone(2)", dense) == ["copy", "point", "identity"]
    assert children("dilated", large) == ["dilated_1", "dilated_2", "dilated_3", "dilated_4", "dilated_5"]
    assert children("sesr", dense) == ["identity"]
    assert children("expandnet", dense) == []
    repvgg = reparam.nn.block(dense, "repvgg", norm=nn.BatchNorm2d(8))
    assert type(repvgg.main[1]) is type(repvgg.branches["point"][1]) is type(repvgg.branches["identity"])
    quantizable = reparam.nn.block(dense, "qarepvgg", norm=nn.BatchNorm2d(8))
    assert [type(part) for part in quantizable.branches.values()] == [nn.Conv2d, nn.Identity]
    assert [type(part) for part in quantizable.main] == [nn.Conv2d, nn.BatchNorm2d]


KINDS = ("1x1", "identity", "scale", "kxk", "1xk", "kx1", "avgpool", "1x1-kxk", "dilated(2)", "dilated(1, 3)")


@st.composite
def convolutions(draw: DrawFn) -> tuple[nn.Module, nn.Module | None]:
    """A convolution of any geometry, and perhaps a norm behind it."""
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    into, out = (groups * draw(st.sampled_from([1, 2])) for _ in range(2))
    if draw(st.booleans()):
        out = into
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 4, 5])) for _ in range(axes))
    stride = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(axes))
    dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(axes))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = tuple(draw(st.integers(0, 3)) for _ in range(axes))
    if set(stride) == {1} and draw(st.booleans()):
        padding = "same"
    if axes == 3 and mode == "reflect":
        mode = "zeros"
    bias = draw(st.booleans())
    conv = CONVS[axes](into, out, kernel, stride, padding, dilation, groups, bias, mode)
    norm = NORMS[axes](out, affine=draw(st.booleans())) if draw(st.booleans()) else None
    return conv, norm


REFLECTING: Final = nn.Conv2d(1, 1, 1, (1, 2), padding=(0, 1), bias=False, padding_mode="reflect")


@st.composite
def nets(draw: DrawFn) -> tuple[nn.Sequential, Any]:
    """A net of one convolution between activations, and what to put beside it."""
    conv, norm = draw(convolutions())
    parts = [nn.ReLU(), conv, *([] if norm is None else [norm]), nn.ReLU()]
    if draw(st.booleans()):
        parts = [nn.Sequential(*parts[:2]), *parts[2:]]
    branches = draw(
        st.one_of(st.sampled_from(PRESETS), st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True))
    )
    return nn.Sequential(*parts), branches


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=60)
@given(drawn=nets(), seed=st.integers(0, 999))
@example(drawn=(nn.Sequential(nn.ReLU(), REFLECTING, nn.BatchNorm2d(1, affine=False), nn.ReLU()), "mobileone"), seed=0)
def test_any_geometry_makes_the_round_trip(drawn: tuple[nn.Sequential, Any], seed: int) -> None:
    torch.manual_seed(seed)
    net, branches = drawn
    ready(net, seed)
    conv = next(module for module in net.modules() if type(module) in CONVS.values())
    inputs = [images((n,) * len(conv.kernel_size), channels=conv.in_channels, seed=seed) for n in (12, 15)]
    if not survey(net, branches).chosen:
        with pytest.raises(reparam.ReparamError, match="expected a convolution that"):
            reparam.expand(net, branches)
        return
    round_trip(net, branches, *inputs)


def test_a_mode_of_a_convolution_that_pads_nothing_says_nothing() -> None:
    for preset in ("sesr", "expandnet", "repvgg"):
        net = ready(nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False, padding_mode="reflect"), nn.ReLU()))
        round_trip(net, preset, images())


@pytest.mark.parametrize("seed", range(3))
def test_scales_of_zero_are_preserved(seed: int) -> None:
    """As in residual blocks whose last norm starts at zero."""
    net = ready(plain(), seed)
    for norm in (net[1], net[7]):
        norm.weight.data[::2] = 0
    for branches in ("repvgg", "qarepvgg", [reparam.nn.BRANCHES["identity"].without_norm()]):
        round_trip(net, branches, images())


def test_a_net_of_zeros_is_preserved() -> None:
    """As the last norm of a residual block starts: neither scale nor shift."""
    net = ready(plain())
    for parameter in net[4].parameters():
        parameter.data.zero_()
    for branches in PRESETS:
        if branches != "dilated":
            round_trip(net, branches, images())


def test_convolutions_and_norms_written_as_functions_stay() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other, self.norm = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.other.weight).relu()
            norm = self.norm
            return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    net = ready(Functional())
    expanded = round_trip(net, ["1x1"], images())
    assert set(blocks(expanded)) == {"conv"}
    assert "other" in survey(net, ["1x1"]).left


def test_a_norm_that_others_read_stays_behind_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, self.norm(y).relu()

    expanded = round_trip(ready(Twice()), "repvgg", images())
    assert type(expanded.norm) is nn.BatchNorm2d
    assert not any(isinstance(m, nn.BatchNorm2d) for m in expanded.conv.modules())


def test_a_norm_is_found_by_what_is_called_not_by_where_it_is_registered() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm_of_two = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
            self.two, self.norm_of_one = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, eps=1e-3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm_of_one(self.one(x)).relu()
            return self.norm_of_two(self.two(x)).relu()

    net = ready(Crossed())
    expanded = round_trip(net, ["1x1"], images())
    assert expanded.one.main.norm.eps == 1e-3
    assert expanded.two.main.norm.eps == 1e-5
    assert type(expanded.norm_of_one) is type(expanded.norm_of_two) is nn.Identity


def test_where_chooses_by_path_type_and_predicate() -> None:
    net = ready(plain())
    assert set(blocks(reparam.expand(net, "repvgg", where=("0",)))) == {"0"}
    assert set(blocks(reparam.expand(net, "repvgg", where=("[36]",)))) == {"3", "6"}
    assert set(blocks(reparam.expand(net, "repvgg", where=(nn.Conv2d,)))) == {"0", "3", "6"}
    strided = reparam.expand(net, "repvgg", where=(lambda path, m: getattr(m, "stride", 0) == (2, 2),))
    assert set(blocks(strided)) == {"3"}


def test_in_place_nothing_is_changed_on_an_error() -> None:
    net = ready(plain())
    before = snapshot(net)
    with pytest.raises(reparam.ReparamError, match="number 2, on which it raises"):
        reparam.expand(net, "repvgg", inplace=True, calibrate=[images(), images(channels=2)])
    assert difference(before, snapshot(net)) == 0
    assert reparam.expand(net, "repvgg", inplace=True) is net
    assert blocks(net)


def test_data_types_devices_and_frozen_weights_are_kept() -> None:
    net = ready(plain()).to(torch.bfloat16).requires_grad_(False)
    expanded = reparam.expand(net, "dbb")
    assert {p.dtype for p in expanded.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in expanded.parameters())
    x = images().to(torch.bfloat16)
    assert difference(net(x), expanded(x)) < 0.1
    single = ready(plain()).float()
    assert difference(single(images().float()), reparam.expand(single, "dbb")(images().float())) < 1e-5
    on_meta = reparam.expand(plain().eval().to("meta"), "repvgg")
    assert structure(reparam.fuse(on_meta)) == structure(reparam.fuse(plain().eval()))


def test_expanded_nets_are_copied_pickled_and_expanded_again() -> None:
    net = ready(plain())
    expanded = reparam.expand(net, "dbb")
    same(expanded, copy.deepcopy(expanded), images(), tolerance=0)
    file = io.BytesIO()
    torch.save(expanded, file)
    file.seek(0)
    same(expanded, torch.load(file, weights_only=False), images(), tolerance=0)
    again = reparam.expand(expanded, "acnet", where=("*.main.conv",))
    same(net, again, images())
    assert structure(reparam.fuse(again)) == structure(reparam.fuse(net))


# --- training ---------------------------------------------------------------------------------------------------------


def batch(n: int = 16) -> Tensor:
    return images((12, 12), batch=n, seed=3)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_reach_every_parameter(preset: str) -> None:
    expanded = reparam.expand(ready(plain(5)), preset).train()
    expanded(batch()).square().mean().backward()
    for name, parameter in expanded.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("preset", ["repvgg", "acnet", "mobileone(2)", "qarepvgg"])
def test_calibrated_nets_compute_the_same_in_training_mode(preset: str) -> None:
    """On the data that the statistics are from, where norms with batch statistics do what they do in eval mode."""
    net = ready(plain())
    expanded = reparam.expand(net, preset, calibrate=[batch()])
    same(net, expanded, batch())
    if preset == "qarepvgg":  # its norms of the sums are those of the net
        for norm in (m for path, m in expanded.named_modules() if path in ("1", "4", "7")):
            norm.eval()
        expanded.train()
        for path in ("1", "4", "7"):
            expanded.get_submodule(path).eval()
    else:
        expanded.train()
    same(net, expanded, batch(), tolerance=1e-9)


def test_without_data_the_first_steps_stay_near_a_net_with_statistics_of_its_own() -> None:
    """A net whose norms hold what they meet, in training mode, before and after."""
    torch.manual_seed(0)
    net = ready(plain())
    for norm in (net[1], net[4], net[7]):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        net.train()(batch(64))
    net.eval()
    wanted = net(batch(64))
    expanded = reparam.expand(net, "repvgg").train()
    found = expanded(batch(64))
    error = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 0.1
    spoilt = copy.deepcopy(reparam.expand(net, "repvgg"))
    for norm in (m for m in spoilt.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
    assert (spoilt.eval()(batch(64)) - wanted).abs().max() > 0.1, "the test would not see a norm without statistics"


def test_new_norms_have_a_tenth_of_the_scale() -> None:
    net = ready(plain())
    expanded = reparam.expand(net, "repvgg")
    for name in ("point.norm", "identity"):
        norm = expanded.get_submodule(f"0.branches.{name}")
        assert torch.allclose(norm.weight, GAIN * net[1].weight.abs())


def test_as_the_papers_start() -> None:
    net = ready(plain())
    expanded = reparam.expand(net, "dbb", preserve=False)
    for path, module in expanded.named_modules():
        if isinstance(module, nn.BatchNorm2d) and ".branches." in path:
            assert bool((module.weight == 1).all())
            assert not module.running_mean.any()
    assert torch.equal(expanded[0].main.conv.weight, net[0].weight)
    first = expanded[0].branches["point_then_kernel"].conv.weight
    assert torch.equal(first.flatten(1), torch.eye(6, dtype=first.dtype))
    x = images()
    assert difference(net(x), expanded(x)) > 0.01
    assert structure(reparam.fuse(expanded)) == structure(reparam.fuse(net))


def test_a_norm_and_pad_trains_as_it_evaluates() -> None:
    layer = ready(NormAndPad(nn.BatchNorm2d(6), nn.ZeroPad2d((1, 2, 0, 1))))
    x = images((5, 6))
    wanted = layer(x)
    edge = torch.cat([wanted[..., 0], wanted[..., -1]], -1)
    assert torch.allclose(edge, edge[:, :, :1].expand_as(edge))
    layer.norm.momentum = 0.0
    trained = layer.train()(x)
    layer.norm.eval()
    assert torch.allclose(trained[..., 0], wanted[..., 0])
    inside = layer.norm.train()(x)
    assert torch.allclose(trained[..., :5, 1:7], inside)


def test_a_training_step_is_compiled() -> None:
    torch.manual_seed(0)
    expanded = reparam.expand(ready(plain()), "dbb").train()
    eager = copy.deepcopy(expanded)

    def step(net: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter]) -> float:
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        loss = net(batch()).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    compiled = torch.compile(expanded, backend="aot_eager")
    for _ in range(2):
        assert step(compiled, expanded.parameters()) == pytest.approx(step(eager, eager.parameters()), rel=1e-9)
    same(eager.eval(), expanded.eval(), images(), tolerance=1e-8)


def test_a_trained_block_is_fused() -> None:
    torch.manual_seed(0)
    net = ready(plain(5))
    expanded = reparam.expand(net, "dbb", calibrate=[batch()]).train()
    optimizer = torch.optim.SGD(expanded.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (expanded(batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    fused = reparam.fuse(expanded.eval())
    same(expanded, fused, images())
    assert structure(fused) == structure(reparam.fuse(net))
    assert difference(net(batch()), fused(batch())) > 0.01


# --- errors -----------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu()).relu()


class Sub(nn.Conv2d):
    """A convolution of a class of its own."""


def one(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.ReLU()).eval()


def hooked() -> nn.Module:
    net = one(nn.Conv2d(6, 6, 3))
    net[0].register_forward_hook(lambda *_: None)
    return net


def tied() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)).eval()
    net[2].weight = net[0].weight
    return net


BAD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "unknown branch": (lambda: one(nn.Conv2d(6, 6, 3)), ["1x2"], {}, "'1x1', .*found '1x2'"),
    "unknown preset": (lambda: one(nn.Conv2d(6, 6, 3)), "repvg", {}, "'repvgg', .*found 'repvg'"),
    "no branch": (lambda: one(nn.Conv2d(6, 6, 3)), [], {}, "at least one branch"),
    "a number": (lambda: one(nn.Conv2d(6, 6, 3)), 3, {}, "found int"),
    "too many numbers": (lambda: one(nn.Conv2d(6, 6, 3)), "repvgg(3)", {}, "repvgg takes other numbers"),
    "no kernels": (lambda: one(nn.Conv2d(6, 6, 3)), "mobileone(0)", {}, "at least one kernel, found 0"),
    "unfit": (lambda: one(nn.Conv2d(6, 6, 1)), "acnet", {"where": ("0",)}, "^0: .*more than one tap"),
    "unfit everywhere": (lambda: one(nn.Conv2d(6, 6, 1)), ["avgpool"], {}, "0: average: the kernel has one tap"),
    "dilated average": (
        lambda: one(nn.Conv2d(6, 6, 3, dilation=2)), ["avgpool"], {"where": ("0",)}, "^0: .*an average has no dilation"
    ),
    "identity of another shape": (
        lambda: one(nn.Conv2d(6, 8, 3)), ["identity"], {"where": ("0",)}, "^0: .*differ in shape"
    ),
    "a bias too many": (
        lambda: one(nn.Conv2d(6, 6, 3, bias=False)), [reparam.nn.BRANCHES["1x1"].with_norm()], {}, "would add a bias"
    ),
    "no convolution": (lambda: nn.Sequential(nn.Linear(3, 3)).eval(), "repvgg", {}, "found none among 0"),
    "not a convolution": (lambda: one(nn.Conv2d(6, 6, 3)), "repvgg", {"where": ("1",)}, "^1: .*found ReLU"),
    "no such module": (lambda: one(nn.Conv2d(6, 6, 3)), "repvgg", {"where": ("x.*",)}, "'x.\\*', which names none"),
    "one string": (lambda: one(nn.Conv2d(6, 6, 3)), "repvgg", {"where": "0"}, "expected where .*where=\\('0',\\)"),
    "training mode": (lambda: one(nn.Conv2d(6, 6, 3)).train(), "repvgg", {}, "call model.eval"),
    "not a module": (lambda: "resnet18", "repvgg", {}, "expected an nn.Module, found str"),  # type: ignore[dict-item, return-value]
    "shared": (lambda: Shared().eval(), "repvgg", {"where": ("conv",)}, "^conv: .*called in several places"),
    "subclass": (lambda: one(Sub(6, 6, 3)), "repvgg", {"where": ("0",)}, "^0: .*it is a Sub"),
    "transposed": (lambda: one(nn.ConvTranspose2d(6, 6, 3)), "repvgg", {"where": ("0",)}, "^0: .*ConvTranspose2d"),
    "hooked": (hooked, "repvgg", {"where": ("0",)}, "^0: .*hook"),
    "tied": (tied, "repvgg", {"where": ("2",)}, "^2: .*those of another module"),
    "normed by weight": (
        lambda: one(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3))), "repvgg", {"where": ("0",)}, "plain"
    ),
    "a scale": (
        lambda: one(nn.Conv2d(6, 6, 1, groups=6)), "mobileone", {"where": ("0",)}, "^0: .*one number per channel"
    ),
    "in a row": (
        lambda: nn.Sequential(nn.Conv2d(6, 12, 1), nn.Conv2d(12, 6, 3)).eval(), "repvgg", {"where": ("1",)},
        "^1: .*fuse makes one convolution of it and 0",
    ),
    "calibrate one tensor": (lambda: one(nn.Conv2d(6, 6, 3)), "repvgg", {"calibrate": images()}, "put it into a list"),
    "calibrate nothing": (lambda: one(nn.Conv2d(6, 6, 3)), "repvgg", {"calibrate": []}, "at least one input"),
    "calibrate a new start": (
        lambda: one(nn.Conv2d(6, 6, 3)), "repvgg", {"calibrate": [], "preserve": False}, "without preserve=False"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_that_names_the_module(case: str) -> None:
    build, branches, options, message = BAD[case]
    with pytest.raises(reparam.ReparamError, match=message):
        reparam.expand(build(), branches, **options)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantized_convolutions_are_named() -> None:
    quantized = pytest.importorskip("torch.ao.nn.qat")
    net = one(quantized.Conv2d(6, 6, 3, qconfig=torch.ao.quantization.default_qconfig))
    with pytest.raises(reparam.ReparamError, match=r"^0: .*found the quantized torch\.ao\..*Conv2d"):
        reparam.expand(net, "repvgg")


# --- parts ------------------------------------------------------------------------------------------------------------


def test_blocks_are_used_on_their_own() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    for made in (reparam.nn.block(conv, preset, norm=nn.BatchNorm2d(6)) for preset in PRESETS if preset != "dilated"):
        assert made(torch.randn(4, 6, 8, 8)).shape == (4, 6, 8, 8)
    assert float(ChannelScale(6, 2)(torch.ones(1, 6, 2, 2)).detach().sum()) == pytest.approx(2.4)
    with pytest.raises(reparam.ReparamError, match=r"found .*Linear"):
        reparam.nn.block(nn.Linear(3, 3), "repvgg")  # type: ignore[arg-type]
    with pytest.raises(reparam.ReparamError, match="acnet fits"):
        reparam.nn.block(nn.Conv1d(3, 3, 3), "acnet")
