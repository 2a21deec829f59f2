"""Nets that Python packages ship, with random weights, small: how each is built, called and converted by its package.

Nothing is imported before a net is built, so a package that is not installed costs nothing.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from nets import images
from torch import Tensor, nn


def image(x: Tensor) -> dict[str, Any]:
    """A call with one positional argument."""
    return {"": x}


@dataclass(frozen=True)
class Net:
    """One net.

    Args:
        package: what has to be installed, by the name that is imported.
        name: the net.
        build: builds it.
        sizes: of two inputs.
        convert: the package's own converter, which may change its argument; None: there is none.
        arguments: of a call with an image, by name; the empty name is positional.
        channels: of the image.
        norms: batch norms that stay, and why they do in ``note``.
        note: what is particular about the net or its converter.
        large: takes several seconds.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((64, 64), (72, 40))
    convert: Callable[[nn.Module], nn.Module] | None = None
    arguments: Callable[[Tensor], Mapping[str, Any]] = image
    channels: int = 3
    norms: int = 0
    note: str = ""
    large: bool = False

    @property
    def key(self) -> str:
        """Package and name."""
        return f"{self.package}/{self.name}"

    def call(self, index: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of one call."""
        keywords = dict(self.arguments(images(self.sizes[index], channels=self.channels, batch=1, seed=index)))
        return ((keywords.pop(""),) if "" in keywords else ()), keywords


def quiet(function: Callable[[], nn.Module]) -> nn.Module:
    """Packages print while they build and convert."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function()


def converted(net: Net, model: nn.Module) -> nn.Module:
    """What the package's own converter makes of a float64 copy; new modules of its are float64, too."""
    assert net.convert is not None
    torch.set_default_dtype(torch.float64)
    try:
        return quiet(lambda: net.convert(copy.deepcopy(model)).eval())  # type: ignore[misc]
    finally:
        torch.set_default_dtype(torch.float32)


def get(path: str) -> Any:
    """`package.module.name`."""
    home, _, name = path.rpartition(".")
    return getattr(import_module(home), name)


def in_place(method: str) -> Callable[[nn.Module], nn.Module]:
    """A converter that is a method of the net and changes it."""

    def convert(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        getattr(model, method)()
        return model

    return convert


def everywhere(method: str) -> Callable[[nn.Module], nn.Module]:
    """A converter that is a method of the blocks, to be called on each."""

    def convert(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for module in model.modules():
            if hasattr(module, method):
                getattr(module, method)()
        return model

    return convert


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_convert(model: nn.Module) -> nn.Module:
    return get("timm.utils.reparameterize_model")(model)


def timm(name: str, sizes: Any = None, variant: str = "", norms: int = 0, note: str = "", **options: Any) -> Net:
    def build() -> nn.Module:
        return get("timm.create_model")(name, **({} if "features_only" in options else {"num_classes": 10}), **options)

    return Net("timm", name + variant, build, sizes or Net.sizes, timm_convert, norms=norms, note=note)


def byob(name: str, types: str, **options: Any) -> Net:
    """A net of timm's that is built from blocks of one type, cut short."""

    def build() -> nn.Module:
        byobnet = import_module("timm.models.byobnet")
        blocks = tuple(
            byobnet.ByoBlockCfg(type=types, d=depth, c=width, s=2, gs=0, **options)
            for depth, width in ((2, 16), (2, 24), (1, 32))
        )
        config = byobnet.ByoModelCfg(blocks=blocks, stem_type=types, stem_chs=16)
        return byobnet.ByobNet(config, num_classes=10)

    return Net("timm", name, build, convert=timm_convert)


STEM = "`forward_intermediates` returns the value in front of the first norm"
TIMM = (
    byob("repvgg", "rep"),
    byob("mobileone", "one", block_kwargs={"num_conv_branches": 3}),
    timm("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(32, 32, 32, 64), sizes=((64, 64), (96, 64))),
    timm("fastvit_sa12", layers=(1, 1, 1, 1), embed_dims=(32, 32, 32, 64), sizes=((64, 64), (96, 64))),
    timm("fastvit_mci0", layers=(1, 1, 1, 1), embed_dims=(32, 32, 32, 64), sizes=((64, 64), (96, 64))),
    timm("repvit_m0_9", depth=(1, 1, 1, 1), embed_dim=(16, 24, 32, 48)),
    timm("repghostnet_050", norms=1, note=STEM),
    timm("ghostnetv3_050", sizes=((96, 96), (72, 40)), norms=1, note=STEM),
    timm("shvit_s1", depth=(1, 2, 2), sizes=((128, 128), (160, 128))),
    timm("levit_128s", depth=(1, 1, 1), sizes=((224, 224), (224, 224))),
    timm("levit_conv_128s", depth=(1, 1, 1), sizes=((224, 224), (224, 224))),
    timm("lcnetv2_small", sizes=((64, 64), (72, 40))),
    timm(
        "nextvit_small",
        sizes=((64, 64), (96, 64)),
        norms=5,
        note="norms whose value goes into a query and, pooled, into keys and values; a last one after a sum",
    ),
    timm("efficientvit_m0", sizes=((224, 224), (224, 224))),
    timm("iformer_t", sizes=((64, 64), (96, 64))),
    timm("efficientvim_m1", sizes=((64, 64), (96, 64))),
    timm(
        "fastvit_t8",
        variant=", features only",
        layers=(1, 1, 1, 1),
        embed_dims=(32, 32, 32, 64),
        sizes=((64, 64), (96, 64)),
        features_only=True,
    ),
)


# --- packages of single architectures ---------------------------------------------------------------------------------


def repvgg(package: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: get(f"{package}.repvgg.RepVGG")([2, 2, 2, 1], 10, [0.25, 0.25, 0.25, 0.25], **options)


def repvgg_plus() -> nn.Module:
    return get("repvgg_pytorch.repvggplus.RepVGGplus")([2, 2, 4, 1], 10, [0.25, 0.25, 0.25, 0.25], use_post_se=True)


def repvgg_convert(model: nn.Module) -> nn.Module:
    return get("repvgg_pytorch.repvgg_model_convert")(model)


def mobileone() -> nn.Module:
    network = get("mobileone_pytorch._mobileone_network.MobileOneNetwork")
    return network(ks=[4, 4, 4], out_channels=[16, 24, 32], num_blocks=[1, 2, 2], strides=[2, 2, 2], num_classes=10)


def mobileone_convert(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).reparametrize()


def holocron(name: str, *arguments: Any, **options: Any) -> Net:
    def build() -> nn.Module:
        return get(f"holocron.models.classification.{name}")(*arguments, **options)

    return Net("holocron", name.rpartition(".")[2], build, convert=in_place("reparametrize"))


SMALL = (
    Net("repvgg_pytorch", "RepVGG", repvgg("repvgg_pytorch"), convert=repvgg_convert),
    Net(
        "repvgg_pytorch",
        "RepVGG, groups and SE",
        repvgg("repvgg_pytorch", override_groups_map={2: 2, 4: 4}, use_se=True),
        convert=repvgg_convert,
    ),
    Net(
        "repvgg_pytorch",
        "RepVGGplus",
        repvgg_plus,
        convert=in_place("switch_repvggplus_to_deploy"),
        note="its converter removes heads that its forward calls",
    ),
    Net("mobileone_pytorch", "MobileOne", mobileone, convert=mobileone_convert),
    holocron("repvgg.RepVGG", [1, 2, 2], [16, 24, 32], 1.0, 1.0),
    holocron("mobileone.MobileOne", [1, 2, 1, 1], [0.25, 0.25, 0.125, 0.125], 3),
    holocron("repvit.RepViT", [16, 24, 32, 48], [1, 3, 3, 1]),
)
CLASSIFIERS: tuple[Net, ...] = (*TIMM, *SMALL)
