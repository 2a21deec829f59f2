"""Parameters, multiply-adds and Winograd multiplications, counted as the RepVGG paper counts them.

    parameters  Σ |weight| + |bias|       over convolutions and linear layers
    FLOPs       Σ |weight| · positions    one multiply-add is one FLOP, adding a bias is none
    Wino MULs   the same, 3×3 convolutions of stride 1 divided by 2.25 = 36/16, as F(2×2, 3×3) does them

The paper cuts its parameter counts off after two decimals and rounds the other two columns to one: with biases all nine
of its parameter counts come out to the digit, without them B1g2 would be 0.013 short.

`python -m reparam.models.count` prints the table for every variant, each fused on the meta device, at 224×224.

Source: arXiv 2101.03697, tables 3 to 5 and section 4.1 (Wino MULs after Lavin and Gray, arXiv 1509.09308).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from reparam.models.repvgg import VARIANTS

WINOGRAD_SAVING = 36 / 16


@dataclass(frozen=True)
class Count:
    """What a net holds, and what one image costs."""

    weights: int
    biases: int
    flops: int
    winograd_muls: float

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + self.biases

    @property
    def figures(self) -> tuple[float, float, float]:
        """Millions of parameters, cut off, billions of FLOPs and of Winograd multiplications, rounded: as published."""
        return self.parameters // 10_000 / 100, round(self.flops / 1e9, 1), round(self.winograd_muls / 1e9, 1)


# Millions, billions and billions, for the deploy form at 224×224.
PUBLISHED: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "repvgg_a0": (8.30, 1.4, 0.7),
        "repvgg_a1": (12.78, 2.4, 1.3),
        "repvgg_a2": (25.49, 5.1, 2.7),
        "repvgg_b0": (14.33, 3.1, 1.6),
        "repvgg_b1": (51.82, 11.8, 5.9),
        "repvgg_b1g2": (41.36, 8.8, 4.6),
        "repvgg_b1g4": (36.12, 7.3, 3.9),
        "repvgg_b2": (80.31, 18.4, 9.1),
        "repvgg_b2g4": (55.77, 11.3, 6.0),
    }
)


def count(model: nn.Module, image: Sequence[int] = (3, 224, 224)) -> Count:
    """Count the convolutions and linear layers that one image passes through; nothing is computed.

    The model runs on the meta device, with stand-ins for its parameters and buffers; the model itself is not changed.

    Args:
        model: any net of one image, as it is: fuse it first to count its deploy form.
        image: (C, H, W).

    Returns:
        Parameters counted once for a layer that runs several times, multiplications every time.
    """
    weights: dict[nn.Module, int] = {}
    biases: dict[nn.Module, int] = {}
    flops = 0
    winograd_muls = 0.0

    def record(layer: _ConvNd | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, winograd_muls
        weights[layer] = layer.weight.numel()
        biases[layer] = 0 if layer.bias is None else layer.bias.numel()
        muls = layer.weight.numel() * _positions(layer, inputs[0], output)
        flops += muls
        winograd_muls += muls / WINOGRAD_SAVING if _winograd_applies(layer) else muls

    stand_ins = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    x = torch.empty(1, *image, device="meta", dtype=dtype)
    hooks = [layer.register_forward_hook(record) for layer in model.modules() if isinstance(layer, _ConvNd | nn.Linear)]
    try:
        with torch.no_grad():
            torch.func.functional_call(model, stand_ins, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return Count(sum(weights.values()), sum(biases.values()), flops, winograd_muls)


def _positions(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """How often every weight is used: output positions; input positions if the convolution is transposed."""
    if isinstance(layer, nn.Linear):
        return y[..., 0].numel()
    side = x if isinstance(layer, _ConvTransposeNd) else y
    return side[:, 0].numel()


def _winograd_applies(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.stride == (1, 1)


def _printed(figures: tuple[float, float, float]) -> tuple[str, str, str]:
    parameters, flops, winograd_muls = figures
    return f"{parameters:.2f}", f"{flops:.1f}", f"{winograd_muls:.1f}"


def main() -> None:
    """Print the table."""
    import reparam  # here, because reparam imports this package

    parser = argparse.ArgumentParser(prog="python -m reparam.models.count", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=224, help="height and width of the image (default 224)")
    size: int = parser.parse_args().size

    print(f"RepVGG in deploy form at {size}×{size}; the paper's figures, for 224×224, in brackets")
    print(f"{'':12}{'parameters, M':>16}{'FLOPs, B':>16}{'Wino MULs, B':>16}")
    for build in VARIANTS:
        with torch.device("meta"):
            model = build()
        figures = _printed(count(reparam.fuse(model.eval()), (3, size, size)).figures)
        published = PUBLISHED.get(build.__name__)
        paper = [f"({figure})" for figure in _printed(published)] if published else [""] * 3
        columns = [f"{ours:>8} {theirs:7}" for ours, theirs in zip(figures, paper, strict=True)]
        print(f"{build.__name__:12}" + "".join(columns).rstrip())


if __name__ == "__main__":
    main()
