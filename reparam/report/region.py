"""One linear region before and after."""

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import final


class Kind(Enum):
    """What an operation of a result is."""

    CONV = "conv"
    TRANSPOSED = "transposed conv"
    LINEAR = "linear"
    SCALE = "scale"
    INPUT = "its input"
    BIAS_MAP = "bias map"


@final
@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation of a result: a convolution or scale of one input, or the input itself.

    Args:
        kind: what it is.
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel: taps per axis; empty for a linear layer; of a map, its size.
        stride: step per axis.
        dilation: distance between taps per axis.
        groups: number of channel groups.
        padding: elements before and behind, per axis; negative: crop.
        remainders: per axis, what an input size may leave when it is divided by the stride; None: it holds for all.

    Example:
        >>> print(Kernel(Kind.CONV, 8, 8, (3, 3), (2, 2), (1, 1), 4, ((1, 1), (1, 1))))
        conv 3x3, stride 2x2, groups 4
    """

    kind: Kind
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding: tuple[tuple[int, int], ...] = ()
    remainders: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        if self.kind is Kind.INPUT:
            return "its input"
        if self.kind is Kind.SCALE:
            return "scale"
        if self.kind is Kind.LINEAR:
            return f"linear {self.in_channels} -> {self.out_channels}"
        if self.kind is Kind.BIAS_MAP:
            return f"bias map {'x'.join(map(str, self.kernel))}, for this size only"
        parts = [f"{self.kind.value} {'x'.join(map(str, self.kernel))}"]
        for name, numbers in (("stride", self.stride), ("dilation", self.dilation)):
            if set(numbers) != {1}:
                parts.append(f"{name} {'x'.join(map(str, numbers))}")
        if self.groups > 1:
            parts.append(f"groups {self.groups}")
        if self.remainders is not None:
            pairs = zip(self.stride, self.remainders, strict=True)
            allowed = [f"{' or '.join(map(str, left))} mod {s}" for s, left in pairs if len(left) < s]
            parts.append(f"for sizes that are {' and '.join(dict.fromkeys(allowed))} only")
        return ", ".join(parts)


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One operation that a region replaces.

    Args:
        label: what it is: ``"conv 3x3"``, ``"batch norm"``.
        path: dotted path of the module that is called, or in whose forward it stands; empty for the model itself.
        parameters: its weights; norm statistics are not counted.
        shared: how many of them an earlier step has counted.
        again: whether an earlier region contains the same operation, which disappears into several.
    """

    label: str
    path: str
    parameters: int
    shared: int = 0
    again: bool = False


@final
@dataclass(frozen=True, slots=True)
class Footprint:
    """Work of a region at the size of the example inputs.

    Args:
        macs: multiply-adds of the whole batch.
        activations: bytes of the results that its operations write.
    """

    macs: int
    activations: int


@final
@dataclass(frozen=True, slots=True)
class Region:
    """One linear region before and after.

    Args:
        path: dotted path of the module in which the result stands; empty for the model itself.
        steps: the operations that are replaced, in order of execution.
        result: the operations that replace them, one per input; their results are added. Empty: nothing reads them.
        params_before: parameters that are replaced, with norm statistics not counted.
        params_after: parameters of the replacement.
        macs_before: multiply-adds per output position of the region.
        macs_after: the same of the replacement.
        how: whether a child, the module or its forward is replaced.
        footprint_before: work at the size of the example inputs; None without them, or if a size is not known.
        footprint_after: the same of the replacement.
        error: largest relative difference that was measured; None if it was not.
    """

    path: str
    steps: tuple[Step, ...]
    result: tuple[Kernel, ...]
    params_before: int
    params_after: int
    macs_before: float
    macs_after: float
    how: str
    footprint_before: Footprint | None = None
    footprint_after: Footprint | None = None
    error: float | None = None

    @property
    def before(self) -> tuple[str, ...]:
        """The operations that are replaced, in words."""
        return tuple(step.label for step in self.steps)

    @property
    def after(self) -> tuple[str, ...]:
        """The operations that replace them, in words."""
        return tuple(map(str, self.result)) or ("nothing, for its value is not read",)

    @property
    def change(self) -> str:
        """Operations before and after, in words."""
        counts = Counter(self.before)
        before = ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())
        return f"{before} -> {' + '.join(self.after)}"

    @property
    def numbers(self) -> str:
        """Parameters and work before and after, and the error, in words."""
        parts = [f"parameters {self.params_before:,} -> {self.params_after:,}"]
        if self.footprint_before is None or self.footprint_after is None:
            parts.append(f"MACs per position {self.macs_before:,.0f} -> {self.macs_after:,.0f}")
        else:
            old, new = self.footprint_before, self.footprint_after
            parts.append(f"MACs {old.macs:,} -> {new.macs:,}")
            parts.append(f"activations {in_bytes(old.activations)} -> {in_bytes(new.activations)}")
        if self.error is not None:
            parts.append(f"error {self.error:.0e}")
        return "; ".join(parts)

    def __str__(self) -> str:
        return f"{self.path or '(model)'}: {self.change} [{self.numbers}]"


def in_bytes(number: int) -> str:
    """A number of bytes for a reader.

    Example:
        >>> in_bytes(700), in_bytes(3 * 2**19)
        ('700 B', '1.50 MiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
