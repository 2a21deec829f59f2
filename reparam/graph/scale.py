"""One number per channel, where a convolution of one tap would be dearer than a product."""

from typing import final

import torch
from torch import Tensor, nn

from reparam.algebra import Conv


@final
class ChannelScale(nn.Module):
    """``x * weight + bias`` with one weight, and one bias, per channel.

    Args:
        channels: number of channels.
        axes: spatial axes behind that of the channels.
        bias: whether there is one.

    Example:
        >>> scale = ChannelScale(2, axes=2)
        >>> _ = scale.weight.data.copy_(torch.tensor([2.0, 3.0]).reshape(2, 1, 1))
        >>> scale(torch.ones(1, 2, 1, 1)).flatten()
        tensor([2., 3.], grad_fn=<ViewBackward0>)
    """

    def __init__(self, channels: int, axes: int, *, bias: bool = False) -> None:
        super().__init__()
        shape = (channels, *(1,) * axes)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, *spatial)``, or ``(..., channels)`` without spatial axes, to the same shape."""
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)

    def extra_repr(self) -> str:
        """Channels, for a reader."""
        return f"{self.weight.shape[0]}, axes={self.weight.dim() - 1}, bias={self.bias is not None}"


def is_scale(conv: Conv) -> bool:
    """Whether a convolution is no more than one number per channel."""
    return conv.diagonal and not conv.identity
