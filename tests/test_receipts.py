"""The receipt: what was done, region by region, kept in the fused model as plain data."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Block, C, conv, conv_norm, difference, images, owned, ready, same
from torch import Tensor, fx, nn

import reparam
import reparam.graph.session as session
from reparam import Receipt, Refusal
from reparam.report.receipt import ATTRIBUTE

X = images()


def net() -> nn.Module:
    return nn.Sequential(conv_norm(3), nn.ReLU(), Block(), nn.Sequential(conv(1), nn.BatchNorm2d(C), conv(3)))


class Spread(nn.Module):
    """A norm that goes into two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(C), conv(1), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.relu(self.first(y)) + torch.sigmoid(self.second(y))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_a_receipt_is_the_plan_with_errors() -> None:
    model = ready(net())
    plan = reparam.plan(model)
    fused = plan.apply()
    receipt = reparam.receipt(fused)
    assert isinstance(receipt, Receipt)
    assert [region.change for region in receipt.regions] == [region.change for region in plan.regions]
    assert receipt.left == plan.left
    assert receipt.totals == plan.totals
    assert receipt.modules == plan.modules
    errors = [region.error for region in receipt.regions]
    assert all(0 < error < 1e-12 for error in errors), errors
    assert all(region.error is None for region in plan.regions)
    assert str(receipt).startswith("Sequential: 3 regions were fused, 1 operation was left alone\n")
    assert f"error {errors[1]:.0e}]" in str(receipt)


@pytest.mark.parametrize("options", [{"inplace": True}, {"cost": reparam.cost.always}, {"example_inputs": X}])
def test_fuse_leaves_the_receipt_of_its_options(options: dict[str, Any]) -> None:
    model = ready(net())
    given = {key: value for key, value in options.items() if key != "inplace"}
    plan = reparam.plan(model, **given)
    receipt = reparam.receipt(reparam.fuse(model, **options))
    assert [(r.change, r.footprint_before) for r in receipt.regions] == [
        (r.change, r.footprint_before) for r in plan.regions
    ]


def test_what_is_not_checked_has_no_error() -> None:
    receipt = reparam.receipt(reparam.fuse(ready(net()), check=False))
    assert [region.error for region in receipt.regions] == [None] * 3
    assert "error" not in str(receipt)


def broken(change: Callable[[Any], Any], build: Callable[[], nn.Module] = net) -> nn.Module:
    model = ready(build())
    change(model)
    return model


def poison(model: Any) -> None:
    with torch.no_grad():
        model[2].dense[0].weight[0, 0, 0, 0] = float("nan")


def overflow(model: Any) -> None:
    """Weights that fit in half precision until they are multiplied."""
    model.half()
    with torch.no_grad():
        model[0][0].weight.fill_(6e4)
        model[0][1].weight.fill_(6e4)


LOST: dict[str, tuple[Callable[[], nn.Module], Refusal]] = {
    "dtype": (
        lambda: broken(lambda model: model[2].point[0].float()),
        Refusal(
            "dtype", "weights of several data types: ['torch.float32', 'torch.float64']", "use one data type",
            ("relu",), "2", True,
        ),
    ),
    "device": (
        lambda: broken(lambda model: model[0][1].to("meta")),
        Refusal(
            "device", "weights on several devices: ['cpu', 'meta']", "use one device", ("BatchNorm2d",), "0.1", True
        ),
    ),
    "finite": (
        lambda: broken(poison),
        Refusal("finite", "its weights are not finite", "repair the weights", ("add",), "2", True),
    ),
    "range": (
        lambda: broken(overflow),
        Refusal(
            "finite", "its weights leave the range of their data type", "use a wider data type", ("BatchNorm2d",),
            "0.1", True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_only_weights_show_is_in_the_receipt(name: str) -> None:
    build, expected = LOST[name]
    model = build()
    plan = reparam.plan(model)
    receipt = reparam.receipt(reparam.fuse(model))
    (found,) = [refusal for refusal in receipt.left if refusal.rule == expected.rule]
    assert (found.condition, found.remedy, found.near) == (expected.condition, expected.remedy, expected.near)
    assert found.path == expected.path
    assert expected.rule not in {refusal.rule for refusal in plan.left}
    assert len(receipt.regions) == len(plan.regions) - 1, "a region that was not made is listed as one"
    assert not [region for region in receipt.regions if region.path == expected.path]
    assert str(found.at("", *found.operands)) in str(receipt)
    assert set(receipt.left) == {*plan.left, found}


def test_a_region_that_cannot_be_run_is_left_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> float:
        raise ValueError("one image at a time\nfound 2")

    model = ready(Block())
    monkeypatch.setattr(session, "region_error", fails)
    fused = reparam.fuse(model)
    receipt = reparam.receipt(fused)
    assert receipt.regions == ()
    (refusal,) = receipt.left
    assert (refusal.rule, refusal.near) == ("check", False)
    assert refusal.condition == "it cannot be run on random input: ValueError: one image at a time"
    assert owned(fused) == owned(model)


def test_a_region_that_differs_is_left_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(net())
    errors = iter([0.0, 1e-3, 0.0])
    monkeypatch.setattr(session, "region_error", lambda *arguments: next(errors))
    fused = reparam.fuse(model)
    receipt = reparam.receipt(fused)
    (refusal,) = [refusal for refusal in receipt.left if refusal.rule == "check"]
    reason = "the fused form differs by 1.0e-03: a bug of this library or of a lifting, please report it"
    assert refusal.condition == reason
    assert refusal.path == "2"
    assert [region.path for region in receipt.regions] == ["0.0", "3.0"]
    assert type(fused[2].dense) is nn.Sequential
    same(model, fused, X)


def test_regions_that_share_an_operation_stay_together() -> None:
    model = broken(lambda model: model.first.weight.data.fill_(float("inf")), Spread)
    fused = reparam.fuse(model)
    receipt = reparam.receipt(fused)
    assert receipt.regions == ()
    assert [(refusal.path, refusal.rule, refusal.near) for refusal in receipt.left] == [
        ("first", "finite", True),
        ("second", "together", False),
    ]
    assert owned(fused) == owned(model)


# --- how it is kept ---------------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)  # fmt: skip
@pytest.mark.parametrize("build", [net, Block, lambda: nn.Sequential(conv_norm(3))])
def test_copies_keep_it(build: Callable[[], nn.Module], through: Callable[[nn.Module], nn.Module]) -> None:
    fused = reparam.fuse(ready(build()))
    assert reparam.receipt(through(fused)) == reparam.receipt(fused)


def test_it_is_plain_data() -> None:
    fused = reparam.fuse(ready(net()), example_inputs=X)
    receipt = reparam.receipt(fused)
    record = json.loads(json.dumps(vars(fused)[ATTRIBUTE]))
    assert record == receipt.to_dict()
    assert Receipt.from_dict(record) == receipt
    assert Receipt.from_dict(record).modules == receipt.modules


def test_a_fused_model_of_torch_modules_is_loaded_without_this_library(tmp_path: Any) -> None:
    fused = reparam.fuse(ready(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())))
    torch.save(fused, tmp_path / "net.pt")
    script = (
        "import sys; sys.modules['reparam'] = None; import torch;"
        f"print(type(torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "Sequential\n", result.stderr


@pytest.mark.parametrize("build", [net, Block])
def test_it_is_no_part_of_the_state_or_class(build: Callable[[], nn.Module]) -> None:
    fused = reparam.fuse(ready(build()))
    bare = copy.deepcopy(fused)
    del vars(bare)[ATTRIBUTE]
    assert list(fused.state_dict()) == list(bare.state_dict())
    assert type(fused) is type(bare)
    assert repr(fused) == repr(bare)
    assert [path for path, _ in fused.named_modules()] == [path for path, _ in bare.named_modules()]
    deployed = reparam.fuse(ready(build(), seed=1))
    deployed.load_state_dict(fused.state_dict())
    assert difference(fused(X), deployed(X)) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_is_compiled_exported_and_scripted_with_it() -> None:
    fused = reparam.fuse(ready(nn.Sequential(conv_norm(3), nn.ReLU())))
    expected = fused(X)
    torch._dynamo.reset()
    for other in (
        torch.compile(fused, backend="eager", fullgraph=True),
        torch.export.export(fused, (X,)).module(),
        torch.jit.trace(fused, X),
        torch.jit.script(fused),
    ):
        assert difference(expected, other(X)) < 1e-12
    torch._dynamo.reset()


def test_fusing_once_more_replaces_it() -> None:
    fused = reparam.fuse(ready(net()))
    again = reparam.fuse(fused)
    assert reparam.receipt(again).regions == ()
    assert len(reparam.receipt(fused).regions) == 3


def test_a_module_that_takes_the_place_of_a_fused_one_does_not_inherit_its_receipt() -> None:
    part = reparam.fuse(ready(Sum()), exclude=("conv",))
    whole = reparam.fuse(ready(nn.Sequential(part, nn.BatchNorm2d(C))))
    assert type(whole[0]) is nn.Conv2d
    assert whole[0].note == "mine", "other attributes are carried"
    assert [path for path, module in whole.named_modules() if ATTRIBUTE in vars(module)] == [""]


class Sum(nn.Module):
    """A convolution and a shortcut, with an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.note = conv(3), "mine"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


def test_the_model_that_was_given_has_none() -> None:
    model = ready(net())
    reparam.fuse(model)
    assert ATTRIBUTE not in vars(model)
    with pytest.raises(reparam.ReparamError) as info:
        reparam.receipt(model)
    assert str(info.value) == (
        "expected a model that reparam.fuse returned, found Sequential without a receipt: fuse it, or ask the fused "
        "model itself (its parts, exported and scripted copies hold none)"
    )


@pytest.mark.parametrize("given", [None, 3, Block, fx.symbolic_trace(nn.ReLU())])
def test_what_holds_no_receipt_is_refused(given: Any) -> None:
    with pytest.raises(reparam.ReparamError, match=f"found {type(given).__name__} without a receipt"):
        reparam.receipt(given)


def test_an_error_leaves_the_model_without_a_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(net())

    def fails(*arguments: Any) -> None:
        raise RuntimeError("mine")

    monkeypatch.setattr(session.Emitter, "_apply", fails)
    with pytest.raises(RuntimeError, match="mine"):
        reparam.fuse(model, inplace=True)
    assert ATTRIBUTE not in vars(model)
