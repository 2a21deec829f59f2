"""What is left of an operation that vanished although it reads its input differently at another rank.

``nn.BatchNorm1d`` has its channels on the second axis: that is the last one of ``(N, C)`` and not of ``(N, C, L)``.
Where the code alone does not tell which it gets, a norm beside a linear layer is read as the first, and input of
another rank is an error.
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
        "a norm was fused for input of one rank and got another: pass example_inputs of this rank to fuse",
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
