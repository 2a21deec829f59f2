"""Wrong formulas of hand-written converters, rebuilt in our own words and measured against the original module.

Float64, batch norms with wide statistics: means and shifts N(0, 1), variances in [0.5, 2], scales of both signs.

    python benchmarks/peers.py            prints the table
    python benchmarks/peers.py --write    puts it into docs/peers.md
"""

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import reparam  # noqa: E402 (the path comes first)
from benchmarks.marks import put  # noqa: E402

PAGE = ROOT / "docs" / "peers.md"
BLOCK = "table: benchmarks/peers.py"
CHANNELS = 8
EXACT = 1e-12


@dataclass(frozen=True)
class Case:
    """One formula.

    Args:
        name: what is folded into what.
        build: the module before.
        fold: what the converter makes of it; may change its argument.
        size: of the input, per axis.
        border: outputs at each end of an axis that depend on the padding.
    """

    name: str
    build: Callable[[], nn.Sequential]
    fold: Callable[[nn.Sequential], nn.Module]
    size: tuple[int, ...]
    border: int


@dataclass(frozen=True)
class Measured:
    """Largest differences, relative to the largest output; and what the library makes of the same module."""

    border: float | None
    inside: float
    ours: float
    answer: str


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as ``scale * x + shift``, ``(channels,)`` each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - scale * norm.running_mean


def norm_into_next_conv(net: nn.Sequential) -> nn.Module:
    """Scale the columns, and move the shift through the whole kernel: right where no tap reads the padding."""
    norm, conv = deepcopy(net)
    scale, shift = scale_and_shift(norm)
    taps = conv.weight.sum(dim=tuple(range(2, conv.weight.dim())))  # (out, in)
    conv.bias.data += taps @ shift
    conv.weight.data *= scale.reshape(1, -1, *[1] * (conv.weight.dim() - 2))
    return conv


def pointwise_into_next_conv(net: nn.Sequential) -> nn.Module:
    """Multiply the matrices, and move the first bias through the whole kernel: right where no tap reads the padding."""
    first, conv = deepcopy(net)
    conv.bias.data += conv.weight.sum(dim=(2, 3)) @ first.bias
    conv.weight.data = torch.einsum("omhw,mi->oihw", conv.weight, first.weight[:, :, 0, 0])
    return conv


def norm_into_transposed_conv(net: nn.Sequential) -> nn.Module:
    """Scale the first axis, which holds the outputs of a convolution but the inputs of a transposed one."""
    conv, norm = deepcopy(net)
    scale, shift = scale_and_shift(norm)
    conv.bias.data = scale * conv.bias + shift
    conv.weight.data *= scale.reshape(-1, 1, 1, 1)
    return conv


def leftover_norms_away(net: nn.Sequential) -> nn.Module:
    """Fold the norms that follow a convolution, and replace every other one by the identity."""
    layers = list(deepcopy(net))
    for index, layer in enumerate(layers):
        if isinstance(layer, _BatchNorm):
            assert not isinstance(layers[index - 1], nn.modules.conv._ConvNd)  # nothing to fold it into
            layers[index] = nn.Identity()
    return nn.Sequential(*layers)


def norm_then_conv() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1))


def pointwise_then_conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))


def transposed_conv_then_norm() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2), nn.BatchNorm2d(CHANNELS))


def norm_after_activation() -> nn.Sequential:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(CHANNELS), nn.ReLU())


CASES = (
    Case("batch norm into the zero-padded 3-tap convolution behind it", norm_then_conv, norm_into_next_conv, (33,), 1),
    Case(
        "1×1 convolution with a bias into the zero-padded 3×3 behind it",
        pointwise_then_conv,
        pointwise_into_next_conv,
        (17, 16),
        1,
    ),
    Case(
        "batch norm into the transposed convolution before it, along its first axis",
        transposed_conv_then_norm,
        norm_into_transposed_conv,
        (9, 8),
        0,
    ),
    Case(
        "batch norm that nothing absorbs, replaced by the identity",
        norm_after_activation,
        leftover_norms_away,
        (17, 16),
        0,
    ),
)


@torch.no_grad()
def widen(net: nn.Sequential, random: torch.Generator) -> nn.Sequential:
    """Wide random numbers, float64, eval mode."""
    net.double().eval()

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=torch.float64)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=random, dtype=torch.float64)

    for module in net:
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(normal(module.running_mean))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2))
            module.weight.copy_(uniform(module.weight, 0.5, 1.5) * normal(module.weight).sign())
            module.bias.copy_(normal(module.bias))
        elif isinstance(module, nn.modules.conv._ConvNd):
            assert module.bias is not None
            module.weight.copy_(normal(module.weight) / module.weight[0].numel() ** 0.5)
            module.bias.copy_(normal(module.bias))
    return net


@torch.no_grad()
def measure(case: Case) -> Measured:
    random = torch.Generator().manual_seed(0)
    net = widen(case.build(), random)
    x = torch.randn(4, CHANNELS, *case.size, generator=random, dtype=torch.float64)
    wanted, fused = net(x), reparam.fuse(net)
    largest = wanted.abs().max()
    difference = (case.fold(net)(x) - wanted).abs() / largest
    inner = (..., *(slice(case.border, -case.border or None) for _ in case.size))
    inside = difference[inner].max().item()
    ours = ((fused(x) - wanted).abs().max() / largest).item()
    left = reparam.plan(net).left
    answer = f"left apart: `{left[0].rule}`" if left else "folded"
    return Measured(difference.max().item() if case.border else None, inside, ours, answer)


def shown(error: float | None) -> str:
    if error is None:
        return "–"
    return f"{error:.2f}" if error > EXACT else "exact"


def table() -> str:
    """Relative errors as a Markdown table."""
    lines = ["| folded | edge outputs | other outputs | `reparam.fuse` | what it does |", "|---|---|---|---|---|"]
    for case in CASES:
        found = measure(case)
        cells = (case.name, shown(found.border), shown(found.inside), shown(found.ours), found.answer)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/peers.md")
    text = table()
    if parser.parse_args().write:
        put(PAGE, BLOCK, text)
    print(text, end="")


if __name__ == "__main__":
    main()
