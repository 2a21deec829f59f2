"""What the market asks for and the library does not do yet: by test of `test_market.py`, the families.

Each entry is run and must fail: one that passes has to be taken out of this list. Outputs are equal for all of them;
what is open is a merge that is missed, a module left beside the fused one, or a reason that is not precise enough.
"""

from typing import Final

OPEN: Final[dict[str, frozenset[str]]] = {}
