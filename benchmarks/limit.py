"""How far a fused net is from what its convolutions alone take, and these from what the machine can do.

    python -m benchmarks.limit             fills benchmarks/results/limit.json and docs/speed.md; about four minutes
    python -m benchmarks.limit --quick     one net, printed

For every net the convolutions of the fused form are run alone, one after the other, on inputs that are there already;
with weights laid out beforehand as oneDNN wants them; and with a ReLU written by the convolution itself.
"""

import copy
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import reparam
from benchmarks import page
from benchmarks.cells import Results, Settings, code, run, settings, setup
from benchmarks.paired import milliseconds, ratio, time_forms
from benchmarks.subjects import SUBJECTS

NETS = ("RepVGG-A0", "RepVGG-B0", "MobileOne-s1", "RepViT-m1.0", "ResNet-50")
BATCHES = (1, 8)
LAST = torch.channels_last
FORMS: Mapping[str, str] = {
    "net": "the fused net, contiguous",
    "weights last": "the fused net, its weights channels last, a contiguous input",
    "channels last": "the fused net, weights and input channels last",
    "target": "the net fused with `target=` a contiguous input, and that input",
    "convs": "its convolutions alone, contiguous",
    "convs last": "its convolutions alone, channels last",
    "packed": "the same, weights laid out by oneDNN beforehand",
    "packed, relu": "the same, each with a ReLU inside",
}


@dataclass(frozen=True)
class Layer:
    """One convolution of a net and its input.

    Args:
        conv: the module.
        x: an input of the shape that it gets there.
        macs: multiply-adds.
        numbers: read and written: input, weights, output.
    """

    conv: nn.Conv2d
    x: Tensor
    macs: int
    numbers: int


def layers(net: nn.Module, x: Tensor) -> list[Layer]:
    """The convolutions of one run, in order.

    >>> [layer.macs for layer in layers(nn.Conv2d(2, 3, 3), torch.zeros(1, 2, 5, 5))]
    [486]
    """
    found: list[Layer] = []

    def record(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        macs = conv.weight.numel() * output[:, 0].numel()
        found.append(
            Layer(conv, torch.randn_like(inputs[0]), macs, sum(t.numel() for t in (inputs[0], conv.weight, output)))
        )

    hooks = [module.register_forward_hook(record) for module in net.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


Step = Callable[[Tensor], Tensor]


def packed(layer: Layer, activation: str) -> Step:
    """A convolution with its weights laid out beforehand, as Inductor's freezing does."""
    conv, x = layer.conv, layer.x
    assert not isinstance(conv.padding, str)
    pads, strides, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        conv.weight.detach().to_mkldnn(), pads, strides, dilation, conv.groups, list(x.shape)
    )
    bias = None if conv.bias is None else conv.bias.detach()
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    return lambda y: convolve(y, weight, bias, pads, strides, dilation, conv.groups, activation, [], "")


def chain(steps: list[tuple[Step, Tensor]]) -> Callable[[], None]:
    """Runs every step on its own input."""

    def run_all() -> None:
        for step, x in steps:
            step(x)

    return run_all


def forms(net: nn.Module, target: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by the names of `FORMS`: a fused net, and the same net fused for `x`."""
    found = layers(net, x)
    last = [
        dataclasses.replace(
            layer, conv=copy.deepcopy(layer.conv).to(memory_format=LAST), x=layer.x.to(memory_format=LAST)
        )
        for layer in found
    ]
    net_last = copy.deepcopy(net).to(memory_format=LAST)
    return {
        "net": functools.partial(net, x),
        "weights last": functools.partial(net_last, x),
        "channels last": functools.partial(net_last, x.to(memory_format=LAST)),
        "target": functools.partial(target, x),
        "convs": chain([(layer.conv, layer.x) for layer in found]),
        "convs last": chain([(layer.conv, layer.x) for layer in last]),
        "packed": chain([(packed(layer, "none"), layer.x) for layer in last]),
        "packed, relu": chain([(packed(layer, "relu"), layer.x) for layer in last]),
    }


def cells(chosen: Settings) -> list[tuple[str, tuple[Any, ...]]]:
    names, batches = (NETS[:1], BATCHES[:1]) if chosen.quick else (NETS, BATCHES)
    return [("machine", ("", 0)), *((f"{name} | {batch}", (name, batch)) for name in names for batch in batches)]


def measure(chosen: Settings, name: str, batch: int) -> dict[str, Any]:
    """One net and batch; or, without a name, the machine."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(chosen.threads)
    if not name:
        return peaks(chosen)
    subject = SUBJECTS[name]
    built, x = subject.forms(), subject.input(batch)
    net, target = built["fused"], reparam.fuse(built["unfused"], check=False, target=x)
    runs = forms(net, target, x)
    with torch.inference_mode():
        for call in runs.values():
            call()
    found = layers(net, x)
    return {
        "macs": sum(layer.macs for layer in found),
        "work": [(layer.macs, layer.numbers) for layer in found],
        "seconds": time_forms(runs, chosen.seconds, chosen.threads),
    }


def peaks(chosen: Settings) -> dict[str, Any]:
    """The fastest of a product of matrices and a large convolution; the fastest copy of what no cache holds."""
    size, length = 2048, 64 * 2**20
    a, b = torch.randn(size, size), torch.randn(size, size)
    source, target = torch.randn(length), torch.empty(length)
    (layer,) = layers(nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 56, 56).to(memory_format=LAST))
    convolve = packed(layer, "none")
    runs: dict[str, Callable[[], Any]] = {
        "product": functools.partial(torch.mm, a, b),
        "convolution": functools.partial(convolve, layer.x),
        "copy": functools.partial(target.copy_, source),
    }
    found = time_forms(runs, chosen.seconds, chosen.threads)
    return {
        "macs_per_second": max(size**3 / min(found["product"]), layer.macs / min(found["convolution"])),
        "bytes_per_second": 2 * 4 * length / min(found["copy"]),
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def roofline(cell: dict[str, Any], machine: dict[str, Any]) -> tuple[float, float]:
    """Seconds at the peak of arithmetic alone, and with everything read from and written to memory once.

    >>> roofline({"work": [[10, 1], [1, 10]]}, {"macs_per_second": 1.0, "bytes_per_second": 4.0})
    (11.0, 20.0)
    """
    work = np.array(cell["work"], dtype=float)
    compute = work[:, 0] / machine["macs_per_second"]
    traffic = 4 * work[:, 1] / machine["bytes_per_second"]
    return float(compute.sum()), float(np.maximum(compute, traffic).sum())


def text(results: Results) -> str:
    good = {name: cell for name, cell in results.good.items() if name != "machine"}
    if not good:
        return page.ABSENT
    names = [name for name in (f"{n} | {b}" for n in NETS for b in BATCHES) if name in good]
    head = ("net, batch", *FORMS)
    labels = [name.replace(" | ", ", ") for name in names]
    absolute = [[label, *milliseconds_of(good[name])] for label, name in zip(labels, names, strict=True)]
    relative = [
        [label, *(ratio(good[name]["seconds"][form], good[name]["seconds"]["net"]) for form in list(FORMS)[1:])]
        for label, name in zip(labels, names, strict=True)
    ]
    parts = [page.machine(results), "", *page.failures(results)]
    parts += ["Forms:", "", *(f"- *{form}*: {what}" for form, what in FORMS.items()), ""]
    parts += ["### Time relative to the fused net", "", page.table(("net, batch", *list(FORMS)[1:]), relative), ""]
    parts += ["### Milliseconds", "", page.table(head, absolute), ""]
    if "machine" in results.good:
        machine = results.good["machine"]
        parts += ["### The roofline", "", *rooflines(names, good, machine)]
    return "\n".join(parts)


def milliseconds_of(cell: dict[str, Any]) -> list[str]:
    return [milliseconds(cell["seconds"][form]) for form in FORMS]


def rooflines(names: list[str], good: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    rows = []
    for name in names:
        compute, whole = roofline(good[name], machine)
        best = min(float(np.median(times)) for form, times in good[name]["seconds"].items() if "packed" not in form)
        row = [good[name]["macs"] / 1e9, 1e3 * compute, 1e3 * whole, compute / best]
        rows.append([name.replace(" | ", ", "), *(f"{value:.2f}" for value in row)])
    head = (
        "net, batch",
        "multiply-adds, B",
        "ms at the peak of arithmetic",
        "ms, memory included",
        "peak over the fastest of net and convs",
    )
    speed, traffic = machine["macs_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    return [
        "The faster of a large product of matrices and a large convolution reaches"
        f" {speed:.0f} billion multiply-adds per second, a copy {traffic:.1f} GB/s.",
        "",
        page.table(head, rows),
    ]


def main() -> int:
    chosen = settings(__doc__, minutes=6, seconds=8)
    results = Results.resumed(chosen.file("limit"), setup(chosen) | {"reparam": code()}, chosen.fresh)
    run(cells(chosen), measure, results, chosen)
    page.publish("limit", text(results), chosen.out is None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
