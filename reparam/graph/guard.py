"""What is left of an operation that vanished although it reads its input differently at another rank.

``nn.BatchNorm1d`` has its channels on the second axis: that is the last one of ``(N, C)`` and not of ``(N, C, L)``.
Where the code alone does not tell which it gets, a norm beside a linear layer is read as the first, and input of
another rank is an error. So is an image without a batch where a scale was shaped for one with a batch.
"""

import torch
from torch import Tensor, nn


def require_rank(x: Tensor, rank: int) -> Tensor:
    """``x``, if it has ``rank`` axes.

    Raises:
        AssertionError: it has another number of axes.

    Example:
        >>> require_rank(torch.zeros(2, 3), 2).shape
        torch.Size([2, 3])
    """
    torch._assert(
        x.dim() == rank,
        "a norm or scale was fused for input of one rank and got another: pass example_inputs of this rank to fuse",
    )
    return x


class OfRank(nn.Identity):
    """The identity on values of one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """``input``, if it has the rank; see ``require_rank``."""
        return require_rank(input, self.rank)


class OfLengths(nn.Identity):
    """The identity on values whose lengths leave certain remainders.

    Args:
        stride: per axis, what the length is divided by.
        remainders: per axis, the remainders that it may leave.

    Example:
        >>> OfLengths((2,), ((0,),))(torch.zeros(1, 1, 4)).shape
        torch.Size([1, 1, 4])
    """

    def __init__(self, stride: tuple[int, ...], remainders: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.stride, self.remainders = stride, remainders

    def forward(self, input: Tensor) -> Tensor:
        """``input``, if it is of such a size.

        Raises:
            AssertionError: it is not; the branches that were fused would not have had one size either.
        """
        for axis, (step, remainders) in enumerate(zip(self.stride, self.remainders, strict=True)):
            length = input.shape[axis - len(self.stride)]
            torch._assert(
                length % step in remainders,
                "branches were fused for input whose sizes leave the remainders of example_inputs, divided by the"
                " stride, and got another size: their own outputs differ in size there",
            )
        return input
