"""Where files are written."""

from pathlib import Path

from reparam.errors import ReparamError


def in_a_folder(file: Path) -> Path:
    """A path that can be written.

    Raises:
        ReparamError: its folder does not exist, or it is a folder itself.

    Example:
        >>> in_a_folder(Path("nowhere") / "net.svg")
        Traceback (most recent call last):
            ...
        reparam.errors.ReparamError: expected a folder to write net.svg into, found none at nowhere: make it first
    """
    if not file.parent.is_dir():
        raise ReparamError(f"expected a folder to write {file.name} into, found none at {file.parent}: make it first")
    if file.is_dir():
        raise ReparamError(f"expected the path of a file to write, found the folder {file}: add a name")
    return file
