"""What a training step costs with branches, and what a forward costs after fusing, over the same of the plain net.

Times are CPU times of one thread, so that other work beside hardly matters; the nets take turns, and a ratio is formed
within each round.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from nets import count
from torch import nn
from torch.nn import functional as F

import reparam
from benchmarks.expand_training import SIZE, VARIANTS, Images, Settings, make, optimizer_of
from benchmarks.paired import Times, ratio
from reparam.models.count import count as arithmetic

COST_ROUNDS = 25  # steps and forwards of each net that are timed, in turn
FORWARDS = 20  # per round


def structure(net: nn.Module) -> Any:
    return [
        {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()},
        [(path, type(module)) for path, module in net.named_modules()],
    ]


def peak_of_step(net: nn.Module, images: Images) -> int:
    """Most bytes that forward and backward hold at once beside parameters, statistics and images."""
    from demo.memory import ActivationMemory

    memory = ActivationMemory([*net.parameters(), *net.buffers(), *images])
    with memory:
        F.cross_entropy(net(images[0]), images[1]).backward()
    return int(memory.peak)


def in_turn(calls: Mapping[str, Callable[[], None]], rounds: int) -> Times:
    """CPU seconds of every call in every round, after one round that does not count."""
    found: Times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in found.items()}


def costs(everything: Images, settings: Settings, rounds: int = COST_ROUNDS) -> dict[str, dict[str, Any]]:
    """What a step and, after fusing, a forward of every variant costs, over the cost of its plain net."""
    x, labels = everything[0][: settings.batch], everything[1][: settings.batch]
    nets = {name: make(variant, settings, 0) for name, variant in VARIANTS.items()}
    fused = {name: reparam.fuse(net) for name, net in nets.items()}
    trained = {name: copy.deepcopy(net).train() for name, net in nets.items()}
    optimizers = {name: optimizer_of(net, settings) for name, net in trained.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        F.cross_entropy(trained[name](x), labels).backward()
        optimizers[name].step()

    @torch.inference_mode()
    def forward(name: str) -> None:
        for _ in range(FORWARDS):
            fused[name](x)

    steps = in_turn({name: lambda name=name: step(name) for name in nets}, rounds)
    forwards = in_turn({name: lambda name=name: forward(name) for name in nets}, rounds)
    peaks = {name: peak_of_step(copy.deepcopy(net).train(), (x, labels)) for name, net in nets.items()}
    counts = {name: fused_counts(net) for name, net in fused.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, variant in VARIANTS.items():
        base = variant.plain
        slower, after = ratio(steps[name], steps[base]), ratio(forwards[name], forwards[base])
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in nets[name].parameters()),
            "step_ms": statistics.median(steps[name]) * 1e3,
            "step_ratio": [slower.median, slower.low, slower.high],
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks[base],
            "fused": counts[name],
            "fused_structure_equal": structure(fused[name]) == structure(fused[base]),
            "fused_ms": statistics.median(forwards[name]) * 1e3 / FORWARDS,
            "fused_ratio": [after.median, after.low, after.high],
        }
    return found


def fused_counts(net: nn.Module) -> dict[str, int]:
    """What a net holds and runs for one image."""
    one = arithmetic(net, (1, SIZE, SIZE))
    calls = count(net, torch.zeros(1, 1, SIZE, SIZE))["calls"]
    return {"parameters": one.parameters, "multiply_adds": one.flops, "operations": calls}
