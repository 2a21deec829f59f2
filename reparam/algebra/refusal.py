"""A refusal: why a rewrite was not made, as a value."""

from dataclasses import dataclass, replace
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something was left as it is.

    Args:
        rule: the identity that did not hold, e.g. ``"conv_after_conv"``.
        condition: what was required and what was found instead.
        remedy: what would make it hold; empty if nothing would.
        operands: the operations that the rule was asked to join.
        path: dotted path of the module in which the operation stands; empty for the model itself.
        near: whether the remedy, one change of the model, would let it fuse.

    Example:
        >>> print(Refusal("branch_sum", "strides differ: (1, 1) and (2, 2)", "give the branches one stride"))
        branch_sum: strides differ: (1, 1) and (2, 2); to fuse: give the branches one stride
    """

    rule: str
    condition: str
    remedy: str = ""
    operands: tuple[str, ...] = ()
    path: str = ""
    near: bool = False

    def at(self, path: str, *operands: str) -> "Refusal":
        """The same refusal with the place where it happened."""
        return replace(self, path=path, operands=operands)

    def __str__(self) -> str:
        place = f"{self.path}: " if self.path else ""
        operands = f" ({' -> '.join(self.operands)})" if self.operands else ""
        remedy = f"; to fuse: {self.remedy}" if self.remedy else ""
        return f"{place}{self.rule}{operands}: {self.condition}{remedy}"
