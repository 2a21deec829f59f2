"""The commands, by name."""

from collections.abc import Callable
from typing import Any, Final

import typer

from reparam.cli import bench, branches, commands, draw

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 the models differ, or a file that was written does;"
    " 2 a wrong argument, model or checkpoint; 3 a package is missing."
)
COMMANDS: Final[dict[str, Callable[..., Any]]] = {
    "plan": commands.plan,
    "draw": draw.draw,
    "fuse": commands.fuse,
    "verify": commands.verify,
    "bench": bench.bench,
    "export": commands.export,
    "expand": branches.expand,
    "restore": branches.restore,
}

app = typer.Typer(
    name="reparam",
    help="Structural re-parameterization of PyTorch nets.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for name, function in COMMANDS.items():
    app.command(name)(function)
