"""Channels first and last in one net, steps that pay only together, and values that go into all their readers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import reparam
from reparam.algebra import Refusal, branch_sum, conv_after_conv, diagonal, permuted, pointwise
from reparam.algebra.conv import Conv
from reparam.cost import DEFAULT_COST, Cost


def wide(model: nn.Module) -> nn.Module:
    """Statistics and weights far from the defaults, in float64."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def becomes(model: nn.Module, x: Tensor, layers: int, norms: int = 0, cost: Cost = DEFAULT_COST) -> nn.Module:
    """The fused model, which gives the same with so many layers and norms."""
    fused = reparam.fuse(model, cost=cost)
    expected = model(x).detach()
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    found = [m for m in fused.modules() if isinstance(m, _ConvNd | nn.Linear)]
    assert len(found) == layers
    assert sum(isinstance(m, _BatchNorm) for m in fused.modules()) == norms
    return fused


# --- algebra ---------------------------------------------------------------------------------------------------------


def test_orders_compose_and_cancel() -> None:
    first = permuted(8, 2, (0, 2, 3, 1))
    turned = conv_after_conv(permuted(8, 0, (1, 0, 2, 3)), first)
    assert isinstance(turned, Conv)
    x = torch.randn(2, 8, 3, 5)
    assert turned.order is not None
    assert torch.equal(x.permute(turned.order), x.permute(0, 2, 3, 1).permute(1, 0, 2, 3))
    back = conv_after_conv(permuted(8, 0, (0, 3, 1, 2)), first)
    assert isinstance(back, Conv)
    assert back.identity
    assert back.axes == 2


def test_a_matrix_between_two_orders_is_a_matrix() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    inner = conv_after_conv(pointwise(6, 8, 0, weight=weight), permuted(8, 2, (0, 2, 3, 1)))
    assert isinstance(inner, Conv)
    whole = conv_after_conv(permuted(6, 0, (0, 3, 1, 2)), inner)
    assert isinstance(whole, Conv)
    assert (whole.order, whole.axes) == (None, 2)


def test_orders_just_outside() -> None:
    conv = Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    order = permuted(8, 2, (0, 2, 3, 1))
    assert isinstance(conv_after_conv(order, conv), Refusal)
    assert isinstance(conv_after_conv(pointwise(8, 6, 0), order), Refusal)
    assert isinstance(branch_sum([order, diagonal(8, 2)]), Refusal)
    with pytest.raises(ValueError, match="order"):
        Conv(8, 8, (3,), (1,), (1,), (0,), (0,), order=(0, 2, 1))


# --- nets ------------------------------------------------------------------------------------------------------------


class LastMlp(nn.Module):
    """Two linear layers with channels last, a norm and a scale with channels first."""

    def __init__(self, tail: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)
        self.behind, self.scale = nn.BatchNorm2d(8), nn.Parameter(torch.randn(8, 1, 1))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).permute(0, 2, 3, 1)
        y = self.second(torch.relu(self.first(y))).permute(0, 3, 1, 2).contiguous()
        return x + self.tail(self.behind(y)) * self.scale


def test_norms_and_scales_of_a_net_with_channels_last() -> None:
    becomes(wide(LastMlp()), torch.randn(2, 8, 5, 7, dtype=torch.float64), layers=2)


class Tokens(nn.Module):
    """A low-rank pair with channels first between layers with channels last, plus the input."""

    def __init__(self, readers: int = 1, dims: tuple[int, int] = (1, 2)) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(16, 4, 1), nn.Conv1d(4, 16, 1)
        self.norm = nn.BatchNorm1d(16)
        self.heads = nn.ModuleList(nn.Linear(16, 16) for _ in range(readers))
        self.dims = dims

    def forward(self, x: Tensor) -> list[Tensor]:
        y = x.transpose(*self.dims)
        y = self.norm(self.up(self.down(y)) + y).transpose(*self.dims)
        return torch.stack([torch.tanh(head(y)) for head in self.heads])


@pytest.mark.parametrize("readers", [1, 3])
def test_what_pays_only_together_goes_into_all_readers(readers: int) -> None:
    fused = becomes(wide(Tokens(readers)), torch.randn(2, 7, 16, dtype=torch.float64), layers=readers)
    assert all(isinstance(layer, nn.Linear) for layer in fused.heads)


class PooledTokens(nn.Module):
    """Keys and values of means over tokens, normed channels first; one more reader takes them as they are."""

    def __init__(self, direct: bool = False) -> None:
        super().__init__()
        self.pool, self.norm = nn.AvgPool1d(2, 2), nn.BatchNorm1d(16)
        self.keys, self.values = nn.Linear(16, 8), nn.Linear(16, 16, bias=False)
        self.direct = nn.Conv1d(16, 8, 1) if direct else None

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.norm(self.pool(x.transpose(1, 2)))
        y = first.transpose(1, 2)
        found = [torch.tanh(self.keys(y).flatten(1)), torch.tanh(self.values(y).flatten(1))]
        return torch.cat(found if self.direct is None else [*found, torch.tanh(self.direct(first).flatten(1))], 1)


@pytest.mark.parametrize("direct", [False, True])
def test_the_norm_of_a_pool_goes_into_all_readers(direct: bool) -> None:
    fused = becomes(wide(PooledTokens(direct)), torch.randn(2, 8, 16, dtype=torch.float64), layers=3 if direct else 2)
    assert isinstance(fused.pool, nn.AvgPool1d)


def test_the_norm_of_a_pool_that_is_also_read_otherwise_stays_unless_convolutions_may_be_added() -> None:
    class Gated(PooledTokens):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.pool(x.transpose(1, 2)))
            return self.keys(y.transpose(1, 2)).transpose(1, 2) * torch.sigmoid(y[:, :8])

    x = torch.randn(2, 8, 16, dtype=torch.float64)
    becomes(wide(Gated()), x, layers=2, norms=1)
    left = reparam.plan(wide(Gated())).left
    assert any("more convolutions would be run: 1 instead of 0" in str(entry) for entry in left)
    becomes(wide(Gated()), x, layers=3, cost=reparam.cost.always)


def test_what_a_norm_reads_may_not_be_written_before_the_layer_that_takes_it_over() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer, self.act = nn.BatchNorm1d(8), nn.Linear(8, 6), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.sigmoid(x)
            y = self.norm(x)
            z = self.act(x)
            return torch.tanh(self.layer(y.permute(0, 2, 1))) + z.mean()

    becomes(wide(Written()), torch.randn(2, 8, 5, dtype=torch.float64), layers=1, norms=1)


class Turned(nn.Module):
    """Convolutions around a layer that has the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).permute(0, 2, 3, 1)
        return self.last(self.norm(self.layer(y).permute(0, 3, 1, 2)))


def test_a_layer_between_two_orders_is_part_of_a_chain_of_convolutions() -> None:
    becomes(wide(Turned()), torch.randn(2, 6, 5, 7, dtype=torch.float64), layers=1)


class PaddedSum(nn.Module):
    """A sum with an input whose channels nothing names, read as it is and behind a border of a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.thin, self.wide, self.scale = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 2), nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([x, self.first(x), self.second(x)]).sum(0)
        padded = nn.functional.pad(y, (0, 1), value=0.5)
        return torch.tanh(self.thin(y)) + torch.tanh(self.wide(padded)) + torch.tanh(y * self.scale)


def test_a_sum_of_unknown_channels_behind_a_border_of_a_constant() -> None:
    model, x = wide(PaddedSum()), torch.randn(2, 2, 5, dtype=torch.float64)
    assert torch.allclose(reparam.fuse(model)(x), model(x), atol=1e-10)


def test_a_reader_more_keeps_the_norm_where_it_is() -> None:
    class Read(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x.transpose(1, 2)).transpose(1, 2)
            return self.heads[0](y) * torch.sigmoid(y)

    model = wide(Read())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert torch.allclose(reparam.fuse(model)(x), model(x), atol=1e-12)


def test_a_convolution_does_not_change_places_with_an_order() -> None:
    class Strips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tall, self.point = nn.Conv2d(8, 8, (3, 1)), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.point(self.tall(x.transpose(2, 3)).transpose(2, 3))

    model = wide(Strips())
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    assert torch.allclose(reparam.fuse(model)(x), model(x), atol=1e-12)


def test_a_scale_of_the_last_axis_becomes_no_matrix() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.relu(self.linear(x)) * self.scale + self.scale)

    becomes(wide(Scaled()), torch.randn(3, 8, dtype=torch.float64), layers=1)


def test_a_chain_of_steps_that_save_nothing_stays_right() -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad, self.conv = nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.pad(x))

    model = nn.Sequential(*(Pads() for _ in range(40))).double().eval()
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
    assert torch.allclose(reparam.fuse(model)(x), model(x), atol=1e-12)


PAIRS = (("reflect", "zeros"), ("zeros", "reflect"))


# --- what stands in between, and what nothing reads ------------------------------------------------------------------


def test_boundaries_are_named_once() -> None:
    convs = [nn.Conv2d(8, 8, 3) for _ in range(3)]
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.GELU()).eval()
    plan = reparam.plan(model)
    assert plan.left == ()
    assert [str(refusal) for refusal in plan.boundaries] == [
        "1: boundary (ReLU): ReLU is no affine convolution (2 times)"
    ]


def test_branches_that_extend_their_input_differently_say_so() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bent = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.zeros = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bent(x) + self.zeros(x)

    conditions = {refusal.condition for refusal in reparam.plan(Mixed().eval()).left}
    conditions = {condition.partition(";")[0] for condition in conditions}  # the other branch is named there
    assert conditions <= {f"borders are extended differently: {a} and {b}" for a, b in PAIRS}
    assert conditions


class Statistics(nn.Module):
    """A norm that only gathers statistics, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.conv(x)


def test_a_norm_that_nothing_reads_goes() -> None:
    model = wide(Statistics())
    becomes(model, torch.randn(2, 8, 5, 7, dtype=torch.float64), layers=1)
    (region,) = reparam.plan(model).regions
    assert (region.path, region.params_after) == ("norm", 0)
    model.norm.register_forward_hook(lambda *_: None)
    becomes(model, torch.randn(2, 8, 5, 7, dtype=torch.float64), layers=1, norms=1)
