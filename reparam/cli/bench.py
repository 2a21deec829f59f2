"""The command ``bench``."""

import copy
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

import reparam
from reparam.cli.options import Cost, Exclude, Input, Json, Kwargs, Model, Only
from reparam.cli.session import chosen, command, load, progress, show
from reparam.timing import in_turn

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement


@command
def bench(
    model: Model,
    kwargs: Kwargs = "{}",
    shapes: Input = None,
    rounds: Annotated[int, typer.Option(help="Rounds, in each of which both nets are timed", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Time for one net in one round", min=0.01)] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads of torch", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Device of torch")] = "cpu",
    cost: Cost = "default",
    exclude: Exclude = None,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Time a model before and after fuse, in turn, and count what it consists of."""
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, "", shapes)
        inputs = tuple(x.to(device) for x in loaded.needed())
        say("fusing")
        before = loaded.model.to(device)
        fused = reparam.fuse(before, **chosen(cost, exclude, only))
    nets = {"before": before, "after": fused}
    console = Console(stderr=True)
    hidden = as_json or not console.is_terminal
    turns = track(range(rounds), "timing", console=console, transient=True, disable=hidden)
    times = in_turn({name: partial(net, *inputs) for name, net in nets.items()}, turns, seconds, threads)
    figures = {name: _figures(net, inputs, times[name]) for name, net in nets.items()}
    setup = {
        "device": device,
        "threads": threads,
        "inputs": [list(x.shape) for x in inputs],
        "torch": torch.__version__,
    }
    plain = {"model": model, **setup, **figures}
    show(as_json, plain, _table(model, figures, setup))


def _figures(net: nn.Module, inputs: tuple[Tensor, ...], times: "list[Measurement]") -> dict[str, Any]:
    merged = times[0].merge(times)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(net)(*inputs)
    kinds = {"convolutions": _ConvNd, "linear_layers": nn.Linear, "batch_norms": _BatchNorm}
    return {
        "milliseconds": 1e3 * merged.median,
        "interquartile_range": 1e3 * merged.iqr,
        "parameters": sum(p.numel() for p in net.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
        **{name: sum(isinstance(m, kind) for m in net.modules()) for name, kind in kinds.items()},
    }


def _table(model: str, figures: dict[str, dict[str, Any]], setup: dict[str, Any]) -> Table:
    shapes = ", ".join("x".join(map(str, shape)) for shape in setup["inputs"])
    where = f"{setup['device']}, {setup['threads']} threads, torch {setup['torch']}"
    table = Table(title=f"{model}, input {shapes}", caption=f"{where}; times are medians and interquartile ranges")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    before, after = figures["before"], figures["after"]
    spread = [f"{f['milliseconds']:.2f} ± {f['interquartile_range'] / 2:.2f}" for f in (before, after)]
    table.add_row("milliseconds", *spread, f"{before['milliseconds'] / after['milliseconds']:.2f}")
    for name in ("parameters", "multiply_adds", "convolutions", "linear_layers", "batch_norms"):
        ratio = f"{before[name] / after[name]:.2f}" if after[name] else ""
        table.add_row(name.replace("_", " "), f"{before[name]:,}", f"{after[name]:,}", ratio)
    return table
