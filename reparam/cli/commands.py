"""The commands ``plan``, ``fuse``, ``verify`` and ``export``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import reparam
from reparam.checkpoints.deploy import load_deploy, save_deploy
from reparam.cli.options import Averaged, Cost, Exclude, Input, Json, Kwargs, Model, Only, TrustPickle, Weights
from reparam.cli.session import DIFFERENT, Loaded, chosen, command, fused_model, load, progress, show
from reparam.cli.source import Source, parse_kwargs
from reparam.exporting.export import export as write_file
from reparam.verification.verify import verify as compare


@command
def plan(
    model: Model,
    kwargs: Kwargs = "{}",
    shapes: Input = None,
    cost: Cost = "default",
    exclude: Exclude = None,
    only: Only = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables, for a pull request")] = False,
    as_json: Json = False,
) -> None:
    """Show what fuse would do, and what it would leave alone, with the reasons."""
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, "", shapes)
        say("planning")
        examples = loaded.inputs if shapes else None
        found = reparam.plan(loaded.model, example_inputs=examples, **chosen(cost, exclude, only))
    plain = found.to_dict()
    messages = [{**refusal, "message": str(found.left[at])} for at, refusal in enumerate(plain["left"])]
    show(as_json, plain | {"model": model, "left": messages}, found.to_markdown() if markdown else str(found))


@command
def fuse(
    model: Model,
    out: Annotated[Path, typer.Option(help="Deploy checkpoint to write (.safetensors)", show_default=False)],
    kwargs: Kwargs = "{}",
    weights: Weights = "",
    ema: Averaged = None,
    trust_pickle: TrustPickle = False,
    shapes: Input = None,
    cost: Cost = "default",
    exclude: Exclude = None,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Turn a model, or its training checkpoint, into a deploy checkpoint."""
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, weights, shapes, trust_pickle=trust_pickle, averaged=ema)
        say("fusing")
        fused = fused_model(loaded, shapes, cost, exclude, only)
        result = None
        if loaded.inputs is not None:
            say("comparing with the original net")
            result = compare(loaded.model, fused, loaded.inputs)
        if result is None or result.ok:
            say(f"writing {out}")
            save_deploy(fused, out, source=model, metadata={"kwargs": kwargs})
    before, after = (sum(p.numel() for p in net.parameters()) for net in (loaded.model, fused))
    verdict = "not compared, as --input is not given" if result is None else str(result)
    written = f"wrote {out}" if result is None or result.ok else f"did not write {out}"
    plain = {
        "model": model,
        "out": str(out),
        "parameters_before": before,
        "parameters_after": after,
        "verification": None if result is None else result.to_dict(),
    }
    show(as_json, plain, f"parameters {before:,} -> {after:,}\n{verdict}\n{written}")
    if result is not None and not result.ok:
        raise typer.Exit(DIFFERENT)


@command
def verify(
    model: Model,
    other: Annotated[
        str, typer.Argument(help="Another model, or a deploy checkpoint of this one; by default, the fused model")
    ] = "",
    kwargs: Kwargs = "{}",
    weights: Weights = "",
    ema: Averaged = None,
    trust_pickle: TrustPickle = False,
    other_kwargs: Kwargs = "{}",
    other_weights: Weights = "",
    shapes: Input = None,
    modules: Annotated[bool, typer.Option("--modules", help="Also compare module by module")] = False,
    cost: Cost = "default",
    exclude: Exclude = None,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Compare two models on random input; a factory's model is compared in the mode in which it is returned."""
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, weights, shapes, trust_pickle=trust_pickle, averaged=ema)
        inputs = loaded.needed()
        if not other:
            say("fusing")
            against: nn.Module = fused_model(loaded, shapes, cost, exclude, only)
        elif other.endswith(".safetensors"):
            say(f"loading {other}")
            build = Source(model, parse_kwargs(kwargs)).build

            def again(net: nn.Module) -> nn.Module:
                return fused_model(Loaded(loaded.source, net, inputs), shapes, cost, exclude, only)

            against = load_deploy(build, other, fuse=again)
        else:
            say(f"building {other}")
            against = load(
                other, other_kwargs, other_weights, (), trust_pickle=trust_pickle, averaged=ema, as_built=True
            ).model
        say("comparing")
        result = compare(loaded.model, against, inputs, modules=modules)
    plain = {"a": model, "b": other or f"fuse({model})", **result.to_dict()}
    show(as_json, plain, str(result))
    if not result.ok:
        raise typer.Exit(DIFFERENT)


@command
def export(
    model: Model,
    out: Annotated[list[Path], typer.Option(help="File to write, .onnx or .pt2; may be repeated", show_default=False)],
    kwargs: Kwargs = "{}",
    weights: Weights = "",
    ema: Averaged = None,
    trust_pickle: TrustPickle = False,
    shapes: Input = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the size of the batch open")] = False,
    unfused: Annotated[bool, typer.Option("--unfused", help="Write the model as it is")] = False,
    cost: Cost = "default",
    exclude: Exclude = None,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Fuse a model, write it for another runtime, and compare the file with the original net."""
    results: dict[str, dict[str, Any]] = {}
    lines = []
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, weights, shapes, trust_pickle=trust_pickle, averaged=ema)
        inputs = loaded.needed()
        say("fusing")
        net = loaded.model if unfused else fused_model(loaded, shapes, cost, exclude, only)
        for path in out:
            say(f"writing and checking {path}")
            result = write_file(net, inputs, path, original=loaded.model, dynamic_batch=dynamic_batch)
            results[str(path)] = result.to_dict()
            lines.append(f"wrote {path}, compared with {model}: {result}")
    show(as_json, {"model": model, "files": results}, "\n".join(lines))
