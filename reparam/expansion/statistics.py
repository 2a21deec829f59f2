"""Statistics of norms: what they are taken to be, what they are on data, and how to set them without changing a net.

A norm computes ``A x + B`` with ``A = gamma / sqrt(var + eps)`` and ``B = beta - mean A``. For any mean and variance
there are a gamma and a beta that give the same A and B, so statistics can be corrected while the function stays.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Conv
from reparam.algebra.groups import response, rows
from reparam.algebra.sources import norm_coefficients
from reparam.errors import ReparamError
from reparam.nn import NormAndPad
from reparam.nn.geometry import Norm


@torch.no_grad()
def set_statistics(norm: Norm, mean: Tensor, variance: Tensor) -> None:
    """Give a norm other statistics, ``(channels,)`` each, and a scale and shift with which it computes the same.

    Example:
        >>> norm = nn.BatchNorm1d(1).double().eval()
        >>> set_statistics(norm, torch.tensor([2.0]), torch.tensor([9.0]))
        >>> round(norm(torch.tensor([[5.0]], dtype=torch.float64)).item(), 4)
        5.0
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale, shift = norm_coefficients(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    mean, variance = norm.running_mean.double().to(scale.device), norm.running_var.double().to(scale.device)
    norm.weight.copy_(scale * torch.sqrt(variance + norm.eps))
    norm.bias.copy_(shift + mean * scale)


@final
@dataclass(frozen=True, slots=True)
class Inputs:
    """What the entries of an input are taken to be: independent, of one mean and one variance.

    Args:
        mean: of an entry.
        variance: of an entry.
    """

    mean: float = 0.0
    variance: float = 1.0

    @classmethod
    def of(cls, kernel: Conv, bias: Tensor | None, mean: Tensor, variance: Tensor) -> Self:
        """The inputs with which a convolution gives outputs of a mean and a variance, in the sense of least squares.

        Args:
            kernel: the convolution, with its weight.
            bias: ``(out,)``.
            mean: ``(out,)``, of the outputs.
            variance: ``(out,)``, of the outputs.
        """
        sums, squares = _sums(kernel), _squares(kernel)
        centred = mean.double() - (0 if bias is None else bias.double())
        total, energy = float(sums.square().sum()), float(squares.sum())
        first = float((centred * sums).sum()) / total if total > 0 else 0.0
        second = float(variance.double().sum()) / energy if energy > 0 else 1.0
        return cls(first, second)

    def seen_by(self, formula: Affine) -> tuple[Tensor, Tensor]:
        """Mean and variance, ``(out,)`` each, of what a formula over one input gives."""
        (conv,) = formula.terms.values()
        mean = self.mean * _sums(conv)
        return mean if formula.bias is None else mean + formula.bias.double().to(mean.device), self.spread(conv)

    def spread(self, conv: Conv) -> Tensor:
        """Variance, ``(out,)``, of what a convolution gives."""
        return self.variance * _squares(conv)


def _sums(conv: Conv) -> Tensor:
    device = None if conv.weight is None else conv.weight.device
    return response(conv, torch.ones(conv.in_channels, dtype=torch.float64, device=device))


def _squares(conv: Conv) -> Tensor:
    return rows(conv).double().square().flatten(1).sum(1)


@final
class _Moments:
    """Mean and variance per channel of all that was shown, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None  # summed squares of differences from the mean

    def show(self, x: Tensor) -> None:
        flat = x.detach().double().movedim(1, 0).flatten(1)
        count, mean = flat.shape[1], flat.mean(1)
        squares = (flat - mean[:, None]).square().sum(1)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        step, total = mean - self.mean, self.count + count
        self.mean = self.mean + step * (count / total)
        self.squares = self.squares + squares + step.square() * (self.count * count / total)
        self.count = total


@torch.no_grad()
def calibrate(model: nn.Module, norms: Iterable[Norm], inputs: Iterable[Any]) -> None:
    """Set the statistics of norms to those of data; what the model computes in eval mode stays.

    Args:
        model: in eval mode.
        norms: which of its norms.
        inputs: each a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        ReparamError: there are no inputs, or the model does not run on them.
    """
    if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable):
        raise ReparamError(
            f"expected calibrate to be an iterable of inputs, found {type(inputs).__name__}: put it into a list"
        )
    around = {module.norm: module for module in model.modules() if isinstance(module, NormAndPad)}
    moments = {norm: _Moments() for norm in norms}
    handles = [
        around.get(norm, norm).register_forward_pre_hook(lambda _, args, seen=seen: seen.show(args[0]))
        for norm, seen in moments.items()
    ]
    try:
        batches = 0
        for batches, given in enumerate(inputs, 1):  # the last number is asked for below
            keywords = dict(given) if isinstance(given, Mapping) else {}
            arguments = () if keywords else given if isinstance(given, tuple) else (given,)
            try:
                model(*arguments, **keywords)
            except Exception as error:
                raise ReparamError(
                    f"expected inputs for calibrate on which the model runs, found number {batches}, on which it raises"
                    f" {type(error).__name__}: {error}"
                ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ReparamError("expected calibrate to give at least one input, found none")
    for norm, seen in moments.items():
        if seen.mean is not None and seen.squares is not None and norm.affine:
            set_statistics(norm, seen.mean, seen.squares / seen.count)
