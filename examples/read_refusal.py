"""Read why something was left alone, do what the remedy says, and see it fused.

    python examples/read_refusal.py

A plan lists what is left alone: near misses, which a change of the model would let fuse, and what no change would.
"""

import torch
from torch import Tensor, nn

import reparam


class Block(nn.Module):
    """A 1×1 and a 3×3 with a norm between them, and a gate."""

    def __init__(self, width: int, pad_first: bool) -> None:
        super().__init__()
        self.thin = nn.Conv2d(width, width, 1, padding=int(pad_first), bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, width, 3, padding=int(not pad_first), bias=False)
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same computation, wherever the padding stands, but for what the border sees."""
        return self.wide(self.norm(self.thin(x))) * torch.sigmoid(self.gate(x))


def build(pad_first: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(Block(8, pad_first))
    for _ in range(3):
        net(torch.randn(8, 8, 16, 16))  # stands for training: the norm now has statistics
    return net.eval()


def main() -> None:
    plan = reparam.plan(build(pad_first=False))
    print(plan)
    # The norm adds a constant, and the convolution behind it pads with zeros, not with that constant.
    (refusal,) = plan.near_misses
    assert (refusal.rule, refusal.path) == ("border_rule", "0.norm")
    assert "pad the input of the first operation" in refusal.remedy
    # The gate multiplies two things that both depend on the input: no change of the model makes that linear.
    assert [(other.rule, other.near) for other in plan.left if other.path == "0"] == [("scale", False)]
    assert [str(kernel) for region in plan.regions for kernel in region.result] == ["conv 1x1"]

    # As the remedy says: the same block, trained with its padding at the first operation.
    better = build(pad_first=True)
    plan = reparam.plan(better)
    print(plan)
    assert plan.near_misses == ()
    assert [str(kernel) for region in plan.regions for kernel in region.result] == ["conv 3x3"]

    # What only weights show stands in the receipt of the fused net, not in the plan.
    better[0].norm.running_var[3] = float("nan")
    receipt = reparam.receipt(plan.apply())
    assert receipt is not None
    print(receipt.left[0])
    assert receipt.left[0].rule == "finite"
    assert receipt.regions == ()


if __name__ == "__main__":
    main()
