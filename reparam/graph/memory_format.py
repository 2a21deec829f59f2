"""How weights lie in memory: as those of the layers that they come from."""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

CHANNELS_LAST: Final[Mapping[int, torch.memory_format]] = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_channels_last(weight: Tensor) -> bool:
    """Whether the channels of a weight lie last in memory; kernels of one tap tell by their strides.

    Example:
        >>> weight = torch.randn(4, 3, 1, 1)
        >>> has_channels_last(weight), has_channels_last(weight.to(memory_format=torch.channels_last))
        (False, True)
    """
    memory_format = CHANNELS_LAST.get(weight.dim())
    if memory_format is None or not weight.is_contiguous(memory_format=memory_format):
        return False
    return weight.stride() != torch.empty(weight.shape, device="meta").stride()


def put_channels_last(module: nn.Module) -> None:
    """Put the channels of all weights of convolutions last in memory."""
    _put(module, CHANNELS_LAST)


def put_channels_first(module: nn.Module) -> None:
    """Put the channels of all weights of convolutions in front of their kernels, as torch makes them."""
    _put(module, dict.fromkeys(CHANNELS_LAST, torch.contiguous_format))


def _put(module: nn.Module, formats: Mapping[int, torch.memory_format]) -> None:
    for conv in convolutions(module):
        if conv.weight.dim() in formats:
            conv.weight.data = conv.weight.data.to(memory_format=formats[conv.weight.dim()])


def convolutions(module: nn.Module) -> Iterator[nn.modules.conv._ConvNd]:
    """The convolutions in a module that hold a weight: a child may hold that of one with a forward of its own."""
    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd) and isinstance(part.weight, Tensor):
            yield part
