"""Torch modules that compute the terms of a formula."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Border, Conv, interned
from reparam.algebra.groups import densify, rows
from reparam.graph.clones import shallow
from reparam.graph.guard import OfLengths
from reparam.nn.parts import BiasMap, ChannelScale

CONVS: Final[Mapping[int, type[nn.Module]]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Final[Mapping[int, type[nn.Module]]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
ZERO_PADS: Final[Mapping[int, type[nn.Module]]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
BORDER_PADS: Final[Mapping[Border, str]] = {
    Border.REFLECT: "ReflectionPad",
    Border.REPLICATE: "ReplicationPad",
    Border.CIRCULAR: "CircularPad",
}


def build(
    conv: Conv,
    bias: Tensor | None,  # (out,) or (out, *size)
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trainable: bool = True,
    copy: bool = True,
) -> nn.Module:
    """The module that computes ``conv(x) + bias``.

    Args:
        conv: the convolution; without a weight it is the identity.
        bias: one number per channel of the result, or a map of it, or None.
        dtype: of the weights.
        device: of the weights.
        trainable: whether the weights require gradients.
        copy: whether the weights are the module's own also where they are of that type already.

    Returns:
        ``ChannelScale``, ``nn.Linear``, ``nn.Conv*d``, ``nn.ConvTranspose*d``, or ``nn.Sequential`` of a padding and a
        convolution where no symmetric padding fits; with a check of the size in front where the formula holds for some
        sizes only, and with ``BiasMap`` behind it where the bias is a map.
    """
    image = bias if bias is not None and bias.dim() > 1 else None
    bias = None if image is not None else bias
    module, pad = _shell(conv, bias is not None)
    if conv.pending is not None and not (isinstance(module, nn.Linear) and conv.groups > 1):
        weight = conv.pending.compute(dtype, device)
    else:
        weight = conv.weight if conv.weight is not None else rows(conv)
        if isinstance(module, nn.Linear):
            weight = densify(weight, conv.groups, 1)
        weight = _rounded(weight, dtype, device, copy)
    if isinstance(module, ChannelScale):
        shape = module.weight.shape
        weight, bias = weight.reshape(shape), None if bias is None else bias.reshape(shape)
    module.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        module.bias = nn.Parameter(_rounded(bias, dtype, device), requires_grad=trainable)
    steps = [pad, module] if pad is not None else [module]
    if conv.remainders is not None:
        steps.insert(0, OfLengths(conv.stride, conv.remainders))
    if image is not None:
        steps.append(BiasMap(_rounded(image, dtype, device), trainable=trainable))
    return module.eval() if len(steps) == 1 else nn.Sequential(*steps).eval()


def kind_of(formula: Affine) -> type[nn.Module]:
    """The class of what takes the place of a module with one input."""
    (conv,) = formula.terms.values()
    module, pad = _template(_shape(conv), formula.biased)
    alone = pad is None and conv.remainders is None and formula.size is None
    return type(module) if alone else nn.Sequential


def _rounded(values: Tensor, dtype: torch.dtype, device: torch.device | str, copy: bool = True) -> Tensor:
    return values.detach().to(dtype=dtype, device=device, copy=copy).contiguous()


def _trimmed(conv: Conv) -> Conv:
    """Without padding behind that no output reads, given the remainders that lengths leave: then it is symmetric."""
    if conv.remainders is None:
        return conv
    hi = []
    for axis, (step, remainders) in enumerate(zip(conv.stride, conv.remainders, strict=True)):
        idle = min((r + conv.slack[axis] - 1) % step for r in remainders)
        hi.append(conv.hi[axis] - min(idle, max(conv.hi[axis] - conv.lo[axis], 0)))
    return replace(conv, hi=tuple(hi))


def _shell(conv: Conv, biased: bool) -> tuple[nn.Module, nn.Module | None]:
    """The module without weights, and the padding in front of it."""
    module, pad = _template(_shape(conv), biased)
    clone = shallow(module, lambda tensor: tensor)
    assert clone is not None
    return clone, None if pad is None else shallow(pad, lambda tensor: tensor)


def _shape(conv: Conv) -> Conv:
    """What the class and the settings of the module depend on."""
    shape = conv.structure
    return interned(shape if shape.fill is None else replace(shape, fill=None))


@lru_cache(maxsize=1024)
def _template(conv: Conv, biased: bool) -> tuple[nn.Module, nn.Module | None]:
    with torch.device("meta"):
        return _new(conv, biased)


def _new(conv: Conv, biased: bool) -> tuple[nn.Module, nn.Module | None]:
    if conv.diagonal:  # torch runs depthwise convolutions of one tap many times slower
        return ChannelScale(conv.out_channels, conv.axes, bias=biased), None
    if conv.axes == 0:
        return nn.Linear(conv.in_channels, conv.out_channels, bias=biased), None
    common: dict[str, Any] = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel,
        "stride": conv.stride,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": biased,
    }
    if conv.transposed:
        kind = TRANSPOSED[conv.axes]
        return kind(**common, padding=conv.lo, output_padding=conv.output_padding), None
    kind = CONVS[conv.axes]
    conv = _trimmed(conv)
    if conv.lo == conv.hi and min(conv.lo) >= 0:
        mode = Border.CONSTANT if not any(conv.lo) else conv.border
        return kind(**common, padding=conv.lo, padding_mode=mode.value), None
    if not conv.needs_pad:  # torch puts the odd one behind, too
        return kind(**common, padding="same", padding_mode=conv.border.value), None
    flat = [p for lo, hi in zip(reversed(conv.lo), reversed(conv.hi), strict=True) for p in (lo, hi)]
    if conv.border is Border.CONSTANT:
        pad = ZERO_PADS[conv.axes](tuple(flat))
    else:
        pad = getattr(nn, f"{BORDER_PADS[conv.border]}{conv.axes}d")(tuple(flat))
    return kind(**common), pad
