"""What is measured of a net before and after `fuse`."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from common import TOLERANCE
from demo.memory import peak_activation_bytes
from demo.training import accuracy


def multiply_adds(net: nn.Module, image: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers for one image (1, 3, size, size)."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(image)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Timing:
    """Median seconds of one forward of two nets, and the median of the ratios of the rounds."""

    before: float
    after: float
    speedup: float


@torch.inference_mode()
def paired_timing(before: nn.Module, after: nn.Module, batch: Tensor, rounds: int) -> Timing:
    """Both nets in every round, the first one alternating, so that a busy machine slows both alike."""
    nets = (before, after)
    for net in nets * 3:
        seconds(net, batch)
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            last = seconds(after, batch)
            times.append((seconds(before, batch), last))
        else:
            first = seconds(before, batch)
            times.append((first, seconds(after, batch)))
    return Timing(
        before=statistics.median(first for first, _ in times),
        after=statistics.median(last for _, last in times),
        speedup=statistics.median(first / last for first, last in times),
    )


def seconds(net: nn.Module, batch: Tensor) -> float:
    wait(batch.device)
    start = time.perf_counter()
    net(batch)
    wait(batch.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Figures:
    """What is known about one form of the net."""

    accuracy: float  # 0 ... 1
    parameters: int
    convolutions: int
    norms: int
    multiply_adds: int  # per image
    latency: float  # seconds, one image
    throughput: float  # images per second, a whole batch
    peak_activations: int  # bytes, a whole batch


@dataclass(frozen=True)
class Comparison:
    """Both forms of the net side by side, and how far their logits on the test images are apart."""

    before: Figures
    after: Figures
    batch: int  # images, for throughput and memory
    latency_ratio: float
    throughput_ratio: float
    largest_logit: float
    largest_difference: float
    predictions: int
    predictions_changed: int

    @property
    def within_rounding(self) -> bool:
        """Whether the two forms compute the same function up to rounding."""
        return self.largest_difference <= TOLERANCE * self.largest_logit


def compare(
    before: nn.Module,
    after: nn.Module,
    logits: tuple[Tensor, Tensor],  # of both, (images, classes) each
    labels: Tensor,  # (images,)
    batch: Tensor,  # (batch, 3, size, size)
    rounds: int,
) -> Comparison:
    one, many = paired_timing(before, after, batch[:1], 4 * rounds), paired_timing(before, after, batch, rounds)

    def figures(net: nn.Module, own: Tensor, latency: float, forward: float) -> Figures:
        return Figures(
            accuracy=accuracy(own, labels),
            parameters=sum(parameter.numel() for parameter in net.parameters()),
            convolutions=sum(isinstance(module, _ConvNd) for module in net.modules()),
            norms=sum(isinstance(module, _BatchNorm) for module in net.modules()),
            multiply_adds=multiply_adds(net, batch[:1]),
            latency=latency,
            throughput=len(batch) / forward,
            peak_activations=peak_activation_bytes(net, batch),
        )

    return Comparison(
        before=figures(before, logits[0], one.before, many.before),
        after=figures(after, logits[1], one.after, many.after),
        batch=len(batch),
        latency_ratio=one.speedup,
        throughput_ratio=many.speedup,
        largest_logit=logits[0].abs().max().item(),
        largest_difference=(logits[0] - logits[1]).abs().max().item(),
        predictions=len(labels),
        predictions_changed=int((logits[0].argmax(1) != logits[1].argmax(1)).sum()),
    )
