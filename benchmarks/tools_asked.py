"""The tools that `benchmarks/tools.py` asks, each by what a user calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tools_cases import C
from torch import Tensor, nn

import reparam

Fold = Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Tool:
    """One tool.

    Args:
        name: of its column.
        package: the distribution whose version is noted.
        fold: what a user calls.
        dtype: in which it is asked.
        counts: whether what it made can be counted by running it.
        own: a block of several branches that the tool brings along.
    """

    name: str
    package: str
    fold: Fold
    dtype: torch.dtype = torch.float64
    counts: bool = True
    own: Callable[[], nn.Module] | None = None


def by_reparam(net: nn.Module, x: Tensor) -> nn.Module:
    return reparam.fuse(net)


def by_timm(net: nn.Module, x: Tensor) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(net)


def by_fx(net: nn.Module, x: Tensor) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(net)


def by_ao(net: nn.Module, x: Tensor) -> nn.Module:
    """It is told what to fuse, by name: every convolution or linear layer with the norm of the same order of calls."""
    from torch.ao.quantization import fuse_modules

    called: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, __, name=name: called.append((name, module)))
        for name, module in net.named_modules()
        if not any(True for _ in module.children())
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    pairs = [
        [name, after]
        for (name, first), (after, second) in itertools.pairwise(called)
        if isinstance(first, layers) and isinstance(second, nn.BatchNorm2d)
    ]
    return fuse_modules(net, pairs) if pairs else net


def by_inductor(net: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    import torch._inductor.config as inductor

    with inductor.patch({"freezing": True}):
        torch.compiler.reset()
        compiled = torch.compile(net)
        compiled(x)
    return compiled


def by_mct(net: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """What it does to a graph before quantization, and the float model that the graph stands for."""
    import model_compression_toolkit as mct
    from model_compression_toolkit.core.graph_prep_runner import graph_preparation_runner
    from model_compression_toolkit.core.pytorch.back2framework.float_model_builder import FloatPyTorchModelBuilder
    from model_compression_toolkit.core.pytorch.default_framework_info import DEFAULT_PYTORCH_INFO as INFO
    from model_compression_toolkit.core.pytorch.pytorch_implementation import PytorchImplementation
    from model_compression_toolkit.target_platform_capabilities.targetplatform2framework import attach2pytorch

    target = attach2pytorch.AttachTpcToPytorch().attach(mct.get_target_platform_capabilities())
    config = mct.core.QuantizationConfig()
    graph = graph_preparation_runner(net, lambda: iter([[x]]), config, INFO, PytorchImplementation(), target)
    model, _ = FloatPyTorchModelBuilder(graph).build_model()
    return model


def by_mmcv(net: nn.Module, x: Tensor) -> nn.Module:
    from mmcv.cnn import fuse_conv_bn

    return fuse_conv_bn(net)


def by_ultralytics(net: nn.Module, x: Tensor) -> nn.Module:
    """Its ``fuse`` belongs to a model whose parts are in ``model``."""
    from ultralytics.nn.tasks import BaseModel

    class Holder(BaseModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model = net

        def info(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Holder().fuse(verbose=False).model


def by_super_gradients(net: nn.Module, x: Tensor) -> nn.Module:
    from super_gradients.modules.repvgg_block import fuse_repvgg_blocks_residual_branches

    fuse_repvgg_blocks_residual_branches(net)
    return net


def own_timm() -> nn.Module:
    from timm.models.byobnet import MobileOneBlock

    return MobileOneBlock(C, C)


def own_ultralytics() -> nn.Module:
    from ultralytics.nn.modules import RepConv

    return RepConv(C, C, 3, bn=True)


def own_super_gradients() -> nn.Module:
    from super_gradients.modules.repvgg_block import RepVGGBlock

    return RepVGGBlock(C, C)


TOOLS = (
    Tool("reparam", "", by_reparam, own=lambda: reparam.models.RepVGGBlock(C, C)),
    Tool("timm", "timm", by_timm, own=own_timm),
    Tool("torch.fx", "torch", by_fx),
    Tool("torch.ao", "torch", by_ao),
    Tool("Inductor", "torch", by_inductor, torch.float32, counts=False),
    Tool("MCT", "model-compression-toolkit", by_mct, torch.float32),
    Tool("mmcv", "mmcv-lite", by_mmcv),
    Tool("ultralytics", "ultralytics-opencv-headless", by_ultralytics, own=own_ultralytics),
    Tool("super-gradients", "super-gradients", by_super_gradients, own=own_super_gradients),
)
