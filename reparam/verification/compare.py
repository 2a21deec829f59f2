"""Two models in one data type: how far they are apart, and where they part."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from reparam.verification.result import Difference
from reparam.verification.runs import ROOT, Inputs, Key, Record, Subject, observe
from reparam.verification.tolerance import tolerance


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs of two models on one input.

    Args:
        a: the first model, and its run.
        b: the second model, and its run compared with the first.
        moved: the first model with other roundings, compared with itself.
        eps: of the coarsest type.
        dtype: in which they were run.
    """

    a: Subject
    b: Subject
    first: Record
    second: Record
    moved: Record
    eps: float
    dtype: str

    @property
    def structure(self) -> str:
        """How the outputs differ in structure or shape; empty if they do not."""
        left, right = self.first.outputs[ROOT], self.second.outputs[ROOT]
        for name in {**left, **right}:
            if name not in right or name not in left:
                here, there = ("a", "b") if name in left else ("b", "a")
                return f"{here} returns {name}, {there} does not"
            if left[name].shape != right[name].shape:
                return f"{name} has shape {tuple(left[name].shape)} in a and {tuple(right[name].shape)} in b"
        return ""

    @property
    def ok(self) -> bool:
        """Whether rounding explains all differences of the outputs."""
        return all(difference.ok for difference in self.outputs())

    def outputs(self) -> tuple[Difference, ...]:
        """The outputs of the models, one by one."""
        return tuple(self.rows(ROOT, ""))

    def modules(self) -> tuple[Difference, ...]:
        """What the modules return that both models have, in order of execution."""
        rows: list[Difference] = []
        for key in self.first.order:
            if key != ROOT and key in self.second.unlike:
                path, call = key
                rows += self.rows(key, f"{path} (call {call + 1})" if call else path)
        return tuple(rows)

    def rows(self, key: Key, label: str) -> list[Difference]:
        """The tensors that one call returns."""
        rows = []
        errors = self.second.unlike[key][1]
        for name, error in errors.items():
            depth = max(record.depths[key].get(name, 0) for record in (self.first, self.second))
            moved = self.moved.unlike[key][1].get(name, 0.0) if key in self.moved.unlike else 0.0
            tensor = self.first.outputs[key].get(name)
            whole = tensor is not None and not _rounds(tensor)
            allowed, basis = (0.0, "none for integers") if whole else tolerance(self.eps, depth, moved)
            shown = label + (name.removeprefix("output") if label else name)
            rows.append(Difference(shown, self.dtype, error, allowed, basis))
        return rows

    def parted(self, key: Key) -> bool:
        """Whether a call returns something else in the second model."""
        return not all(difference.ok for difference in self.rows(key, ""))

    def same_inputs(self, key: Key) -> bool:
        """Whether a call receives the same in both models, up to rounding."""
        moved = self.moved.unlike[key][0] if key in self.moved.unlike else {}
        depth = max((d for r in (self.first, self.second) for d in r.depths[key].values()), default=1)
        unlike = self.second.unlike[key][0]
        return all(error <= tolerance(self.eps, depth, moved.get(name, 0.0))[0] for name, error in unlike.items())


def compare(a: Subject, b: Subject, inputs: Inputs, eps: float, dtype: str, *, inside: bool = False) -> Comparison:
    """Run two models, and the first once more with other roundings.

    Args:
        a: the first model.
        b: the second model.
        inputs: of both.
        eps: of the coarsest type of number in the models as they were given.
        dtype: what to call the type in which they are run.
        inside: look at every module, not only at the outputs.
    """
    first = observe(a, inputs, inside=inside, eps=eps)
    second = observe(b, inputs, inside=inside, other=first, eps=eps)
    with a.rounded_anew(eps / 2):
        moved = observe(a, inputs, inside=inside, other=first)
    return Comparison(a, b, first, second, moved, max(eps, first.coarsest, second.coarsest), dtype)


def common_eps(a: nn.Module, b: nn.Module) -> float:
    """The eps of the coarsest numbers of two models; that of float32 where neither has any."""
    found = (t.dtype for model in (a, b) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return max((torch.finfo(dtype).eps for dtype in found), default=torch.finfo(torch.float32).eps)


def _rounds(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
