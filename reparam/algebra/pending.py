"""A weight that is not computed yet: a sum of scaled weights.

    W[r, c] = sum_i  scale_i[r] . W_i[r, c] . inputs_i[c]     for every output channel r and input channel c

with each W_i at its own taps. A norm behind a convolution or in front of it, and the sum of such branches, change
nothing but the scales. So a region's weight is computed once, some rows at a time in a buffer that stays in the cache,
and rounded where it is stored; no copy of a large weight in float64 is made.
"""

from collections.abc import Iterator
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
        inputs: ``(in,)`` in float64, the scales of its input channels; None: ones.
    """

    conv: "Conv"
    weight: Tensor | None
    taps: tuple[slice, ...]
    scale: Tensor | None = None
    inputs: Tensor | None = None

    def scaled(self, scale: Tensor) -> "Part":
        """The summand with its rows multiplied."""
        return replace(self, scale=scale if self.scale is None else self.scale * scale)

    def after_scale(self, scale: Tensor) -> "Part":
        """The summand with its input channels multiplied."""
        if self.weight is None:
            return self.scaled(scale)
        return replace(self, inputs=scale if self.inputs is None else self.inputs * scale)

    def values(self, rows: slice, device: torch.device) -> Tensor:
        """Some rows of it in float64, each summand rounded by itself, so that branches which cancel do so exactly."""
        if self.weight is None:
            values = torch.ones((rows.stop - rows.start, 1, *self.conv.kernel), dtype=torch.float64, device=device)
        else:
            values = self.weight[rows].to(torch.float64, copy=self.scale is not None or self.inputs is not None)
        return self.scale_(values, rows)

    def scale_(self, values: Tensor, rows: slice) -> Tensor:
        """Multiply some rows of its weight, in place, by its scales."""
        ones = (1,) * (values.dim() - 2)
        if self.inputs is not None:
            values.mul_(_by_row(self.inputs, self.conv, rows).reshape(-1, values.shape[1], *ones))
        if self.scale is not None:
            values.mul_(self.scale[rows].reshape(-1, 1, *ones))
        return values


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
        """With its rows multiplied by ``scale``, of ``out`` numbers."""
        factor = self._factor(scale)
        return Pending(self.box, tuple(part.scaled(factor) for part in self.parts))

    def after_scale(self, scale: Tensor) -> "Pending":
        """With its input channels multiplied by ``scale``, of ``in`` numbers."""
        factor = self._factor(scale)
        return Pending(self.box, tuple(part.after_scale(factor) for part in self.parts))

    def compute(self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """The weight, ``(out, in/groups, *kernel)``, computed in float64 and rounded once."""
        result = torch.empty(self._shape, dtype=dtype, device=self.device)
        for rows, block in self._blocks():
            result[rows].copy_(block)
        return result if device is None else result.to(device)

    def response(self, vector: Tensor) -> Tensor:
        """What the map gives on an input that is ``vector``, ``(in,)`` in float64, everywhere: ``(out,)``."""
        result = torch.empty(self.box.out_channels, dtype=torch.float64, device=self.device)
        vector = vector.to(self.device)
        for rows, block in self._blocks():
            total = block.flatten(2).sum(-1) if block.dim() > 2 else block
            result[rows] = (total * _by_row(vector, self.box, rows)).sum(1)
        return result

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.box.out_channels, self.box.in_channels // self.box.groups, *self.box.kernel)

    def _factor(self, scale: Tensor) -> Tensor:
        return scale.detach().reshape(-1).to(self.device, torch.float64)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after the other, in float64, in a buffer that is used again."""
        shape = self._shape
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
                first.scale_(block.copy_(first.weight[rows]), rows)
            for part in others:
                self._add(block, part, rows, places.get(id(part)))
            yield rows, block

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
        values = part.values(rows, block.device)
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


def _by_row(values: Tensor, conv: "Conv", rows: slice) -> Tensor:
    """``(in,)`` as the input channels that some rows of a weight read: ``(rows, in/groups)``, or one row for all."""
    if conv.groups == 1:
        return values.unsqueeze(0)
    group = torch.arange(rows.start, rows.stop, device=values.device) // (conv.out_channels // conv.groups)
    return values.reshape(conv.groups, -1)[group]
