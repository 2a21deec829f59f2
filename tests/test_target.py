"""`fuse(model, target=inputs)`: what is timed, what is chosen, and what is refused."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nets import Block, difference, images, ready, same, snapshot
from test_no_more_convolutions import Gained
from torch import Tensor, nn

import reparam
from reparam import target
from reparam.graph.memory_format import has_channels_last


@dataclass
class Took:
    median: float


def in_turn(wins: int) -> Callable[..., dict[str, list[Took]]]:
    """Times in which the other format is faster in some rounds."""

    def times(runs: Mapping[str, Callable[[], Any]], rounds: Iterable[int], *_: object) -> dict[str, list[Took]]:
        for run in runs.values():
            run()
        turns = list(rounds)
        return {"now": [Took(2.0)] * len(turns), "other": [Took(1.0 if turn < wins else 3.0) for turn in turns]}

    return times


def last(model: nn.Module) -> set[bool]:
    return {has_channels_last(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}


@pytest.mark.parametrize("start", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("wins", "changes"), [(7, True), (6, True), (5, False), (0, False)])
def test_the_other_format_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, wins: int, changes: bool, start: torch.memory_format
) -> None:
    monkeypatch.setattr(target, "in_turn", in_turn(wins))
    model = ready(nn.Sequential(Block(), Block())).to(memory_format=start)
    was_last = start is torch.channels_last
    fused = reparam.fuse(model, target=images())
    assert last(fused) == {was_last != changes}
    assert last(model) == {was_last}
    same(model, fused, images())


def test_a_convolution_whose_weight_a_child_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "in_turn", in_turn(7))
    model = ready(nn.Sequential(Gained(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    fused = reparam.fuse(model, target=x)
    assert fused[0].weight is None
    assert has_channels_last(fused[0].fused.weight)
    same(model, fused, x)


def test_three_axes_and_one() -> None:
    for kind, sizes in ((nn.Conv3d, (5, 6, 7)), (nn.Conv1d, (9,))):
        model = ready(nn.Sequential(kind(3, 8, 3), nn.ReLU()))
        x = torch.randn(2, 3, *sizes, dtype=torch.float64)
        same(model, reparam.fuse(model, target=(x,)), x)


def test_the_volume_of_weights_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "in_turn", in_turn(7))
    model = ready(nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)))
    fused = reparam.fuse(model, target={"input": torch.randn(2, 3, 5, 6, 7, dtype=torch.float64)})
    assert fused[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("given", [None, reparam.cost.always])
def test_regions_are_measured_unless_another_cost_is_given(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr("reparam.api.measured", lambda x: (asked.append(x), reparam.measured(x))[1])
    x = images()
    reparam.fuse(ready(Block()), target=x, **({} if given is None else {"cost": given}))
    assert [value is x for value in asked] == [True] * (given is None)


@pytest.mark.parametrize("wrong", [torch.randn(2, 5, 8, 8, dtype=torch.float64), "images", {"y": images()}])
def test_a_target_on_which_the_model_does_not_run_changes_nothing(wrong: Any) -> None:
    model = ready(Block())
    before = snapshot(model)
    with pytest.raises(reparam.ReparamError, match="expected a target on which the model can be timed, found one"):
        reparam.fuse(model, target=wrong, inplace=True)
    assert difference(before, snapshot(model)) == 0
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_model_in_training_mode_is_told_so_first() -> None:
    with pytest.raises(reparam.TrainingModeError):
        reparam.fuse(Block(), target=images())
