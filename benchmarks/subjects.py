"""The nets whose fused form is timed: how each is built, and what its author, or else torch, converts it with."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from market import UniRepLk
from nets import randomise
from package_detectors import Detector
from package_nets import get, quiet, timm_convert
from torch import Tensor, nn

import reparam
from benchmarks import authors
from reparam.graph.generated import SOURCE

Converter = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Subject:
    """One net.

    Args:
        build: builds it; weights and statistics are then drawn at random.
        shape: (C, H, W) of an input.
        converter: whose converter is compared with.
        convert: that converter; may change its argument.
        ranked: outputs are ordered by rank, so that rounding may exchange two of them.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int] = (3, 160, 160)
    converter: str = "none"
    convert: Converter | None = None
    ranked: bool = False

    def forms(self) -> dict[str, nn.Module]:
        """`unfused`, `fused` and, if there is a converter, `author`."""
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = randomise(quiet(self.build).eval())
        found = {"unfused": net, "fused": reparam.fuse(net, check=False)}
        if self.convert is not None:
            convert = self.convert
            found["author"] = quiet(lambda: convert(copy.deepcopy(net)).eval())
        return found

    def fused(self) -> str:
        """Fingerprint of the fused form."""
        return fingerprint(self.forms()["fused"])

    def input(self, batch: int) -> Tensor:
        """Random images."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(1))


def fingerprint(net: nn.Module) -> str:
    """What a net runs, its numbers apart, in twelve digits: classes, settings, shapes and generated forwards."""
    digest = hashlib.sha256()
    for path, module in net.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        held = [(name, tuple(tensor.shape), str(tensor.dtype), tensor.stride()) for name, tensor in tensors]
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(repr((path, kind, module.extra_repr(), held, getattr(module, SOURCE, ""))).encode())
    return digest.hexdigest()[:12]


def torch_fx(net: nn.Module) -> nn.Module:
    """Batch norms folded into the convolutions in front of them, by torch."""
    return get("torch.fx.experimental.optimization.fuse")(net)


def imported_when_called(path: str) -> Converter:
    """A function of a package that is imported when it is called."""
    return lambda net: get(path)(net)


def _repvgg(name: str) -> Subject:
    return Subject(
        lambda: get(f"repvgg_pytorch.repvgg.create_RepVGG_{name}")(deploy=False),
        converter="repvgg-pytorch",
        convert=imported_when_called("repvgg_pytorch.repvgg_model_convert"),
    )


def _timm(name: str, size: int = 160) -> Subject:
    return Subject(lambda: get("timm.create_model")(name), (3, size, size), "timm", timm_convert)


def _rt_detr() -> nn.Module:
    backbone = get("transformers.RTDetrResNetConfig")(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = get("transformers.RTDetrConfig")(
        backbone_config=backbone, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3
    )
    return Detector(get("transformers.RTDetrForObjectDetection")(config))


BY_HAND = "its steps, by hand"
SUBJECTS: Mapping[str, Subject] = {
    "RepVGG-A0": _repvgg("A0"),
    "RepVGG-B0": _repvgg("B0"),
    "RepVGG-B1g4": _repvgg("B1g4"),
    "MobileOne-s1": _timm("mobileone_s1"),
    "FastViT-t8": _timm("fastvit_t8"),
    "RepViT-m1.0": _timm("repvit_m1_0"),
    "RepGhostNet-1.0": _timm("repghostnet_100"),
    "UniRepLKNet, 4 blocks": Subject(
        lambda: nn.Sequential(*(UniRepLk(96) for _ in range(4))), (96, 40, 40), BY_HAND, authors.unireplknet
    ),
    "RT-DETR-R18": Subject(_rt_detr, (3, 320, 320), BY_HAND, authors.rt_detr, ranked=True),
    "ResNet-50": Subject(lambda: get("torchvision.models.resnet50")(), (3, 160, 160), "torch.fx", torch_fx),
    "MobileNetV4-small": Subject(
        lambda: get("timm.create_model")("mobilenetv4_conv_small"), (3, 160, 160), "torch.fx", torch_fx
    ),
}
QUICK = ("RepVGG-A0", "MobileNetV4-small")


def first_tensors(value: Any) -> list[Tensor]:
    """The tensors of an output."""
    return [value] if isinstance(value, Tensor) else [x for x in value if isinstance(x, Tensor)]
