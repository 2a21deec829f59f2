"""Where the channels of a value are."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Space:
    """``channels`` on the axis in front of ``axes`` spatial ones (the last axis if ``axes`` is 0)."""

    channels: int
    axes: int
