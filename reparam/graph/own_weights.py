"""Convolutions whose forward does more than torch's own, such as to pad, and that hold their new weights themselves.

That is where others look for weights, and a convolution within a convolution would be one too many.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, fx, nn

CONVOLVE: Final[Mapping[type[nn.Module], Callable[..., Tensor]]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
GEOMETRY: Final = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def holds_weights_of(module: nn.Module, new: nn.Module) -> bool:
    """Whether a module is a convolution like a new one, with nothing but a weight and a bias."""
    if set(module._parameters) != {"weight", "bias"} or module._modules or type(new) not in CONVOLVE:
        return False
    alike = isinstance(module, type(new)) and new.padding_mode == "zeros"
    return alike and all(getattr(module, name) == getattr(new, name) for name in GEOMETRY)


def call_own_weights(graph: fx.Graph, node: fx.Node, new: nn.Module) -> None:
    """Replace the call of a new convolution by the function, on ``weight`` and ``bias`` of the module itself."""
    conv: Any = new
    with graph.inserting_before(node):
        weight = graph.get_attr("weight")
        bias = None if conv.bias is None else graph.get_attr("bias")
        settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        function = CONVOLVE[type(new)]
        node.replace_all_uses_with(graph.call_function(function, (node.args[0], weight, bias, *settings)))
    graph.erase_node(node)
