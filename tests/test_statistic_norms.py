"""Scale and shift of layer, group and root-mean-square norms that go into the linear layers behind them."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FEWEST = reparam.cost.parameters


class OwnNorm(nn.LayerNorm):
    """A layer norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """One norm, three readers."""

    def __init__(self, norm: type[nn.LayerNorm] = nn.LayerNorm, bias: bool = False) -> None:
        super().__init__()
        self.norm = norm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=bias), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.softmax(self.query(x) @ self.key(x).mT, dim=-1) @ self.value(x)


class Downsample(nn.Module):
    """Channels last for the norm, first for the convolution behind it."""

    def __init__(self, norm: type[nn.LayerNorm] = nn.LayerNorm, padding: int = 0) -> None:
        super().__init__()
        self.norm, self.conv = norm(8), nn.Conv2d(8, 6, 2, 2, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Token(nn.Module):
    """The first token goes to a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0])


class WrittenOut(nn.Module):
    """Channels first, with scale and shift as operations of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.point = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.point(self.weight[:, None, None] * x + self.bias[:, None, None])


def wide(model: nn.Module) -> nn.Module:
    """Every scale and shift far from the default, in float64."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return model.double().eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


def image() -> Tensor:
    return torch.randn(2, 8, 6, 4, dtype=torch.float64)


def scaling(model: nn.Module) -> int:
    """Norms that have a scale."""
    return sum(getattr(m, "weight", None) is not None for m in model.modules() if isinstance(m, NORMS))


def assert_equal(fused: nn.Module, model: nn.Module, x: Tensor) -> None:
    found, expected = fused(x).detach(), model(x).detach()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


CASES = {
    "attention": (Attention, tokens),
    "attention, own forward": (lambda: Attention(OwnNorm), tokens),
    "downsampling": (Downsample, image),
    "downsampling, own forward": (lambda: Downsample(OwnNorm), image),
    "one token": (Token, tokens),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3)), image),
    "root mean square": (lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 6)), tokens),
    "no shift": (lambda: nn.Sequential(nn.LayerNorm(8, bias=False), nn.Linear(8, 6, bias=False)), tokens),
}


@pytest.mark.parametrize("case", CASES)
def test_scale_and_shift_go_into_the_readers(case: str) -> None:
    build, data = CASES[case]
    model, x = wide(build()), data()
    fused = reparam.fuse(model, cost=FEWEST)
    assert scaling(model) == 1
    assert scaling(fused) == 0
    assert_equal(fused, model, x)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, fused)]
    assert count[1] < count[0]
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    assert_equal(torch.load(stored, weights_only=False), model, x)
    again = reparam.fuse(build().double().eval(), cost=FEWEST)
    again.load_state_dict(fused.state_dict())
    assert_equal(again, model, x)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cost", [reparam.DEFAULT_COST, reparam.cost.macs, reparam.cost.traffic, reparam.cost.always])
def test_they_stay_where_the_kernel_has_them_for_free(case: str, cost: reparam.cost.Cost) -> None:
    build, _ = CASES[case]
    model = wide(build())
    assert scaling(reparam.fuse(model, cost=cost)) == 1
    (reason,) = [r for r in reparam.plan(model, cost=cost).boundaries if r.rule == "cost"]
    assert "parameters" in reason.remedy


def test_written_out_they_are_operations_and_go() -> None:
    model, x = wide(WrittenOut()), image()
    fused = reparam.fuse(model)
    assert_equal(fused, model, x)
    assert [name for name, _ in fused.named_parameters()] == ["point.weight", "point.bias"]


def test_a_new_shift_may_cost_more_than_is_saved() -> None:
    model = wide(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32, bias=False)))
    assert scaling(reparam.fuse(model, cost=FEWEST)) == 1


class Residual(Attention):
    """The normed value is also added."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + torch.relu(self.query(x))


class Result(Attention):
    """The normed value is also a result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return x, self.query(x)


class Twice(Attention):
    """One norm for two values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.query(self.norm(x)) + torch.relu(self.key(self.norm(2 * x)))


def hooked() -> nn.Module:
    model = Attention()
    model.norm.register_forward_hook(lambda module, args, result: result * 2)
    return model


@pytest.mark.parametrize(
    ("build", "data", "word"),
    [
        (Residual, tokens, ""),
        (Result, tokens, ""),
        (Twice, tokens, "several places"),
        (hooked, tokens, "hook"),
        (lambda: Downsample(padding=1), image, "padded by zeros"),
        (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)), image, "padded by zeros"),
        (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.ConstantPad2d(1, 0.5), nn.Conv2d(8, 8, 3)), image, "constant"),
        (lambda: nn.Sequential(nn.LayerNorm((5, 8)), nn.Linear(8, 8)), tokens, ""),
        (lambda: nn.Sequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8)), tokens, ""),
    ],
    ids=["residual", "result", "twice", "hook", "padded", "padded group norm", "filled", "two axes", "activation"],
)
def test_left_alone(build: Callable[[], nn.Module], data: Callable[[], Tensor], word: str) -> None:
    model, x = wide(build()), data()
    plan = reparam.plan(model, cost=FEWEST)
    fused = plan.apply()
    assert scaling(fused) == 1
    found, expected = fused(x), model(x)
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    assert all(float((a - b).detach().abs().max()) < 1e-12 for a, b in zip(found, expected, strict=True))
    assert any(word in str(reason) for reason in plan.boundaries) or not word


@pytest.mark.parametrize("excluded", ["norm", "key"])
def test_excluded_modules_stay(excluded: str) -> None:
    model = wide(Attention())
    fused = reparam.fuse(model, cost=FEWEST, exclude=(excluded,))
    assert torch.equal(fused.get_submodule(excluded).weight, model.get_submodule(excluded).weight)
    assert scaling(fused) == 1


def test_the_model_is_not_changed_and_inplace_changes_it() -> None:
    model, x = wide(Attention()), tokens()
    expected = model(x)
    reparam.fuse(model, cost=FEWEST)
    assert scaling(model) == 1
    assert torch.equal(model(x), expected)
    same = copy.deepcopy(model)
    assert reparam.fuse(same, cost=FEWEST, inplace=True) is same
    assert scaling(same) == 0


def test_a_wrong_share_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares both sides through the readers."""
    from reparam.graph import wraps

    cut = wraps._cut
    monkeypatch.setattr(wraps, "_cut", lambda bias, wrap: None if bias is None else 1.1 * cut(bias, wrap))
    model = wide(Attention())
    fused = reparam.fuse(model, cost=FEWEST)
    assert scaling(fused) == 1
    assert_equal(fused, model, tokens())


def test_the_picture_shows_the_norm_before_and_after() -> None:
    wiring = reparam.plan(wide(Attention()), cost=FEWEST).wiring
    for nodes in (wiring.before, wiring.after):
        assert [node.label for node in nodes.values()].count("LayerNorm") == 1
