"""The command ``draw``."""

from pathlib import Path
from typing import Annotated

import typer

import reparam
from reparam.cli.options import Averaged, Cost, Exclude, Input, Json, Kwargs, Model, Only, TrustPickle, Weights
from reparam.cli.session import chosen, command, load, progress, show
from reparam.show.text import headline


@command
def draw(
    model: Model,
    out: Annotated[Path, typer.Option(help="Picture to write: .svg, .png or .html", show_default=False)],
    module: Annotated[str, typer.Option(help="Path of the module to draw in full, as in named_modules()")] = "",
    ranges: Annotated[
        bool,
        typer.Option("--ranges", help="Draw the largest weight of every output channel instead (.png, .svg, .pdf)"),
    ] = False,
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
    """Draw a model before and after fuse, side by side, or the ranges of its weights."""
    if ranges and module:
        raise reparam.ReparamError(
            f"expected --ranges or --module, found both: --ranges draws all regions; name some by --only {module}"
        )
    with progress(as_json) as say:
        say(f"building {model}")
        loaded = load(model, kwargs, weights, shapes, trust_pickle=trust_pickle, averaged=ema)
        say("planning")
        examples = loaded.inputs if shapes else None
        plan = reparam.plan(loaded.model, example_inputs=examples, **chosen(cost, exclude, only))
        say(f"drawing {out}")
        if ranges:
            plan.draw_ranges(out)
        else:
            plan.draw(out, module=module)
    plain = {"model": model, "out": str(out), "module": module, "regions": len(plan.regions), "left": len(plan.left)}
    show(as_json, plain, f"wrote {out}: {headline(plan)}")
