"""A block of one's own: nothing is registered, no class is known, the forward is read as it stands.

    python examples/own_block.py

Three branches, one of them through functions and with a learned scale, under one norm: one convolution is left.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import reparam


class Crossed(nn.Module):
    """A 3×3, a 1×3 behind a 1×1, and a scaled average of the input: summed, then normalized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.square = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.point = nn.Conv2d(width, width, 1, bias=False)
        self.row = nn.Parameter(torch.randn(width, width, 1, 3) / width)
        self.scale = nn.Parameter(torch.randn(width, 1, 1))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """The block as anyone would write it."""
        y = self.square(x)
        y = y + functional.conv2d(self.point(x), self.row, padding=(0, 1))
        y += self.scale * functional.avg_pool2d(x, 3, stride=1, padding=1)
        return torch.relu(self.norm(y))


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), Crossed(16), Crossed(16))
    for _ in range(5):
        net(torch.randn(8, 3, 32, 32))  # stands for training: the norms now have statistics
    net.eval()

    plan = reparam.plan(net)
    print(plan)
    fused = plan.apply()
    print(fused)
    assert [region.path for region in plan.regions] == ["2", "3"]
    assert [str(kernel) for kernel in plan.regions[0].result] == ["conv 3x3"]
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 3
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert isinstance(fused[2], Crossed), "the block keeps its class, so that code that asks for it goes on working"

    result = reparam.verify(net, fused, torch.randn(2, 3, 33, 40))
    print(result)
    assert result.ok


if __name__ == "__main__":
    main()
