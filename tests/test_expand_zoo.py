"""Expand and fuse nets of other libraries: outputs are preserved, the round trip has the structure of the fused net."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import difference, images, ready, same
from package_detectors import Detector
from torch import nn

import reparam
from reparam.expansion import survey
from reparam.nn import MultiBranch, Widened

pytestmark = [pytest.mark.zoo, pytest.mark.slow]


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(num_classes=10)


def timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=10)


def unet() -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    return library.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 32, 32, 16, 16))


def rtdetr() -> nn.Module:
    library = pytest.importorskip("transformers")
    backbone = library.RTDetrResNetConfig(depths=[1, 1, 1, 1], layer_type="basic", hidden_sizes=[16, 32, 64, 64],
                                          embedding_size=16, out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    config = library.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[32, 64, 64], encoder_hidden_dim=32, d_model=32,
        feat_strides=[8, 16, 32], encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_layers=1, num_queries=20,
        decoder_in_channels=[32, 32, 32], num_labels=5, decoder_attention_heads=4, encoder_attention_heads=4,
    )  # fmt: skip
    return Detector(library.RTDetrForObjectDetection(config))


def small_repvgg() -> nn.Module:
    return reparam.models.RepVGG(depths=(1, 2, 2), widths=(8, 16, 16), strides=(2, 2, 2), num_classes=10)


def deployed_repvgg() -> nn.Module:
    """3x3 convolutions with biases and activations, and nothing else."""
    return reparam.fuse(ready(small_repvgg()))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "repvgg": (small_repvgg, ("acnet", "mobileone(2)")),
    "deployed_repvgg": (deployed_repvgg, ("repvgg", "dbb", "expandnet(2)")),
    "resnet18": (torchvision("resnet18"), ("repvgg", "acnet", "qarepvgg")),
    "resnet50": (torchvision("resnet50"), ("repvgg",)),
    "mobilenet_v2": (torchvision("mobilenet_v2"), ("dbb", "acnet")),
    "mobilenet_v3_small": (torchvision("mobilenet_v3_small"), ("mobileone(2)", "dilated", "sesr")),
    "efficientnet_b0": (torchvision("efficientnet_b0"), ("repvgg", "dilated")),
    "convnext_tiny": (torchvision("convnext_tiny"), ("dilated",)),
    "timm_efficientnet": (timm("efficientnet_lite0"), ("acnet",)),
    "unet": (unet, ("repvgg", "acnet")),
    "rtdetr": (rtdetr, ("repvgg", "qarepvgg", "dbb")),
}
SIZE = 64
CASES = [(name, preset) for name, (_, presets) in NETS.items() for preset in presets]
PRESETS = ("repvgg", "qarepvgg", "acnet", "dbb", "mobileone(2)", "dilated", "expandnet(2)", "sesr(2)")


def structure(model: nn.Module) -> dict[str, Any]:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return shapes | {path: type(module).__name__ for path, module in model.named_modules()}


def net_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    build, _ = NETS[name]
    if name == "rtdetr":  # wide random weights leave no digits in attention and in sorted scores
        return build().double().eval()
    return ready(build())


def round_trip(net: nn.Module, preset: str) -> nn.Module:
    """Expand and fuse; returns the expanded net."""
    x = images((SIZE, SIZE), channels=3, batch=1)
    expanded = reparam.expand(net, preset)
    same(net, expanded, x)
    fused = reparam.fuse(expanded)
    same(net, fused, x)
    assert structure(fused) == structure(reparam.fuse(net))
    return expanded


def test_every_preset_has_nets() -> None:
    assert {preset.partition("(")[0] for preset in PRESETS} == {*reparam.nn.PRESETS}
    assert {preset.partition("(")[0] for _, preset in CASES} == {*reparam.nn.PRESETS}


@pytest.mark.parametrize(("name", "preset"), CASES, ids=lambda part: part)
def test_a_net_makes_the_round_trip(name: str, preset: str) -> None:
    expanded = round_trip(net_of(name), preset)
    assert sum(isinstance(module, (MultiBranch, Widened)) for module in expanded.modules()) >= 5


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NETS)
def test_every_net_makes_the_round_trip_with_every_preset(name: str, preset: str) -> None:
    """A preset that fits none of the convolutions is an error."""
    net = net_of(name)
    found = survey(net, preset)
    if not found.chosen:
        with pytest.raises(reparam.ReparamError, match=f"expected a convolution that {re.escape(preset)} can expand"):
            reparam.expand(net, preset)
        return
    expanded = round_trip(net, preset)
    assert all(isinstance(expanded.get_submodule(path), (MultiBranch, Widened)) for path in found.chosen)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_a_net_is_restored(name: str) -> None:
    torch.manual_seed(0)
    build = torchvision(name)
    net = ready(build())
    fused = reparam.fuse(net)
    restored = reparam.restore(fused, build)
    assert restored.state_dict().keys() == net.state_dict().keys()
    assert difference(fused(images((64, 64), channels=3)), restored(images((64, 64), channels=3))) < 1e-10
