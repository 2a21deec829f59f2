"""The deploy forms of authors whose converter no package ships: the same steps, done by hand on the nets timed here.

Nothing of `reparam` is used. Sources of the steps: `UniRepLKNetBlock.reparameterize` of AILab-CVC/UniRepLKNet,
`RepVggBlock.convert_to_deploy` of lyuwenyu/RT-DETR.
"""

import copy
from collections.abc import Iterable

import torch
from market import ResponseNorm, UniRepLk
from torch import Tensor, nn

Branch = tuple[nn.Conv2d, nn.BatchNorm2d]


def norm_scale(norm: nn.BatchNorm2d) -> Tensor:
    """(C,): what a norm multiplies by."""
    return norm.weight / (norm.running_var + norm.eps).sqrt()


@torch.no_grad()
def one_convolution(branches: Iterable[Branch]) -> nn.Conv2d:
    """Convolutions with norms, summed, as one: the first has the largest kernel, all have their middle in common."""
    (largest, _), *_ = branches = list(branches)
    merged = copy.deepcopy(largest)
    merged.weight.zero_()
    merged.bias = nn.Parameter(merged.weight.new_zeros(merged.out_channels))
    for conv, norm in branches:
        scale = norm_scale(norm)
        places = []
        for size, whole, rate in zip(conv.kernel_size, merged.kernel_size, conv.dilation, strict=True):
            start = (whole - rate * (size - 1) - 1) // 2
            places.append(slice(start, start + rate * (size - 1) + 1, rate))
        merged.weight[:, :, places[0], places[1]] += conv.weight * scale.view(-1, 1, 1, 1)
        merged.bias += norm.bias - scale * norm.running_mean
    return merged


class Response(nn.Module):
    """Response normalisation without a shift, channels last."""

    def __init__(self, norm: ResponseNorm) -> None:
        super().__init__()
        self.gamma = norm.gamma

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) in and out."""
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (self.gamma * (size / (size.mean(dim=-1, keepdim=True) + 1e-6)) + 1) * x


class DeployedUniRepLk(nn.Module):
    """A block of UniRepLKNet after its `reparameterize`: one depthwise convolution, no norm, no scale, no shift."""

    @torch.no_grad()
    def __init__(self, block: UniRepLk) -> None:
        super().__init__()
        branches = block.branches
        names = [f"k{size}_r{rate}" for size, rate in branches.branches]
        self.conv = one_convolution(
            [
                (branches.large, branches.large_norm),
                *((getattr(branches, f"conv_{name}"), getattr(branches, f"norm_{name}")) for name in names),
            ]
        )
        scale = norm_scale(block.norm)
        self.conv.weight.mul_(scale.view(-1, 1, 1, 1))
        self.conv.bias.sub_(block.norm.running_mean).mul_(scale).add_(block.norm.bias)
        self.norm = nn.Identity()
        self.gate, self.widen = block.gate, block.widen
        activation, response = block.act
        self.act = nn.Sequential(activation, Response(response))
        linear, to_maps, norm = block.narrow
        scale = norm_scale(norm)
        narrow = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        narrow.weight.copy_(linear.weight * (scale * block.scale).view(-1, 1))
        shift = linear.weight @ response.beta.flatten() - norm.running_mean
        narrow.bias.copy_((norm.bias + scale * shift) * block.scale)
        self.narrow = nn.Sequential(narrow, to_maps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        y = self.gate(self.norm(self.conv(x)))
        return x + self.narrow(self.act(self.widen(y)))


def unireplknet(net: nn.Module) -> nn.Module:
    """A row of UniRepLKNet blocks, deployed."""
    return nn.Sequential(*(DeployedUniRepLk(block) for block in net.children()))


class DeployedRepVgg(nn.Module):
    """The block of RT-DETR's encoder after its `convert_to_deploy`: a convolution and its activation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv = one_convolution([(branch.conv, branch.norm) for branch in (block.conv1, block.conv2)])
        self.activation = block.activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        return self.activation(self.conv(x))


def rt_detr(net: nn.Module) -> nn.Module:
    """RT-DETR of transformers with the RepVGG blocks deployed; other norms stay, as its author has it."""
    for path, block in list(net.named_modules()):
        if type(block).__name__ == "RTDetrRepVggBlock":
            net.set_submodule(path, DeployedRepVgg(block))
    return net
