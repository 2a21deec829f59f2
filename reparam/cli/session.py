"""What every command does: load a model, show progress, print, and end with the right exit code."""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn, ParamSpec, final

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import reparam
from reparam import cost as costs
from reparam.checkpoints.read import load_checkpoint
from reparam.cli.source import Source, parse_kwargs
from reparam.cost import DEFAULT_COST, Cost
from reparam.errors import CheckError, MissingPackageError, ReparamError

DIFFERENT: Final = 1
BAD_USAGE: Final = 2
MISSING_PACKAGE: Final = 3
COSTS: Final[dict[str, Cost]] = {
    "default": DEFAULT_COST,
    "macs": costs.macs,
    "traffic": costs.traffic,
    "parameters": costs.parameters,
    "always": costs.always,
}
P = ParamSpec("P")


@final
@dataclass(frozen=True, slots=True)
class Loaded:
    """A model of the command line.

    Args:
        source: where it comes from.
        model: the model.
        inputs: random inputs, if their shapes are known.
    """

    source: Source
    model: nn.Module
    inputs: tuple[Tensor, ...] | None

    def needed(self) -> tuple[Tensor, ...]:
        """The inputs.

        Raises:
            ReparamError: their shapes are not known.
        """
        if self.inputs is None:
            raise ReparamError(
                f"expected the shape of the input of {self.source.name}, found none: pass --input 1x3x224x224"
            )
        return self.inputs


def load(
    name: str,
    kwargs: str,
    weights: str,
    shapes: Iterable[str] | None,
    *,
    trust_pickle: bool = False,
    averaged: bool | None = None,
    as_built: bool = False,
) -> Loaded:
    """Build a model by name, and load its weights; ``as_built`` leaves what a user's factory returns in its mode."""
    source = Source(name, parse_kwargs(kwargs))
    model = source.build()
    if source.zoo or not as_built:
        model.eval()
    if weights:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            load_checkpoint(model, weights, averaged=averaged, trust_pickle=trust_pickle)
    return Loaded(source, model, source.inputs(model, shapes or ()))


def cost_named(name: str) -> Cost:
    """A cost policy of the library."""
    if name not in COSTS:
        raise ReparamError(f"expected --cost to be one of {', '.join(COSTS)}, found {name!r}")
    return COSTS[name]


def chosen(cost: str, exclude: list[str] | None, only: list[str] | None) -> dict[str, Any]:
    """Arguments of ``reparam.plan`` and ``reparam.fuse`` from those of a command."""
    return {"cost": cost_named(cost), "exclude": tuple(exclude or ()), "only": tuple(only) if only else None}


def fused_model(
    loaded: Loaded, shapes: list[str] | None, cost: str, exclude: list[str] | None, only: list[str] | None
) -> nn.Module:
    """The model, fused; compared with the original if the shapes of its inputs were given."""
    return reparam.fuse(loaded.model, example_inputs=loaded.inputs if shapes else None, **chosen(cost, exclude, only))


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; it goes to stderr, and is gone at the end."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda description: bar.update(task, description=description)


def show(as_json: bool, plain: dict[str, Any], text: object) -> None:
    """Print a result, as JSON or for a reader."""
    if as_json:
        typer.echo(json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False))
    elif isinstance(text, str):
        typer.echo(text)
    else:
        Console().print(text)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command that reports errors of this library on stderr, or in JSON, and ends with their exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except ReparamError as error:
            _fail(error, bool(kwargs.get("as_json")))

    return wrapped


def _fail(error: ReparamError, as_json: bool) -> NoReturn:
    if as_json:
        plain: dict[str, Any] = {"error": str(error)}
        if isinstance(error, CheckError):
            plain["verification"] = error.verification.to_dict()
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        typer.echo(f"error: {error}", err=True)
    codes = {CheckError: DIFFERENT, MissingPackageError: MISSING_PACKAGE}
    raise typer.Exit(codes.get(type(error), BAD_USAGE))
