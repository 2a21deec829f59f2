"""What a comparison of two models found."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, final


class Cause(Enum):
    """Why two models differ, or that they do not."""

    NONE = "the outputs are equal, bit for bit"
    ROUNDING = "rounding"
    TRAINING_MODE = "training mode"
    DROPOUT = "dropout is active"
    EPSILON = "another eps"
    RANDOM = "random numbers"
    STRUCTURE = "outputs of another structure"
    COMPUTATION = "another computation"


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor of two models is apart.

    Args:
        name: of the output (``output``, ``output['boxes']``), or the path of the module whose result it is.
        dtype: in which the models were run.
        error: largest difference, relative to the largest magnitude in the first model.
        tolerance: what rounding explains; see `reparam.verification.tolerance`.
        basis: how the tolerance came about.
    """

    name: str
    dtype: str
    error: float
    tolerance: float
    basis: str

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.name} in {self.dtype}: error {self.error:.1e}, allowed {self.tolerance:.1e} = {self.basis}"


@final
@dataclass(frozen=True, slots=True)
class Verification:
    """Whether two models compute the same on one input, and why not.

    It is true in a condition iff the models agree.

    Args:
        ok: whether rounding explains every difference.
        cause: why the models differ.
        where: path of the first module where they part; empty for the model itself, None if they do not part.
        detail: the diagnosis in a sentence.
        remedy: what to do; empty if there is nothing to do.
        outputs: every output, in float64 and in the dtype of the models.
        modules: results of all modules that both models have, in order of execution; empty unless asked for.
        notes: what else there is to know.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> result = reparam.verify(net, reparam.fuse(net), torch.randn(1, 3, 8, 8))
        >>> result.ok, result.cause.value
        (True, 'rounding')
    """

    ok: bool
    cause: Cause
    where: str | None
    detail: str
    remedy: str
    outputs: tuple[Difference, ...]
    modules: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "not equal"
        lines = [f"{verdict}: {self.detail}" + (f"; {self.remedy}" if self.remedy else "")]
        if self.where is not None:
            lines.append(f"  first module where they part: {self.where or '(model)'}")
        lines += [f"  {difference}" for difference in self.outputs]
        if self.modules:
            lines.append("  modules:")
            lines += [f"    {'' if difference.ok else 'PARTED '}{difference}" for difference in self.modules]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON; an infinite error is None."""

        def row(difference: Difference) -> dict[str, Any]:
            finite = difference.error < float("inf")
            return {
                "name": difference.name,
                "dtype": difference.dtype,
                "error": difference.error if finite else None,
                "tolerance": difference.tolerance,
                "basis": difference.basis,
                "ok": difference.ok,
            }

        return {
            "ok": self.ok,
            "cause": self.cause.name.lower(),
            "where": self.where,
            "detail": self.detail,
            "remedy": self.remedy,
            "outputs": [row(difference) for difference in self.outputs],
            "modules": [row(difference) for difference in self.modules],
            "notes": list(self.notes),
        }
