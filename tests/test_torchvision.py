"""Nets of torchvision and timm: no batch norm left, and every way into the net still there and right."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nets import count, difference, images, ready, same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import reparam

pytestmark = pytest.mark.zoo
models = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")

SIZE, ODD = (64, 72), (33, 47)
X = images(SIZE, channels=3, batch=1)


def vgg16_bn() -> nn.Module:
    """With one small linear layer in the place of its three large ones."""
    with torch.device("meta"):
        model = models.vgg16_bn()
        model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 10))
    return model.to_empty(device="cpu")


@dataclass(frozen=True)
class Zoo:
    """A net and what is known of it.

    Args:
        build: builds it.
        adds: additions of a run, which are the residual ones.
        parts: modules that a user takes out by name or index.
        nodes: values that torchvision's feature extraction gives by name.
    """

    build: Callable[[], nn.Module]
    adds: int
    parts: tuple[str, ...]
    nodes: tuple[str, ...]


def stages(*depths: int) -> tuple[str, ...]:
    return tuple(f"layer{i + 1}.{j}" for i, depth in enumerate(depths) for j in range(depth))


def several(name: str, number: int) -> tuple[str, ...]:
    return tuple(f"{name}.{index}" for index in range(number))


ZOO = {
    "resnet18": Zoo(
        lambda: models.resnet18(num_classes=10),
        8,
        ("layer1", *stages(2, 2, 2, 2)),
        ("relu", "layer1", "layer2.0.relu", "layer3.1", "flatten"),
    ),
    "resnet50": Zoo(
        lambda: models.resnet50(num_classes=10),
        16,
        ("layer3", *stages(3, 4, 6, 3)),
        ("layer1.0.relu_1", "layer2", "layer4.2.relu_2"),
    ),
    "resnext50": Zoo(
        lambda: models.resnext50_32x4d(num_classes=10), 16, ("layer4", *stages(3, 4, 6, 3)), ("layer1.0.relu", "layer4")
    ),
    "mobilenet_v2": Zoo(
        lambda: models.mobilenet_v2(num_classes=10),
        10,
        ("features", *several("features", 19)),
        ("features.0", "features.3.conv.1", "features.18"),
    ),
    "efficientnet_b0": Zoo(
        lambda: models.efficientnet_b0(num_classes=10),
        9,
        ("features.6.1", *several("features", 9)),
        ("features.2.0.block.0", "features.4", "avgpool"),
    ),
    "regnet_y_400mf": Zoo(
        lambda: models.regnet_y_400mf(num_classes=10),
        16,
        ("stem", *(f"trunk_output.block{i}" for i in range(1, 5))),
        ("stem", "trunk_output.block2"),
    ),
    "regnet_x_400mf": Zoo(
        lambda: models.regnet_x_400mf(num_classes=10),
        22,
        ("trunk_output", *(f"trunk_output.block{i}" for i in range(1, 5))),
        ("trunk_output.block3", "avgpool"),
    ),
    "vgg16_bn": Zoo(vgg16_bn, 0, ("features", "classifier"), ("features.2", "features.23", "classifier")),
    "timm_resnet18": Zoo(
        lambda: timm.create_model("resnet18", num_classes=10),
        8,
        stages(2, 2, 2, 2),
        ("layer2.1.act2", "layer4", "global_pool"),
    ),
    "timm_efficientnet_b0": Zoo(
        lambda: timm.create_model("efficientnet_b0", num_classes=10),
        9,
        several("blocks", 7),
        ("blocks.2", "global_pool"),
    ),
}
TIMM = [name for name in ZOO if name.startswith("timm")]


@dataclass(frozen=True)
class Pair:
    """A net, what `fuse` made of it, and what is known of it."""

    name: str
    model: nn.Module
    fused: nn.Module
    zoo: Zoo


@pytest.fixture(scope="module", params=ZOO)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Shared by the tests that do not change it."""
    zoo = ZOO[request.param]
    model = ready(zoo.build())
    return Pair(request.param, model, reparam.fuse(model), zoo)


on_timm = pytest.mark.parametrize("pair", TIMM, indirect=True)


# --- structure and numbers --------------------------------------------------------------------------------------------


def test_no_batch_norm_is_left_and_the_class_is_kept(pair: Pair) -> None:
    assert type(pair.fused) is type(pair.model)
    assert not any(isinstance(module, _BatchNorm) for module in pair.fused.modules())
    before, after = count(pair.model, X), count(pair.fused, X)
    assert before["norm"] > 0
    wanted = {"conv": before["conv"], "convs": before["convs"], "norm": 0, "norms": 0, "add": pair.zoo.adds}
    assert {key: after[key] for key in wanted} == wanted
    assert after["calls"] == before["calls"] - before["norm"]


def test_the_net_computes_the_same(pair: Pair) -> None:
    for size in (SIZE, ODD):
        same(pair.model, pair.fused, images(size, channels=3, batch=2), tolerance=1e-10)


def test_every_convolution_keeps_its_name_and_geometry(pair: Pair) -> None:
    convs = {name: module for name, module in pair.fused.named_modules() if isinstance(module, _ConvNd)}
    for name, module in pair.model.named_modules():
        if isinstance(module, _ConvNd):
            new = convs.pop(name)
            assert type(new) is type(module)
            for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
                assert getattr(new, key) == getattr(module, key), f"{name}.{key}"
    assert not convs
    assert len(pair.fused.state_dict()) < len(pair.model.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50", "regnet_y_400mf", "vgg16_bn", "timm_resnet18"])
def test_the_plan_leaves_nothing_and_lists_one_region_per_norm(name: str) -> None:
    model = ZOO[name].build().eval()
    plan = reparam.plan(model)
    gates = sum("SqueezeExcitation" in type(module).__name__ for module in model.modules())
    assert [refusal.rule for refusal in plan.left] == ["scale"] * gates, "products of two values are all that is left"
    assert plan.near_misses == ()
    assert len(plan.regions) == sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "timm_efficientnet_b0"])
def test_the_plan_lists_only_what_could_have_been_merged(name: str) -> None:
    """Linear bottlenecks next to convolutions, which are dearer in one; not identities and dropouts."""
    left = reparam.plan(ZOO[name].build().eval()).left
    assert left
    assert {refusal.rule for refusal in left} <= {"cost", "used_elsewhere", "scale"}
    assert {refusal.condition for refusal in left if refusal.rule == "scale"} <= {"both factors depend on the input"}
    assert [str(refusal) for refusal in left if "costs 1.00 times" in refusal.condition] == []
    assert [str(refusal) for refusal in left if {"Identity", "Dropout"} & set(refusal.operands)] == []


# --- what a user reads of a net ---------------------------------------------------------------------------------------


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def methods(module: nn.Module) -> Iterator[str]:
    for name in public(dir(type(module))):
        if callable(inspect.getattr_static(type(module), name)):
            yield name


def test_methods_and_attributes_exist(pair: Pair) -> None:
    """Of every module but norms, which are gone, and what stands in them."""
    norms: list[str] = []
    for name, old in pair.model.named_modules():
        if isinstance(old, _BatchNorm):
            norms.append(f"{name}.")
            assert isinstance(pair.fused.get_submodule(name), nn.Module)
        if f"{name}.".startswith(tuple(norms)):
            continue
        new = pair.fused.get_submodule(name)
        assert isinstance(new, type(old)), name
        assert [n for n in methods(old) if not callable(getattr(new, n, None))] == []
        assert public(vars(old)) <= public(vars(new))
        assert [n for n, _ in old.named_children()] == [n for n, _ in new.named_children()]
        for key, value in vars(old).items():
            if isinstance(value, (bool, int, float, str, tuple)) and key != "training":
                assert vars(new)[key] == value, f"{name}.{key}"
        assert new.training is False


def test_parts_taken_out_by_name_and_index_compute_the_same(pair: Pair) -> None:
    """Each part on the input that it has in the net."""
    inputs: dict[str, Tensor] = {}
    handles = [
        pair.model.get_submodule(part).register_forward_pre_hook(
            lambda _, arguments, part=part: inputs.setdefault(part, arguments[0].clone())
        )
        for part in pair.zoo.parts
    ]
    with torch.no_grad():
        pair.model(X)
    for handle in handles:
        handle.remove()
    assert inputs.keys() == set(pair.zoo.parts)
    for part, value in inputs.items():
        same(pair.model.get_submodule(part), pair.fused.get_submodule(part), value, tolerance=1e-12)


@pytest.mark.parametrize("pair", ["mobilenet_v2", "efficientnet_b0", "vgg16_bn"], indirect=True)
@torch.no_grad()
def test_features_are_indexed_and_sliced(pair: Pair) -> None:
    """Wherever no norm follows: it would be part of the convolution before it now."""
    old, new = pair.model.features, pair.fused.features
    assert len(old) == len(new)
    norms = [index for index, module in enumerate(old) if isinstance(module, _BatchNorm)]
    assert all(type(new[index]) is nn.Identity for index in norms)
    ends = [index for index in range(len(old)) if index not in norms and index + 1 not in norms]
    assert len(ends) == {"mobilenet_v2": 19, "efficientnet_b0": 9, "vgg16_bn": 18}[pair.name]
    x = images(ODD, channels=3, batch=1)
    value = x
    for index, module in enumerate(old):
        if index in ends:
            assert type(new[index]) is type(module)
            same(module, new[index], value, tolerance=1e-12)
        value = module(value)
        if index in ends and index % 5 == 3:
            same(old[: index + 1], new[: index + 1], x, tolerance=1e-10)


# --- other entries than forward ---------------------------------------------------------------------------------------


@on_timm
@torch.no_grad()
def test_forward_features_and_head(pair: Pair) -> None:
    model, fused = pair.model, pair.fused
    same(model.forward_features, fused.forward_features, X)
    features = model.forward_features(X)
    same(model.forward_head, fused.forward_head, features, tolerance=1e-12)
    same(model.forward_head, fused.forward_head, features, tolerance=1e-12, pre_logits=True)
    assert difference(fused(X), fused.forward_head(fused.forward_features(X))) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, 2, 4], "norm": True},
        {"indices": [1], "intermediates_only": True, "stop_early": True},
    ],
    ids=str,
)
@on_timm
def test_forward_intermediates(pair: Pair, options: dict[str, Any]) -> None:
    same(pair.model.forward_intermediates, pair.fused.forward_intermediates, X, **options)


@on_timm
def test_the_classifier_is_read_and_replaced(pair: Pair) -> None:
    model, fused = copy.deepcopy((pair.model, pair.fused))
    assert torch.equal(model.get_classifier().weight, fused.get_classifier().weight)
    for net in (model, fused):
        net.reset_classifier(7)
        ready(net.get_classifier())
    with torch.no_grad():
        assert fused(X).shape == (1, 7)
    same(model, fused, X)
    for net in (model, fused):
        net.reset_classifier(0)
    with torch.no_grad():
        assert fused(X).shape == (1, fused.num_features)
    same(model, fused, X)


@on_timm
def test_layers_are_pruned_alike(pair: Pair) -> None:
    model, fused = copy.deepcopy((pair.model, pair.fused))
    assert model.prune_intermediate_layers([1, 2]) == fused.prune_intermediate_layers([1, 2])
    assert [name for name, _ in model.named_children()] == [name for name, _ in fused.named_children()]
    same(model.forward_intermediates, fused.forward_intermediates, X, indices=[1, 2], intermediates_only=True)


def test_a_timm_net_that_gives_features_only() -> None:
    model = ready(timm.create_model("mobilenetv2_050", features_only=True))
    fused = reparam.fuse(model)
    assert type(fused) is type(model)
    assert fused.feature_info.channels() == model.feature_info.channels()
    assert count(fused, X)["norm"] == 0
    same(model, fused, X)


@pytest.mark.filterwarnings("ignore:.*nodes obtained by tracing the model in:UserWarning")
def test_features_are_extracted_by_torchvision(pair: Pair) -> None:
    """By the names of the nodes of its own trace, which must be the same before and after."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    before, after = (
        extraction.create_feature_extractor(net, return_nodes=list(pair.zoo.nodes), suppress_diff_warning=True).eval()
        for net in (pair.model, pair.fused)
    )
    same(before, after, X)
    assert count(after, X)["norm"] == 0


@pytest.mark.parametrize("pair", ["resnet18", "resnext50"], indirect=True)
def test_a_detection_backbone_takes_the_net(pair: Pair) -> None:
    utils = pytest.importorskip("torchvision.models.detection.backbone_utils")
    widest = pair.model.fc.in_features
    layers = {f"layer{i}": str(i) for i in range(1, 5)}
    nets = [
        utils.BackboneWithFPN(copy.deepcopy(net), layers, [widest // 8, widest // 4, widest // 2, widest], 16)
        for net in (pair.model, pair.fused)
    ]
    for net in nets:
        ready(net.fpn)
    same(*nets, X)
