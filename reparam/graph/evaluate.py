"""Formulas with weights, run in float64 on the CPU."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine
from reparam.graph.build import build
from reparam.graph.net import Value


@final
class Evaluator:
    """A formula as torch computes it: the modules that take the place of a region, with weights in float64.

    Args:
        formula: with weights.
    """

    def __init__(self, formula: Affine) -> None:
        self.formula = formula
        self.modules: dict[Value, nn.Module] = {}
        for root, conv in formula.terms.items():
            assert isinstance(root, Value)
            if conv.identity and len(formula.terms) > 1:
                continue
            self.modules[root] = build(conv, None, dtype=torch.float64, device="cpu", trainable=False, copy=False)

    def run(self, inputs: Mapping[Value, Tensor]) -> tuple[Tensor, Tensor]:
        """The value, and the magnitude of each of its channels, to which differences are compared."""
        total: Tensor | None = None
        for root in self.formula.terms:
            assert isinstance(root, Value)
            term = self.modules[root](inputs[root]) if root in self.modules else inputs[root]
            total = term if total is None else total + term
        assert total is not None
        axes = max(conv.axes for conv in self.formula.terms.values())
        others = [axis for axis in range(total.dim()) if axis != total.dim() - 1 - axes]
        magnitude = total.square().mean(others).sqrt().reshape(-1, *(1,) * axes)
        if self.formula.bias is not None:
            bias = self.formula.bias.double().cpu()
            bias = bias if bias.dim() > 1 else bias.reshape(-1, *(1,) * axes)
            total, magnitude = total + bias, magnitude + bias.abs()
        return total, magnitude + magnitude.mean() + torch.finfo(torch.float64).tiny


def evaluate(formula: Affine, inputs: Mapping[Value, Tensor]) -> Tensor:
    """The formula as torch computes it."""
    return Evaluator(formula).run(inputs)[0]
