"""The commands ``expand`` and ``restore``."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from torch import nn

import reparam
from reparam.checkpoints.deploy import load_deploy
from reparam.checkpoints.read import safetensors_torch
from reparam.cli.options import Averaged, Cost, Exclude, Input, Json, Kwargs, Model, Only, TrustPickle, Weights
from reparam.cli.session import DIFFERENT, Loaded, chosen, command, fused_model, load, progress, show
from reparam.cli.source import Source, called, parse_kwargs
from reparam.errors import ReparamError
from reparam.expansion import survey
from reparam.nn import BRANCHES, PRESETS
from reparam.verification.result import Verification
from reparam.verification.verify import verify as compare

KNOWN: Final = f"A preset ({', '.join(PRESETS)}), or branches, each by its own option ({', '.join(BRANCHES)})"

Calibrate = Annotated[
    str, typer.Option(help="Function that returns inputs to measure statistics on, as path/file.py:function")
]


@command
def expand(
    model: Model,
    branches: Annotated[list[str] | None, typer.Option(help=KNOWN, show_default="repvgg")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Path pattern of the convolutions; by default, all")] = None,
    preserve: Annotated[
        bool, typer.Option("--preserve/--no-preserve", help="Compute the same, or start as the papers start")
    ] = True,
    calibrate: Calibrate = "",
    out: Annotated[
        Path | None, typer.Option(help="Checkpoint to write (.safetensors); without, nothing is written")
    ] = None,
    kwargs: Kwargs = "{}",
    weights: Weights = "",
    ema: Averaged = None,
    trust_pickle: TrustPickle = False,
    shapes: Input = None,
    as_json: Json = False,
) -> None:
    """Put branches beside convolutions, to train with; show which, and write the weights."""
    _refuse_path(out)
    names = branches or ["repvgg"]
    given: str | list[str] = names[0] if len(names) == 1 else names
    patterns = tuple(where) if where else None
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, weights, shapes, trust_pickle=trust_pickle, averaged=ema)
        examples = loaded.inputs if shapes else None
        say("looking for convolutions")
        found = survey(loaded.model, given, where=patterns, example_inputs=examples)
        say("expanding")
        expanded = reparam.expand(
            loaded.model,
            given,
            where=patterns,
            preserve=preserve,
            calibrate=_inputs(calibrate),
            example_inputs=examples,
        )
        result = None
        if preserve and loaded.inputs is not None:
            say("comparing with the original net")
            result = compare(loaded.model, expanded, loaded.inputs)
        written = _write(expanded, out, result, {"source": model, "kwargs": kwargs, "branches": " ".join(names)})
    unpreserved = "not compared, as --no-preserve starts branches anew"
    plain = {
        "model": model,
        "branches": names,
        "chosen": {path: list(added) for path, added in found.chosen.items()},
        "left": dict(found.left),
    }
    text = [str(found), _growth(loaded.model, expanded), _verdict(result, "" if preserve else unpreserved), written]
    _end(as_json, plain, loaded.model, expanded, out, result, text)


@command
def restore(
    model: Model,
    deployed: Annotated[str, typer.Argument(help="Deploy checkpoint of this model, as fuse writes it")],
    out: Annotated[Path, typer.Option(help="Training checkpoint to write (.safetensors)", show_default=False)],
    calibrate: Calibrate = "",
    kwargs: Kwargs = "{}",
    shapes: Input = None,
    cost: Cost = "default",
    exclude: Exclude = None,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Give a fused net the branches of its architecture back, to train on; options are those it was fused with."""
    _refuse_path(out)
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, "", shapes)
        build = Source(model, parse_kwargs(kwargs)).build

        def again(net: nn.Module) -> nn.Module:
            return fused_model(Loaded(loaded.source, net, loaded.inputs), shapes, cost, exclude, only)

        say(f"loading {deployed}")
        fused = load_deploy(build, deployed, fuse=again)
        say("restoring")
        restored = reparam.restore(
            fused,
            build,
            calibrate=_inputs(calibrate),
            example_inputs=loaded.inputs if shapes else None,
            **chosen(cost, exclude, only),
        )
        result = None
        if loaded.inputs is not None:
            say("comparing with the fused net")
            result = compare(fused, restored, loaded.inputs)
        written = _write(restored, out, result, {"source": model, "kwargs": kwargs})
    text = [_growth(fused, restored), _verdict(result), written]
    _end(as_json, {"model": model, "deployed": deployed}, fused, restored, out, result, text)


def _inputs(name: str) -> Any:
    return called(name, "inputs for --calibrate") if name else None


def _refuse_path(out: Path | None) -> None:
    """Raise before anything is computed that could not be written."""
    if out is None:
        return
    if out.suffix != ".safetensors":
        raise ReparamError(f"expected a path for --out that ends with .safetensors, found {out}")
    if not out.parent.is_dir():
        raise ReparamError(f"expected a folder for --out, found none at {out.parent}: make it first")


def _write(model: nn.Module, out: Path | None, result: Verification | None, about: dict[str, str]) -> str:
    """Write a training checkpoint, unless the model is not what it should be; says what was done."""
    if out is None:
        return "nothing was written, as --out is not given"
    if result is not None and not result.ok:
        return f"did not write {out}"
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    safetensors_torch().save_file(tensors, out, metadata=about)
    return f"wrote {out}"


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _growth(before: nn.Module, after: nn.Module) -> str:
    return f"parameters {_parameters(before):,} -> {_parameters(after):,}"


def _verdict(result: Verification | None, reason: str = "") -> str:
    return str(result) if result is not None else reason or "not compared, as --input is not given"


def _end(
    as_json: bool,
    plain: dict[str, Any],
    before: nn.Module,
    after: nn.Module,
    out: Path | None,
    result: Verification | None,
    text: list[str],
) -> None:
    """Print, and end with the right exit code."""
    plain |= {
        "out": None if out is None or (result is not None and not result.ok) else str(out),
        "parameters_before": _parameters(before),
        "parameters_after": _parameters(after),
        "verification": None if result is None else result.to_dict(),
    }
    show(as_json, plain, "\n".join(text))
    if result is not None and not result.ok:
        raise typer.Exit(DIFFERENT)
