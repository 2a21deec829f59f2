"""Blocks with fewer branches, and how many feature maps a net has to hold.

Source: the RepVGG paper, arXiv 2101.03697, table 6 and figure 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparam.models import RepVGG
from reparam.models.repvgg import RepVGGBlock


class Sum(nn.Module):
    """The sum of branches of one input, and a ReLU that writes in place."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the shape that all branches give."""
        first, *others = self.branches
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return self.act(y)


def with_branches(net: RepVGG, identity: bool, pointwise: bool) -> RepVGG:
    """Replace the blocks of a RepVGG, in place, by ones that hold only some of their branches."""
    for stage in net.stages:
        for index, block in enumerate(stage):
            assert isinstance(block, RepVGGBlock)
            branches = [
                block.dense,
                *([block.pointwise] if pointwise else []),
                *([block.skip] if identity and block.skip is not None else []),
            ]
            stage[index] = Sum(branches)
    return net


class Held(fx.Interpreter):
    """Runs a net, frees every value after its last use, and counts the bytes that are held between two operations."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(fx.symbolic_trace(net))
        self.most = 0

    def run_node(self, n: fx.Node) -> Any:
        """Before an operation runs, its inputs are held, and all that later ones need."""
        if n.op != "placeholder":
            held = {
                value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
                for value in self.env.values()
                if isinstance(value, Tensor)
            }
            self.most = max(self.most, sum(held.values()))
        return super().run_node(n)


def maps_held(net: nn.Module, x: Tensor) -> float:
    """Most bytes held between two operations, in multiples of the input's.

    >>> maps_held(Sum([nn.Conv2d(4, 4, 3, padding=1)]), torch.zeros(1, 4, 8, 8))
    1.0
    >>> maps_held(Sum([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()]), torch.zeros(1, 4, 8, 8))
    2.0
    """
    interpreter = Held(net)
    with torch.no_grad():
        interpreter.run(x)
    return interpreter.most / x.untyped_storage().nbytes()
