"""RepVGG in plain PyTorch: every block trains as three branches and knows nothing of how it will be fused.

    block(x) = relu(squeeze_excite( norm(conv3x3(x)) + norm(conv1x1(x)) + norm(x) ))

The last branch is there only where input and output have the same shape, and squeeze-excite only in RepVGG-D2se.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, arXiv 2101.03697, tables 2 and 3.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from reparam.errors import ReparamError

A_DEPTHS = (1, 2, 4, 14, 1)
B_DEPTHS = (1, 4, 6, 16, 1)
D_DEPTHS = (1, 8, 14, 24, 1)
HALVE_EACH_STAGE = (2, 2, 2, 2, 2)
DENSE: Mapping[int, int] = MappingProxyType({})
# Every second layer of a B net, counted from 1 after the stem; the last one, 27, stays dense.
GROUPED_LAYERS = range(2, 27, 2)


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate in (0, 1) that is computed from the means of all channels.

    Args:
        channels: C, of input and output.
        reduction: the hidden layer has `channels // reduction` channels.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // reduction, 1)
        self.up = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        hidden = self.down(x.mean((2, 3), keepdim=True)).relu()
        gate: Tensor = self.up(hidden).sigmoid()
        return x * gate


class RepVGGBlock(nn.Module):
    """Three parallel branches, summed, then squeeze-excite (optional) and ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of both convolutions; the third branch, a batch norm, exists only at stride 1 with equal channels.
        groups: of both convolutions.
        squeeze_excite: whether the sum passes through `SqueezeExcite` before the ReLU.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, squeeze_excite: bool = False
    ) -> None:
        super().__init__()
        keeps_shape = stride == 1 and in_channels == out_channels
        self.dense = _conv_norm(in_channels, out_channels, 3, stride, groups)
        self.pointwise = _conv_norm(in_channels, out_channels, 1, stride, groups)
        self.skip = nn.BatchNorm2d(out_channels) if keeps_shape else None
        self.squeeze_excite = SqueezeExcite(out_channels) if squeeze_excite else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride))."""
        y = self.dense(x) + self.pointwise(x)
        if self.skip is not None:
            y = y + self.skip(x)
        activated: Tensor = self.act(self.squeeze_excite(y))
        return activated


class RepVGG(nn.Module):
    """Stages of `RepVGGBlock`s, a global average pool and a linear head.

    Every sequence has one entry per stage. The stem is stage 0. The first block of a stage has the stage's stride.

    Args:
        depths: blocks per stage.
        widths: output channels per stage.
        strides: stride per stage. Five 2s suit 224×224 images; small images need some 1s.
        groups_of_layer: groups of both convolutions of a block by its index in the whole net, the stem being 0.
            Layers that are not named have 1 group.
        squeeze_excite: in every block.
        num_classes: outputs of the head.
        in_channels: channels of the image.

    Raises:
        ReparamError: the sequences differ in length, or `groups_of_layer` names a layer that does not exist.

    >>> import torch
    >>> net = RepVGG(depths=(1, 2), widths=(8, 16), strides=(1, 2), num_classes=10, in_channels=1).eval()
    >>> net(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = A_DEPTHS,
        widths: Sequence[int] = (48, 48, 96, 192, 1280),
        strides: Sequence[int] = HALVE_EACH_STAGE,
        groups_of_layer: Mapping[int, int] = DENSE,
        squeeze_excite: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not len(depths) == len(widths) == len(strides) or len(depths) == 0:
            raise ReparamError(
                f"RepVGG: depths, widths and strides need one entry per stage, "
                f"found {len(depths)}, {len(widths)} and {len(strides)}"
            )
        absent = sorted(set(groups_of_layer) - set(range(sum(depths))))
        if absent:
            raise ReparamError(f"RepVGG: groups_of_layer names layers {absent}, the net has 0 to {sum(depths) - 1}")

        stages: list[nn.Sequential] = []
        layer, channels = 0, in_channels
        for depth, width, first_stride in zip(depths, widths, strides, strict=True):
            blocks: list[RepVGGBlock] = []
            for index in range(depth):
                stride = first_stride if index == 0 else 1
                blocks.append(RepVGGBlock(channels, width, stride, groups_of_layer.get(layer, 1), squeeze_excite))
                layer, channels = layer + 1, width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, in_channels, H, W) to (N, widths[-1], H / 32, W / 32) with five strides of 2."""
        features: Tensor = self.stages(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits: (N, in_channels, H, W) to (N, num_classes)."""
        logits: Tensor = self.head(self.forward_features(x).mean((2, 3)))
        return logits


def repvgg_a0(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-A0: depths 1/2/4/14/1, a = 0.75, b = 2.5."""
    return RepVGG(A_DEPTHS, _widths(0.75, 2.5), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_a1(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-A1: depths 1/2/4/14/1, a = 1, b = 2.5."""
    return RepVGG(A_DEPTHS, _widths(1, 2.5), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_a2(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-A2: depths 1/2/4/14/1, a = 1.5, b = 2.75."""
    return RepVGG(A_DEPTHS, _widths(1.5, 2.75), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_b0(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B0: depths 1/4/6/16/1, a = 1, b = 2.5."""
    return RepVGG(B_DEPTHS, _widths(1, 2.5), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_b1(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B1: depths 1/4/6/16/1, a = 2, b = 4."""
    return RepVGG(B_DEPTHS, _widths(2, 4), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_b1g2(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B1g2: B1 with 2 groups in layers 2, 4, ... 26."""
    return RepVGG(B_DEPTHS, _widths(2, 4), strides, _grouped(2), num_classes=num_classes, in_channels=in_channels)


def repvgg_b1g4(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B1g4: B1 with 4 groups in layers 2, 4, ... 26."""
    return RepVGG(B_DEPTHS, _widths(2, 4), strides, _grouped(4), num_classes=num_classes, in_channels=in_channels)


def repvgg_b2(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B2: depths 1/4/6/16/1, a = 2.5, b = 5."""
    return RepVGG(B_DEPTHS, _widths(2.5, 5), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_b2g2(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B2g2: B2 with 2 groups in layers 2, 4, ... 26."""
    return RepVGG(B_DEPTHS, _widths(2.5, 5), strides, _grouped(2), num_classes=num_classes, in_channels=in_channels)


def repvgg_b2g4(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B2g4: B2 with 4 groups in layers 2, 4, ... 26."""
    return RepVGG(B_DEPTHS, _widths(2.5, 5), strides, _grouped(4), num_classes=num_classes, in_channels=in_channels)


def repvgg_b3(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B3: depths 1/4/6/16/1, a = 3, b = 5."""
    return RepVGG(B_DEPTHS, _widths(3, 5), strides, num_classes=num_classes, in_channels=in_channels)


def repvgg_b3g2(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B3g2: B3 with 2 groups in layers 2, 4, ... 26."""
    return RepVGG(B_DEPTHS, _widths(3, 5), strides, _grouped(2), num_classes=num_classes, in_channels=in_channels)


def repvgg_b3g4(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-B3g4: B3 with 4 groups in layers 2, 4, ... 26."""
    return RepVGG(B_DEPTHS, _widths(3, 5), strides, _grouped(4), num_classes=num_classes, in_channels=in_channels)


def repvgg_d2se(num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = HALVE_EACH_STAGE) -> RepVGG:
    """RepVGG-D2se: depths 1/8/14/24/1, a = 2.5, b = 5, squeeze-excite in every block."""
    return RepVGG(
        D_DEPTHS,
        _widths(2.5, 5),
        strides,
        squeeze_excite=True,
        num_classes=num_classes,
        in_channels=in_channels,
    )


VARIANTS: tuple[Callable[..., RepVGG], ...] = (
    repvgg_a0,
    repvgg_a1,
    repvgg_a2,
    repvgg_b0,
    repvgg_b1,
    repvgg_b1g2,
    repvgg_b1g4,
    repvgg_b2,
    repvgg_b2g2,
    repvgg_b2g4,
    repvgg_b3,
    repvgg_b3g2,
    repvgg_b3g4,
    repvgg_d2se,
)


def _widths(a: float, b: float) -> tuple[int, ...]:
    """min(64, 64a), 64a, 128a, 256a, 512b: `b` scales the last stage, `a` the others."""
    return (min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b))


def _grouped(groups: int) -> dict[int, int]:
    return dict.fromkeys(GROUPED_LAYERS, groups)


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    """A "same" convolution without bias, then a batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))
