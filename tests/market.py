"""The market: a small module of our own for every published re-parameterizable block, and what fusing must make of it.

A `Family` says how a block is built, what it runs on, how many convolutions, norms, additions and scalings a run of it
makes before and after fusing, and, where something must stay apart, why. The modules follow the published blocks in
structure (branches in lists, flags, in-place additions, borders written by slice assignment, weights made in forward),
because a reader that knows no class has to cope with exactly that; names and code are ours.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Shape = tuple[int, ...]
Count = int | range | None  # exactly, one of, or not checked


@dataclass(frozen=True)
class Counts:
    """What one run calls on its input: convolutions and linear layers, batch norms, additions, constant scalings."""

    convs: Count
    norms: Count
    adds: Count
    scales: Count = 0

    def differences(self, found: "Counts") -> dict[str, str]:
        """The fields of `found` that do not agree, each with what was expected."""
        wrong = {}
        for name in ("convs", "norms", "adds", "scales"):
            expected, value = getattr(self, name), getattr(found, name)
            allowed = expected if isinstance(expected, range) else (expected,)
            if expected is not None and value not in allowed:
                wrong[name] = f"expected {expected}, found {value}"
        return wrong


@dataclass(frozen=True)
class Why:
    """The reason that a plan must give for what it leaves apart: `text` for people, `words` to look for."""

    text: str
    words: tuple[str, ...]

    def explains(self, refusal: object) -> bool:
        """Whether the printed refusal names this reason."""
        return any(word in f"{getattr(refusal, 'rule', '')} {refusal}".lower() for word in self.words)

    def __or__(self, other: "Why") -> "Why":
        return Why(f"{self.text}; {other.text}", self.words + other.words)


BORDER = Why(
    "a value that is not zero outside its tensor meets zero padding", ("border", "outside", "extension", "padd")
)
COST = Why("one convolution would be dearer", ("cost", "dearer", "macs", "expensive"))
ACTIVATION = Why(
    "a non-linear operation stands in between", ("linear", "boundary", "activation", "relu", "silu", "gelu")
)
DATA = Why("weights or scales depend on the data", ("depend", "product", "linear", "boundary", "unknown", "constant"))
ROOTS = Why("the operands come from different values", ("root", "different", "boundary", "linear"))
IMPURE = Why(
    "forward changes its own weights", ("writes", "written", "impure", "changes", "mutat", "state", "in-place")
)
OPAQUE = Why("an operator that cannot be read", ("opaque", "autograd", "unread", "unknown", "custom", "linear"))
PLACE = Why(
    "a constant or a divisor that varies over space",
    ("spatial", "place", "position", "map", "count_include_pad", "ceil", "broadcast", "linear", "boundary"),
)
PHASE = Why("shift-invariant only with a period", ("transpos", "period", "phase", "cost", "shape", "unread", "linear"))
STATISTICS = Why("the norm uses the statistics of its batch", ("statistic", "running", "training"))
SIZED = Why("the kernel is made anew for as many channels as the input has", ("sizes of the input",))
CUT = Why("forward cuts a weight by a size of its input, and writes into it", ("slice indices",))
AUTOGRAD = Why("a function of autograd in the forward, which so cannot be written anew", ("gradient mode",))
KERNEL = Why("the norm scales and shifts in the pass that it makes anyway", ("same pass",))
SLOPE = Why("the slope is not 1", ("slope", "linear", "activation", "boundary", "leaky"))

DEAD = "zeros, identities and dead code"
NORM = "norm after convolution"
SCALE = "scale by a constant"
SUM = "sum of branches"
IDENTITY = "identity as a tap"
CHAIN = "convolution after convolution"
PAD = "explicit padding"
POOL = "average pooling"
GROUPS = "groups"
BEFORE = "norm before convolution"
CHANNELS = "channel structure"
CONSTANT = "subgraph of constants"
LAYOUT = "layout of linear layers"
SLOPE_ONE = "activation that is the identity"
NESTED = "nested sums"
DIMENSIONS = "one and three dimensions"
TRANSPOSED = "transposed convolution"
SHUFFLE = "pixel shuffle"
BIAS_MAP = "spatial bias map"
HORIZONTAL = "horizontal merge"
TO_LINEAR = "convolution as a linear layer"


@dataclass(frozen=True)
class Source:
    """Where a block was published."""

    paper: str
    arxiv: str  # number, or empty
    code: str  # repository and path, or empty


def image(size: Shape, channels: int) -> tuple[Shape, ...]:
    """One tensor with channels first: `(channels, *size)`."""
    return ((channels, *size),)


def tokens(size: Shape, channels: int) -> tuple[Shape, ...]:
    """One tensor with channels last: `(*size, channels)`."""
    return ((*size, channels),)


@dataclass(frozen=True)
class Family:
    """A published block and what fusing must make of it."""

    name: str
    source: Source
    build: Callable[..., nn.Module]  # accepts the keys of `sweep`
    before: Counts
    after: Counts
    rules: tuple[str, ...]
    becomes: str
    why: Why | None = None  # set where something must stay apart
    channels: int = 8
    sizes: tuple[Shape, Shape] = ((9, 11), (8, 10))  # odd, even
    shapes: Callable[[Shape, int], tuple[Shape, ...]] = image  # (size, channels) -> one shape per input, no batch
    example_inputs: bool = False  # the sum only holds once the size is known
    sweep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    one_conv: bool | None = None  # what dense probing must find of the block without its activations
    modules: int | None = None  # convolution modules that may remain, where it is not `after.convs`
    holds: Callable[[nn.Module], bool] = lambda fused: True  # one more property of the fused block

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float64, **parameters: int) -> nn.Module:
        """A block in eval mode with wide statistics."""
        torch.manual_seed(seed)
        return randomise(self.build(**parameters), seed).to(dtype).eval()

    def inputs(
        self, size: Shape, dtype: torch.dtype = torch.float64, channels: int | None = None
    ) -> tuple[Tensor, ...]:
        """Random inputs of one size, `batch` 3 for the first of `sizes` and 2 else."""
        generator = torch.Generator().manual_seed(sum(size) + 1)
        batch = 3 if size == self.sizes[0] else 2
        shapes = self.shapes(size, channels or self.channels)
        return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Draw every weight and statistic anew, wide enough that a misplaced tap or a dropped shift shows.

    Norm means N(0, 1), variances U(0.5, 2), gammas and betas N(0, 1), other vectors and scales N(0, 1), weights
    N(0, 1/fan_in). Frozen parameters and other buffers (fixed filters, indices) stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, deviation: float = 1.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * deviation)

    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, _BatchNorm) and child.running_mean is not None and child.running_var is not None:
                normal(child.running_mean)
                uniform = torch.rand(child.running_var.shape, generator=generator, dtype=torch.float64)
                child.running_var.copy_(0.5 + 1.5 * uniform)
        for parameter in module.parameters():
            if parameter.requires_grad:
                vector = parameter.numel() == max(parameter.shape, default=1)
                normal(parameter, 1.0 if vector else 1 / math.sqrt(math.prod(parameter.shape[1:])))
    return module


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
Kernel = int | tuple[int, ...]


def conv_norm(
    cin: int, cout: int, kernel: Kernel = 1, stride: Kernel = 1, padding: Kernel | str = 0, groups: int = 1,
    dilation: int = 1, bias: bool = False, ndim: int = 2,
) -> nn.Sequential:  # fmt: skip
    """A convolution and its batch norm."""
    conv = CONVS[ndim](cin, cout, kernel, stride, padding, dilation, groups, bias)
    return nn.Sequential(OrderedDict(conv=conv, norm=NORMS[ndim](cout)))


def depthwise(channels: int, kernel: Kernel, stride: Kernel = 1, bias: bool = False, dilation: int = 1) -> nn.Conv2d:
    """A depthwise convolution that keeps the size (at stride 1, odd kernels)."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, channels, bias)


def conv_norm_act(cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm and SiLU, as the detectors stack them."""
    block = conv_norm(cin, cout, kernel, stride, kernel // 2, groups)
    block.add_module("act", nn.SiLU())
    return block


class Gate(nn.Module):
    """Squeeze and excite: a scale per channel that depends on the data."""

    def __init__(self, channels: int, reduced: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, reduced, 1)
        self.up = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(squeezed))))


class Residual(nn.Module):
    """`x + body(x)`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Scaled(nn.Module):
    """A learnt scale per channel (and a shift)."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.factor.view(1, -1, 1, 1)
        return scaled if self.shift is None else scaled + self.shift.view(1, -1, 1, 1)


# --- Classic multi-branch blocks -------------------------------------------------------------------------------------


class RepVgg(nn.Module):
    """3x3, 1x1 and, where the shape allows, a norm of the input."""

    def __init__(
        self, channels: int = 8, groups: int = 1, stride: int = 1, cout: int | None = None,
        gate: nn.Module | None = None, gate_last: bool = False, act: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        cout = cout or channels
        self.dense = conv_norm(channels, cout, 3, stride, 1, groups)
        self.point = conv_norm(channels, cout, 1, stride, 0, groups)
        self.skip = nn.BatchNorm2d(channels) if cout == channels and stride == 1 else None
        self.gate = gate or nn.Identity()
        self.gate_last = gate_last
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        total = self.dense(x) + self.point(x) + skip
        return self.gate(self.act(total)) if self.gate_last else self.act(self.gate(total))


class CheckpointedStage(nn.Module):
    """Blocks that run under gradient checkpointing, which no reader of forward sees through."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([RepVgg(channels, gate=Gate(channels), gate_last=True) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class QaRepVgg(nn.Module):
    """A norm after the sum; flags say which branches are normed before it."""

    def __init__(
        self, channels: int = 8, groups: int = 1, stride: int = 1, dilation: int = 1, norm_all: bool = False,
        pool: bool = False, alpha: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dense = conv_norm(channels, channels, 3, stride, dilation, groups, dilation)
        point = nn.Conv2d(channels, channels, 1, stride, groups=groups, bias=alpha)
        self.point = nn.Sequential(point, nn.BatchNorm2d(channels)) if norm_all else point
        self.skip = (nn.BatchNorm2d(channels) if norm_all else nn.Identity()) if stride == 1 else None
        self.pool = nn.AvgPool2d(3, stride, 1) if pool else None
        self.alpha = nn.Parameter(torch.ones(1)) if alpha else 1
        self.after = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.dense(x) + self.alpha * self.point(x)
        if self.skip is not None:
            total = total + self.skip(x)
        if self.pool is not None:
            total = total + self.pool(x)
        return self.act(self.after(total))


BRANCH_SCALE = {"value": 0.25}


class PartialSumNorm(nn.Module):
    """A norm over the sum of two branches only, scaled by a number kept outside of the module."""

    def __init__(self, channels: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(channels, channels, 3, 1, 1, groups)
        self.point = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x) + BRANCH_SCALE["value"] * self.norm(self.point(x) + x))


class CropSides(nn.Module):
    """Cut `rows` above and below and `columns` left and right."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.rows : x.size(2) - self.rows, self.columns : x.size(3) - self.columns]


class AcBlock(nn.Module):
    """k x k, k x 1 and 1 x k; where the padding is too small for the thin ones, they see a cropped input."""

    def __init__(
        self, channels: int = 8, groups: int = 1, stride: int = 1, kernel: int = 3, padding: int = 1,
        affine: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.square = nn.Conv2d(channels, channels, kernel, stride, padding, groups=groups, bias=False)
        room = padding - kernel // 2
        tall = nn.Conv2d(channels, channels, (kernel, 1), stride, (padding, max(room, 0)), groups=groups, bias=False)
        wide = nn.Conv2d(channels, channels, (1, kernel), stride, (max(room, 0), padding), groups=groups, bias=False)
        self.square_norm = nn.BatchNorm2d(channels, affine=affine)
        crops = (CropSides(0, -room), CropSides(-room, 0)) if room < 0 else (nn.Identity(), nn.Identity())
        self.tall = nn.Sequential(crops[0], tall, nn.BatchNorm2d(channels, affine=affine))
        self.wide = nn.Sequential(crops[1], wide, nn.BatchNorm2d(channels, affine=affine))

    def forward(self, x: Tensor) -> Tensor:
        square = self.square_norm(self.square(x))
        tall = self.tall(x)
        wide = self.wide(x)
        return square + tall + wide


class NormThenBorder(nn.Module):
    """A norm whose zero input, not zero, continues outside: the border is written by slice assignment."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.width > 0:
            norm, w = self.norm, self.width
            factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
            outside = norm.bias.detach() - norm.running_mean * factor
            y = F.pad(y, [w] * 4)
            outside = outside.view(1, -1, 1, 1)
            y[:, :, 0:w, :] = outside
            y[:, :, -w:, :] = outside
            y[:, :, :, 0:w] = outside
            y[:, :, :, -w:] = outside
        return y


class IdentityPlusConv(nn.Conv2d):
    """A 1x1 convolution whose kernel is its weight plus the identity; the identity is a plain attribute."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        width = channels // groups
        self.identity = torch.eye(width).repeat(groups, 1).view(channels, width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.identity.to(self.weight.device).type_as(self.weight)
        return F.conv2d(x, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups)


def pad_then_average(channels: int, groups: int, stride: int = 1) -> nn.Sequential:
    """1x1, norm with its own border, 3x3 average, norm."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, channels, 1, groups=groups, bias=False),
            norm=NormThenBorder(channels, 1),
            pool=nn.AvgPool2d(3, stride, 0),
            pool_norm=nn.BatchNorm2d(channels),
        )
    )


def pad_then_conv(channels: int, groups: int, stride: int = 1, inner: int | None = None) -> nn.Sequential:
    """1x1, norm with its own border, unpadded 3x3, norm."""
    inner = inner or channels
    first: nn.Module = nn.Conv2d(channels, inner, 1, groups=groups, bias=False)
    if inner == channels:
        first = IdentityPlusConv(channels, groups)
    return nn.Sequential(
        OrderedDict(
            conv=first,
            norm=NormThenBorder(inner, 1),
            deep=nn.Conv2d(inner, channels, 3, stride, 0, groups=groups, bias=False),
            deep_norm=nn.BatchNorm2d(channels),
        )
    )


class DiverseBranches(nn.Module):
    """Up to four branches with in-place sums; depthwise blocks take other branches than dense ones."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.origin = conv_norm(channels, channels, 3, stride, 1, groups)
        if groups < channels:
            self.point = conv_norm(channels, channels, 1, stride, 0, groups)
            self.average = pad_then_average(channels, groups, stride)
        else:
            self.average = nn.Sequential(nn.AvgPool2d(3, stride, 1), nn.BatchNorm2d(channels))
        self.chain = pad_then_conv(channels, groups, stride, 2 * channels if groups == channels else channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if hasattr(self, "point"):
            out += self.point(x)
        out += self.average(x)
        out += self.chain(x)
        return self.act(out)


class GrownBranches(nn.Module):
    """Branches that came and went in training, the 3x3 one again such a block."""

    def __init__(self, channels: int = 8, groups: int = 1, depth: int = 2) -> None:
        super().__init__()
        square: nn.Module = nn.Conv2d(channels, channels, 3, 1, 1, groups=groups)
        if depth > 1:
            square = GrownBranches(channels, groups, depth - 1)
        self.branches = nn.ModuleDict()
        self.branches["square"] = nn.Sequential(square, nn.BatchNorm2d(channels))
        self.branches["point"] = conv_norm(channels, channels, 1, groups=groups)
        self.branches["chain"] = pad_then_conv(channels, groups)
        self.branches["average"] = pad_then_average(channels, groups)
        self.branches["wide"] = conv_norm(channels, channels, (1, 3), 1, (0, 1), groups)
        self.branches["tall"] = conv_norm(channels, channels, (3, 1), 1, (1, 0), groups)
        self.branches["skip"] = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches.values())


class ReserveAndMerge(nn.Module):
    """A residual block with a norm that only gathers statistics; its result is thrown away."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = conv_norm(channels, channels, 3, 1, 1)
        self.second = conv_norm(channels, channels, 3, 1, 1)
        self.statistics = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.statistics(x)
        return self.act(self.second(self.act(self.first(x))) + x)


class ReservedWeights(nn.Module):
    """Writes unit kernels into its own weight at every call."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 2 * channels, 3, 1, 1)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.second = nn.Conv2d(2 * channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            reserved = self.first.weight.data[x.shape[1] :]
            reserved.zero_()
            reserved[:, :, 1, 1].fill_diagonal_(1.0)
        return self.second(F.relu(self.norm(self.first(x))))


class PoolBesideStride(nn.Module):
    """Downsampling: strided 3x3 beside an average of 2x2 and a 1x1."""

    def __init__(self, channels: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(channels, channels, 3, 2, 1, groups)
        self.point = nn.Sequential(nn.AvgPool2d(2, 2), *conv_norm(channels, channels, 1, groups=groups))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x) + self.point(x))


class GatedSkip(nn.Module):
    """The identity branch runs through a gate; the two others are linear."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dense = conv_norm(channels, channels, 3, 1, 1)
        self.point = conv_norm(channels, channels)
        self.skip = nn.BatchNorm2d(channels)
        self.gate = Gate(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(self.skip(x)) + self.dense(x) + self.point(x))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffledGroups(nn.Module):
    """A grouped block with a channel shuffle behind it."""

    def __init__(self, channels: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.block = RepVgg(channels, groups, act=nn.SiLU())
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return shuffle_channels(y, self.groups) if self.groups > 1 else y


REPVGG = Source("RepVGG, CVPR 2021", "2101.03697", "DingXiaoH/RepVGG:repvgg.py")
REPVGG_PLUS = Source("RepVGG, CVPR 2021", "2101.03697", "DingXiaoH/RepVGG:repvggplus.py")
QA_REPVGG = Source("QARepVGG, AAAI 2024", "2212.01593", "cxxgtxy/QARepVGG:repvgg.py")
QA_YOLOV6 = Source("QARepVGG, AAAI 2024", "2212.01593", "meituan/YOLOv6:yolov6/layers/common.py")
QA_SUPER = Source("QARepVGG, AAAI 2024", "2212.01593", "Deci-AI/super-gradients:modules/qarepvgg_block.py")
ACNET = Source("ACNet, ICCV 2019", "1908.03930", "DingXiaoH/ACNet:acnet/acb.py")
DBB = Source("Diverse Branch Block, CVPR 2021", "2103.13425", "DingXiaoH/DiverseBranchBlock:diversebranchblock.py")
DYREP = Source("DyRep, CVPR 2022", "2203.12868", "hunto/image_classification_sota:lib/models/utils/dyrep.py")
RMNET = Source("RMNet, 2021", "2111.00687", "fxmeng/RMNet:models/resnet2vgg.py")
PARNET = Source("Non-deep Networks, NeurIPS 2022", "2110.07641", "imankgoyal/NonDeepNetworks:simplenet_impl/repvgg.py")
GEOMETRY = {"channels": (4, 8), "groups": (1, 2, 4), "stride": (1, 2)}
WIDTHS = {"channels": (4, 8, 12), "groups": (1, 2, 4)}

CLASSIC = (
    Family("RepVGG", REPVGG, RepVgg, Counts(2, 3, 2), Counts(1, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS),
           "3x3", sweep=GEOMETRY, one_conv=True),
    Family("RepVGG, downsampling", REPVGG, lambda channels=8, groups=1: RepVgg(channels, groups, 2, 2 * channels),
           Counts(2, 2, 1), Counts(1, 0, 0), (DEAD, NORM, SUM, GROUPS), "3x3 of stride 2", sweep=WIDTHS, one_conv=True),
    Family("RepVGG, gate before the activation", REPVGG, lambda channels=8: RepVgg(channels, gate=Gate(channels)),
           Counts(4, 3, 2), Counts(3, 0, 0), (NORM, SUM, IDENTITY), "3x3, gate"),
    Family("RepVGGplus, gate after the activation", REPVGG_PLUS,
           lambda channels=8: RepVgg(channels, gate=Gate(channels), gate_last=True),
           Counts(4, 3, 2), Counts(3, 0, 0), (NORM, SUM, IDENTITY), "3x3, gate"),
    Family("RepVGGplus, checkpointed stage", REPVGG_PLUS, CheckpointedStage, Counts(8, 6, 4), Counts(6, 0, 0),
           (NORM, SUM, IDENTITY), "every block a 3x3 and its gate"),
    Family("QARepVGG, norms on every branch and after", QA_REPVGG,
           lambda channels=8, groups=1, stride=1: QaRepVgg(channels, groups, stride, norm_all=True),
           Counts(2, 4, 2, 1), Counts(1, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS), "3x3", sweep=GEOMETRY,
           one_conv=True),
    Family("QARepVGG, norm on the 3x3 and after", QA_REPVGG, QaRepVgg, Counts(2, 2, 2, 1), Counts(1, 0, 0),
           (DEAD, NORM, SUM, IDENTITY, GROUPS), "3x3", sweep=GEOMETRY, one_conv=True),
    Family("QARepVGG, with an average pool", QA_YOLOV6,
           lambda channels=8, groups=1, stride=1: QaRepVgg(channels, groups, stride, pool=True),
           Counts(2, 2, 3, 1), Counts(1, 0, 0), (DEAD, NORM, SUM, IDENTITY, POOL, GROUPS), "3x3", sweep=GEOMETRY,
           one_conv=True),
    Family("QARepVGG, dilated and weighted", QA_SUPER,
           lambda channels=8, dilation=2: QaRepVgg(channels, dilation=dilation, alpha=True),
           Counts(2, 2, 2, 1), Counts(1, 0, 0), (NORM, SCALE, SUM, IDENTITY), "3x3 of the same dilation",
           sweep={"channels": (4, 8), "dilation": (1, 2, 3)}, one_conv=True),
    Family("QARepVGG, norm of a partial sum", QA_REPVGG, PartialSumNorm, Counts(2, 2, 2, 1), Counts(1, 0, 0),
           (NORM, SCALE, SUM, IDENTITY, GROUPS, NESTED), "3x3", sweep=WIDTHS, one_conv=True),
    Family("ACNet", ACNET, AcBlock, Counts(3, 3, 2), Counts(1, 0, 0), (NORM, SUM, GROUPS), "3x3", sweep=GEOMETRY,
           one_conv=True),
    Family("ACNet, cropped", ACNET, lambda channels=8, groups=1, stride=1: AcBlock(channels, groups, stride, padding=0),
           Counts(3, 3, 2), Counts(1, 0, 0), (NORM, SUM, PAD, GROUPS), "unpadded 3x3", sweep=GEOMETRY, one_conv=True),
    Family("ACNet, 5x5 with a padding of 1", ACNET,
           lambda channels=8, groups=1, stride=1: AcBlock(channels, groups, stride, 5, 1),
           Counts(3, 3, 2), Counts(1, 0, 0), (NORM, SUM, PAD, GROUPS), "5x5", sweep=GEOMETRY, one_conv=True),
    Family("ACNet, norms without affine", ACNET, lambda channels=8, groups=1: AcBlock(channels, groups, affine=False),
           Counts(3, 3, 2), Counts(1, 0, 0), (NORM, SUM, GROUPS), "3x3", sweep=WIDTHS, one_conv=True),
    Family("DBB", DBB, DiverseBranches, Counts(5, 6, 3), Counts(1, 0, 0),
           (NORM, SUM, CHAIN, PAD, POOL, GROUPS, CONSTANT), "3x3",
           sweep={"channels": (8, 12), "groups": (1, 2, 4), "stride": (1, 2)}, one_conv=True),
    Family("DBB, depthwise", DBB, lambda channels=8, stride=1: DiverseBranches(channels, channels, stride),
           Counts(3, 4, 2), Counts(1, 0, 0), (NORM, SUM, CHAIN, PAD, POOL, GROUPS), "depthwise 3x3",
           sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("DyRep, a block in a block", DYREP, GrownBranches, Counts(13, 18, 12), Counts(1, 0, 0),
           (DEAD, NORM, SUM, IDENTITY, CHAIN, PAD, POOL, GROUPS, NESTED), "3x3",
           sweep={"channels": (8,), "groups": (1, 2), "depth": (1, 2, 3)}, one_conv=True),
    Family("RMNet", RMNET, ReserveAndMerge, Counts(2, 3, 1), Counts(2, 0, 1), (DEAD, NORM), "two 3x3, their sum kept",
           why=ACTIVATION | ROOTS),
    Family("RMNet, weights written in forward", RMNET, ReservedWeights, Counts(2, 1, 0), Counts(2, range(2), 0), (),
           "unchanged", why=CUT),
    Family("ParNet, downsampling", PARNET, PoolBesideStride, Counts(2, 2, 1), Counts(1, 0, 0),
           (NORM, SUM, CHAIN, POOL, GROUPS), "3x3 of stride 2, once the size is known to be even",
           sizes=((12, 10), (8, 10)), example_inputs=True, sweep=WIDTHS, one_conv=True),
    Family("ParNet, gated skip", PARNET, GatedSkip, Counts(4, 3, 2), Counts(3, 1, 1), (NORM, SUM),
           "3x3, gate with its norm, one sum", why=DATA | ROOTS),
    Family("ParNet, shuffled groups", PARNET, ShuffledGroups, Counts(2, 3, 2), Counts(1, 0, 0),
           (NORM, SUM, IDENTITY, GROUPS, CHANNELS), "grouped 3x3, shuffle",
           sweep={"channels": (4, 8), "groups": (1, 2, 4)}),
)  # fmt: skip


# --- Mobile and hybrid backbones -------------------------------------------------------------------------------------


class MobileOne(nn.Module):
    """Several convolutions of one shape in a list, a 1x1, a norm of the input; absent branches are the integer 0."""

    def __init__(
        self, channels: int = 8, cout: int | None = None, kernel: Kernel = 3, stride: int = 1, groups: int = 1,
        branches: int = 4, point: bool = True, gate: nn.Module | None = None, act: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        cout = cout or channels
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel)
        self.skip = nn.BatchNorm2d(channels) if cout == channels and stride == 1 else None
        self.convs = nn.ModuleList(
            [conv_norm(channels, cout, kernel, stride, padding, groups) for _ in range(branches)]
        )
        self.point = conv_norm(channels, cout, 1, stride, 0, groups) if point and max(kernel) > 1 else None
        self.gate = gate or nn.Identity()
        self.act = nn.GELU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        skip = 0
        if self.skip is not None:
            skip = self.skip(x)
        point = 0
        if self.point is not None:
            point = self.point(x)
        out = point + skip
        for conv in self.convs:
            out += conv(x)
        return self.act(self.gate(out))


class RepMixer(nn.Module):
    """`x + scale * (mixer(x) - norm(x))`, all depthwise."""

    def __init__(self, channels: int = 8, kernel: Kernel = 3, scaled: bool = True) -> None:
        super().__init__()
        still = nn.Identity()
        self.norm = MobileOne(channels, kernel=kernel, groups=channels, branches=0, point=False, act=still)
        self.mixer = MobileOne(channels, kernel=kernel, groups=channels, branches=1, act=still)
        self.scale = nn.Parameter(1e-5 * torch.ones(channels, 1, 1)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            return x + self.scale * (self.mixer(x) - self.norm(x))
        return x + self.mixer(x) - self.norm(x)


class NormFirstMixer(nn.Module):
    """The mixer as the paper draws it: the norm stands before the padded convolution."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


class PositionConv(nn.Module):
    """A depthwise convolution added to its input."""

    def __init__(self, channels: int = 8, kernel: int = 7) -> None:
        super().__init__()
        self.conv = depthwise(channels, kernel, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class LargeAndSmall(nn.Module):
    """Strided 7x7 beside 3x3, two channels out per channel in; one form computes an activation and drops it."""

    def __init__(self, channels: int = 8, stride: int = 2, drop_activation: bool = True) -> None:
        super().__init__()
        self.large = conv_norm(channels, 2 * channels, 7, stride, 3, channels)
        self.small = conv_norm(channels, 2 * channels, 3, stride, 1, channels)
        self.gate = nn.Identity() if drop_activation else Gate(2 * channels)
        self.act = nn.GELU()
        self.drop_activation = drop_activation

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        out += self.small(x)
        if self.drop_activation:
            self.act(out)
            return out
        return self.act(self.gate(out))


class ConvFfn(nn.Module):
    """Depthwise convolution, norm, two pointwise layers; scaled and added to the input."""

    def __init__(self, channels: int = 16, kernel: Kernel = 7, depthwise_bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(conv=depthwise(channels, kernel, bias=depthwise_bias), norm=nn.BatchNorm2d(channels))
        )
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.act = nn.GELU()
        self.narrow = nn.Conv2d(2 * channels, channels, 1)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(1e-5 * torch.ones(channels, 1, 1), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.widen(self.conv(x))))
        return x + self.scale * self.drop(self.narrow(y))


def mobile_stem(channels: int = 4) -> nn.Sequential:
    """Dense, depthwise and pointwise blocks of one branch each."""
    wide = 2 * channels
    return nn.Sequential(
        MobileOne(channels, wide, stride=2, branches=1),
        MobileOne(wide, wide, stride=2, groups=wide, branches=1),
        MobileOne(wide, wide, kernel=1, branches=1),
    )


class TextMixer(nn.Module):
    """A mixer over tokens, seen as an image of height 1."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.mixer = RepMixer(channels, (1, 11))
        self.ffn = ConvFfn(channels, (1, 11))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 1).unsqueeze(2)
        x = self.ffn(self.mixer(x))
        return x.squeeze(2).permute(0, 2, 1)


class RepVit(nn.Module):
    """Depthwise 3x3 with a norm, biased depthwise 1x1 without, and the bare input; a norm after the sum."""

    def __init__(self, channels: int = 8, kernel: Kernel = 3) -> None:
        super().__init__()
        self.conv = nn.Sequential(depthwise(channels, kernel), nn.BatchNorm2d(channels))
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((self.conv(x) + self.point(x)) + x)


def repvit_block(channels: int = 8) -> nn.Sequential:
    """Token mixer with a gate, then the channel mixer."""
    mixer = nn.Sequential(*conv_norm(channels, 2 * channels), nn.GELU(), *conv_norm(2 * channels, channels))
    return nn.Sequential(nn.Sequential(RepVit(channels), Gate(channels)), Residual(mixer))


class TwoHeads(nn.Module):
    """Classifier and distillation head, averaged at inference."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, classes))
        self.distilled = nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = self.head(x), self.distilled(x)
        if not self.training:
            return (out[0] + out[1]) / 2
        return out


def serial_axes(channels: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Sequential:
    """Depthwise 1 x k, then k x 1; each axis padded and strided once."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, kernel // 2), groups=channels, bias=bias),
        nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (kernel // 2, 0), groups=channels, bias=bias),
    )


def corner_taps(channels: int, stride: int = 1) -> nn.Conv2d:
    """A 2x2 kernel of dilation 2: the four corners of a 3x3."""
    return nn.Conv2d(channels, channels, 2, stride, 1, 2, channels)


class SmallAxes(nn.Module):
    """3x3, 3x1, 1x3 and corners; with a stride, 3x3, a serial pair and corners."""

    def __init__(self, channels: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.square = depthwise(channels, 3, stride, bias=True)
        if stride == 1:
            self.tall = depthwise(channels, (3, 1), bias=True)
            self.wide = depthwise(channels, (1, 3), bias=True)
        else:
            self.serial = serial_axes(channels, 3, stride)
        self.corners = corner_taps(channels, stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return self.square(x) + self.tall(x) + self.wide(x) + self.corners(x)
        return self.square(x) + self.serial(x) + self.corners(x)


class MediumAxes(nn.Module):
    """7x7, 5x3, 3x5 and two serial pairs."""

    def __init__(self, channels: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.square = depthwise(channels, 7, stride, bias=True)
        self.tall = depthwise(channels, (5, 3), stride, bias=True)
        self.wide = depthwise(channels, (3, 5), stride, bias=True)
        self.serial = nn.ModuleList([serial_axes(channels, 7, stride), serial_axes(channels, 5, stride)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.square(x) + self.tall(x) + self.wide(x)
        for pair in self.serial:
            y = y + pair(x)
        return y


class ChunkedAxes(nn.Module):
    """Four chunks of channels (identity, small, medium, a biased long pair), then norm and pointwise."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        part = channels // 4
        self.parts = nn.ModuleList([SmallAxes(part), MediumAxes(part), serial_axes(part, 11, bias=True)])
        self.norm = nn.BatchNorm2d(channels)
        self.mix = nn.Conv2d(channels, 2 * channels, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        still, small, medium, long = torch.chunk(x, 4, dim=1)
        y = torch.cat((still, self.parts[0](small), self.parts[1](medium), self.parts[2](long)), dim=1)
        return self.act(self.mix(self.norm(y)))


class CopiedAxes(nn.Module):
    """Two downsamplings of the same input side by side, one norm over both."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.small, self.medium = SmallAxes(channels, 2), MediumAxes(channels, 2)
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.small(x), self.medium(x)], dim=1))


class RepGhost(nn.Module):
    """A depthwise branch and normed identities, walked in pairs."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.primary = nn.Sequential(*conv_norm(channels, channels), nn.ReLU(inplace=True))
        self.cheap = nn.Sequential(*conv_norm(channels, channels, 3, 1, 1, channels))
        self.branches = nn.Sequential(nn.Identity())
        self.branch_norms = nn.Sequential(nn.BatchNorm2d(channels))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        out = self.cheap(primary)
        for branch, norm in zip(self.branches, self.branch_norms, strict=True):
            out = out + norm(branch(primary))
        return self.act(out)


class GhostV3(nn.Module):
    """Repeated primary and cheap branches, concatenated, cut and multiplied by a gate with a linear front."""

    def __init__(self, channels: int = 8, cout: int = 14) -> None:
        super().__init__()
        half = (cout + 1) // 2
        self.primary = nn.ModuleList([conv_norm(channels, half) for _ in range(3)])
        self.primary_act = nn.ReLU()
        self.cheap = nn.ModuleList([conv_norm(half, half, 3, 1, 1, half) for _ in range(3)])
        self.cheap_point = conv_norm(half, half, 1, groups=half)
        self.cheap_skip = nn.BatchNorm2d(half)
        self.cheap_act = nn.ReLU()
        self.attention = nn.Sequential(
            nn.AvgPool2d(2, 2),
            *conv_norm(channels, cout),
            *conv_norm(cout, cout, (1, 5), 1, (0, 2), cout),
            *conv_norm(cout, cout, (5, 1), 1, (2, 0), cout),
        )
        self.cout = cout

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.attention(x))
        primary = 0
        for branch in self.primary:
            primary += branch(x)
        primary = self.primary_act(primary)
        cheap = self.cheap_point(primary) + self.cheap_skip(primary)
        for branch in self.cheap:
            cheap += branch(primary)
        out = torch.cat([primary, self.cheap_act(cheap)], dim=1)
        gate = F.interpolate(gate, size=(out.shape[-2], out.shape[-1]), mode="nearest")
        return out[:, : self.cout, :, :] * gate


class AxisInception(nn.Module):
    """One part of the channels through a wide block, the other through a tall one."""

    def __init__(self, channels: int = 8, tall: int = 2) -> None:
        super().__init__()
        self.sizes = (channels - tall, tall)
        self.wide, self.tall = RepVit(channels - tall, (1, 7)), RepVit(tall, (7, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide, tall = torch.split(x, self.sizes, dim=1)
        return torch.cat((self.wide(wide), self.tall(tall)), dim=1)


class LsNetMixer(nn.Module):
    """Two normed depthwise branches and the input."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.square = conv_norm(channels, channels, 3, 1, 1, channels)
        self.point = conv_norm(channels, channels, 1, 1, 0, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.point(x) + x


class LargeKernelPerception(nn.Module):
    """Pointwise, then a depthwise 7x7 and a pointwise without an activation between, then the weights' layer."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        half = channels // 2
        self.first = conv_norm(channels, half)
        self.act = nn.ReLU()
        self.large = conv_norm(half, half, 7, 1, 3, half)
        self.mix = conv_norm(half, half)
        self.last = nn.Conv2d(half, channels, 1)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(self.act(self.mix(self.large(self.act(self.first(x)))))))


def shvit_block(channels: int = 8) -> nn.Sequential:
    """A depthwise residual, then a feed-forward residual."""
    ffn = nn.Sequential(*conv_norm(channels, 2 * channels), nn.ReLU(), *conv_norm(2 * channels, channels))
    return nn.Sequential(Residual(conv_norm(channels, channels, 3, 1, 1, channels)), Residual(ffn))


class SingleHeadAttention(nn.Module):
    """Attention over a part of the channels, the rest passes by."""

    def __init__(self, channels: int = 16, part: int = 8, keys: int = 4) -> None:
        super().__init__()
        self.part, self.keys = part, keys
        self.norm = nn.GroupNorm(1, part)
        self.qkv = conv_norm(part, 2 * keys + part)
        self.out = nn.Sequential(nn.ReLU(), *conv_norm(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        part, rest = torch.split(x, [self.part, channels - self.part], dim=1)
        query, key, value = self.qkv(self.norm(part)).split([self.keys, self.keys, self.part], dim=1)
        query, key, value = query.flatten(2), key.flatten(2), value.flatten(2)
        weights = (query.transpose(-2, -1) @ key * self.keys**-0.5).softmax(dim=-1)
        part = (value @ weights.transpose(-2, -1)).reshape(batch, self.part, height, width)
        return self.out(torch.cat([part, rest], dim=1))


class Star(nn.Module):
    """Two pointwise branches multiplied; norms before padded depthwise convolutions."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        def conv_bn(cin: int, cout: int, kernel: int, groups: int, norm: bool) -> nn.Sequential:
            block = conv_norm(cin, cout, kernel, 1, kernel // 2, groups, bias=True)
            return block if norm else block[:1]

        self.first = conv_bn(channels, channels, 7, channels, True)
        self.left, self.right = (conv_bn(channels, 2 * channels, 1, 1, False) for _ in range(2))
        self.back = conv_bn(2 * channels, channels, 1, 1, True)
        self.last = conv_bn(channels, channels, 7, channels, False)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.act(self.left(y)) * self.right(y)
        return x + self.last(self.back(y))


class PooledHead(nn.Module):
    """Norm, global average, linear layer."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.norm(x)), 1))


class SwiftMlp(nn.Module):
    """Norm, two pointwise layers, a scale of shape `(C, 1, 1)`."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.widen, self.narrow = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.act = nn.GELU()
        self.scale = nn.Parameter(torch.ones(channels).unsqueeze(-1).unsqueeze(-1), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(self.act(self.widen(self.norm(x))))


class LocalGlobalQuery(nn.Module):
    """A strided depthwise convolution plus every second pixel, taken by a pool of size 1; then pointwise and norm."""

    def __init__(self, channels: int = 16, cout: int = 24, stride: int = 2) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(1, stride, 0)
        self.local = nn.Sequential(nn.Conv2d(channels, channels, 3, stride, 1, groups=channels))
        self.project = nn.Sequential(nn.Conv2d(channels, cout, 1), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        every_second = self.pool(x)
        return self.project(local + every_second)


class InvertedBottleneck(nn.Module):
    """Depthwise without an activation, widen, depthwise, narrow."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        wide = 2 * channels
        self.start = conv_norm(channels, channels, 3, 1, 1, channels)
        self.widen = nn.Sequential(*conv_norm(channels, wide), nn.ReLU())
        self.middle = nn.Sequential(*conv_norm(wide, wide, 3, 1, 1, wide), nn.ReLU())
        self.narrow = conv_norm(wide, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.middle(self.widen(self.start(x)))) + x


def light_conv(channels: int = 16) -> nn.Sequential:
    """Pointwise and norm, depthwise and norm, activation."""
    return nn.Sequential(
        conv_norm(channels, channels), nn.Sequential(*conv_norm(channels, channels, 5, 1, 2, channels), nn.ReLU())
    )


class PartialConv(nn.Module):
    """A convolution of a quarter of the channels, written back by slice assignment or joined by a concatenation."""

    def __init__(self, channels: int = 16, assign: bool = False) -> None:
        super().__init__()
        self.part, self.rest = channels // 4, channels - channels // 4
        self.conv = nn.Conv2d(self.part, self.part, 3, 1, 1, bias=False)
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        if self.assign:
            x = x.clone()
            x[:, : self.part, :, :] = self.conv(x[:, : self.part, :, :])
            return x
        part, rest = torch.split(x, [self.part, self.rest], dim=1)
        return torch.cat((self.conv(part), rest), 1)


class FasterNet(nn.Module):
    """Partial convolution and two pointwise layers."""

    def __init__(self, channels: int = 16, assign: bool = False) -> None:
        super().__init__()
        self.partial = PartialConv(channels, assign)
        self.mlp = nn.Sequential(
            *conv_norm(channels, 2 * channels), nn.ReLU(), nn.Conv2d(2 * channels, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.partial(x))


class SameAdapter(nn.Module):
    """Depthwise convolutions with `padding="same"` side by side, norm, activation, pointwise."""

    def __init__(self, channels: int = 8, kernels: tuple[int, ...] = (3, 5)) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels, channels, k, padding="same", groups=channels) for k in kernels]
        )
        self.norm = nn.BatchNorm2d(channels * len(kernels))
        self.act = nn.GELU()
        self.point = nn.Conv2d(channels * len(kernels), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([conv(x) for conv in self.convs], dim=1)
        return x + self.point(self.act(self.norm(y)))


class LateNorms(nn.Module):
    """A norm behind the activation, before the next padded convolution."""

    def __init__(self, channels: int = 32, groups: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=groups), nn.Conv2d(channels, channels, 1)
        )
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=groups), nn.Conv2d(channels, channels, 1)
        )
        self.norm, self.last_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.relu(self.first(x)))
        y = self.last_norm(self.second(y))
        y += x
        return F.relu(y)


MOBILEONE = Source("MobileOne, CVPR 2023", "2206.04040", "apple/ml-mobileone:mobileone.py")
FASTVIT = Source("FastViT, ICCV 2023", "2303.14189", "apple/ml-fastvit:models/fastvit.py")
FASTVIT_LARGE = Source("FastViT, ICCV 2023", "2303.14189", "apple/ml-fastvit:models/modules/replknet.py")
MOBILECLIP = Source("MobileCLIP, CVPR 2024", "2311.17049", "apple/ml-mobileclip:mobileclip/modules/text/repmixer.py")
MOBILECLIP_IMAGE = Source("MobileCLIP, CVPR 2024", "2311.17049", "apple/ml-mobileclip:mobileclip/models/mci.py")
REPVIT = Source("RepViT, CVPR 2024", "2307.09283", "THU-MIG/RepViT:model/repvit.py")
REPNEXT = Source("RepNeXt, 2024", "2406.16004", "suous/RepNeXt:model/repnext.py")
REPGHOST = Source("RepGhost, 2022", "2211.06088", "ChengpengChen/RepGhost:model/repghost.py")
GHOST_V3 = Source("GhostNetV3, 2024", "2404.11202", "huawei-noah/Efficient-AI-Backbones:ghostnetv3_pytorch")
TINYVIM = Source("TinyViM, 2024", "2411.17473", "xwmaxwma/TinyViM:model/tvimblock.py")
LSNET = Source("LSNet, CVPR 2025", "2503.23135", "jameslahm/lsnet:model/lsnet.py")
SHVIT = Source("SHViT, CVPR 2024", "2401.16456", "ysj9909/SHViT:model/shvit.py")
STARNET = Source("StarNet, CVPR 2024", "2403.19967", "ma-xu/Rewrite-the-Stars:imagenet/starnet.py")
SWIFTFORMER = Source("SwiftFormer, ICCV 2023", "2303.15446", "Amshaker/SwiftFormer:models/swiftformer.py")
EFFICIENTFORMER = Source("EfficientFormerV2, ICCV 2023", "2212.08059", "snap-research/EfficientFormer:models")
MOBILENET_V4 = Source("MobileNetV4, 2024", "", "huggingface/pytorch-image-models:timm/models/_efficientnet_blocks.py")
HGNET = Source("HGNetV2, 2023", "", "PaddlePaddle/PaddleDetection:ppdet/modeling/backbones/hgnet_v2.py")
FASTERNET = Source("FasterNet, 2023", "", "JierunChen/FasterNet:models/fasternet.py")
REDIMNET = Source("ReDimNet, 2024", "", "IDRnD/ReDimNet:redimnet/layers/convnext.py")

MOBILE = (
    Family("MobileOne, depthwise", MOBILEONE, lambda channels=8, stride=1, branches=4:
           MobileOne(channels, stride=stride, groups=channels, branches=branches), Counts(5, 6, 5), Counts(1, 0, 0),
           (DEAD, NORM, SUM, IDENTITY, GROUPS), "depthwise 3x3",
           sweep={"channels": (4, 8), "stride": (1, 2), "branches": (1, 2, 4)}, one_conv=True),
    Family("MobileOne, pointwise", MOBILEONE, lambda channels=8, branches=4:
           MobileOne(channels, kernel=1, branches=branches), Counts(4, 5, 4), Counts(1, 0, 0),
           (DEAD, NORM, SUM, IDENTITY), "1x1", sweep={"channels": (4, 8), "branches": (1, 2, 4)}, one_conv=True),
    Family("MobileOne, stage with gates", MOBILEONE, lambda channels=8: nn.Sequential(
               MobileOne(channels, groups=channels, gate=Gate(channels)),
               MobileOne(channels, 2 * channels, kernel=1, gate=Gate(2 * channels))),
           Counts(13, 10, 8), Counts(6, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS), "depthwise 3x3, 1x1, gates"),
    Family("MobileOne, dense and grouped", MOBILEONE,
           lambda channels=8, groups=1, stride=1: MobileOne(channels, groups=groups, stride=stride),
           Counts(5, 6, 5), Counts(1, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS), "3x3", sweep=GEOMETRY, one_conv=True),
    Family("FastViT RepMixer", FASTVIT, RepMixer, Counts(2, 4, 4, 1), Counts(1, 0, 0),
           (DEAD, NORM, SCALE, SUM, IDENTITY, GROUPS, NESTED), "depthwise 3x3",
           sweep={"channels": (3, 8), "kernel": (3, 5, 7)}, one_conv=True),
    Family("FastViT RepMixer, unscaled", FASTVIT, lambda channels=8: RepMixer(channels, scaled=False),
           Counts(2, 4, 4), Counts(1, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS, NESTED), "depthwise 3x3",
           sweep={"channels": (3, 8)}, one_conv=True),
    Family("FastViT RepMixer, norm first", FASTVIT, NormFirstMixer, Counts(1, 1, 1), Counts(1, 1, 1),
           (BEFORE, BIAS_MAP), "unchanged: as the paper draws it", why=BORDER, one_conv=False),
    Family("FastViT RepCPE", FASTVIT, PositionConv, Counts(1, 0, 1), Counts(1, 0, 0), (SUM, IDENTITY, GROUPS),
           "depthwise 7x7", sweep={"channels": (3, 8), "kernel": (3, 5, 7)}, one_conv=True),
    Family("FastViT large kernel", FASTVIT_LARGE, LargeAndSmall, Counts(2, 2, 1), Counts(1, 0, 0),
           (DEAD, NORM, SUM, GROUPS), "7x7, two outputs a channel; the dropped activation goes",
           sweep={"channels": (3, 8), "stride": (1, 2)}, one_conv=True),
    Family("MobileCLIP large kernel with gate", MOBILECLIP_IMAGE, lambda channels=8: LargeAndSmall(channels, 2, False),
           Counts(4, 2, 1), Counts(3, 0, 0), (NORM, SUM, GROUPS), "7x7, two outputs a channel, gate"),
    Family("FastViT stem", FASTVIT, mobile_stem, Counts(5, 6, 3), Counts(3, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS),
           "3x3, depthwise 3x3, 1x1", channels=4),
    Family("FastViT ConvFFN", FASTVIT, ConvFfn, Counts(3, 1, 1, 1), Counts(3, 0, 1), (NORM, SCALE),
           "depthwise 7x7, two 1x1, one sum", why=COST, channels=16),
    Family("MobileCLIP text mixer", MOBILECLIP, TextMixer, Counts(5, 5, 5, 2), Counts(4, 0, 1),
           (DEAD, NORM, SCALE, SUM, IDENTITY, GROUPS, LAYOUT, DIMENSIONS), "depthwise 1x11; three more",
           why=COST | BORDER, channels=16, sizes=((13,), (10,)), shapes=tokens),
    Family("RepViT mixer", REPVIT, RepVit, Counts(2, 2, 2), Counts(1, 0, 0), (NORM, SUM, IDENTITY, GROUPS),
           "depthwise 3x3", sweep={"channels": (3, 8), "kernel": (3, 5)}, one_conv=True),
    Family("RepViT block", REPVIT, repvit_block, Counts(6, 4, 3), Counts(5, 0, 1), (NORM, SUM, IDENTITY, GROUPS),
           "depthwise 3x3, gate, two 1x1, one sum"),
    Family("RepViT heads", REPVIT, TwoHeads, Counts(2, 2, 1, 1), Counts(1, 0, 0),
           (NORM, SCALE, SUM, BEFORE, LAYOUT), "one linear layer", sizes=((), ()), sweep={"channels": (4, 8)}),
    Family("RepNeXt small", REPNEXT, SmallAxes, Counts(4, 0, 3), Counts(1, 0, 0), (SUM, GROUPS), "depthwise 3x3",
           sweep={"channels": (3, 8)}, one_conv=True),
    Family("RepNeXt small, stride 2", REPNEXT, lambda channels=8: SmallAxes(channels, 2), Counts(4, 0, 2),
           Counts(1, 0, 0), (SUM, CHAIN, GROUPS), "depthwise 3x3", sweep={"channels": (3, 8)}, one_conv=True),
    Family("RepNeXt medium", REPNEXT, MediumAxes, Counts(7, 0, 4), Counts(1, 0, 0), (SUM, CHAIN, GROUPS),
           "depthwise 7x7", sweep={"channels": (3, 8), "stride": (1, 2)}, one_conv=True),
    Family("RepNeXt chunks", REPNEXT, ChunkedAxes, Counts(14, 1, 7), Counts(5, 0, 0),
           (SUM, CHAIN, GROUPS, BEFORE, CHANNELS), "depthwise 3x3 and 7x7, the long pair as it is, 1x1",
           why=BORDER | COST, channels=32),
    Family("RepNeXt long pair", REPNEXT, lambda channels=8: serial_axes(channels, 11, bias=True), Counts(2, 0, 0),
           Counts(2, 0, 0), (CHAIN,), "unchanged", why=BORDER | COST, one_conv=False),
    Family("RepNeXt copies", REPNEXT, CopiedAxes, Counts(11, 1, 6), Counts(2, 0, 0),
           (NORM, SUM, CHAIN, GROUPS, CHANNELS), "depthwise 3x3 and 7x7 side by side", why=COST),
    Family("RepGhost", REPGHOST, RepGhost, Counts(2, 3, 1), Counts(2, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS),
           "1x1, depthwise 3x3", sweep={"channels": (3, 8)}),
    Family("GhostNetV3", GHOST_V3, GhostV3, Counts(10, 11, 6), Counts(5, 0, 0), (DEAD, NORM, SUM, IDENTITY, GROUPS),
           "1x1, depthwise 3x3, the gate's three", why=BORDER | COST),
    Family("TinyViM mixer", TINYVIM, lambda channels=8: RepVit(channels, 3), Counts(2, 2, 2), Counts(1, 0, 0),
           (NORM, SUM, IDENTITY, GROUPS), "depthwise 3x3", sweep={"channels": (3, 8)}, one_conv=True),
    Family("TinyViM wide mixer", TINYVIM, lambda channels=8: RepVit(channels, (1, 7)), Counts(2, 2, 2),
           Counts(1, 0, 0), (NORM, SUM, IDENTITY, GROUPS), "depthwise 1x7", sweep={"channels": (3, 8)}, one_conv=True),
    Family("TinyViM inception", TINYVIM, AxisInception, Counts(4, 4, 4), Counts(2, 0, 0),
           (NORM, SUM, IDENTITY, GROUPS, CHANNELS), "depthwise 1x7 and 7x1", why=COST),
    Family("LSNet mixer", LSNET, LsNetMixer, Counts(2, 2, 2), Counts(1, 0, 0), (NORM, SUM, IDENTITY, GROUPS),
           "depthwise 3x3", sweep={"channels": (3, 8)}, one_conv=True),
    Family("LSNet large-kernel perception", LSNET, LargeKernelPerception, Counts(4, 3, 0), Counts(4, 0, 0), (NORM,),
           "four convolutions", why=COST, channels=32),
    Family("SHViT block", SHVIT, shvit_block, Counts(3, 3, 2), Counts(3, 0, 1), (NORM, SUM, IDENTITY, GROUPS),
           "depthwise 3x3, two 1x1, one sum"),
    Family("SHViT attention", SHVIT, SingleHeadAttention, Counts(2, 2, 0, 1), Counts(2, 0, 0, range(2)), (NORM,),
           "two 1x1", channels=16),
    Family("SHViT head", SHVIT, lambda channels=8: nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, 5)),
           Counts(1, 1, 0), Counts(1, 0, 0), (BEFORE, LAYOUT), "one linear layer", sizes=((), ())),
    Family("StarNet block", STARNET, Star, Counts(5, 2, 1), Counts(5, 0, 1), (NORM,), "five convolutions, one sum",
           why=BORDER | COST, channels=16),
    Family("StarNet chain before padding", STARNET, lambda channels=8: nn.Sequential(
               *conv_norm(2 * channels, channels, bias=True), depthwise(channels, 7, bias=True)),
           Counts(2, 1, 0), Counts(2, 0, 0), (NORM,), "1x1, depthwise 7x7", why=BORDER | COST, channels=16,
           one_conv=False),
    Family("StarNet head", STARNET, PooledHead, Counts(1, 1, 0), Counts(1, 0, 0), (BEFORE, LAYOUT),
           "pool, one linear layer"),
    Family("SwiftFormer encoder", SWIFTFORMER, lambda channels=16: ConvFfn(channels, 3, True), Counts(3, 1, 1, 1),
           Counts(3, 0, 1), (NORM, SCALE), "depthwise 3x3, two 1x1, one sum", why=COST, channels=16),
    Family("SwiftFormer MLP", SWIFTFORMER, SwiftMlp, Counts(2, 1, 1, 1), Counts(2, 0, 1), (SCALE, BEFORE),
           "two 1x1, one sum", sweep={"channels": (4, 8)}),
    Family("EfficientFormerV2 query", EFFICIENTFORMER, LocalGlobalQuery, Counts(2, 1, 1), Counts(2, 0, 0),
           (NORM, SUM, IDENTITY, POOL, GROUPS), "strided depthwise 3x3, 1x1", why=COST, channels=16),
    Family("MobileNetV4 inverted bottleneck", MOBILENET_V4, InvertedBottleneck, Counts(4, 4, 1), Counts(4, 0, 1),
           (NORM,), "four convolutions, one sum", why=COST, channels=16),
    Family("HGNetV2 light convolution", HGNET, light_conv, Counts(2, 2, 0), Counts(2, 0, 0), (NORM,),
           "1x1, depthwise 5x5", why=BORDER | COST, channels=16, one_conv=False),
    Family("FasterNet", FASTERNET, FasterNet, Counts(3, 1, 1), Counts(3, 0, 1), (NORM, CHANNELS),
           "partial 3x3, two 1x1, one sum", why=COST, channels=16),
    Family("FasterNet, slice assignment", FASTERNET, lambda channels=16: FasterNet(channels, True), Counts(3, 1, 1),
           Counts(3, 0, 1), (NORM, CHANNELS), "partial 3x3, two 1x1, one sum", why=COST, channels=16),
    Family("ReDimNet adapter", REDIMNET, SameAdapter, Counts(3, 1, 1), Counts(3, 0, 1), (NORM, CHANNELS),
           "two depthwise, 1x1, one sum", why=COST | ACTIVATION),
    Family("ReDimNet residual block", REDIMNET, LateNorms, Counts(4, 2, 1), Counts(4, 1, 1), (NORM, BIAS_MAP),
           "four convolutions, the norm before the padding, one sum", why=BORDER, channels=32),
)  # fmt: skip


# --- Large kernels ---------------------------------------------------------------------------------------------------


class PadsInside(nn.Conv2d):
    """A depthwise convolution whose `padding` says 0 and whose forward pads."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, 1, self.kernel_size[0] // 2, 1, self.groups)


class RepLk(nn.Module):
    """Norm, pointwise, 31x31 beside 5x5, pointwise; added to the input."""

    def __init__(self, channels: int = 8, kernel: int = 31, small: int = 5, pads_inside: bool = False) -> None:
        super().__init__()
        conv = PadsInside if pads_inside else depthwise
        self.before = nn.BatchNorm2d(channels)
        self.widen = nn.Sequential(*conv_norm(channels, channels), nn.ReLU())
        self.large = nn.Sequential(OrderedDict(conv=conv(channels, kernel), norm=nn.BatchNorm2d(channels)))
        self.small = nn.Sequential(OrderedDict(conv=conv(channels, small), norm=nn.BatchNorm2d(channels)))
        self.act = nn.ReLU()
        self.narrow = conv_norm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.widen(self.before(x))
        large = self.large(y)
        large += self.small(y)
        return x + self.narrow(self.act(large))


def norm_first_ffn(channels: int = 8) -> nn.Module:
    """Norm, pointwise and norm, GELU, pointwise and norm; added to the input."""
    wide = 2 * channels
    return Residual(
        nn.Sequential(nn.BatchNorm2d(channels), conv_norm(channels, wide), nn.GELU(), conv_norm(wide, channels))
    )


DILATED = {
    5: ((3, 1), (3, 2)), 7: ((5, 1), (3, 2), (3, 3)), 9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)), 13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)), 17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}  # fmt: skip


class DilatedBranches(nn.Module):
    """A large depthwise kernel and dilated small ones, their modules found by constructed names."""

    def __init__(self, channels: int = 8, kernel: int = 13) -> None:
        super().__init__()
        self.large = depthwise(channels, kernel)
        self.large_norm = nn.BatchNorm2d(channels)
        self.branches = DILATED[kernel]
        for k, rate in self.branches:
            self.__setattr__(f"conv_k{k}_r{rate}", depthwise(channels, k, dilation=rate))
            self.__setattr__(f"norm_k{k}_r{rate}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.large_norm(self.large(x))
        for k, rate in self.branches:
            conv = self.__getattr__(f"conv_k{k}_r{rate}")
            norm = self.__getattr__(f"norm_k{k}_r{rate}")
            out = out + norm(conv(x))
        return out


class ResponseNorm(nn.Module):
    """Global response normalisation, channels last: a data-dependent scale and a constant shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        size = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
        return (self.gamma * size + 1) * x + self.beta


class ChannelsLast(nn.Module):
    """`(N, C, H, W)` to `(N, H, W, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class LastToFirst(nn.Module):
    """`(N, H, W, C)` to `(N, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous()


class UniRepLk(nn.Module):
    """Dilated branches, norm, gate, a channels-last MLP, norm, layer scale; added to the input."""

    def __init__(self, channels: int = 8, kernel: int = 13) -> None:
        super().__init__()
        wide = 2 * channels
        self.branches = DilatedBranches(channels, kernel)
        self.norm = nn.BatchNorm2d(channels)
        self.gate = Gate(channels)
        self.widen = nn.Sequential(ChannelsLast(), nn.Linear(channels, wide))
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(wide))
        self.narrow = nn.Sequential(nn.Linear(wide, channels, bias=False), LastToFirst(), nn.BatchNorm2d(channels))
        self.scale = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.norm(self.branches(x)))
        y = self.scale.view(1, -1, 1, 1) * self.narrow(self.act(self.widen(y)))
        return x + y


class Bands(nn.Module):
    """A tall and a wide band and a small square."""

    def __init__(self, channels: int = 8, long: int = 51, short: int = 5) -> None:
        super().__init__()
        self.tall = nn.Sequential(depthwise(channels, (long, short)), nn.BatchNorm2d(channels))
        self.wide = nn.Sequential(depthwise(channels, (short, long)), nn.BatchNorm2d(channels))
        self.small = nn.Sequential(depthwise(channels, short), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.tall(x) + self.wide(x)
        return out + self.small(x)


class AddShifted(torch.autograd.Function):
    """Sum copies of the channels, each shifted along one axis: linear, but closed to any reader."""

    @staticmethod
    def forward(ctx: object, x: Tensor, copies: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, height, width = x.shape
        parts = x.view(batch, channels // copies, copies, height, width)
        down = torch.stack([parts[:, :, c, c : height - 2 + c, 1:-1] for c in range(copies)])
        right = torch.stack([parts[:, :, c, 1:-1, c : width - 2 + c] for c in range(copies)])
        return down.sum(0), right.sum(0), parts[:, :, 0, 1:-1, 1:-1].clone()


class ShiftWise(nn.Module):
    """Selected channels through parallel convolutions and shifted sums, the rest passes by."""

    def __init__(self, channels: int = 8, copies: int = 3) -> None:
        super().__init__()
        half = channels // 2
        self.register_buffer("used", torch.arange(0, channels, 2))
        self.register_buffer("passed", torch.arange(1, channels, 2))
        self.copies = copies
        self.convs = nn.ModuleList([conv_norm(half, half * copies, 3, 1, 2, half) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(half) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        used, passed = torch.index_select(x, 1, self.used), torch.index_select(x, 1, self.passed)
        y = 0
        for conv in self.convs:
            y = y + conv(used)
        down, right, still = AddShifted.apply(y, self.copies)
        out = self.norms[0](down) + self.norms[1](right) + self.norms[2](still)
        return torch.cat([out + used, passed], dim=1)


class Peripheral(nn.Module):
    """A large kernel gathered from a small shared one, plus a kernel of positions."""

    def __init__(self, channels: int = 8, kernel: int = 9, shared: int = 5) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(channels, shared * shared))
        self.positions = nn.Parameter(torch.zeros(channels, 1, kernel, kernel))
        axis = (torch.arange(kernel) * shared) // kernel
        self.register_buffer("index", (axis[:, None] * shared + axis[None, :]).flatten())
        self.kernel = kernel
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        index = self.index.expand(x.shape[1], -1)
        weight = torch.gather(self.shared, 1, index).view_as(self.positions) + self.positions
        return self.norm(F.conv2d(x, weight, None, 1, self.kernel // 2, 1, x.shape[1]))


class CircularRows(nn.Module):
    """A learnt position added, then a circular convolution as long as the image is high."""

    def __init__(self, channels: int = 8, height: int = 8) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, channels, height, 1))
        self.conv = nn.Conv2d(channels, channels, (height, 1), groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        return self.conv(torch.cat((x, x[:, :, :-1, :]), dim=2))


class InceptionMixer(nn.Module):
    """Four parts of the channels: identity, square, wide, tall; norm and MLP behind."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        part = channels // 4
        self.sizes = (part,) * 4
        self.square = depthwise(part, 3, bias=True)
        self.wide, self.tall = depthwise(part, (1, 11), bias=True), depthwise(part, (11, 1), bias=True)
        self.norm = nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.Identity(), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
        )
        self.scale = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        still, square, wide, tall = torch.split(x, self.sizes, dim=1)
        y = torch.cat((still, self.square(square), self.wide(wide), self.tall(tall)), dim=1)
        return self.mlp(self.norm(y)).mul(self.scale.reshape(1, -1, 1, 1)) + x


class LargeKernelAttention(nn.Module):
    """Depthwise 5x5, dilated depthwise 7x7 and pointwise make the weights of a product."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.act = nn.GELU()
        self.near = depthwise(channels, 5, bias=True)
        self.far = depthwise(channels, 7, bias=True, dilation=3)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x.clone()
        x = self.act(self.first(x))
        x = x.clone() * self.mix(self.far(self.near(x)))
        return self.last(x) + shortcut


class Wavelets(nn.Module):
    """A convolution of the image plus a convolution of its Haar transform, transformed back."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        low, high = torch.tensor([0.5, 0.5]), torch.tensor([0.5, -0.5])
        filters = torch.stack([torch.outer(a, b) for a in (low, high) for b in (low, high)])
        self.register_buffer("analysis", filters[:, None].repeat(channels, 1, 1, 1))
        self.register_buffer("synthesis", 2 * filters[:, None].repeat(channels, 1, 1, 1))
        self.base, self.base_scale = depthwise(channels, 5, bias=True), Scaled(channels)
        self.inner, self.inner_scale = depthwise(4 * channels, 5), Scaled(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[2], x.shape[3], x.shape[1]
        even = x
        if height % 2 > 0 or width % 2 > 0:
            even = F.pad(x, (0, width % 2, 0, height % 2))
        coefficients = F.conv2d(even, self.analysis, stride=2, groups=channels)
        coefficients = self.inner_scale(self.inner(coefficients))
        detail = F.conv_transpose2d(coefficients, self.synthesis, stride=2, groups=channels)
        return self.base_scale(self.base(x)) + detail[:, :, :height, :width]


REPLKNET = Source("RepLKNet, CVPR 2022", "2203.06717", "DingXiaoH/RepLKNet-pytorch:replknet.py")
UNIREPLKNET = Source("UniRepLKNet, CVPR 2024", "2311.15599", "AILab-CVC/UniRepLKNet:unireplknet.py")
SLAK = Source("SLaK, ICLR 2023", "2207.03620", "VITA-Group/SLaK:models/SLaK.py")
SHIFTWISE = Source("ShiftwiseConv, 2024", "2401.12736", "lidc54/shift-wiseConv:backbones/SW_v2_unirep.py")
PELK = Source("PeLK, CVPR 2024", "2403.07589", "")
PARCNET = Source("ParC-Net, ECCV 2022", "2203.03952", "hkzhang91/ParC-Net:ParC_ConvNets/ParC_convnext.py")
INCEPTIONNEXT = Source("InceptionNeXt, CVPR 2024", "2303.16900", "sail-sg/inceptionnext:models/inceptionnext.py")
VAN = Source("Visual Attention Network, 2022", "2202.09741", "Visual-Attention-Network/VAN-Classification")
WTCONV = Source("WTConv, ECCV 2024", "2407.05848", "BGU-CS-VIL/WTConv:wtconv/wtconv2d.py")

LARGE = (
    Family("RepLKNet block", REPLKNET, RepLk, Counts(4, 5, 2), Counts(3, 0, 1), (NORM, SUM, GROUPS, BEFORE),
           "1x1, depthwise 31x31, 1x1, one sum"),
    Family("RepLKNet, a convolution that pads inside", REPLKNET, lambda channels=8: RepLk(channels, pads_inside=True),
           Counts(4, 5, 2), Counts(3, 0, 1), (NORM, SUM, GROUPS, BEFORE), "1x1, depthwise 31x31, 1x1, one sum"),
    Family("RepLKNet feed-forward", REPLKNET, norm_first_ffn, Counts(2, 3, 1), Counts(2, 0, 1), (NORM, BEFORE),
           "two 1x1, one sum", sweep={"channels": (4, 8)}),
    Family("UniRepLKNet dilated branches", UNIREPLKNET, DilatedBranches, Counts(6, 6, 5), Counts(1, 0, 0),
           (NORM, SUM, GROUPS), "depthwise 13x13", one_conv=True),
    Family("UniRepLKNet dilated branches, every size", UNIREPLKNET, lambda channels=4, kernel=7:
           DilatedBranches(channels, kernel), Counts(4, 4, 3), Counts(1, 0, 0), (NORM, SUM, GROUPS),
           "depthwise, as large as the largest", channels=4,
           sweep={"channels": (3, 4), "kernel": (5, 7, 9, 11, 13, 15, 17)}, one_conv=True),
    Family("UniRepLKNet block", UNIREPLKNET, UniRepLk, Counts(10, 8, 7, 2), Counts(5, 0, 1, 1),
           (NORM, SCALE, SUM, GROUPS, BEFORE, LAYOUT), "depthwise 13x13, gate, two linear layers, one sum"),
    Family("SLaK bands", SLAK, lambda channels=4: Bands(channels), Counts(3, 3, 2), Counts(2, 0, 1),
           (NORM, SUM, GROUPS), "the two bands, the square folded into one of them", why=COST, channels=4,
           one_conv=True),
    Family("ShiftwiseConv", SHIFTWISE, ShiftWise, Counts(2, 5, 4), Counts(2, 3, 4), (NORM, GROUPS),
           "two depthwise 3x3 before the shifts, without their norms", why=AUTOGRAD),
    Family("PeLK", PELK, Peripheral, Counts(1, 1, 0), Counts(1, 1, 0), (), "unchanged", why=SIZED, one_conv=True),
    Family("ParC-Net", PARCNET, CircularRows, Counts(1, 0, 1), Counts(1, 0, range(2)), (BIAS_MAP,),
           "circular convolution and a map", why=PLACE, sizes=((8, 9), (8, 10)), one_conv=False),
    Family("InceptionNeXt", INCEPTIONNEXT, InceptionMixer, Counts(5, 1, 1, 1), Counts(5, 0, 1),
           (NORM, SCALE, BEFORE, CHANNELS), "three depthwise, two 1x1, one sum", why=COST, channels=16),
    Family("VAN large kernel attention", VAN, LargeKernelAttention, Counts(5, 0, 1), Counts(5, 0, 1), (), "unchanged",
           why=BORDER | COST, channels=16),
    Family("VAN chain of the attention", VAN, lambda channels=8: nn.Sequential(
               depthwise(channels, 5, bias=True), depthwise(channels, 7, bias=True, dilation=3),
               nn.Conv2d(channels, channels, 1)), Counts(3, 0, 0), Counts(3, 0, 0), (), "unchanged",
           why=BORDER | COST, one_conv=False),
    Family("WTConv", WTCONV, Wavelets, Counts(4, 0, 1, 2), Counts(range(3, 5), 0, 1, None), (SCALE,),
           "scales into the convolutions", why=PHASE, channels=4, one_conv=False, modules=4),
)  # fmt: skip


# --- Detectors -------------------------------------------------------------------------------------------------------


class ConvModule(nn.Module):
    """Convolution, norm and, unless it is None, an activation."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.act is None:
            return self.bn(self.conv(x))
        return self.act(self.bn(self.conv(x)))


class YoloRepVgg(nn.Module):
    """The three branches of RepVGG over convolution modules without activations."""

    def __init__(self, channels: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.skip = nn.BatchNorm2d(channels) if stride == 1 else None
        self.dense = ConvModule(channels, channels, 3, stride)
        self.point = ConvModule(channels, channels, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "deployed"):
            return self.act(self.deployed(inputs))
        skip = 0 if self.skip is None else self.skip(inputs)
        return self.act(self.dense(inputs) + self.point(inputs) + skip)


class WeightedBottleneck(nn.Module):
    """Two blocks and the input times a learnt number."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.second = YoloRepVgg(channels), YoloRepVgg(channels)
        self.shortcut = True
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.second(self.first(x))
        return outputs + self.alpha * x if self.shortcut else outputs


class CspStage(nn.Module):
    """Two ways of half width, joined by a pointwise module."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        half = channels // 2
        self.left, self.right = (ConvModule(channels, half, act=nn.ReLU()) for _ in range(2))
        self.join = ConvModule(channels, channels, act=nn.ReLU())
        self.blocks = nn.Sequential(YoloRepVgg(half))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((self.blocks(self.left(x)), self.right(x)), dim=1))


class ScaledSum(nn.Module):
    """Scaled 3x3, scaled 1x1 and scaled identity; one norm after the sum."""

    def __init__(self, channels: int = 8, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.dense = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.dense_scale = Scaled(channels, bias)
        self.point = nn.Conv2d(channels, channels, 1, stride, bias=False)
        self.point_scale = Scaled(channels, bias)
        if stride == 1:
            self.skip_scale = Scaled(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense_scale(self.dense(x)) + self.point_scale(self.point(x))
        if hasattr(self, "skip_scale"):
            out += self.skip_scale(x)
        return self.act(self.norm(out))


class SpatialPyramid(nn.Module):
    """Three max pools in a row, all of them joined."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = ConvModule(channels, channels // 2, act=nn.ReLU())
        self.last = ConvModule(2 * channels, channels, act=nn.ReLU())
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.pool(x)
        z = self.pool(y)
        return self.last(torch.cat([x, y, z, self.pool(z)], 1))


class ThreeScales(nn.Module):
    """A transposed convolution brings the small map up, a strided one the large map down; all joined."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2, bias=True)
        self.middle, self.large = (ConvModule(channels, channels, act=nn.ReLU()) for _ in range(2))
        self.down = ConvModule(channels, channels, 3, 2, act=nn.ReLU())
        self.join = ConvModule(3 * channels, channels, act=nn.ReLU())

    def forward(self, small: Tensor, middle: Tensor, large: Tensor) -> Tensor:
        return self.join(torch.cat((self.up(small), self.middle(middle), self.down(self.large(large))), dim=1))


def three_scales(size: Shape, channels: int) -> tuple[Shape, ...]:
    """A map, one twice and one four times as large."""
    return tuple((channels, size[0] * scale, size[1] * scale) for scale in (1, 2, 4))


class YoloRepConv(nn.Module):
    """Branches as bare sequences; the one of the norm is None where the shape forbids it."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1, skip: bool = True) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.skip = nn.BatchNorm2d(channels) if skip and stride == 1 else None
        self.dense = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(channels)
        )
        self.point = nn.Sequential(
            nn.Conv2d(channels, channels, 1, stride, 0, groups=groups, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        return self.act(self.dense(x) + self.point(x) + skip)


class GeneratedRepConv(nn.Module):
    """The same with a generated 3x3 kernel."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dense = GeneratedKernel(channels)
        self.point = conv_norm(channels, channels)
        self.skip = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x)
        out += self.point(x)
        out += self.skip(x)
        return self.act(out)


class ImplicitHead(nn.Module):
    """A learnt vector added before the last layer and another multiplied after it."""

    def __init__(self, channels: int = 8, outputs: int = 6) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.head = nn.Conv2d(channels, outputs, 1)
        self.factor = nn.Parameter(torch.ones(1, outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.factor * self.head(self.added + x)
        batch, outputs, height, width = y.shape
        return y.view(batch, 2, outputs // 2, height, width).permute(0, 1, 3, 4, 2).contiguous().sigmoid()


class DepthwisePair(nn.Module):
    """Depthwise 7x7 beside 3x3."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.large = conv_norm(channels, channels, 7, 1, 3, channels)
        self.small = conv_norm(channels, channels, 3, 1, 1, channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.large(x) + self.small(x))


class InnerPoint(nn.Module):
    """A bare 1x1 inside, one norm after the sum."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, stride, 0, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x) + self.point(x)))


def compact_inverted(channels: int = 8) -> nn.Module:
    """Depthwise, pointwise, the depthwise pair, pointwise, depthwise; added to the input."""
    wide = 2 * channels
    return Residual(
        nn.Sequential(
            conv_norm_act(channels, channels, 3, groups=channels), conv_norm_act(channels, wide), DepthwisePair(wide),
            conv_norm_act(wide, channels), conv_norm_act(channels, channels, 3, groups=channels),
        )
    )  # fmt: skip


class WeightedPoint(nn.Module):
    """The 1x1 branch times a learnt number that is also a condition."""

    def __init__(self, channels: int = 8, alpha: bool = True) -> None:
        super().__init__()
        self.dense = ConvModule(channels, channels, 3)
        self.point = ConvModule(channels, channels, 1)
        self.act = nn.SiLU()
        self.alpha = nn.Parameter(torch.tensor([1.0])) if alpha else None

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha:  # the truth of a parameter
            return self.act(self.dense(x) + self.alpha * self.point(x))
        return self.act(self.dense(x) + self.point(x))


class RepCsp(nn.Module):
    """Two pointwise ways, one with blocks, summed."""

    def __init__(self, channels: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.left, self.right = (ConvModule(channels, channels, act=nn.SiLU()) for _ in range(2))
        self.blocks = nn.Sequential(*[WeightedPoint(channels, alpha=False) for _ in range(blocks)])
        self.last = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        left = self.blocks(self.left(x))
        right = self.right(x)
        return self.last(left + right)


class ReversedBlock(nn.Module):
    """A re-parameterized convolution, an ordinary one, the input."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.second = YoloRepConv(channels, skip=False)
        self.first = ConvModule(channels, channels, 3, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(x)
        y = self.first(y)
        return x + y


class HierarchicalBlock(nn.Module):
    """Parts of the channels, each added to the one before; activations everywhere."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.part = channels // 3
        self.first, self.last = conv_norm_act(channels, channels), conv_norm_act(channels, channels)
        self.ways = nn.ModuleList([nn.Identity()])
        for kernel in (3, 5):
            self.ways.append(nn.Sequential(
                conv_norm_act(self.part, 2 * self.part),
                conv_norm_act(2 * self.part, 2 * self.part, kernel, groups=2 * self.part),
                conv_norm_act(2 * self.part, self.part),
            ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        done = []
        for i, way in enumerate(self.ways):
            part = x[:, i * self.part : (i + 1) * self.part, ...]
            if i >= 1:
                part = part + done[i - 1]
            done.append(way(part))
        return self.last(torch.cat(done, dim=1))


class TextHead(nn.Module):
    """Normed features against text embeddings, a second input."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.point = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.bias = nn.Parameter(torch.zeros([]))
        self.logit_scale = nn.Parameter(-1.0 * torch.ones([]))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.norm(self.point(x))
        text = F.normalize(text, dim=-1, p=2)
        return torch.einsum("bchw,bkc->bkhw", x, text) * self.logit_scale.exp() + self.bias


class BoundTextHead(TextHead):
    """The same with the text bound: a buffer."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__(channels)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("text", torch.randn(classes, channels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.point(x))
        text = F.normalize(self.text, dim=-1, p=2)
        return torch.einsum("bchw,kc->bkhw", x, text) * self.logit_scale.exp() + self.bias


YOLOV6 = Source("YOLOv6, 2022", "2209.02976", "meituan/YOLOv6:yolov6/layers/common.py")
YOLOV6_V3 = Source("YOLOv6 v3.0, 2023", "2302.00386", "meituan/YOLOv6:yolov6/models/efficientrep.py")
YOLOV7 = Source("YOLOv7, CVPR 2023", "2207.02696", "WongKinYiu/yolov7:models/common.py")
YOLOV9 = Source("YOLOv9, ECCV 2024", "2402.13616", "WongKinYiu/yolov9:models/common.py")
YOLOV10 = Source("YOLOv10, NeurIPS 2024", "2405.14458", "THU-MIG/yolov10:ultralytics/nn/modules/block.py")
PP_YOLOE = Source("PP-YOLOE, 2022", "2203.16250", "PaddlePaddle/PaddleDetection:ppdet/modeling/backbones/cspresnet.py")
RT_DETR = Source("RT-DETR, CVPR 2024", "2304.08069", "lyuwenyu/RT-DETR:rtdetrv2_pytorch/hybrid_encoder.py")
DAMO = Source("DAMO-YOLO, 2022", "2211.15444", "tinyvision/DAMO-YOLO:damo/base_models/core/ops.py")
YOLO_MS = Source("YOLO-MS, 2023", "2308.05480", "FishAndWasabi/YOLO-MS:yoloms/models/layers/msblock.py")
RTMDET = Source("RTMDet, 2022", "2212.07784", "open-mmlab/mmdetection:mmdet/models/layers/csp_layer.py")
YOLO_WORLD = Source("YOLO-World, CVPR 2024", "2401.17270", "AILab-CVC/YOLO-World:tools/reparameterize_yoloworld.py")

DETECTORS = (
    Family("YOLOv6 RepVGG block", YOLOV6, YoloRepVgg, Counts(2, 3, 2), Counts(1, 0, 0), (DEAD, NORM, SUM, IDENTITY),
           "3x3", sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("YOLOv6 BottleRep", YOLOV6, WeightedBottleneck, Counts(4, 6, 5, 1), Counts(2, 0, 1, 1),
           (DEAD, NORM, SUM, IDENTITY), "two 3x3, the weighted sum kept", why=ACTIVATION | ROOTS),
    Family("YOLOv6 BepC3", YOLOV6, CspStage, Counts(5, 6, 2), Counts(4, 0, 0), (DEAD, NORM, SUM, IDENTITY),
           "three 1x1, 3x3"),
    Family("YOLOv6 LinearAddBlock", YOLOV6, lambda channels=8, stride=1: ScaledSum(channels, stride, True),
           Counts(2, 1, 4, 3), Counts(1, 0, 0), (NORM, SCALE, SUM, IDENTITY), "3x3",
           sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("YOLOv6 SimSPPF", YOLOV6_V3, SpatialPyramid, Counts(2, 2, 0), Counts(2, 0, 0), (NORM,), "two 1x1"),
    Family("YOLOv6 BiFusion", YOLOV6_V3, ThreeScales, Counts(5, 4, 0), Counts(range(5, 7), 0, range(3)), (NORM,),
           "a transposed convolution, 3x3, three 1x1", sizes=((3, 5), (4, 2)), shapes=three_scales),
    Family("EfficientRep stage", YOLOV6_V3, lambda channels=8: nn.Sequential(
               YoloRepVgg(channels, 2), nn.Sequential(YoloRepVgg(channels), YoloRepVgg(channels))),
           Counts(6, 8, 5), Counts(3, 0, 0), (DEAD, NORM, SUM, IDENTITY), "every block a 3x3"),
    Family("YOLOv7 RepConv", YOLOV7, YoloRepConv, Counts(2, 3, 2), Counts(1, 0, 0),
           (DEAD, NORM, SUM, IDENTITY, GROUPS), "3x3", sweep=GEOMETRY, one_conv=True),
    Family("YOLOv7 RepConv with a generated kernel", YOLOV7, GeneratedRepConv, Counts(2, 3, 2), Counts(1, 0, 0),
           (NORM, SUM, IDENTITY, CONSTANT), "3x3", one_conv=True),
    Family("YOLOv7 implicit head", YOLOV7, ImplicitHead, Counts(1, 0, 1, 1), Counts(1, 0, 0), (SCALE, BEFORE), "1x1",
           example_inputs=True,  # an input of one channel would broadcast against the vector
           sweep={"channels": (4, 8)}),
    Family("YOLOv9 RepConvN", YOLOV9, lambda channels=8, groups=1, stride=1:
           YoloRepConv(channels, groups, stride, False), Counts(2, 2, 1), Counts(1, 0, 0), (DEAD, NORM, SUM, GROUPS),
           "3x3", sweep=GEOMETRY, one_conv=True),
    Family("YOLOv10 depthwise pair", YOLOV10, DepthwisePair, Counts(2, 2, 1), Counts(1, 0, 0), (NORM, SUM, GROUPS),
           "depthwise 7x7", sweep={"channels": (3, 8)}, one_conv=True),
    Family("YOLOv10 Conv2", YOLOV10, InnerPoint, Counts(2, 1, 1), Counts(1, 0, 0), (NORM, SUM, GROUPS), "3x3",
           sweep=GEOMETRY, one_conv=True),
    Family("YOLOv10 compact inverted block", YOLOV10, compact_inverted, Counts(6, 6, 2), Counts(5, 0, 1),
           (NORM, SUM, GROUPS), "three depthwise, two 1x1, one sum"),
    Family("YOLOv10 SCDown", YOLOV10, lambda channels=8: nn.Sequential(
               conv_norm_act(channels, 2 * channels), conv_norm(2 * channels, 2 * channels, 3, 2, 1, 2 * channels)),
           Counts(2, 2, 0), Counts(2, 0, 0), (NORM,), "1x1, depthwise 3x3", why=ACTIVATION),
    Family("PP-YOLOE", PP_YOLOE, WeightedPoint, Counts(2, 2, 1, 1), Counts(1, 0, 0), (NORM, SCALE, SUM), "3x3",
           sweep={"channels": (4, 8)}, one_conv=True),
    Family("RT-DETR CSPRepLayer", RT_DETR, RepCsp, Counts(6, 6, 3), Counts(4, 0, 1), (DEAD, NORM, SUM),
           "two 1x1, two 3x3, one sum"),
    Family("DAMO-YOLO reversed block", DAMO, ReversedBlock, Counts(3, 3, 2), Counts(2, 0, 1), (DEAD, NORM, SUM),
           "two 3x3, one sum"),
    Family("YOLO-MS", YOLO_MS, HierarchicalBlock, Counts(8, 8, 2), Counts(8, 0, 2), (NORM,), "unchanged but for norms",
           why=ACTIVATION | ROOTS, channels=12),
    Family("RTMDet CSPNeXt block", RTMDET, lambda channels=8: Residual(nn.Sequential(
               conv_norm_act(channels, channels, 3), conv_norm_act(channels, channels, 5, groups=channels),
               conv_norm_act(channels, channels))), Counts(3, 3, 1), Counts(3, 0, 1), (NORM,),
           "unchanged but for norms", why=ACTIVATION | ROOTS),
    Family("YOLO-World", YOLO_WORLD, TextHead, Counts(1, 1, 1, 1), Counts(1, 0, 1, 1), (NORM,),
           "1x1, the product with the text", why=DATA | ROOTS,
           shapes=lambda size, channels: ((channels, *size), (5, channels))),
    Family("YOLO-World, text bound", YOLO_WORLD, BoundTextHead, Counts(2, 1, 1, 1), Counts(1, 0, 0),
           (NORM, SCALE, CHAIN, CONSTANT, LAYOUT), "1x1", one_conv=True),
)  # fmt: skip


# --- Super-resolution ------------------------------------------------------------------------------------------------


def filled_border(x: Tensor, value: Tensor) -> Tensor:
    """`x` padded by one pixel of `value` per channel, written as the published blocks write it."""
    x = F.pad(x, (1, 1, 1, 1), "constant", 0)
    value = value.view(1, -1, 1, 1)
    x[:, :, 0:1, :] = value
    x[:, :, -1:, :] = value
    x[:, :, :, 0:1] = value
    x[:, :, :, -1:] = value
    return x


EDGES = {
    "across": ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)),
    "down": ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)),
    "both": ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0)),
}


class PointThenSquare(nn.Module):
    """Raw 1x1 and 3x3 weights with the first bias continued outside."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.k0, self.b0 = nn.Parameter(torch.zeros(middle, channels, 1, 1)), nn.Parameter(torch.zeros(middle))
        self.k1, self.b1 = nn.Parameter(torch.zeros(channels, middle, 3, 3)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = filled_border(F.conv2d(x, self.k0, self.b0, stride=1), self.b0)
        return F.conv2d(y, self.k1, self.b1, stride=1)

    def merged(self) -> tuple[Tensor, Tensor]:
        """One kernel and bias."""
        device = self.k0.get_device()
        if device < 0:
            device = None
        kernel = F.conv2d(self.k1, self.k0.permute(1, 0, 2, 3))
        ones = torch.ones(1, self.b0.numel(), 3, 3, device=device, dtype=self.b0.dtype)
        return kernel, F.conv2d(ones * self.b0.view(1, -1, 1, 1), self.k1).view(-1) + self.b1


class PointThenEdge(nn.Module):
    """1x1, then a fixed edge filter per channel times a learnt scale."""

    def __init__(self, channels: int, edge: str) -> None:
        super().__init__()
        self.k0, self.b0 = nn.Parameter(torch.zeros(channels, channels, 1, 1)), nn.Parameter(torch.zeros(channels))
        self.scale, self.bias = nn.Parameter(torch.zeros(channels, 1, 1, 1)), nn.Parameter(torch.zeros(channels))
        mask = torch.tensor(EDGES[edge]).repeat(channels, 1, 1, 1)
        self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = filled_border(F.conv2d(x, self.k0, self.b0, stride=1), self.b0)
        return F.conv2d(y, self.scale * self.mask, self.bias, stride=1, groups=self.mask.shape[0])

    def merged(self) -> tuple[Tensor, Tensor]:
        """One kernel and bias."""
        depthwise_kernel = self.scale * self.mask
        channels = depthwise_kernel.shape[0]
        dense = torch.zeros(channels, channels, 3, 3, dtype=depthwise_kernel.dtype, device=depthwise_kernel.device)
        for i in range(channels):
            dense[i, i, :, :] = depthwise_kernel[i, 0, :, :]
        kernel = F.conv2d(dense, self.k0.permute(1, 0, 2, 3))
        ones = torch.ones(1, channels, 3, 3, dtype=dense.dtype, device=dense.device)
        return kernel, F.conv2d(ones * self.b0.view(1, -1, 1, 1), dense).view(-1) + self.bias


class EdgeBlock(nn.Module):
    """Edge-oriented branches; in eval mode the merged kernel is made anew at every call, unless `branched`."""

    def __init__(self, channels: int = 8, branched: bool = True, skip: bool = True) -> None:
        super().__init__()
        self.branched = branched
        self.plain = nn.Conv2d(channels, channels, 3, padding=1)
        self.deep = PointThenSquare(channels, 2 * channels)
        self.edges = nn.ModuleList([PointThenEdge(channels, edge) for edge in EDGES])
        self.skip = skip
        self.act = nn.PReLU(num_parameters=channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.branched:
            y = self.plain(x) + self.deep(x)
            for edge in self.edges:
                y = y + edge(x)
            if self.skip:
                y += x
        else:
            kernel, bias = self.merged()
            y = F.conv2d(x, kernel, bias, stride=1, padding=1)
        return self.act(y)

    def merged(self) -> tuple[Tensor, Tensor]:
        """One kernel and bias."""
        kernel, bias = self.plain.weight, self.plain.bias
        for part in (self.deep, *self.edges):
            more, shift = part.merged()
            kernel, bias = kernel + more, bias + shift
        device = kernel.get_device()
        unit = torch.zeros_like(kernel, device=None if device < 0 else device)
        for i in range(unit.shape[0]):
            unit[i, i, 1, 1] = 1.0
        return kernel + unit if self.skip else kernel, bias


class Collapsible(nn.Module):
    """A wide k x k convolution without bias, then pointwise; added to the input where widths agree."""

    def __init__(
        self, channels: int = 8, cout: int | None = None, kernel: int = 3, middle: int = 64,
        act: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        cout = cout or channels
        self.wide = nn.Conv2d(channels, middle, kernel, padding=kernel // 2, bias=False)
        self.narrow = nn.Conv2d(middle, cout, 1)
        self.residual = channels == cout
        self.act = act or nn.PReLU(cout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.wide(x))
        if self.residual:
            y += x
        return self.act(y)


class OnlineCollapsed(nn.Module):
    """The same with its kernel made in forward: a unit image through both convolutions."""

    def __init__(self, channels: int = 8, kernel: int = 3, middle: int = 64) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(middle, channels, kernel, kernel))
        self.narrow = nn.Parameter(torch.zeros(channels, middle, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.kernel = kernel
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        channels, kernel = self.narrow.shape[0], self.kernel
        unit = F.pad(torch.eye(channels, dtype=self.wide.dtype)[..., None, None], [kernel // 2] * 4)
        response = F.conv2d(F.conv2d(unit, self.wide, padding=kernel // 2), self.narrow)
        weight = response.flip(2, 3).permute(1, 0, 2, 3)
        identity = F.pad(torch.eye(channels, dtype=weight.dtype)[..., None, None], [kernel // 2] * 4)
        return self.act(F.conv2d(x, weight + identity, self.bias, padding=kernel // 2))


class CollapsibleNet(nn.Module):
    """Head, residual blocks, a long residual, tail, the input repeated, pixel shuffle."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.head = Collapsible(1, channels, 5)
        self.blocks = nn.Sequential(*[Collapsible(channels) for _ in range(2)])
        self.tail = Collapsible(channels, 4, 5, act=nn.Identity())
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x)
        y = self.tail(self.blocks(first) + first)
        return self.shuffle(y + torch.repeat_interleave(x, 4, dim=1))


class ExpandSqueeze(nn.Module):
    """Two expand-and-squeeze ways with a norm between, beside a clean residual."""

    def __init__(self, channels: int = 8, point_first: bool = False) -> None:
        super().__init__()
        wide = 2 * channels
        square = nn.Conv2d(wide if point_first else channels, channels if point_first else wide, 3, 1, 1, bias=False)
        point = nn.Conv2d(channels if point_first else wide, wide if point_first else channels, 1)
        ways = [(point, square) if point_first else (square, point)]
        ways.append(tuple(type(c)(c.in_channels, c.out_channels, c.kernel_size, 1, c.padding) for c in ways[0]))
        self.ways = nn.ModuleList([nn.Sequential(a, nn.BatchNorm2d(wide), b) for a, b in ways])
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.ways[0](x) + self.ways[1](x))


class LocalFeatures(nn.Module):
    """Three activated convolutions, a residual and a spatial attention."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)])
        self.act = nn.LeakyReLU(0.05, inplace=True)
        self.point = nn.Conv2d(channels, channels, 1)
        few = channels // 4
        self.squeeze, self.side = nn.Conv2d(channels, few, 1), nn.Conv2d(few, few, 1)
        self.stride, self.deep = nn.Conv2d(few, few, 3, stride=2), nn.Conv2d(few, few, 3, padding=1)
        self.restore = nn.Conv2d(few, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv in self.convs:
            out = self.act(conv(out))
        out = self.point(out + x)
        few = self.squeeze(out)
        pooled = F.max_pool2d(self.stride(few), kernel_size=7, stride=3)
        pooled = F.interpolate(self.deep(pooled), (x.size(2), x.size(3)), mode="bilinear", align_corners=False)
        return out * torch.sigmoid(self.restore(pooled + self.side(few)))


class PlainMobile(nn.Module):
    """1x1, a border of its bias, 3x3 times an attention that knows no data, an inner sum, 1x1, an outer sum."""

    def __init__(self, channels: int = 8, ratio: int = 2) -> None:
        super().__init__()
        wide = ratio * channels
        self.widen, self.narrow = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
        self.square = nn.Conv2d(wide, wide, 3, 1, 0)
        self.seed = nn.Parameter(torch.zeros(1, wide))
        self.attention = nn.Sequential(nn.Linear(wide, wide // 2), nn.SiLU(), nn.Linear(wide // 2, wide), nn.Sigmoid())
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        wide = self.widen(x)
        y = self.square(filled_border(wide, self.widen.bias))
        y = self.attention(self.seed).view(1, -1, 1, 1) * y
        return self.act(self.narrow(y + wide) + x)


class OneChannelAgain(nn.Module):
    """A convolution whose first output channel is replaced by a mixture of all."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, 1, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(torch.cat([self.mix(y), y[:, 1:]], dim=1))


class ResidualInResidual(nn.Module):
    """1x1, a border of its bias, 3x3 plus the unpadded 1x1, 1x1, plus the input."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.square = nn.Conv2d(2 * channels, 2 * channels, 3, 1, 0)
        self.reduce = nn.Conv2d(2 * channels, channels, 1)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(x)
        inner = out
        out = self.square(filled_border(out, self.expand.bias))
        out = out + inner
        out = self.reduce(out)
        out += x
        return self.act(out)


class EdgeEnhanced(nn.Module):
    """3x3, an unbiased 1x1 before a padded 3x3, the input and edge filters."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.plain = nn.Conv2d(channels, channels, 3, 1, 1)
        self.deep = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        )
        self.edges = nn.ModuleList([PointThenEdge(channels, edge) for edge in EDGES])
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.plain(x) + self.deep(x) + x + sum(edge(x) for edge in self.edges))


class PaddedTriple(nn.Module):
    """Zeros around the input, 1x1, 3x3, 1x1, beside a 1x1."""

    def __init__(self, channels: int = 8, stride: int = 1) -> None:
        super().__init__()
        wide = 2 * channels
        self.side = nn.Conv2d(channels, channels, 1, stride)
        self.triple = nn.Sequential(
            nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, wide, 3, stride, 0), nn.Conv2d(wide, channels, 1)
        )
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.triple(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.side(x))


class SelfUpdating(PaddedTriple):
    """The same, but in eval mode it first writes the merged weights into a convolution and runs that."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.deployed = nn.Conv2d(channels, channels, 3, 1, 1)
        for parameter in self.deployed.parameters():
            parameter.requires_grad = False

    def update(self) -> None:
        """Merge, in place."""
        first, square, last = (layer.weight.data for layer in self.triple)
        whole = torch.einsum("om,mnhw,nc->ochw", last[:, :, 0, 0], square, first[:, :, 0, 0])
        bias = self.triple[1].bias.data + square.sum((2, 3)) @ self.triple[0].bias.data
        whole = whole + F.pad(self.side.weight.data, [1, 1, 1, 1])
        self.deployed.weight.data = whole
        self.deployed.bias.data = self.triple[2].bias.data + last[:, :, 0, 0] @ bias + self.side.bias.data

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        self.update()
        return self.act(self.deployed(x))


def grouped_blocks(channels: int, count: int) -> nn.Sequential:
    """Grouped 3x3, ReLU, pointwise, with nothing between the blocks."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(channels, channels, 1)]
    return nn.Sequential(*layers)


class GroupedNet(nn.Module):
    """Grouped blocks beside a 3x3 of the input, joined by a pointwise layer."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
        self.blocks = grouped_blocks(channels, 3)
        self.side = nn.Conv2d(3, channels, 3, padding=1)
        self.join = nn.Sequential(nn.Conv2d(2 * channels, 12, 1), nn.ReLU())
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.join(torch.cat([self.blocks(self.head(x)), self.side(x)], dim=1)))


class AnchoredNet(nn.Module):
    """Activated convolutions plus the input repeated, before the pixel shuffle."""

    def __init__(self, channels: int = 3, scale: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Hardtanh(0, 1))
        self.last = nn.Conv2d(8, channels * scale**2, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        anchor = torch.cat([x] * self.scale**2, dim=1)
        return F.pixel_shuffle(self.last(self.body(x)) + anchor, self.scale)


class AnchoredConv(nn.Module):
    """The last layer and a nearest-neighbour anchor (0/1 weights) on the same input."""

    def __init__(self, channels: int = 4, scale: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * scale**2, 3, padding=1)
        self.anchor = nn.Conv2d(channels, channels * scale**2, 1, bias=False)
        with torch.no_grad():
            self.anchor.weight.copy_(torch.repeat_interleave(torch.eye(channels), scale**2, dim=0)[..., None, None])
        self.anchor.weight.requires_grad = False
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x) + self.anchor(x))


class ShuffledBranches(nn.Module):
    """Two convolutions, each with its own pixel shuffle, summed after it."""

    def __init__(self, channels: int = 8, scale: int = 2) -> None:
        super().__init__()
        wide = channels * scale**2
        self.square = nn.Sequential(nn.Conv2d(channels, wide, 3, padding=1), nn.PixelShuffle(scale))
        self.point = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.point(x)


class UnshuffledPoint(nn.Module):
    """Pixels into channels, then pointwise."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        self.point = nn.Sequential(*conv_norm(4 * channels, 2 * channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.unshuffle(x))


class TwoStreams(nn.Module):
    """An image stream fed by a residual stream."""

    def __init__(self, image: int = 3, residual: int = 9, layers: int = 2) -> None:
        super().__init__()
        self.first_image, self.first_residual = (nn.Conv2d(image, c, 3, padding=1) for c in (image, residual))
        def convs(cin: int, cout: int) -> nn.ModuleList:
            return nn.ModuleList([nn.Conv2d(cin, cout, 3, padding=1) for _ in range(layers)])

        self.image, self.across, self.residual = convs(image, image), convs(residual, image), convs(residual, residual)
        self.last_image, self.last_residual = (nn.Conv2d(c, 4 * image, 3, padding=1) for c in (image, residual))

    def forward(self, x: Tensor) -> Tensor:
        x, residual = F.relu(self.first_image(x)), F.relu(self.first_residual(x))
        for image, across, further in zip(self.image, self.across, self.residual, strict=True):
            x, residual = F.relu(image(x) + across(residual)), F.relu(further(residual))
        return F.pixel_shuffle(self.last_image(x) + self.last_residual(residual), 2)


class MaxShuffle(nn.Module):
    """One convolution, pixel shuffle, the maximum over channels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * 4, 5, padding=2, bias=False)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(self.shuffle(self.conv(x)), dim=1, keepdim=True)[0]


class ClassicUpscale(nn.ConvTranspose2d):
    """A transposed convolution by class, but one that pads and crops by itself."""

    def __init__(self, channels: int, scale: int = 2) -> None:
        super().__init__(channels, channels, 2 * scale, scale, groups=channels, bias=False)
        self.scale = scale
        self.weight.data.fill_(0.25)
        self.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        y = F.conv_transpose2d(x, self.weight, None, self.scale, 0, 0, self.groups)
        crop = self.scale + self.scale // 2
        return y[..., crop:-crop, crop:-crop]


class TemplateMatching(nn.Module):
    """Softmax-weighted templates beside a classic upscaling."""

    def __init__(self, channels: int = 1, templates: int = 3) -> None:
        super().__init__()
        self.templates = templates
        self.filter = nn.Conv2d(channels, 2 * templates * 4, 3, padding=1, bias=False)
        self.shuffle = nn.PixelShuffle(2)
        self.upscale = ClassicUpscale(channels)

    def forward(self, x: Tensor) -> Tensor:
        value, key = torch.split(self.shuffle(self.filter(x)), [self.templates, self.templates], dim=1)
        return torch.sum(value * torch.softmax(key, dim=1), dim=1, keepdim=True) + self.upscale(x)


ECBSR = Source("ECBSR, ACM MM 2021", "", "xindongzhang/ECBSR:models/ecb.py")
SESR = Source("SESR, MLSys 2022", "2103.09404", "ARM-software/sesr:models/model_utils.py")
REPSR = Source("RepSR, ACM MM 2022", "2205.05671", "")
RLFN = Source("RLFN, CVPRW 2022", "2205.07514", "bytedance/RLFN:model/block.py")
PLAINUSR = Source("PlainUSR, ACCV 2024", "", "icandle/PlainUSR:2024_PlainUSR_ACCV/archs/PlainUSR_train_arch.py")
FMEN = Source("FMEN, CVPRW 2022", "2204.08397", "ofsoundof/NTIRE2022_ESR:models/team03_fmen.py")
EFDN = Source("EFDN, CVPRW 2022", "", "ofsoundof/NTIRE2022_ESR:models/team01_efdn.py")
SPAN = Source("SPAN, CVPRW 2024", "2311.12770", "hongyuanyu/SPAN:basicsr/archs/span_arch.py")
XLSR = Source("XLSR, 2021", "", "quic/aimet-model-zoo:aimet_zoo_torch/quicksrnet/model/blocks.py")
ABPN = Source("ABPN, 2021", "", "quic/aimet-model-zoo:aimet_zoo_torch/quicksrnet/model/models.py")
QUICKSRNET = Source("QuickSRNet, 2023", "", "quic/aimet-model-zoo:aimet_zoo_torch/quicksrnet/model/models.py")
ETDS = Source("ETDS, CVPR 2023", "", "ECNUSR/ETDS:core/archs/ir/ETDS/arch.py")
EDGESR = Source("edgeSR, WACV 2022", "", "pnavarre/eSR:models.py")
RESOLUTION = (
    Family("ECBSR, branches", ECBSR, EdgeBlock, Counts(9, 0, 5), Counts(1, 0, 0),
           (SUM, IDENTITY, CHAIN, PAD, GROUPS, CONSTANT), "3x3", sweep={"channels": (4, 8)}, one_conv=True),
    Family("ECBSR, kernel made in eval mode", ECBSR, lambda channels=8: EdgeBlock(channels, branched=False),
           Counts(1, 0, 0), Counts(1, 0, 0), (CONSTANT,), "3x3", sweep={"channels": (4, 8)}, one_conv=True),
    Family("SESR block", SESR, Collapsible, Counts(2, 0, 1), Counts(1, 0, 0), (SUM, IDENTITY, CHAIN), "3x3",
           sweep={"channels": (4, 8), "kernel": (3, 5)}, one_conv=True),
    Family("SESR head", SESR, lambda: Collapsible(1, 16, 5), Counts(2, 0, 0), Counts(1, 0, 0), (CHAIN,), "5x5",
           channels=1, one_conv=True),
    Family("SESR, kernel made in forward", SESR, OnlineCollapsed, Counts(1, 0, 0), Counts(1, 0, 0), (CONSTANT,), "3x3",
           one_conv=True),
    Family("SESR net", SESR, CollapsibleNet, Counts(8, 0, 4), Counts(4, 0, 2), (SUM, IDENTITY, CHAIN),
           "every block one convolution, the long sums kept", why=ROOTS, channels=1),
    Family("RepSR", REPSR, ExpandSqueeze, Counts(4, 2, 2), Counts(1, 0, 0), (NORM, SUM, IDENTITY, CHAIN), "3x3",
           sweep={"channels": (4, 8)}, one_conv=True),
    Family("RepSR, 1x1 first", REPSR, lambda channels=8: ExpandSqueeze(channels, True), Counts(4, 2, 2),
           Counts(4, 0, 2), (NORM,), "two ways of two", why=BORDER, one_conv=False),
    Family("RLFN", RLFN, LocalFeatures, Counts(9, 0, 2), Counts(9, 0, 2), (), "unchanged",
           why=ACTIVATION | ROOTS | COST, channels=16, sizes=((25, 21), (24, 20))),
    Family("PlainUSR MBConv", PLAINUSR, PlainMobile, Counts(3, 0, 2, 1), Counts(1, 0, 0),
           (SCALE, SUM, IDENTITY, CHAIN, PAD, CONSTANT, NESTED), "3x3", sweep={"channels": (4, 8)}, one_conv=True),
    Family("PlainUSR partial channels", PLAINUSR, OneChannelAgain, Counts(2, 0, 0), Counts(1, 0, 0), (CHAIN, CHANNELS),
           "3x3", sweep={"channels": (4, 8)}, one_conv=True),
    Family("FMEN", FMEN, ResidualInResidual, Counts(3, 0, 2), Counts(1, 0, 0), (SUM, IDENTITY, CHAIN, PAD, NESTED),
           "3x3", sweep={"channels": (4, 8)}, one_conv=True),
    Family("EFDN", EFDN, EdgeEnhanced, Counts(9, 0, 5), Counts(1, 0, 0), (SUM, IDENTITY, CHAIN, PAD, GROUPS, CONSTANT),
           "3x3", sweep={"channels": (4, 8)}, one_conv=True),
    Family("SPAN, branches", SPAN, PaddedTriple, Counts(4, 0, 1), Counts(1, 0, 0), (SUM, CHAIN, PAD), "3x3",
           sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("SPAN, weights written in forward", SPAN, SelfUpdating, Counts(1, 0, 0), Counts(1, 0, 0), (),
           "unchanged", why=IMPURE, modules=5),
    Family("XLSR", XLSR, GroupedNet, Counts(9, 0, 0), Counts(range(8, 10), 0, range(2)), (CHANNELS,),
           "grouped 3x3 and 1x1 stay apart", why=BORDER | COST, channels=3),
    Family("XLSR chain between blocks", XLSR, lambda channels=16: nn.Sequential(
               nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1, groups=4)),
           Counts(2, 0, 0), Counts(2, 0, 0), (), "unchanged", why=BORDER | COST, channels=16, one_conv=False),
    Family("ABPN", ABPN, AnchoredNet, Counts(2, 0, 1), Counts(2, 0, 1), (), "unchanged", why=ROOTS, channels=3),
    Family("SESR anchor on the same input", SESR, AnchoredConv, Counts(2, 0, 1), Counts(1, 0, 0), (SUM,),
           "3x3, pixel shuffle", channels=4),
    Family("QuickSRNet, sum of shuffled branches", QUICKSRNET, ShuffledBranches, Counts(2, 0, 1), Counts(1, 0, 0),
           (SUM, SHUFFLE), "3x3, pixel shuffle", sweep={"channels": (4, 8), "scale": (2, 3)}),
    Family("QuickSRNet, unshuffled pixels", QUICKSRNET, UnshuffledPoint, Counts(1, 1, 0), Counts(1, 0, 0),
           (NORM, SHUFFLE), "2x2 of stride 2, or 1x1 on unshuffled pixels", channels=4, sizes=((6, 10), (8, 4))),
    Family("ETDS", ETDS, TwoStreams, Counts(10, 0, 3), Counts(10, 0, 3), (), "unchanged", why=ROOTS, channels=3),
    Family("edgeSR maximum", EDGESR, MaxShuffle, Counts(1, 0, 0), Counts(1, 0, 0), (), "unchanged", channels=3),
    Family("edgeSR template matching", EDGESR, TemplateMatching, Counts(2, 0, 1), Counts(2, 0, 1), (), "unchanged",
           why=ROOTS | PHASE, channels=1),
)  # fmt: skip


# --- Linear over-parameterization and generated weights --------------------------------------------------------------


def expanded_conv(
    channels: int = 8, stride: int = 1, groups: int = 1, rate: int = 4, bias: bool = True
) -> nn.Sequential:
    """1x1 with the padding, 3x3 without, 1x1; norm and ReLU."""
    wide = rate * channels
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1, padding=1, groups=groups, bias=bias),
        nn.Conv2d(wide, wide, 3, stride, groups=groups, bias=bias),
        nn.Conv2d(wide, channels, 1, groups=groups, bias=bias),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def expanded_kernel(channels: int = 4) -> nn.Sequential:
    """A 7x7 as three 3x3, all of the padding on the first."""
    wide = 4 * channels
    return nn.Sequential(
        nn.Conv2d(channels, wide, 3, padding=3), nn.Conv2d(wide, wide, 3), nn.Conv2d(wide, 2 * channels, 3), nn.ReLU()
    )


def expanded_linear(channels: int = 8) -> nn.Sequential:
    """One linear layer as three."""
    wide = 4 * channels
    return nn.Sequential(nn.Linear(channels, wide), nn.Linear(wide, wide), nn.Linear(wide, channels), nn.ReLU())


class OverParameterized(nn.Module):
    """A kernel that is a depthwise one applied to a conventional one, made by einsum."""

    def __init__(self, channels: int = 8, groups: int = 1, padding_mode: str = "zeros") -> None:
        super().__init__()
        taps = 9
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, taps))
        self.depth = nn.Parameter(torch.zeros(channels, taps, taps))
        self.register_buffer("diagonal", torch.eye(taps).expand(channels, -1, -1).clone())
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.padding_mode = groups, padding_mode
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        channels, width = self.weight.shape[:2]
        depth = (self.depth + self.diagonal).reshape(channels // width, width, *self.depth.shape[1:])
        weight = self.weight.reshape(channels // width, width, width, -1)
        kernel = torch.einsum("gmst,gomt->goms", depth, weight).reshape(channels, width, 3, 3)
        if self.padding_mode != "zeros":
            x = F.pad(x, (1, 1, 1, 1), mode=self.padding_mode)
            y = F.conv2d(x, kernel, self.bias, 1, 0, 1, self.groups)
        else:
            y = F.conv2d(x, kernel, self.bias, 1, 1, 1, self.groups)
        return self.act(self.norm(y))


class GeneratedKernel(nn.Module):
    """Six kernels, each scaled by a row of a matrix, summed in forward; one convolution and norm."""

    def __init__(self, channels: int = 8, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        width = channels // groups
        self.origin = nn.Parameter(torch.zeros(channels, width, 3, 3))
        self.average_point = nn.Parameter(torch.zeros(channels, width, 1, 1))
        self.frequency_point = nn.Parameter(torch.zeros(channels, width, 1, 1))
        self.register_buffer("average", torch.full((channels, 3, 3), 1 / 9))
        waves = torch.cos(math.pi * (torch.arange(3) + 0.5)[None, :] * torch.arange(channels)[:, None] / 3)
        self.register_buffer("frequency", waves[:, :, None] * waves[:, None, :])
        self.first = nn.Parameter(torch.zeros(width, width, 1, 1))
        self.second = nn.Parameter(torch.zeros(channels, width, 3, 3))
        self.point = nn.Parameter(torch.zeros(channels, width, 1, 1))
        self.depthwise = nn.Parameter(torch.zeros(2 * width, 1, 3, 3))
        self.pointwise = nn.Parameter(torch.zeros(channels, 2 * width, 1, 1))
        self.rows = nn.Parameter(torch.zeros(6, channels))
        self.norm = nn.BatchNorm2d(channels)
        self.groups, self.stride = groups, stride

    def kernel(self) -> Tensor:
        """The kernel of the day, `(out, in / groups, 3, 3)`."""
        def scaled(weight: Tensor, row: int) -> Tensor:
            return torch.einsum("oihw,o->oihw", weight, self.rows[row, :])

        weight = scaled(self.origin, 0)
        weight = weight + scaled(torch.einsum("oi,ohw->oihw", self.average_point[..., 0, 0], self.average), 1)
        weight = weight + scaled(torch.einsum("oi,ohw->oihw", self.frequency_point[..., 0, 0], self.frequency), 2)
        unit = torch.eye(self.first.shape[0], dtype=weight.dtype)
        weight = weight + scaled(torch.einsum("ti,othw->oihw", self.first[..., 0, 0] + unit, self.second), 3)
        weight = weight + scaled(F.pad(self.point, [1, 1, 1, 1]), 4)
        channels, width = weight.shape[:2]
        separable = self.depthwise.view(2, width, 3, 3), self.pointwise.view(channels, 2, width)
        return weight + scaled(torch.einsum("mihw,omi->oihw", *separable), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.kernel(), None, self.stride, 1, 1, self.groups))


class ConvolvedKernel(nn.Module):
    """A 7x7 kernel made by convolving 3x3 kernels with each other."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(torch.zeros(channels, channels, 3, 3)) for _ in range(3)])
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernels[0].transpose(0, 1)
        for other in self.kernels[1:]:
            kernel = F.conv2d(kernel, other, padding=2)
        return self.norm(F.conv2d(x, kernel.transpose(0, 1), None, 1, 3))


class DiracConv(nn.Conv2d):
    """A convolution by class whose kernel is a scaled identity plus a scaled, normed weight."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2)
        self.alpha = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.beta = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.register_buffer("delta", nn.init.dirac_(torch.empty(channels, channels, kernel, kernel)))

    def forward(self, x: Tensor) -> Tensor:
        flat = F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return F.conv2d(x, self.alpha * self.delta + self.beta * flat, self.bias, self.stride, self.padding)


class DiracConv1d(nn.Conv1d):
    """The same along one axis."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2)
        self.alpha = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("delta", nn.init.dirac_(torch.empty(channels, channels, kernel)))

    def forward(self, x: Tensor) -> Tensor:
        flat = F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return F.conv1d(x, self.alpha * self.delta + flat, self.bias, self.stride, self.padding)


class RefocusedConv(nn.Module):
    """A frozen kernel plus a grouped convolution of that kernel, seen as an image."""

    def __init__(self, channels: int = 8, groups: int = 1) -> None:
        super().__init__()
        width = channels // groups
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frozen", torch.randn(channels, width, 3, 3, generator=generator) / math.sqrt(9 * width))
        planes = channels * width
        self.refocus = nn.Conv2d(planes, planes, 3, padding=1, groups=planes // width, bias=False)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()
        self.groups, self.planes = groups, planes

    def forward(self, x: Tensor) -> Tensor:
        image = self.frozen.view(1, self.planes, 3, 3)
        kernel = self.frozen + self.refocus(image).view(*self.frozen.shape)
        return self.act(self.norm(F.conv2d(x, kernel, None, 1, 1, 1, self.groups)))


class SeriesActivation(nn.ReLU):
    """An activation by class: ReLU, then a depthwise convolution with a raw weight, then norm."""

    def __init__(self, channels: int, reach: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, 2 * reach + 1, 2 * reach + 1))
        self.norm = nn.BatchNorm2d(channels)
        self.channels, self.reach = channels, reach

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(super().forward(x), self.weight, None, padding=self.reach, groups=self.channels))


class Vanilla(nn.Module):
    """Two normed pointwise layers with a leaky ReLU between whose slope is a Python number."""

    def __init__(self, channels: int = 16, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope
        self.first = conv_norm(channels, channels, bias=True)
        self.second = conv_norm(channels, 2 * channels, bias=True)
        self.pool = nn.MaxPool2d(2)
        self.act = SeriesActivation(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.leaky_relu(x, self.slope)
        return self.act(self.pool(self.second(x)))


class VanillaHead(nn.Module):
    """Global pool, dropout, normed pointwise, leaky ReLU, pointwise."""

    def __init__(self, channels: int = 16, classes: int = 10, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope
        pool = nn.AdaptiveAvgPool2d((1, 1))
        self.first = nn.Sequential(pool, nn.Dropout(0.1), *conv_norm(channels, classes, bias=True))
        self.second = nn.Conv2d(classes, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), self.slope)
        return self.second(x).view(x.size(0), -1)


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight is standardized by a batch norm in training mode, at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


EXPANDNETS = Source("ExpandNets, NeurIPS 2020", "1811.10495", "GUOShuxuan/expandnets:exp_cifar/models/cifar_tiny_3.py")
EXPAND_MOBILE = Source("ExpandNets, NeurIPS 2020", "1811.10495", "GUOShuxuan/expandnets:exp_imagenet/models")
DOCONV = Source("DO-Conv, TIP 2022", "2006.12030", "yangyanli/DO-Conv:do_conv_pytorch.py")
OREPA = Source("OREPA, CVPR 2022", "2204.00826", "JUGGHM/OREPA_CVPR2022:blocks.py")
REPOPT = Source("RepOptimizer, ICLR 2023", "2205.15242", "DingXiaoH/RepOptimizers:repoptimizer/repoptvgg_impl.py")
DIRACNET = Source("DiracNets, 2017", "1706.00388", "szagoruyko/diracnets:diracconv.py")
REFCONV = Source("RefConv, 2023", "2310.10563", "Aiolus-X/RefConv:ImageNet-MobileNetv3-RefConv.py")
VANILLANET = Source("VanillaNet, NeurIPS 2023", "2305.12972", "huawei-noah/VanillaNet:models/vanillanet.py")
STANDARDIZED = Source("Weight standardization", "", "huggingface/pytorch-image-models:timm/layers/std_conv.py")
PARAMETRIZED = Source("Weight and spectral norm", "", "pytorch/pytorch:torch/nn/utils/parametrizations.py")

GENERATED = (
    Family("ExpandNets, wide layer", EXPANDNETS, expanded_conv, Counts(3, 1, 0), Counts(1, 0, 0), (NORM, CHAIN), "3x3",
           sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("ExpandNets, wide kernel", EXPANDNETS, expanded_kernel, Counts(3, 0, 0), Counts(1, 0, 0), (CHAIN,), "7x7",
           channels=4, one_conv=True),
    Family("ExpandNets, linear layer", EXPANDNETS, expanded_linear, Counts(3, 0, 0), Counts(1, 0, 0), (CHAIN, LAYOUT),
           "one linear layer", sizes=((), ()), sweep={"channels": (4, 8)}),
    Family("ExpandNets, MobileNet", EXPAND_MOBILE, lambda channels=8: expanded_conv(channels, bias=False),
           Counts(3, 1, 0), Counts(1, 0, 0), (NORM, CHAIN), "3x3", one_conv=True),
    Family("ExpandNets, MobileNet depthwise", EXPAND_MOBILE, lambda channels=8, stride=1:
           expanded_conv(channels, stride, channels, bias=False), Counts(3, 1, 0), Counts(1, 0, 0),
           (NORM, CHAIN, GROUPS), "depthwise 3x3", sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("DO-Conv", DOCONV, OverParameterized, Counts(1, 1, 0), Counts(1, 0, 0), (NORM, GROUPS, CONSTANT), "3x3",
           sweep=WIDTHS, one_conv=True),
    Family("DO-Conv, reflected border", DOCONV, lambda channels=8: OverParameterized(channels, padding_mode="reflect"),
           Counts(1, 1, 0), Counts(1, 0, 0), (NORM, PAD, CONSTANT), "3x3", one_conv=False),
    Family("OREPA", OREPA, GeneratedKernel, Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT), "3x3", sweep=GEOMETRY,
           one_conv=True),
    Family("OREPA, large kernel", OREPA, ConvolvedKernel, Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT), "7x7",
           one_conv=True),
    Family("RepOpt-VGG", REPOPT, lambda channels=8: nn.Sequential(*conv_norm(channels, channels, 3, 1, 1), nn.ReLU()),
           Counts(1, 1, 0), Counts(1, 0, 0), (NORM,), "3x3", one_conv=True),
    Family("RepOpt-VGG, constant scales", REPOPT, ScaledSum, Counts(2, 1, 2, 3), Counts(1, 0, 0),
           (NORM, SCALE, SUM, IDENTITY), "3x3", sweep={"channels": (4, 8), "stride": (1, 2)}, one_conv=True),
    Family("DiracNet", DIRACNET, lambda channels=8, kernel=3: nn.Sequential(DiracConv(channels, kernel), nn.ReLU()),
           Counts(1, 0, 0), Counts(1, 0, 0), (CONSTANT,), "3x3", sweep={"channels": (4, 8), "kernel": (1, 3, 5)},
           one_conv=True),
    Family("DiracNet, one axis", DIRACNET, lambda channels=8: nn.Sequential(
               DiracConv1d(channels), nn.BatchNorm1d(channels), nn.ReLU()),
           Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT, DIMENSIONS), "3", sizes=((13,), (10,)), one_conv=True),
    Family("RefConv", REFCONV, RefocusedConv, Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT), "3x3", sweep=WIDTHS,
           one_conv=True),
    Family("VanillaNet, slope 1", VANILLANET, Vanilla, Counts(3, 3, 0), Counts(2, 0, 0), (NORM, CHAIN, SLOPE_ONE),
           "1x1, depthwise 7x7", channels=16),
    Family("VanillaNet, slope 0.3", VANILLANET, lambda channels=16: Vanilla(channels, 0.3), Counts(3, 3, 0),
           Counts(3, 0, 0), (NORM,), "two 1x1, depthwise 7x7", why=SLOPE, channels=16),
    Family("VanillaNet head", VANILLANET, VanillaHead, Counts(2, 1, 0), Counts(1, 0, 0),
           (NORM, CHAIN, LAYOUT, SLOPE_ONE), "pool, 1x1", channels=16),
    Family("Standardized weight", STANDARDIZED, lambda channels=8: nn.Sequential(
               StandardizedConv(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()),
           Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT), "3x3", one_conv=True),
    Family("Weight norm", PARAMETRIZED, lambda channels=8: nn.Sequential(
               parametrizations.weight_norm(nn.Conv2d(channels, channels, 3, padding=1)), nn.BatchNorm2d(channels),
               nn.ReLU()), Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT), "3x3", one_conv=True),
    Family("Spectral norm", PARAMETRIZED, lambda channels=8: nn.Sequential(
               parametrizations.spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)), nn.BatchNorm2d(channels),
               nn.ReLU()), Counts(1, 1, 0), Counts(1, 0, 0), (NORM, CONSTANT), "3x3", one_conv=True),
)  # fmt: skip


# --- Adapters and transformers ---------------------------------------------------------------------------------------


class LowRankLinear(nn.Linear):
    """A linear layer plus a scaled low-rank one; with `merges`, `eval()` writes the sum into the weight."""

    def __init__(self, channels: int = 16, rank: int = 2, alpha: int = 4, merges: bool = False) -> None:
        super().__init__(channels, channels)
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(rank, channels)), nn.Parameter(torch.zeros(channels, rank))
        self.scaling = alpha / rank
        self.drop = nn.Dropout(0.1)
        self.merges, self.merged = merges, False

    def train(self, mode: bool = True) -> "LowRankLinear":
        super().train(mode)
        if self.merges and self.merged == mode:
            sign = -1 if mode else 1
            self.weight.data += sign * (self.lora_b @ self.lora_a) * self.scaling
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, bias=self.bias)
        result = F.linear(x, self.weight, bias=self.bias)
        result += (self.drop(x) @ self.lora_a.transpose(0, 1) @ self.lora_b.transpose(0, 1)) * self.scaling
        return result


class MergedLowRank(nn.Linear):
    """A joint projection with low-rank parts for some of its thirds, put in place by an index."""

    def __init__(self, channels: int = 16, rank: int = 2, enabled: tuple[bool, ...] = (True, False, True)) -> None:
        super().__init__(channels, channels * len(enabled))
        used = sum(enabled)
        self.lora_a = nn.Parameter(torch.zeros(rank * used, channels))
        self.lora_b = nn.Parameter(torch.zeros(channels * used, rank))
        index = torch.zeros(len(enabled), channels, dtype=torch.bool)
        index[list(enabled), :] = True
        self.index = index.view(-1)
        self.used, self.scaling = used, 2.0
        self.drop = nn.Dropout(0.1)

    def delta(self) -> Tensor:
        """The low-rank part, `(out, in)`."""
        part = F.conv1d(self.lora_a.unsqueeze(0), self.lora_b.unsqueeze(-1), groups=self.used).squeeze(0)
        whole = part.new_zeros((len(self.index), *part.shape[1:]))
        whole[self.index] = part
        return whole

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, bias=self.bias)
        result += self.drop(x) @ self.delta().T * self.scaling
        return result


class LowRankConv(nn.Module):
    """A convolution called by its private method with a weight of its own plus a low-rank one."""

    def __init__(self, channels: int = 8, rank: int = 2, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.lora_a = nn.Parameter(torch.zeros(rank * kernel, channels * kernel))
        self.lora_b = nn.Parameter(torch.zeros(channels * kernel, rank * kernel))
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight + (self.lora_b @ self.lora_a).view(self.conv.weight.shape) * self.scaling
        return self.conv._conv_forward(x, weight, self.conv.bias)


class ManyAdapters(nn.Module):
    """A linear layer and several named low-rank adapters, each with its scale."""

    def __init__(self, channels: int = 16, ranks: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.base = nn.Linear(channels, channels)
        names = [f"task{i}" for i in range(len(ranks))]
        self.lora_a = nn.ModuleDict({n: nn.Linear(channels, r, bias=False) for n, r in zip(names, ranks, strict=True)})
        self.lora_b = nn.ModuleDict({n: nn.Linear(r, channels, bias=False) for n, r in zip(names, ranks, strict=True)})
        self.drop = nn.ModuleDict({n: nn.Dropout(0.1) for n in names})
        self.scaling = {n: 0.5 + i for i, n in enumerate(names)}
        self.active = names

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        for name in self.active:
            if name not in self.lora_a:
                continue
            result = result + self.lora_b[name](self.lora_a[name](self.drop[name](x))) * self.scaling[name]
        return result


class TokenAdapter(nn.Module):
    """Two convolutions of kernel 1 over tokens, the second grouped; scaled, added to the input."""

    def __init__(self, channels: int = 16, rank: int = 4, groups: int = 2, scale: float = 0.5) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(channels, rank, 1), nn.Conv1d(rank, channels, 1, groups=groups)
        self.drop = nn.Dropout(0.1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.up(self.drop(self.down(x))) * self.scale + x
        return x.transpose(1, 2).contiguous()


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.widen(x)))


def adapted_forward(self: Mlp, x: Tensor) -> Tensor:
    """What the adapter puts in place of `Mlp.forward`."""
    return self.narrow(self.act(self.widen(self.adapter(x))))


def adapted_mlp(channels: int = 16) -> Mlp:
    """An MLP whose forward is replaced on the instance, as the adapter's authors do it."""
    mlp = Mlp(channels)
    mlp.adapter = TokenAdapter(channels)
    mlp.forward = adapted_forward.__get__(mlp, mlp.__class__)
    return mlp


class ImageAdapter(nn.Module):
    """The adapter over images, before a padded depthwise convolution."""

    def __init__(self, channels: int = 16, rank: int = 4, scale: float = 0.5) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, rank, 1), nn.Conv2d(rank, channels, 1, groups=2)
        self.large = depthwise(channels, 7, bias=True)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.large(self.up(self.down(x)) * self.scale + x)


class TiledPerceptron(nn.Module):
    """A grouped layer over all of the pixels of a tile beside convolutions within it, and a gate for the image."""

    def __init__(self, channels: int = 8, sets: int = 4, tile: int = 4) -> None:
        super().__init__()
        self.channels, self.sets, self.tile = channels, sets, tile
        self.gate_down, self.gate_up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        pixels = tile * tile * sets
        self.whole = nn.Conv2d(pixels, pixels, 1, groups=sets, bias=False)
        self.whole_norm = nn.BatchNorm2d(sets)
        for k in (1, 3):
            setattr(self, f"local{k}", conv_norm(sets, sets, k, 1, k // 2, sets))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate_up(F.relu(self.gate_down(F.adaptive_avg_pool2d(x, 1)))))
        batch, channels, height, width = x.shape
        rows, columns, tile = height // self.tile, width // self.tile, self.tile
        tiles = x.reshape(batch, channels, rows, tile, columns, tile).permute(0, 2, 4, 1, 3, 5)
        whole = self.whole(tiles.reshape(-1, self.sets * tile * tile, 1, 1))
        out = self.whole_norm(whole.reshape(-1, self.sets, tile, tile))
        local = tiles.reshape(-1, self.sets, tile, tile)
        convs = 0
        for k in (1, 3):
            convs += getattr(self, f"local{k}")(local)
        out += convs
        out = out.reshape(batch, rows, columns, channels, tile, tile).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, channels, height, width) * gate


class TokenNorm(nn.Module):
    """A batch norm over tokens plus a learnt multiple of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


class NormedAttention(nn.Module):
    """A norm whose value goes into three linear layers."""

    def __init__(self, channels: int = 16, norm: Callable[[int], nn.Module] = TokenNorm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1)
        return weights @ self.value(x)


class LinearNorm(nn.Module):
    """A linear layer and a batch norm over flattened tokens."""

    def __init__(self, cin: int = 8, cout: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(cin, cout, bias=False)
        self.bn = nn.BatchNorm1d(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class EverySecond(nn.Module):
    """Every second pixel, as tokens, through a linear layer and its norm."""

    def __init__(self, channels: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.project = LinearNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return self.project(x.flatten(2).transpose(1, 2))


class StridedIdentity(nn.Module):
    """A strided depthwise convolution plus every second pixel of its input."""

    def __init__(self, channels: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.conv = depthwise(channels, 3, stride, bias=True)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x[..., :: self.stride, :: self.stride]


class BareAverage(nn.Module):
    """A strided depthwise convolution plus an average that leaves its padding out of the divisor."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = depthwise(channels, 3, 2, bias=True)
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pool(x)


class CascadedGroups(nn.Module):
    """Attention in groups of channels, each group's result added to the next one's input."""

    def __init__(self, channels: int = 16, heads: int = 2, keys: int = 4) -> None:
        super().__init__()
        part = channels // heads
        self.keys, self.part = keys, part
        self.qkv = nn.ModuleList([conv_norm(part, 2 * keys + part) for _ in range(heads)])
        self.local = nn.ModuleList([conv_norm(keys, keys, 5, 1, 2, keys) for _ in range(heads)])
        self.out = nn.Sequential(nn.ReLU(), *conv_norm(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        parts = x.chunk(len(self.qkv), dim=1)
        done = []
        part = parts[0]
        for i, qkv in enumerate(self.qkv):
            if i > 0:
                part = part + parts[i]
            query, key, value = qkv(part).view(batch, -1, height, width).split([self.keys, self.keys, self.part], dim=1)
            query = self.local[i](query)
            query, key, value = query.flatten(2), key.flatten(2), value.flatten(2)
            weights = (query.transpose(-2, -1) @ key).softmax(dim=-1)
            part = (value @ weights.transpose(-2, -1)).view(batch, self.part, height, width)
            done.append(part)
        return self.out(torch.cat(done, 1))


LORA = Source("LoRA, ICLR 2022", "2106.09685", "microsoft/LoRA:loralib/layers.py")
REPADAPTER = Source("RepAdapter, 2023", "2302.08106", "luogen1996/RepAdapter:repadapter.py")
REPMLP = Source("RepMLPNet, CVPR 2022", "2112.11081", "DingXiaoH/RepMLP:repmlpnet.py")
SLAB = Source("SLAB, ICML 2024", "2405.11582", "xinghaochen/SLAB:classification/models/prepbn.py")
NEXTVIT = Source("Next-ViT, 2022", "", "huggingface/pytorch-image-models:timm/models/nextvit.py")
LEVIT = Source("LeViT, 2021", "", "facebookresearch/LeViT:levit.py")
EFFICIENTVIT = Source("EfficientViT, 2023", "", "huggingface/pytorch-image-models:timm/models/efficientvit_msra.py")
TINYVIT = Source("TinyViT, 2022", "", "huggingface/pytorch-image-models:timm/models/tiny_vit.py")
TOKENS = {"channels": 16, "sizes": ((7,), (6,)), "shapes": tokens}

ADAPTERS = (
    Family("LoRA, linear", LORA, LowRankLinear, Counts(3, 0, 1, 1), Counts(1, 0, 0), (SCALE, SUM, CHAIN, LAYOUT),
           "one linear layer", sweep={"channels": (8, 16), "rank": (1, 2, 4)}, **TOKENS),
    Family("LoRA, merging in eval()", LORA, lambda channels=16: LowRankLinear(channels, merges=True), Counts(1, 0, 0),
           Counts(1, 0, 0), (LAYOUT,), "unchanged: one linear layer", **TOKENS),
    Family("LoRA, joint projection", LORA, MergedLowRank, Counts(2, 0, 1, 1), Counts(1, 0, 0),
           (SCALE, SUM, CONSTANT, LAYOUT), "one linear layer", **TOKENS),
    Family("LoRA, convolution", LORA, LowRankConv, Counts(1, 0, 0), Counts(1, 0, 0), (CONSTANT,), "3x3",
           sweep={"channels": (4, 8), "rank": (1, 2), "kernel": (1, 3)}, one_conv=True),
    Family("LoRA, several adapters", LORA, ManyAdapters, Counts(5, 0, 2, 2), Counts(1, 0, 0),
           (SCALE, SUM, CHAIN, LAYOUT), "one linear layer", **TOKENS),
    Family("RepAdapter", REPADAPTER, lambda channels=16: nn.Sequential(
               TokenAdapter(channels), nn.Linear(channels, 3 * channels)), Counts(3, 0, 1, 1), Counts(1, 0, 0),
           (SCALE, IDENTITY, CHAIN, GROUPS, LAYOUT), "one linear layer", **TOKENS),
    Family("RepAdapter, patched in", REPADAPTER, adapted_mlp, Counts(4, 0, 1, 1), Counts(2, 0, 0),
           (SCALE, IDENTITY, CHAIN, GROUPS, LAYOUT), "two linear layers", **TOKENS),
    Family("RepAdapter before a padded convolution", REPADAPTER, ImageAdapter, Counts(3, 0, 1, 1), Counts(3, 0, 1),
           (SCALE,), "the adapter and the convolution apart", why=BORDER | COST, channels=16, one_conv=False),
    Family("RepMLP", REPMLP, TiledPerceptron, Counts(5, 3, 2), Counts(range(3, 5), range(2), range(2)),
           (NORM, SUM, GROUPS), "convolutions within the tile merged, the layer over it as it is",
           why=DATA | OPAQUE | ROOTS, sizes=((12, 4), (8, 8))),
    Family("SLAB token norm", SLAB, lambda channels=16: nn.Sequential(TokenNorm(channels), nn.Linear(channels, 8)),
           Counts(1, 1, 1, 1), Counts(1, 0, 0), (NORM, SCALE, IDENTITY, BEFORE, LAYOUT), "one linear layer", **TOKENS),
    Family("SLAB attention", SLAB, NormedAttention, Counts(3, 1, 1, 1), Counts(3, 0, 0),
           (NORM, SCALE, IDENTITY, BEFORE, LAYOUT), "three linear layers", **TOKENS),
    Family("NextViT, two norms before a layer", NEXTVIT, lambda channels=8: nn.Sequential(
               nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1), nn.GELU()),
           Counts(1, 2, 0), Counts(1, 0, 0), (NORM, BEFORE), "1x1", sweep={"channels": (4, 8)}, one_conv=True),
    Family("LeViT linear norm", LEVIT, LinearNorm, Counts(1, 1, 0), Counts(1, 0, 0), (NORM, LAYOUT), "one linear layer",
           sizes=((7,), (6,)), shapes=tokens),
    Family("LeViT subsampling", LEVIT, EverySecond, Counts(1, 1, 0), Counts(1, 0, 0), (NORM, IDENTITY, LAYOUT),
           "one linear layer on every second pixel"),
    Family("LeViT strided identity", LEVIT, StridedIdentity, Counts(1, 0, 1), Counts(1, 0, 0), (SUM, IDENTITY, GROUPS),
           "depthwise 3x3 of stride 2", sweep={"channels": (3, 8), "stride": (1, 2, 3)}, one_conv=True),
    Family("LeViT average without its padding", LEVIT, BareAverage, Counts(1, 0, 1), Counts(1, 0, 1), (), "unchanged",
           why=PLACE, one_conv=False),
    Family("EfficientViT cascaded attention", EFFICIENTVIT, CascadedGroups, Counts(5, 5, 1), Counts(5, 0, 1), (NORM,),
           "five convolutions", why=BORDER | COST, channels=16),
    Family("TinyViT attention", TINYVIT, lambda channels=16: NormedAttention(channels, nn.LayerNorm), Counts(3, 0, 0),
           Counts(3, 0, 0), (BEFORE, LAYOUT), "unchanged; for fewest parameters a bare layer norm, three linear layers",
           why=KERNEL, **TOKENS),
)  # fmt: skip


# --- One axis, three axes, transposed --------------------------------------------------------------------------------


class SpeakerBlock(nn.Module):
    """3x3, 3x3 of dilation 2, a norm of the input; ReLU and gate."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.near = conv_norm(channels, channels, 3, 1, 1)
        self.far = conv_norm(channels, channels, 3, 1, 2, dilation=2)
        self.skip = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.gate = Gate(channels)

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        return self.gate(self.act(self.near(x) + self.far(x) + skip))


class FrameBlock(nn.Module):
    """Branches, then leaky ReLU, then the norm, which so stands before the next block's padding."""

    def __init__(self, channels: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.square = nn.Conv1d(channels, channels, 3, padding=1, groups=groups)
        self.point = nn.Conv1d(channels, channels, 1, groups=groups)
        self.act = nn.LeakyReLU()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.square(x) + self.point(x) + x))


class SplitFrames(nn.Module):
    """Parts of the channels through convolution, ReLU, norm, each added to the next part's input."""

    def __init__(self, channels: int = 16, scale: int = 4) -> None:
        super().__init__()
        part = channels // scale
        def unit(cin: int, kernel: int, dilation: int = 1) -> nn.Sequential:
            conv = nn.Conv1d(cin, cin, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation)
            return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm1d(cin))

        self.first, self.last = unit(channels, 1), unit(channels, 1)
        self.parts = nn.ModuleList([unit(part, 3, 2) for _ in range(scale - 1)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        done: list[Tensor] = []
        for i, part in enumerate(torch.chunk(self.first(x), self.scale, dim=1)):
            if i == 0:
                done.append(part)
            else:
                done.append(self.parts[i - 1](part if i == 1 else part + done[-1]))
        return self.last(torch.cat(done, dim=1)) + x


class SeriesBlock(nn.Module):
    """Large and small kernels over time; the norm behind sees variables as a part of the batch."""

    def __init__(self, variables: int = 2, width: int = 4, kernel: int = 9) -> None:
        super().__init__()
        channels = variables * width
        self.large = conv_norm(channels, channels, kernel, 1, kernel // 2, channels, ndim=1)
        self.small = conv_norm(channels, channels, 5, 1, 2, channels, ndim=1)
        self.norm = nn.BatchNorm1d(width)
        self.widen = nn.Conv1d(channels, 2 * channels, 1, groups=variables)
        self.act = nn.GELU()
        self.narrow = nn.Conv1d(2 * channels, channels, 1, groups=variables)

    def forward(self, x: Tensor) -> Tensor:
        batch, variables, width, length = x.shape
        y = x.reshape(batch, variables * width, length)
        y = self.large(y) + self.small(y)
        y = y.reshape(batch * variables, width, length)
        y = self.norm(y).reshape(batch, variables * width, length)
        return x + self.narrow(self.act(self.widen(y))).reshape(batch, variables, width, length)


class ExpertMixture(nn.Module):
    """Kernels of 5, 3 and 1 and two averaged ones, mixed per output channel by a gate of the task."""

    def __init__(self, channels: int = 4, tasks: int = 3) -> None:
        super().__init__()
        for name, size in (("five", 5), ("three", 3), ("one", 1), ("average_three", 1), ("average_five", 1)):
            setattr(self, name, nn.Parameter(torch.zeros(channels, channels, *(size,) * 3)))
        self.register_buffer("mean_three", torch.full((3, 3, 3), 1 / 27))
        self.register_buffer("mean_five", torch.full((5, 5, 5), 1 / 125))
        self.gate = nn.Linear(tasks, 5 * channels)
        self.norm, self.act = nn.BatchNorm3d(channels), nn.ReLU()

    def kernel(self, task: Tensor) -> Tensor:
        """The kernel for one task, `(out, in, 5, 5, 5)`."""
        experts = [
            self.five,
            F.pad(self.three, [1] * 6),
            F.pad(self.one, [2] * 6),
            F.pad(torch.einsum("oixyz,dhw->oidhw", self.average_three, self.mean_three), [1] * 6),
            torch.einsum("oixyz,dhw->oidhw", self.average_five, self.mean_five),
        ]
        weights = torch.softmax(self.gate(task).view(5, -1), dim=0)
        return torch.einsum("eo,eoidhw->oidhw", weights, torch.stack(experts))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.act(self.norm(F.conv3d(x, self.kernel(task[:1]), None, padding="same")))


class BoundMixture(ExpertMixture):
    """The same for one task, a buffer."""

    def __init__(self, channels: int = 4, tasks: int = 3) -> None:
        super().__init__(channels, tasks)
        self.register_buffer("task", torch.eye(tasks)[:1])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(F.conv3d(x, self.kernel(self.task), None, padding="same")))


class MaskedEveryCall(nn.Module):
    """Multiplies its weight by a mask at every call."""

    def __init__(self, channels: int = 4, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        axis = torch.linspace(-1, 1, kernel).abs()
        self.mask = 1 - 0.1 * (axis[:, None, None] + axis[:, None] + axis)
        self.norm = nn.BatchNorm3d(channels)
        self.deployed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.deployed:
            self.conv.weight.data *= self.mask.to(self.conv.weight.dtype)
        return self.norm(self.conv(x))


class OccupiedConv(nn.Module):
    """A convolution over the occupied places only, as sparse libraries run it, with weights shared in blocks."""

    def __init__(self, channels: int = 4, dilation: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3, 3, 3))
        self.shared = dilation == 1
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.shared:
            for axis in (2, 3, 4):
                weight = torch.cat([weight.narrow(axis, 0, 1)] * 3 + [weight.narrow(axis, 1, 2)], dim=axis)
            y = F.conv3d(x, weight, None, padding=2)
        else:
            y = F.conv3d(x, weight, None, padding=2, dilation=2)
        return y * (x.amax(dim=1, keepdim=True) > 0)


class SparsePair(nn.Module):
    """Two such convolutions and a norm."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.large, self.far = OccupiedConv(channels), OccupiedConv(channels, dilation=2)
        self.norm, self.act = nn.BatchNorm3d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.large(x)[..., :-1, :-1, :-1] + self.far(x)[..., :-1, :-1, :-1]))


class TransposedPair(nn.Module):
    """Two transposed convolutions of one stride, summed and normed."""

    def __init__(self, channels: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.large = nn.ConvTranspose2d(channels, channels, 4, 2, 1, groups=groups, bias=False)
        self.small = nn.ConvTranspose2d(channels, channels, 2, 2, 0, groups=groups)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.large(x) + self.small(x)))


def transposed_norm(cin: int, cout: int, kernel: int, stride: int, padding: int = 0, groups: int = 1) -> nn.Sequential:
    """A transposed convolution, its norm, ReLU."""
    conv = nn.ConvTranspose2d(cin, cout, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())


def around_transposed(channels: int = 8, bias: bool = False, after: bool = False) -> nn.Sequential:
    """A pointwise layer before or behind a transposed convolution."""
    up = nn.ConvTranspose2d(channels, channels, 2, 2)
    point = nn.Conv2d(channels, channels, 1, bias=bias)
    return nn.Sequential(*((up, point) if after else (point, up)), nn.ReLU())


REPSPK = Source("Rep Works in Speaker Verification, 2021", "2110.09720", "wenet-e2e/wespeaker:models/repvgg.py")
CSREP = Source("CS-Rep, ICASSP 2022", "", "zrtlemontree/CS-Rep:rep_tdnn.py")
ECAPA = Source("ECAPA-TDNN, 2020", "", "IDRnD/ReDimNet")
MODERNTCN = Source("ModernTCN, ICLR 2024", "", "luodhhh/ModernTCN:ModernTCN-classification/models/ModernTCN.py")
REPMODE = Source("RepMode, CVPR 2023", "2212.10066", "Correr-Zhou/RepMode:fnet/nn_modules/RepMode.py")
REPUXNET = Source("RepUX-Net, MICCAI 2023", "2303.05785", "MASILab/RepUX-Net:networks/RepUXNet_3D/repuxnet_encoder.py")
LARGEKERNEL3D = Source("LargeKernel3D, CVPR 2023", "2206.10555", "dvlab-research/LargeKernel3D:object-detection")
UPSAMPLING = Source("YOLOv6 v3.0, 2023", "2302.00386", "meituan/YOLOv6:yolov6/layers/common.py")
CUBES = {"channels": 4, "sizes": ((5, 7, 5), (6, 4, 6))}

AXES = (
    Family("RepSPK", REPSPK, SpeakerBlock, Counts(4, 3, 2), Counts(4, 0, 1), (NORM, SUM, IDENTITY),
           "3x3 and dilated 3x3 apart, the identity in one of them, gate", why=COST, channels=32),
    Family("RepSPK, the branches alone", REPSPK, lambda channels=32: Residual(nn.Sequential(
               *conv_norm(channels, channels, 3, 1, 2, dilation=2))), Counts(1, 1, 1), Counts(1, 0, 0),
           (NORM, SUM, IDENTITY), "dilated 3x3", channels=32, one_conv=True),
    Family("CS-Rep", CSREP, lambda channels=8, groups=1: nn.Sequential(
               FrameBlock(channels, groups), FrameBlock(channels, groups)),
           Counts(4, 2, 4), Counts(2, 2, 0), (SUM, IDENTITY, GROUPS, DIMENSIONS, BIAS_MAP),
           "every block one convolution; the norms stand before zero padding", why=BORDER,
           sizes=((13,), (10,)), sweep=WIDTHS),
    Family("CS-Rep, norm before the padding", CSREP, lambda channels=8: nn.Sequential(
               nn.BatchNorm1d(channels), nn.Conv1d(channels, channels, 3, padding=1)), Counts(1, 1, 0), Counts(1, 1, 0),
           (BIAS_MAP,), "unchanged", why=BORDER, sizes=((13,), (10,)), one_conv=False),
    Family("ECAPA-TDNN", ECAPA, SplitFrames, Counts(5, 5, 3), Counts(5, range(3, 6), 3), (DIMENSIONS,),
           "unchanged: the norms follow the activations", why=BORDER | ACTIVATION | ROOTS, channels=16,
           sizes=((13,), (10,))),
    Family("ModernTCN", MODERNTCN, SeriesBlock, Counts(4, 3, 2), Counts(3, range(2), 1),
           (NORM, SUM, GROUPS, LAYOUT, DIMENSIONS), "depthwise 9, two grouped 1, one sum", sizes=((13,), (10,)),
           shapes=lambda size, channels: ((2, channels // 2, *size),)),
    Family("RepMode, task bound", REPMODE, BoundMixture, Counts(1, 1, 0), Counts(1, 0, 0),
           (NORM, CONSTANT, DIMENSIONS), "5x5x5", one_conv=True, **CUBES),
    Family("RepMode, task given", REPMODE, ExpertMixture, Counts(3, 1, 0),
           Counts(3, 1, 0), (DIMENSIONS,), "unchanged", why=DATA,
           shapes=lambda size, channels: ((channels, *size), (3,)), **CUBES),
    Family("RepUX-Net", REPUXNET, MaskedEveryCall, Counts(1, 1, 0), Counts(1, range(2), 0), (DIMENSIONS,), "unchanged",
           why=IMPURE, **CUBES),
    Family("LargeKernel3D", LARGEKERNEL3D, SparsePair, Counts(2, 1, 1), Counts(2, 1, 1), (DIMENSIONS,), "unchanged",
           why=DATA | ROOTS, **CUBES),
    Family("Transposed convolution and norm", UPSAMPLING, lambda channels=8, groups=1:
           transposed_norm(channels, 2 * channels, 2, 2, 0, groups), Counts(1, 1, 0), Counts(1, 0, 0),
           (NORM, GROUPS, TRANSPOSED), "transposed 2x2", sweep=WIDTHS),
    Family("RepMode decoder", REPMODE, lambda channels=4: nn.Sequential(
               nn.ConvTranspose3d(channels, 2 * channels, 2, 2, bias=False), nn.BatchNorm3d(2 * channels), nn.ReLU()),
           Counts(1, 1, 0), Counts(1, 0, 0), (NORM, TRANSPOSED, DIMENSIONS), "transposed 2x2x2", **CUBES),
    Family("Sum of transposed convolutions", UPSAMPLING, TransposedPair, Counts(2, 1, 1), Counts(1, 0, 0),
           (NORM, SUM, GROUPS, TRANSPOSED), "transposed 4x4", sweep=WIDTHS),
    Family("Pointwise before a transposed convolution", UPSAMPLING, around_transposed, Counts(2, 0, 0), Counts(1, 0, 0),
           (CHAIN, TRANSPOSED), "transposed 2x2"),
    Family("Pointwise behind a transposed convolution", UPSAMPLING,
           lambda channels=8: around_transposed(channels, True, True), Counts(2, 0, 0), Counts(1, 0, 0),
           (CHAIN, TRANSPOSED), "transposed 2x2"),
    Family("Biased pointwise before a transposed convolution", UPSAMPLING,
           lambda channels=8: around_transposed(channels, True), Counts(2, 0, 0), Counts(2, 0, 0), (TRANSPOSED,),
           "unchanged: the bias would differ by phase", why=PHASE | BORDER),
)  # fmt: skip


# --- Boundaries and other things that must stay as they are ----------------------------------------------------------


class MixedKernels(nn.Module):
    """Kernels mixed per image by a routing layer, all images of the batch in one grouped call."""

    def __init__(self, channels: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.routing = nn.Linear(channels, experts)
        self.weight = nn.Parameter(torch.zeros(experts, channels * channels * 9))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        routing = torch.sigmoid(self.routing(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        weight = torch.matmul(routing, self.weight).view(batch * channels, channels, 3, 3)
        y = F.conv2d(x.reshape(1, batch * channels, height, width), weight, None, padding=1, groups=batch)
        return self.norm(y.view(batch, channels, height, width))


class AttendedKernel(nn.Module):
    """The input and the output of a convolution scaled by attentions that depend on the input."""

    def __init__(self, channels: int = 8, reduced: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, reduced, 1, bias=False)
        self.norm = nn.BatchNorm2d(reduced)
        self.inputs, self.outputs = nn.Conv2d(reduced, channels, 1), nn.Conv2d(reduced, channels, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        context = F.relu(self.norm(self.down(F.adaptive_avg_pool2d(x, 1))))
        y = self.conv(x * torch.sigmoid(self.inputs(context)))
        return self.last(y * torch.sigmoid(self.outputs(context)))


class KernelPerPlace(nn.Module):
    """A small convolution makes the kernel of every place."""

    def __init__(self, channels: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.weights = nn.Sequential(*conv_norm(channels, channels), nn.ReLU(), nn.Conv2d(channels, 9 * groups, 1))
        self.norm = nn.BatchNorm2d(channels)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernels = self.weights(x).view(batch, 1, self.groups, 9, height, width)
        patches = F.unfold(x, 3, padding=1).view(batch, channels // self.groups, self.groups, 9, height, width)
        return self.norm((patches * kernels).sum(3).view(batch, channels, height, width)) + x


class ResidualBasic(nn.Module):
    """Two convolutions and a residual, as everywhere."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.second = conv_norm(channels, channels, 3, 1, 1), conv_norm(channels, channels, 3, 1, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.act(self.first(x)))
        out += x
        return self.act(out)


class MixedBorders(nn.Module):
    """One branch reflects its border, the other pads zeros."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.reflected = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.zeros = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reflected(x) + self.zeros(x)


class ReflectedBranches(nn.Module):
    """A convolution that reflects its border beside branches that never look outside."""

    def __init__(self, channels: int = 8, mode: str = "reflect") -> None:
        super().__init__()
        self.square = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=mode, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.square(x)) + self.point(x) + x


class BatchStatistics(nn.Module):
    """A norm that keeps no statistics: it is no affine map even in eval mode."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


GENERAL = Source("A common construction", "", "")
CONDCONV = Source("CondConv", "", "OSVAI/KernelWarehouse:modules")
KERNELWAREHOUSE = Source("KernelWarehouse, ICML 2024", "2308.08361", "OSVAI/KernelWarehouse:modules")
LSCONV = Source("LSNet, CVPR 2025", "2503.23135", "jameslahm/lsnet:model/lsnet.py")

BOUNDARIES = (
    Family("CondConv", CONDCONV, MixedKernels, Counts(3, 1, 0), Counts(3, 1, 0), (), "unchanged", why=DATA),
    Family("KernelWarehouse and ODConv", KERNELWAREHOUSE, AttendedKernel, Counts(4, 2, 0), Counts(4, 1, 0), (NORM,),
           "unchanged but for the inner norm", why=DATA),
    Family("LSConv", LSCONV, KernelPerPlace, Counts(2, 2, 1), Counts(2, 1, 1), (NORM,),
           "unchanged but for the inner norm", why=DATA | ROOTS),
    Family("Residual block", GENERAL, ResidualBasic, Counts(2, 2, 1), Counts(2, 0, 1), (NORM,), "two 3x3, one sum",
           why=ACTIVATION | ROOTS),
    Family("Linear bottleneck", GENERAL, lambda channels=16: nn.Sequential(
               nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1), nn.ReLU()),
           Counts(2, 0, 0), Counts(2, 0, 0), (), "unchanged", why=COST, channels=16, one_conv=True),
    Family("Separable convolution", GENERAL, lambda channels=16: nn.Sequential(
               depthwise(channels, 3), *conv_norm(channels, channels), nn.ReLU()),
           Counts(2, 1, 0), Counts(2, 0, 0), (NORM,), "depthwise 3x3, 1x1", why=COST, channels=16, one_conv=True),
    Family("Stacked padded 3x3", GENERAL, lambda channels=8: nn.Sequential(
               nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.Conv2d(channels, channels, 3, padding=1)),
           Counts(2, 0, 0), Counts(2, 0, 0), (), "unchanged", why=BORDER | COST, one_conv=False),
    Family("Biased 1x1 before a padded 3x3", GENERAL, lambda channels=8: nn.Sequential(
               *conv_norm(channels, 4 * channels), nn.Conv2d(4 * channels, channels, 3, padding=1)),
           Counts(2, 1, 0), Counts(2, 0, 0), (NORM,), "1x1, 3x3", why=BORDER, one_conv=False),
    Family("Strided 3x3 before a padded 3x3", GENERAL, lambda channels=8: nn.Sequential(
               nn.Conv2d(channels, 4 * channels, 3, 2, 1, bias=False), nn.Conv2d(4 * channels, channels, 3, padding=1)),
           Counts(2, 0, 0), Counts(2, 0, 0), (), "unchanged: exact for odd sizes only", why=BORDER | COST),
    Family("Reflecting and zero-padding branches", GENERAL, MixedBorders, Counts(2, 0, 1), Counts(2, 0, 1), (),
           "unchanged", why=Why("the branches continue their input differently", ("padding", "mode", "border")),
           one_conv=False),
    Family("Reflecting branch, 1x1 and identity", GENERAL, ReflectedBranches, Counts(2, 1, 2), Counts(1, 0, 0),
           (NORM, SUM, IDENTITY, PAD), "reflecting 3x3", one_conv=False),
    Family("Circular branch, 1x1 and identity", GENERAL, lambda channels=8: ReflectedBranches(channels, "circular"),
           Counts(2, 1, 2), Counts(1, 0, 0), (NORM, SUM, IDENTITY, PAD), "circular 3x3", one_conv=False),
    Family("Norm without running statistics", GENERAL, BatchStatistics, Counts(1, 1, 0), Counts(1, 1, 0), (),
           "unchanged", why=STATISTICS),
)  # fmt: skip

SECTIONS: dict[str, tuple[Family, ...]] = {
    "Classic multi-branch blocks": CLASSIC,
    "Mobile and hybrid backbones": MOBILE,
    "Large kernels": LARGE,
    "Detectors": DETECTORS,
    "Super-resolution": RESOLUTION,
    "Linear over-parameterization and generated weights": GENERATED,
    "Adapters and transformers": ADAPTERS,
    "One axis, three axes, transposed": AXES,
    "Boundaries": BOUNDARIES,
}
FAMILIES: dict[str, Family] = {family.name: family for section in SECTIONS.values() for family in section}
