"""A weight that is not computed yet: a sum of scaled weights.

    W[r] = sum_i  scale_i[r] . W_i[r]        for every row (output channel) r, each W_i at its own taps

A norm behind a convolution, and the sum of such branches, change nothing but the scales. So a region's weight is
computed once, some rows at a time in a buffer that stays in the cache, and rounded where it is stored; no copy of a
large weight in float64 is made.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Final, Self, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reparam.algebra.conv import Conv

BUFFER: Final = 65536  # numbers of a buffer: half a megabyte in float64


@final
@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One summand.

    Args:
        conv: its structure.
        weight: ``(out, in/groups, *kernel)``; None: one for every channel, as the identity has.
        taps: where its taps lie among those of the sum, per axis.
        scale: ``(out,)`` in float64; None: ones.
    """

    conv: "Conv"
    weight: Tensor | None
    taps: tuple[slice, ...]
    scale: Tensor | None = None

    def scaled(self, scale: Tensor) -> "Part":
        """The summand with its rows multiplied."""
        return replace(self, scale=scale if self.scale is None else self.scale * scale)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A sum of scaled weights, not transposed.

    Args:
        box: structure of the sum.
        parts: the summands.
    """

    box: "Conv"
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, conv: "Conv", weight: Tensor) -> Self:
        """The weight of one convolution."""
        return cls(conv, (Part(conv, weight, tuple(slice(k) for k in conv.kernel)),))

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return next(part.weight.device for part in self.parts if part.weight is not None)

    def scaled(self, scale: Tensor) -> "Pending":
        """With its rows multiplied by ``scale``, ``(out,)``."""
        factor = scale.detach().reshape(-1).to(self.device, torch.float64)
        return Pending(self.box, tuple(part.scaled(factor) for part in self.parts))

    def compute(self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """The weight, ``(out, in/groups, *kernel)``, computed in float64 and rounded once."""
        shape = (self.box.out_channels, self.box.in_channels // self.box.groups, *self.box.kernel)
        result = torch.empty(shape, dtype=dtype, device=self.device)
        first, others = self._first(), list(self.parts)
        if first is not None:
            others.remove(first)
        places = {id(part): self._columns(part) for part in others if self._is_finer(part)}
        step = max(BUFFER // prod(shape[1:]), 1)
        buffer = torch.empty((min(step, shape[0]), *shape[1:]), dtype=torch.float64, device=self.device)
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            block = buffer[: rows.stop - start]
            if first is None or first.weight is None:
                block.zero_()
            else:
                block.copy_(first.weight[rows])
                if first.scale is not None:
                    block.mul_(_column(first.scale[rows], block.dim()))
            for part in others:
                self._add(block, part, rows, places.get(id(part)))
            result[rows].copy_(block)
        return result if device is None else result.to(device)

    def _first(self) -> Part | None:
        """A part that fills the whole box."""
        for part in self.parts:
            if part.weight is not None and part.conv.groups == self.box.groups and part.conv.kernel == self.box.kernel:
                return part
        return None

    def _is_finer(self, part: Part) -> bool:
        """Whether a part has more groups than the sum, so that its weights stand at scattered places."""
        return part.conv.groups != self.box.groups or part.weight is None

    def _add(self, block: Tensor, part: Part, rows: slice, columns: Tensor | None) -> None:
        """Add some rows of a part to the same rows of the sum; ``columns``: where its input channels stand there."""
        window = block[(slice(None), slice(None), *part.taps)]
        scale = None if part.scale is None else _column(part.scale[rows], block.dim())
        if part.weight is None:
            values = torch.ones((len(block), 1, *part.conv.kernel), dtype=torch.float64, device=block.device)
        else:
            values = part.weight[rows].double()
        if scale is not None:
            values = values * scale  # rounded by itself, so that branches which cancel do so exactly
        if columns is None:
            window.add_(values)
            return
        where = torch.arange(len(block), device=block.device).unsqueeze(1), columns[rows]
        window[where] += values

    def _columns(self, part: Part) -> Tensor:
        """``(out, in/groups of the part)``: where, in every row of the sum, the input channels of a part stand."""
        out, inner = self.box.out_channels, self.box.in_channels
        row = torch.arange(out, device=self.device)
        width = part.conv.in_channels // part.conv.groups
        first = row // (out // part.conv.groups) * width - row // (out // self.box.groups) * (inner // self.box.groups)
        return first.unsqueeze(1) + torch.arange(width, device=self.device)


def _column(scale: Tensor, dim: int) -> Tensor:
    return scale.reshape(-1, *(1,) * (dim - 1))
