"""RepVGG, every variant as three codebases write it: one 3x3 convolution per block, and the same numbers."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nets import SIZES, count, difference, images, owned, randomise, ready, same, snapshot
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import reparam
from reparam.algebra import Pending
from reparam.models import RepVGG, RepVGGBlock, repvgg

# --- the same net, written with flat attributes, one running sum and a gate out of a Sequential -----------------------


class PlainBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, groups: int, gated: bool) -> None:
        super().__init__()
        self.norm3, self.norm1 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.norm0 = nn.BatchNorm2d(c_in) if c_in == c_out and stride == 1 else None
        self.conv1 = nn.Conv2d(c_in, c_out, 1, stride, groups=groups, bias=False)
        self.conv3 = nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=False)
        self.gate = None
        if gated:
            squeeze = nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_out, c_out // 16, 1), nn.ReLU()
            self.gate = nn.Sequential(*squeeze, nn.Conv2d(c_out // 16, c_out, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm3(self.conv3(x))
        y += self.norm1(self.conv1(x))
        if self.norm0 is not None:
            y += self.norm0(x)
        if self.gate is not None:
            y = self.gate(y) * y
        return torch.relu_(y)


class PlainNet(nn.Module):
    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], groups: int, gated: bool, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.body = nn.ModuleList()
        c_in = 3
        for depth, width in zip(depths, widths, strict=True):
            for index in range(depth):
                layer = len(self.body)
                grouped = groups if layer % 2 == 0 and 0 < layer < 27 else 1
                self.body.append(PlainBlock(c_in, width, 1 if index else 2, grouped, gated))
                c_in = width
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        return self.fc(x.mean(3).mean(2))


# --- variants ---------------------------------------------------------------------------------------------------------

A, B, D = (1, 2, 4, 14, 1), (1, 4, 6, 16, 1), (1, 8, 14, 24, 1)


@dataclass(frozen=True)
class Variant:
    """Depths, the two width multipliers, groups of every second layer, and whether blocks have squeeze-excite."""

    depths: tuple[int, ...]
    a: float
    b: float
    groups: int = 1
    gated: bool = False

    def widths(self, narrow: int = 1) -> list[int]:
        full = (min(64, 64 * self.a), 64 * self.a, 128 * self.a, 256 * self.a, 512 * self.b)
        return [int(width) // narrow for width in full]

    @property
    def narrow(self) -> int:
        """By how much the net may be narrowed: a gate needs 16 channels."""
        return 4 if self.gated else 8


VARIANTS = {
    "a0": Variant(A, 0.75, 2.5),
    "a1": Variant(A, 1, 2.5),
    "a2": Variant(A, 1.5, 2.75),
    "b0": Variant(B, 1, 2.5),
    "b1": Variant(B, 2, 4),
    "b1g2": Variant(B, 2, 4, groups=2),
    "b1g4": Variant(B, 2, 4, groups=4),
    "b2": Variant(B, 2.5, 5),
    "b2g2": Variant(B, 2.5, 5, groups=2),
    "b2g4": Variant(B, 2.5, 5, groups=4),
    "b3": Variant(B, 3, 5),
    "b3g2": Variant(B, 3, 5, groups=2),
    "b3g4": Variant(B, 3, 5, groups=4),
    "d2se": Variant(D, 2.5, 5, gated=True),
}
DEPTHS = (1, 2, 3)  # of the short nets
KINDS = {"dense": {}, "grouped": {"groups": 4}, "gated": {"gated": True}}
SOURCES = ("ours", "plain", pytest.param("timm", marks=pytest.mark.zoo))


def block_class(source: str) -> type[nn.Module]:
    if source == "timm":
        return pytest.importorskip("timm").models.byobnet.RepVggBlock
    return {"ours": RepVGGBlock, "plain": PlainBlock}[source]


def build(source: str, name: str, narrow: int = 1, num_classes: int = 1000) -> nn.Module:
    """A variant with all its blocks, its widths divided by `narrow`."""
    variant = VARIANTS[name]
    if source == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model(f"repvgg_{name}", width_factor=1 / narrow, num_classes=num_classes)
    if source == "ours" and narrow == 1:
        return getattr(repvgg, f"repvgg_{name}")(num_classes=num_classes)
    if source == "ours":
        groups = dict.fromkeys(range(2, 27, 2), variant.groups)
        return RepVGG(
            variant.depths,
            variant.widths(narrow),
            groups_of_layer=groups if variant.groups > 1 else {},
            squeeze_excite=variant.gated,
            num_classes=num_classes,
        )
    return PlainNet(variant.depths, variant.widths(narrow), variant.groups, variant.gated, num_classes)


def short(source: str, kind: str) -> nn.Module:
    """Six blocks, dense, grouped or gated."""
    groups, gated = KINDS[kind].get("groups", 1), KINDS[kind].get("gated", False)
    widths = (16, 32, 48)
    if source == "ours":
        layers = dict.fromkeys((2, 4), groups)
        return RepVGG(DEPTHS, widths, (2, 2, 2), layers, squeeze_excite=gated, num_classes=20)
    if source == "plain":
        return PlainNet(DEPTHS, widths, groups, gated, 20)
    timm = pytest.importorskip("timm")
    stages = tuple(
        timm.models.byobnet.ByoBlockCfg("rep", depth, width, 2, gs=lambda c, index: c // groups if index % 2 else 0)
        for depth, width in zip(DEPTHS[1:], widths[1:], strict=True)
    )
    name = "repvgg_d2se" if gated else "repvgg_a0"
    return timm.create_model(name, blocks=stages, stem_chs=widths[0], num_classes=20)


def every(source: str, names: Iterable[str] = VARIANTS) -> list[Any]:
    """A source with each variant that it has: timm has none of two groups."""
    if source != "timm":
        return [(source, name) for name in names]
    return [pytest.param(source, name, marks=pytest.mark.zoo) for name in names if not name.endswith("g2")]


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def blocks(net: nn.Module, source: str) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, block_class(source))]


def spatial(block: nn.Module) -> list[nn.Conv2d]:
    """Its 3x3 convolutions."""
    return [module for module in block.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]


def geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.in_channels, conv.out_channels, conv.stride, conv.padding, conv.dilation, conv.groups


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def assert_one_convolution_per_block(net: nn.Module, fused: nn.Module, source: str, gated: bool, x: Tensor) -> None:
    """Structure of the modules and of one run; the two 1x1 convolutions of a gate are no part of it."""
    assert type(fused) is type(net)
    before, after = blocks(net, source), blocks(fused, source)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert isinstance(new, type(old))
        assert len(spatial(new)) == 1
        assert geometry(spatial(new)[0]) == geometry(spatial(old)[0])
        assert spatial(new)[0].bias is not None
        assert sum(isinstance(module, _ConvNd) for module in new.modules()) == (3 if gated else 1)
    total = len(after) * (3 if gated else 1)
    found = count(fused, x)
    expected = {"conv": total, "convs": total, "norm": 0, "norms": 0, "add": 0, "linear": 1, "linears": 1}
    assert {key: found[key] for key in expected} == expected


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "name"), [*every("ours"), *every("plain"), *every("timm")])
def test_a_variant_becomes_one_convolution_per_block(source: str, name: str) -> None:
    """At full width, on the meta device."""
    net = on_meta(lambda: build(source, name))
    fused = reparam.fuse(net)
    assert len(blocks(net, source)) == sum(VARIANTS[name].depths)
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert_one_convolution_per_block(net, fused, source, VARIANTS[name].gated, x)
    assert all(tensor.is_meta for tensor in fused.state_dict().values())
    assert fused(x).shape == (1, 1000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_meta_device_gives_the_keys_and_shapes_of_the_cpu(source: str, kind: str) -> None:
    expected = shapes(reparam.fuse(ready(short(source, kind))))
    assert shapes(reparam.fuse(on_meta(lambda: short(source, kind)))) == expected
    assert not any("norm" in key.lower() or "bn" in key.split(".") for key in expected)


def test_a_whole_variant_has_the_same_keys_on_the_cpu() -> None:
    on_cpu = reparam.fuse(build("ours", "a0").eval())
    assert shapes(on_cpu) == shapes(reparam.fuse(on_meta(lambda: build("ours", "a0"))))
    assert not any(tensor.is_meta for tensor in on_cpu.state_dict().values())


# --- numbers ----------------------------------------------------------------------------------------------------------


def assert_same_numbers(net: nn.Module, fused: nn.Module, source: str, size: Sequence[int]) -> None:
    """Every block on the input that it has in the net, to 1e-12, and the whole net, to 1e-10."""
    x = images(size, channels=3)
    seen: list[Tensor] = []
    before, after = blocks(net, source), blocks(fused, source)
    handles = [block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())) for block in before]
    same(net, fused, x, tolerance=1e-10)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(before)
    for index, (old, new, value) in enumerate(zip(before, after, seen, strict=True)):
        with torch.no_grad():
            error = difference(old(value.clone()), new(value.clone()))
        assert error < 1e-12, f"block {index}: {error:.1e}"


@pytest.mark.parametrize(
    ("source", "name"), [*every("ours"), *every("plain", ("a0", "b1g4")), *every("timm", ("a0", "b1g4"))]
)
def test_a_narrow_variant_computes_the_same(source: str, name: str) -> None:
    """All blocks of the variant, fewer channels, wide statistics."""
    variant = VARIANTS[name]
    net = ready(build(source, name, variant.narrow, num_classes=10))
    fused = reparam.fuse(net)
    assert_one_convolution_per_block(net, fused, source, variant.gated, images((33, 40), channels=3, batch=1))
    assert_same_numbers(net, fused, source, (33, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_short_net_computes_the_same_at_every_size(source: str, kind: str) -> None:
    net = ready(short(source, kind))
    fused = reparam.fuse(net)
    for size in (*SIZES, (1, 1), (8, 8), (2, 17)):
        assert_same_numbers(net, fused, source, size)


@torch.no_grad()
def widen(net: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics over many magnitudes: means N(0, 10), standard deviations from 1e-3 to 1e2."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            draw = torch.rand(module.running_var.shape, generator=generator, dtype=torch.float64)
            module.running_var.copy_(10 ** (10 * draw - 6))
            module.running_mean.copy_(10 * torch.randn(draw.shape, generator=generator, dtype=torch.float64))
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_statistics_of_many_magnitudes(source: str, kind: str) -> None:
    net = widen(ready(short(source, kind)))
    fused = reparam.fuse(net)
    assert owned(fused)["norms"] == 0
    assert_same_numbers(net, fused, source, (20, 23))


def errors(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest and root mean square error, absolute."""
    error = found.double() - expected
    return float(error.abs().max()), float(error.square().mean().sqrt())


@pytest.mark.zoo
@pytest.mark.parametrize("kind", ["a0", *KINDS])
def test_float32_is_no_worse_than_timms_own(kind: str) -> None:
    """Three errors against the net in float64, ours over timm's, largest and rms, median of five seeds.

    Of the rounded weights alone, which timm rounds at every step and we round once; of all blocks in float32 on the
    same input; of the logits. In the last two the rounding of the sums, alike in both nets, is as large as that of the
    weights, and one value decides the largest error: hence its slack.
    """
    reparameterize = pytest.importorskip("timm.utils.model").reparameterize_model
    ratios: dict[str, list[tuple[float, float]]] = {"weights": [], "blocks": [], "logits": []}
    for seed in range(5):
        net = randomise(build("timm", "a0", 8, num_classes=20) if kind == "a0" else short("timm", kind), seed).eval()
        exact, fused, theirs = copy.deepcopy(net).double(), reparam.fuse(net), reparameterize(net)
        x = images((32, 32), channels=3, batch=48, seed=seed).float()
        pairs: dict[str, list[list[tuple[float, float]]]] = {key: [] for key in ratios}
        with torch.no_grad():
            logits, value = exact(x.double()), x
            pairs["logits"].append([errors(logits, other(x)) for other in (fused, theirs)])
            for block, *others in zip(*(blocks(other, "timm") for other in (exact, fused, theirs)), strict=True):
                wanted = block(value.double())
                scale = 1 / wanted.square().mean().sqrt()
                pairs["blocks"].append([errors(wanted * scale, other(value) * scale) for other in others])
                value = (wanted * scale).float()
            pairs["weights"].append([errors(logits, other.double()(x.double())) for other in (fused, theirs)])
        for key, found in pairs.items():
            largest = [max(error for error, _ in column) for column in zip(*found, strict=True)]
            rms = [math.hypot(*(error for _, error in column)) for column in zip(*found, strict=True)]
            ratios[key].append((largest[0] / largest[1], rms[0] / rms[1]))
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in ratios.items()}
    assert max(medians["weights"]) < 0.8, medians
    assert max(medians["blocks"][1], medians["logits"][1]) <= 1.0, medians
    assert max(medians["blocks"][0], medians["logits"][0]) <= 1.25, medians


# --- use --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_deploy_checkpoint_loads_into_a_fresh_fused_net(source: str, kind: str) -> None:
    fused = reparam.fuse(ready(short(source, kind)))
    fresh = reparam.fuse(short(source, kind).double().eval())
    x = images((20, 23), channels=3)
    assert difference(fused(x), fresh(x)) > 1e-3
    assert fresh.load_state_dict(fused.state_dict(), strict=True).missing_keys == []
    assert torch.equal(fused(x), fresh(x))


def assert_untouched(net: nn.Module, before: dict[str, Any], modules: list[Any], memory: dict[str, int]) -> None:
    assert [(name, id(module)) for name, module in net.named_modules()] == modules
    assert difference(before, snapshot(net)) == 0
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == memory
    assert not any("_forward_hooks" in vars(m) and m._forward_hooks for m in net.modules())


def state(net: nn.Module) -> tuple[dict[str, Any], list[Any], dict[str, int]]:
    modules = [(name, id(module)) for name, module in net.named_modules()]
    return snapshot(net), modules, {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("inplace", [False, True])
def test_training_mode_is_refused_with_the_remedy(source: str, inplace: bool) -> None:
    net = short(source, "dense").train()
    before = state(net)
    name = type(net).__name__
    with pytest.raises(reparam.TrainingModeError, match=rf"found {name} in training mode.*call model\.eval\(\) first"):
        reparam.fuse(net, inplace=inplace)
    assert_untouched(net, *before)


class Sealed(RepVGGBlock):
    """A block that can be read, and refuses to be changed."""

    sealed = False

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self).sealed and name != "training":
            raise RuntimeError(f"{name} cannot be set")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if type(self).sealed:
            raise RuntimeError(f"{name} cannot be deleted")
        super().__delattr__(name)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_block_that_cannot_be_changed_leaves_the_net_bit_for_bit(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Whether fuse fails or works around it, the net is the old one or an equal one, never half of each."""
    net = ready(short("ours", "dense"))
    path = [name for name, module in net.named_modules() if isinstance(module, RepVGGBlock)][place]
    net.get_submodule(path).__class__ = Sealed
    x = images((20, 23), channels=3)
    logits, before = net(x), state(net)
    monkeypatch.setattr(Sealed, "sealed", True)
    try:
        reparam.fuse(net, inplace=True)
    except (RuntimeError, reparam.ReparamError):
        assert_untouched(net, *before)
        assert torch.equal(net(x), logits)
    else:
        assert difference(logits, net(x)) < 1e-10


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("calls", [0, 1, 7, 40])
def test_a_policy_that_raises_leaves_the_net_bit_for_bit(source: str, calls: int) -> None:
    net = ready(short(source, "dense"))
    before, asked = state(net), 0

    def policy(work: reparam.Work) -> float:
        nonlocal asked
        asked += 1
        if asked > calls:
            raise KeyError("no such device")
        return work.macs + work.traffic

    with pytest.raises(KeyError, match="no such device"):
        reparam.fuse(net, inplace=True, cost=policy)
    assert asked == calls + 1
    assert_untouched(net, *before)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("built", [0, 1, 5])
def test_memory_that_runs_out_leaves_the_net_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, source: str, built: int
) -> None:
    """The weight of some block cannot be computed any more."""
    net = ready(short(source, "dense"))
    x = images((20, 23), channels=3)
    logits, before, original, made = net(x), state(net), Pending.compute, 0

    def compute(self: Pending, *arguments: Any) -> Tensor:
        nonlocal made
        made += 1
        if made > built:
            raise MemoryError("no memory left")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "compute", compute)
        with pytest.raises((MemoryError, reparam.ReparamError), match="no memory left"):
            reparam.fuse(net, inplace=True, check=False)
    assert made == built + 1
    assert_untouched(net, *before)
    assert torch.equal(net(x), logits)
    reparam.fuse(net, inplace=True)
    assert owned(net)["norms"] == 0
    assert difference(logits, net(x)) < 1e-10
