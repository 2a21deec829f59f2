"""The policy that measures: with a timer that is made up, and on this machine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import ReparamError

X = torch.randn(1, 8, 12, 12)


def separable() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()


def timer(grouped: float) -> tuple[Callable[[Callable[[Tensor], Any], Tensor], float], list[Any]]:
    """A convolution with groups takes `grouped` seconds, anything else takes one; and what was timed."""
    asked: list[Any] = []

    def seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
        asked.append((run, tuple(x.shape)))
        return grouped if isinstance(run, nn.Conv2d) and run.groups > 1 else 1.0

    return seconds, asked


@pytest.mark.parametrize(("grouped", "convs"), [(0.0, 2), (0.5, 1), (3.0, 1)])
def test_the_faster_form_is_kept(grouped: float, convs: int) -> None:
    model = separable()
    seconds, asked = timer(grouped)
    fused = reparam.fuse(model, cost=reparam.measured(X, timer=seconds))
    assert torch.allclose(fused(X), model(X), atol=1e-5)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == convs
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert {shape[1] for _, shape in asked} == {8}


def test_what_no_count_speaks_against_is_not_timed_again() -> None:
    seconds, asked = timer(1.0)
    policy = reparam.measured(X, timer=seconds)
    first = reparam.fuse(separable(), cost=policy)
    once = len(asked)
    second = reparam.fuse(separable(), cost=policy)
    assert len(asked) == once > 0
    assert first.state_dict().keys() == second.state_dict().keys()


def test_a_slower_form_is_refused_with_its_time() -> None:
    seconds, _ = timer(0.0)
    left = reparam.plan(separable(), cost=reparam.measured(X, timer=seconds)).left
    assert any("times as long" in refusal.condition for refusal in left)


def test_on_this_machine() -> None:
    model = separable()
    fused = reparam.fuse(model, cost=reparam.measured(X))
    assert torch.allclose(fused(X), model(X), atol=1e-5)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) in (1, 2)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.parametrize("inputs", [None, (1, 2), torch.zeros(3), torch.zeros(1, 2, dtype=torch.long)])
def test_inputs_without_a_tensor_of_numbers(inputs: Any) -> None:
    with pytest.raises(ReparamError, match="example_inputs"):
        reparam.measured(inputs)
