"""Convolutions and transposed convolutions, as modules and as functions."""

from typing import Any

from torch import Tensor, nn

from reparam.algebra import Border, Conv, Ints, Refusal
from reparam.graph.calls import argument, held_shape, name_of, stock, tensor_input
from reparam.graph.kinds import CONVS, TRANSPOSED_CONVS, asks_size
from reparam.graph.lift.base import (
    Known,
    Lifted,
    bias_of,
    depends_on_input,
    generated,
    numbers_of,
    per_axis,
    shape_text,
    weight_of,
)
from reparam.graph.net import Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.sizes import of_sizes_alone

DEPENDS = Refusal("conv_after_conv", "the weight depends on the input")
SIZED = Refusal(
    "conv_after_conv",
    "the weight is made for sizes of the input, so it is another one for another size",
    "make it for what the module knows, its number of channels say",
)


def padding_of(padding: Any, kernel: Ints, dilation: Ints) -> tuple[Ints, Ints]:
    """Padding before and behind every axis: of one number, of one number or pair per axis, or ``"same"``."""
    axes = len(kernel)
    if padding == "valid":
        return (0,) * axes, (0,) * axes
    if padding == "same":  # torch puts the odd one behind
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    if not isinstance(padding, int) and any(not isinstance(amount, int) for amount in padding):
        before, behind = zip(*padding, strict=True)
        return tuple(map(int, before)), tuple(map(int, behind))
    around = per_axis(padding, axes)
    return around, around


def _convolution(
    source: Value,
    weight: Numbers,
    shape: Ints,  # of the weight
    bias: Numbers | None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    border: Border = Border.CONSTANT,
    transposed: bool = False,
    output_padding: Any = 0,
    sized: bool = False,
    made: bool = False,
) -> Operation:
    kernel = tuple(shape[2:])
    axes = len(kernel)
    dilation = per_axis(dilation, axes)
    lo, hi = padding_of(padding, kernel, dilation)
    conv = Conv(
        out_channels=shape[1] * groups if transposed else shape[0],
        in_channels=shape[0] if transposed else shape[1] * groups,
        kernel=kernel,
        stride=per_axis(stride, axes),
        dilation=dilation,
        lo=lo,
        hi=hi,
        groups=groups,
        border=border,
        transposed=transposed,
        output_padding=per_axis(output_padding, axes) if transposed else (),
        sized=sized,
    )
    label = f"{'transposed conv' if transposed else 'conv'} {shape_text(kernel)}"
    return Operation(label, {source: conv}, {source: weight}, bias, generated=made)


def conv_module(value: Value, known: Known) -> Lifted:
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``."""
    module = value.module
    if stock(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    assert isinstance(module, nn.modules.conv._ConvNd)
    source = tensor_input(value)
    if source is None:
        return None
    return _convolution(
        source,
        weight_of(module),
        held_shape(module, module.out_channels, module.in_channels // module.groups, *module.kernel_size),
        bias_of(module),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        border=Border(module.padding_mode),
    )


def conv_transpose_module(value: Value, known: Known) -> Lifted:
    """``nn.ConvTranspose1d``, ``2d``, ``3d``; an output size says how many of the results there are."""
    module = value.module
    if stock(module) not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        return None
    assert isinstance(module, nn.modules.conv._ConvTransposeNd)
    source = tensor_input(value)
    if source is None:
        return None
    return _convolution(
        source,
        weight_of(module),
        held_shape(module, module.in_channels, module.out_channels // module.groups, *module.kernel_size),
        bias_of(module),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        transposed=True,
        output_padding=module.output_padding,
        sized=asks_size(value),
    )


def conv_function(value: Value, known: Known) -> Lifted:
    """``F.conv*d``, ``F.conv_transpose*d`` and ``aten.convolution`` with a weight that does not depend on the input."""
    name = name_of(value)
    if name not in CONVS and name not in TRANSPOSED_CONVS and name != "convolution":
        return None
    source, weight, bias = tensor_input(value), argument(value, 1, "weight"), argument(value, 2, "bias")
    if source is None or not isinstance(weight, Tensor) or isinstance(bias, Value):
        return SIZED if isinstance(weight, Value) and of_sizes_alone(weight) else DEPENDS
    options = {"stride": argument(value, 3, "stride", 1), "padding": argument(value, 4, "padding", 0)}
    if name in CONVS:
        options |= {"dilation": argument(value, 5, "dilation", 1), "groups": argument(value, 6, "groups", 1)}
    elif name in TRANSPOSED_CONVS:
        options |= {
            "output_padding": argument(value, 5, "output_padding", 0),
            "groups": argument(value, 6, "groups", 1),
        }
        options |= {"dilation": argument(value, 7, "dilation", 1), "transposed": True}
    else:
        names = enumerate(("dilation", "transposed", "output_padding", "groups"), 5)
        options |= {name: argument(value, place, name) for place, name in names}
    if any(depends_on_input(option) for option in options.values()):
        return Refusal("conv_after_conv", "its stride, padding, dilation or number of groups depends on the input")
    return _convolution(
        source,
        numbers_of(lambda: weight),
        tuple(weight.shape),
        None if bias is None else numbers_of(lambda: bias),
        made=generated(value, weight),
        **options,
    )
