"""Colours of regions."""

from typing import Final

PASTELS: Final = (
    "#a6cee3", "#fdbf6f", "#b2df8a", "#fb9a99", "#cab2d6", "#ffff99", "#8dd3c7", "#fccde5", "#bebada", "#ffd92f",
)  # fmt: skip


def colour(region: int) -> str:
    """The colour of a region, by its number; neighbours differ."""
    return PASTELS[region % len(PASTELS)]
