"""The course of a training as CSV files and, on request, for TensorBoard."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import InputError

NAMES = ("steps", "epochs")  # of the files


class Journal:
    """Rows of figures, each with its step; whatever has been added is on the disk.

    Args:
        folder: receives `steps.csv` and `epochs.csv`.
        after: the step that a resumed training goes on from; later rows, whose steps are about to be repeated, go. 0
            starts anew.
        tensorboard: whether a folder `tensorboard` is written, too.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, after: int, tensorboard: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            keep(folder / f"{name}.csv", after)
        self.board = board(folder / "tensorboard", after) if tensorboard else None

    def add(self, name: str, step: int, figures: Mapping[str, float]) -> None:
        """Append a row to `name.csv`; the name is one of `NAMES`."""
        path = self.folder / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(["step", *figures])
            rows.writerow([step, *figures.values()])
        if self.board is not None:
            for key, value in figures.items():
                self.board.add_scalar(f"{name}/{key}", value, step)
            self.board.flush()

    def close(self) -> None:
        """Nothing is added any more."""
        if self.board is not None:
            self.board.close()


def keep(path: Path, last: int) -> None:
    """Take out of a CSV file the rows of steps after `last`, and a row that was cut off while it was written."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if len(row) == len(head) and int(row[0]) <= last]
    if not kept:
        path.unlink()
        return
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *kept])
    partial.replace(path)


def board(folder: Path, after: int) -> Any:  # a SummaryWriter
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tensorboard needs TensorBoard ({error}): pip install 'reparam[train]'") from error
    return SummaryWriter(str(folder), purge_step=after + 1)
