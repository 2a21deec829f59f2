"""`reparam.verify` gives the right diagnosis, and `fuse` refuses to hand back a net that fails."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Block, C, conv, conv_norm, difference, images, is_fused, randomise, ready, snapshot
from torch import Tensor, nn
from torch.nn import functional

import reparam
from reparam import Cause, verify
from reparam.graph.lift import Known
from reparam.graph.lift.base import passed
from reparam.graph.net import Value
from reparam.models import RepVGG
from reparam.verification.leaves import relative_error

X = images().float()
BATCH = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net() -> RepVGG:
    model = RepVGG(depths=(1, 2, 3), widths=(8, 12, 16), strides=(2, 2, 1), num_classes=5)
    return randomise(model).eval()


def changed(model: nn.Module, change: Callable[[Any], None]) -> Any:
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model)
    return model


def drop_bias(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).bias.zero_()

    return change


def shift_tap(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        weight = model.get_submodule(path).weight
        weight.copy_(weight.roll(1, -1))

    return change


def set_eps(eps: float, *paths: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and (path in paths or not paths):
                module.eps = eps

    return change


# --- right ones -------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A dictionary of a list out, keyword arguments in."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(), conv_norm()

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y = self.block(x)
        return {"maps": [y, self.other(y) * scale], "largest": y.flatten(1).argmax(1), "size": x.shape[-1]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fused_net_is_right(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    result = verify(model, reparam.fuse(model), BATCH)
    assert result.ok, result
    assert result
    assert (result.cause, result.where, result.modules) == (Cause.ROUNDING, None, ())
    name = str(dtype).removeprefix("torch.")
    assert [row.dtype for row in result.outputs] == ["float64"] + [name] * (dtype != torch.float64)
    eps = torch.finfo(dtype).eps
    assert all(0 < row.error <= row.tolerance <= 50 * eps for row in result.outputs), result


@pytest.mark.parametrize("seed", range(20))
def test_long_sums_round_more_often(seed: int) -> None:
    """In float64 torch forms them one term after the other."""
    torch.manual_seed(seed)
    model = ready(nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 5), nn.BatchNorm2d(4)), seed)
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    assert reparam.verify(model, reparam.fuse(model, example_inputs=x), x)


def test_a_fault_of_a_few_roundings_is_seen_in_long_sums() -> None:
    model = ready(nn.Sequential(nn.Conv2d(64, 4, 5), nn.BatchNorm2d(4)))
    x = torch.randn(2, 64, 12, 12, dtype=torch.float64)
    wrong = reparam.fuse(model)
    wrong[0].bias.data += 1e-12
    assert not reparam.verify(model, wrong, x)


def test_sums_in_a_finer_type_do_not_count() -> None:
    """The run in float64 of a model in float32 is as sharp as if its sums had one term."""
    model = ready(nn.Sequential(nn.Conv2d(64, 4, 5), nn.BatchNorm2d(4))).float()
    found = reparam.verify(model, reparam.fuse(model), torch.randn(2, 64, 12, 12))
    assert [difference.dtype for difference in found.outputs] == ["float64", "float32"]
    assert "√2 operations" in found.outputs[0].basis or "move a" in found.outputs[0].basis
    assert found.outputs[1].tolerance > 5 * found.outputs[0].tolerance


def test_a_net_is_itself() -> None:
    model = net()
    result = verify(model, model, BATCH)
    assert (result.ok, result.cause) == (True, Cause.NONE)
    assert [row.error for row in result.outputs] == [0, 0]
    assert str(result).startswith("equal: the outputs are equal, bit for bit\n  output in float64: error 0.0e+00")


def test_nested_outputs_are_compared_one_by_one() -> None:
    model = randomise(Nested()).eval()
    inputs = {"x": X, "scale": torch.tensor(0.5)}
    result = verify(model, reparam.fuse(model), inputs)
    assert result.ok, result
    names = ["output['maps'][0]", "output['maps'][1]", "output['largest']", "output['size']"]
    assert [row.name for row in result.outputs] == names * 2
    assert [row.tolerance > 0 for row in result.outputs[:4]] == [True, True, False, False]
    wrong = changed(reparam.fuse(model), drop_bias("other.0"))
    assert [row.ok for row in verify(model, wrong, inputs).outputs[:4]] == [True, False, True, True]


def test_nothing_is_changed() -> None:
    a, b = net(), net().train()
    before = snapshot(a), snapshot(b)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    x = BATCH.clone()
    verify(a, b, x, modules=True)
    assert difference(before, (snapshot(a), snapshot(b))) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, BATCH)


# --- wrong ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
def test_forgotten_eval(name: str) -> None:
    model = net()
    models = {"a": model, "b": reparam.fuse(model) if name == "a" else copy.deepcopy(model)}
    models[name] = copy.deepcopy(model).train()
    result = verify(models["a"], models["b"], BATCH)
    assert (result.ok, result.cause, result.where) == (False, Cause.TRAINING_MODE, "stages.0.0.dense.norm")
    assert f"{name} is in training mode" in result.detail
    assert result.remedy == f"call {name}.eval() first"


def test_one_module_in_training_mode() -> None:
    model = net()
    result = verify(model, changed(model, lambda m: m.stages[1][1].skip.train()), BATCH)
    assert (result.cause, result.where) == (Cause.TRAINING_MODE, "stages.1.1.skip")
    assert "stages.1.1.skip of b (BatchNorm2d) is in training mode, while b itself is not" in result.detail


@pytest.mark.parametrize("change", [drop_bias, shift_tap])
@pytest.mark.parametrize("path", ["stages.0.0.dense", "stages.1.1.dense", "stages.2.2.dense", "head"])
def test_a_wrong_converter(change: Callable[[str], Any], path: str) -> None:
    model = net()
    wrong = changed(reparam.fuse(model), change(path))
    result = verify(model, wrong, BATCH)
    assert (result.ok, result.cause) == (False, Cause.COMPUTATION), result
    assert result.where == path.removesuffix(".dense")  # the block as a whole: what is inside is meant to differ
    assert result.where in result.detail
    assert ("one number per channel" in result.detail) == (path == "head" and change is drop_bias)


@pytest.mark.parametrize("position", [0, 3])
def test_a_wrong_chain(position: int) -> None:
    """Where a child is replaced and its norm is gone, the convolution returns another value on purpose."""
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(), nn.BatchNorm2d(C), nn.ReLU())).eval()
    fused = reparam.fuse(model)
    assert [type(m) for m in fused][:2] == [nn.Conv2d, nn.Identity]
    assert verify(model, fused, X)
    result = verify(model, changed(fused, drop_bias(str(position))), X)
    assert (result.cause, result.where) == (Cause.COMPUTATION, str(position)), result


@pytest.mark.parametrize("path", ["1", "4"])
def test_another_eps_folded_into_a_chain(path: str) -> None:
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(), nn.BatchNorm2d(C), nn.ReLU())).eval()
    result = verify(model, reparam.fuse(changed(model, set_eps(0.0, path))), X)
    assert (result.cause, result.where) == (Cause.EPSILON, path), result
    assert result.detail == f"{path} has eps 1e-05 in a, folded with eps 0 in b"


def test_a_bias_dropped_from_a_chain_is_recognised() -> None:
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU())).eval()
    result = verify(model, changed(reparam.fuse(model), drop_bias("0")), X)
    assert result.where == "0"
    assert result.detail.startswith("0 receives the same in both and 1, folded into it, returns something else")
    assert "one number per channel" in result.detail


def test_a_bias_is_recognised() -> None:
    model = randomise(nn.Sequential(conv(bias=True), nn.ReLU())).eval()
    result = verify(model, changed(model, drop_bias("0")), X)
    assert (result.where, "one number per channel" in result.detail) == ("0", True)


def test_a_fault_and_training_mode() -> None:
    model = net()
    wrong = changed(model, shift_tap("stages.1.0.pointwise.conv")).train()
    with torch.no_grad():
        wrong.stages[1][0].pointwise.conv.weight.mul_(2)
    result = verify(model, wrong, BATCH)
    assert (result.cause, result.where) == (Cause.COMPUTATION, "stages.1.0.pointwise.conv"), result
    assert result.notes == ("b is in training mode, and differs in eval mode, too",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_fault_in_a_coarse_type(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    result = verify(model, changed(reparam.fuse(model), drop_bias("stages.1.1.dense")), BATCH)
    assert (result.cause, result.where) == (Cause.COMPUTATION, "stages.1.1"), result


def test_another_eps() -> None:
    model = net()
    result = verify(model, changed(model, set_eps(1e-3)), BATCH)
    assert (result.cause, result.where) == (Cause.EPSILON, "stages.0.0.dense.norm")
    assert result.detail.startswith("stages.0.0.dense.norm has eps 1e-05 in a and 0.001 in b, and 14 more norms")


def test_another_eps_folded() -> None:
    model = net()
    result = verify(model, reparam.fuse(changed(model, set_eps(1e-3))), BATCH)
    assert (result.cause, result.where) == (Cause.EPSILON, "stages.0.0")
    assert result.detail == "the norms of stages.0.0 have eps 1e-05 in a, folded with eps 0.001 in b"


def test_another_eps_of_one_norm_folded() -> None:
    model = net()
    result = verify(model, reparam.fuse(changed(model, set_eps(1e-3, "stages.1.1.skip"))), BATCH)
    assert (result.cause, result.where) == (Cause.EPSILON, "stages.1.1.skip")
    assert result.detail == "stages.1.1.skip has eps 1e-05 in a, folded with eps 0.001 in b"


class Dropping(nn.Module):
    """Dropout as a module, or as a function that forgets the mode."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.conv, self.function, self.drop = conv(), function, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return functional.dropout(y, 0.5) if self.function else self.drop(y)


def test_dropout_is_active() -> None:
    model = randomise(Dropping(function=False)).eval()
    result = verify(model, changed(model, lambda m: m.drop.train()), X)
    assert (result.cause, result.where) == (Cause.DROPOUT, "drop")
    assert "drop of b (Dropout) is in training mode" in result.detail
    assert verify(model, changed(model, lambda m: m.train()), X).cause is Cause.DROPOUT


def test_dropout_is_active_in_eval_mode() -> None:
    model = randomise(nn.Sequential(Dropping(function=True))).eval()
    right = changed(model, lambda m: setattr(m[0], "function", False))
    result = verify(right, model, X)
    assert (result.cause, result.where) == (Cause.DROPOUT, "0")
    assert "a forward calls torch.nn.functional.dropout" in result.detail
    assert verify(model, reparam.fuse(model), X), "both draw the same random numbers"


class Noisy(nn.Module):
    def __init__(self, draws: int) -> None:
        super().__init__()
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.draws):
            noise = torch.randn_like(x)
        return x + noise


def test_random_numbers() -> None:
    result = verify(Noisy(1).eval(), Noisy(2).eval(), X)
    assert (result.cause, result.where) == (Cause.RANDOM, "")
    assert "a draws random numbers in its forward" in result.detail


@pytest.mark.parametrize(
    ("other", "detail"),
    [
        (conv(c_out=C + 1), "output has shape (2, 6, 9, 11) in a and (2, 7, 9, 11) in b"),
        (nn.LSTM(11, 6), "a returns output, b does not"),
    ],
    ids=["shape", "tuple"],
)
def test_outputs_of_another_structure(other: nn.Module, detail: str) -> None:
    x = X if isinstance(other, nn.Conv2d) else X[0]
    result = verify(conv().eval(), other.eval(), x)
    assert (result.ok, result.cause, result.detail) == (False, Cause.STRUCTURE, detail)


class Overflow(nn.Module):
    """The same sum in two orders; one of them leaves the range of float16."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.scale, self.first = nn.Parameter(torch.tensor(300.0)), first

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self.scale / 400 if self.first else x * (self.scale / 20) * (self.scale / 20)


def test_a_type_that_is_too_narrow() -> None:
    x = torch.ones(1, 4)
    result = verify(Overflow(False).half().eval(), Overflow(True).half().eval(), x)
    assert (result.ok, result.cause) == (False, Cause.ROUNDING)
    assert result.detail == "they agree in float64, but not in float16: one of them leaves its range"
    assert [row.ok for row in result.outputs] == [True, False]
    assert verify(Overflow(False).eval(), Overflow(True).eval(), x)


class OnlyFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float())


def test_a_model_that_does_not_run_in_float64() -> None:
    model = randomise(OnlyFloat32()).eval()
    result = verify(model, changed(model, shift_tap("conv")), X)
    assert (result.cause, result.where) == (Cause.COMPUTATION, "conv")
    assert [row.dtype for row in result.outputs] == ["float32"]
    assert result.notes[0].startswith("compared in float32 only, because in float64 it does not run: ")


# --- the value --------------------------------------------------------------------------------------------------------


def test_modules_on_request() -> None:
    model = net()
    result = verify(model, reparam.fuse(model), BATCH, modules=True)
    rows = {row.name: row for row in result.modules}
    assert list(rows)[-3:] == ["stages.2.2.squeeze_excite", "stages.2.2.act", "head"]
    assert all(rows[path].ok for path in ("stages", "stages.0", "stages.0.0", "stages.2.2", "head"))
    assert not rows["stages.1.1.dense"].ok  # a branch there, the whole block here
    assert "PARTED stages.1.1.dense in float64: error" in str(result)


def test_as_plain_values() -> None:
    model = net()
    result = verify(model, changed(model, set_eps(1e-3)), BATCH, modules=True)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (plain["ok"], plain["cause"], plain["where"]) == (False, "epsilon", "stages.0.0.dense.norm")
    assert plain["outputs"][0]["error"] == result.outputs[0].error
    assert plain["modules"][0].keys() == {"name", "dtype", "error", "tolerance", "basis", "ok"}
    assert pickle.loads(pickle.dumps(result)) == result


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, float("inf")], [1.0, -float("inf")], float("inf")),
        ([float("inf")], [float("inf")], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.25),
        ([1.0], [1.0, 1.0], float("inf")),
        ([], [], 0.0),
        ([1 + 1j], [1 + 1j], 0.0),
    ],
    ids=str,
)
def test_relative_error(expected: list[float], found: list[float], error: float) -> None:
    assert relative_error(torch.tensor(expected), torch.tensor(found)) == error


@pytest.mark.parametrize(
    ("a", "b", "inputs", "message"),
    [
        ("net", conv(), X, "expected a to be an nn.Module, found str: pass the model itself"),
        (conv(), None, X, "expected b to be an nn.Module, found NoneType: pass the model itself"),
        (
            conv(),
            nn.Conv2d(3, 3, 3, device="meta"),
            X,
            "expected b to have numbers, found Conv2d on the meta device: load its weights first",
        ),
        (
            conv().eval(),
            conv().eval(),
            X[:, :2],
            "expected example_inputs on which a (Conv2d) runs, found tensor(2, 2, 9, 11), on which it raises"
            " RuntimeError: ",
        ),
        (
            nn.BatchNorm1d(4).eval(),
            nn.BatchNorm1d(4),
            torch.zeros(1, 4),
            "on which it raises ValueError: Expected more than 1 value per channel when training, got input size"
            " torch.Size([1, 4]); it is in training mode: call b.eval() first",
        ),
    ],
    ids=["no module", "none", "meta", "wrong input", "training"],
)
def test_errors(a: Any, b: Any, inputs: Tensor, message: str) -> None:
    with pytest.raises(reparam.ReparamError) as info:
        verify(a, b, inputs)
    assert message in str(info.value)


# --- fuse refuses -----------------------------------------------------------------------------------------------------


class Loud(nn.Module):
    """The identity for small inputs, which random ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.abs().max() > 100 else x


def loud_is_the_identity(value: Value, known: Known) -> Any:
    """A lifting that is wrong, in a way that random inputs do not show."""
    return passed(value.inputs[0], known) if isinstance(value.module, Loud) else None


@pytest.mark.parametrize("inplace", [False, True])
def test_fuse_refuses_what_fails(inplace: bool) -> None:
    model = randomise(nn.Sequential(Block(), nn.Sequential(conv(), Loud(), nn.BatchNorm2d(C)), nn.ReLU())).eval()
    liftings = (loud_is_the_identity, *reparam.LIFTINGS)
    before = snapshot(model)
    modules = list(model.modules())
    with pytest.raises(reparam.CheckError) as info:
        reparam.fuse(model, inplace=inplace, example_inputs=1000 * X, liftings=liftings)
    assert (info.value.verification.cause, info.value.verification.where) == (Cause.COMPUTATION, "1.0")
    message = str(info.value)
    assert message.startswith("expected the fused model to compute what Sequential computes, found another result on")
    assert message.endswith("pass check=False to fuse all the same, or exclude= the module where they part")
    assert str(info.value.verification) in message
    assert str(pickle.loads(pickle.dumps(info.value))) == message
    assert difference(before, snapshot(model)) == 0
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    unchecked = reparam.fuse(model, example_inputs=1000 * X, liftings=liftings, check=False)
    assert is_fused(unchecked[0])
    assert verify(model, reparam.fuse(model, inplace=inplace, example_inputs=X, liftings=liftings), X)


def test_fuse_compares_on_the_example_inputs() -> None:
    model = randomise(net()).eval()
    assert verify(model, reparam.fuse(model, example_inputs=BATCH), BATCH)
