"""Start the command line, or say which packages it needs."""

import sys

from reparam.errors import MissingPackageError


def main() -> None:
    """Run the command line with the arguments of the process."""
    try:
        import rich  # noqa: F401  # said here, where nothing needs it yet
        import typer  # noqa: F401
    except ImportError as error:
        print(MissingPackageError.of(str(error.name), "the command line is made of", "cli"), file=sys.stderr)
        sys.exit(3)
    from reparam.cli.app import app

    app()
