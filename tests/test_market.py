"""Every family of the market: outputs, counts, cost and reasons after fusing; the market against probing."""

import copy
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from market import FAMILIES, SECTIONS, Family
from probing import Tally, one_convolution, tally, without_activations
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import reparam

PAGE = Path(__file__).parents[1] / "docs" / "blocks.md"


def families(chosen: Callable[[Family], bool] = lambda family: True) -> pytest.MarkDecorator:
    """One test per family that is chosen."""
    return pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if chosen(family)])


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a copy, because some blocks change themselves when they run."""
    with torch.no_grad():
        return copy.deepcopy(module)(*(x.clone() for x in inputs))


def options(family: Family, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What `fuse` and `plan` are told beside the model."""
    return {"example_inputs": inputs} if family.example_inputs else {}


@cache
def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A block and the same block fused; neither is ever run itself, so both stay as they are."""
    family = FAMILIES[name]
    model = family.make(dtype=dtype)
    return model, reparam.fuse(model, **options(family, family.inputs(family.sizes[0], dtype)))


@cache
def tallies(name: str, size: tuple[int, ...]) -> tuple[Tally, Tally]:
    """What a run of the block and of the fused block calls."""
    model, fused = pair(name)
    inputs = FAMILIES[name].inputs(size)
    return tally(model, inputs), tally(fused, inputs)


def assert_close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    assert value.shape == expected.shape
    error = float((value.double() - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"relative error {error:.1e}"


def most(count: int | range | None) -> float:
    """The largest number that a count allows."""
    return float("inf") if count is None else max(count) if isinstance(count, range) else count


# --- the market itself -----------------------------------------------------------------------------------------------


@families()
def test_block_is_as_published(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    assert not any(module.training for module in model.modules())
    for size in family.sizes:
        inputs = family.inputs(size)
        assert torch.isfinite(run(model, inputs)).all()
        assert not family.before.differences(tally(model, inputs).counts)


@families(lambda family: family.one_conv is not None)
def test_one_convolution_is_possible_or_not(name: str) -> None:
    family = FAMILIES[name]
    failure = one_convolution(without_activations(family.make()), family.channels, family.sizes)
    assert (failure == "") == family.one_conv, failure


def test_probing_tells_convolutions_from_others() -> None:
    sizes = ((5, 7), (4, 6))

    def found(*layers: nn.Module) -> str:
        torch.manual_seed(0)
        return one_convolution(nn.Sequential(*layers).double(), 2, sizes)

    assert not found(nn.Conv2d(2, 3, (2, 3), 2, (1, 0), 2))
    assert not found(nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 2, 3, padding=1))
    assert "bias" in found(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, padding=1))
    assert "two matrices" in found(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, padding=1))
    assert "another tap" in found(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    assert "affine" in found(nn.ReLU())


def test_tally_counts_calls_on_the_input_only() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.make = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 2, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            made = self.make(torch.ones(1, 2, 1, 1)).sum() + 1
            y = 0 + self.norm(self.conv(x))
            y += y
            return 2 * y - made

    found = tally(Block().eval(), (torch.ones(1, 2, 5, 5),))
    assert (found.counts.convs, found.counts.norms, found.counts.adds, found.counts.scales) == (1, 1, 2, 1)
    assert found.constant == 1
    assert found.macs == 9 * 4 * (2 * 9 + 1 + 2 + 1)


def test_every_section_has_its_own_names() -> None:
    assert sum(map(len, SECTIONS.values())) == len(FAMILIES) >= 60


# --- fused -----------------------------------------------------------------------------------------------------------


@families()
@pytest.mark.parametrize("parity", [0, 1], ids=["odd", "even"])
def test_output_in_float64(name: str, parity: int) -> None:
    model, fused = pair(name)
    inputs = FAMILIES[name].inputs(FAMILIES[name].sizes[parity])
    assert_close(run(fused, inputs), run(model, inputs), 1e-10)


@families()
def test_output_in_float32(name: str) -> None:
    family = FAMILIES[name]
    _, fused = pair(name, torch.float32)
    assert next(iter(fused.parameters())).dtype == torch.float32
    expected = run(family.make(), family.inputs(family.sizes[0]))
    assert_close(run(fused, family.inputs(family.sizes[0], torch.float32)), expected, 1e-4)


@families()
@pytest.mark.parametrize("parity", [0, 1], ids=["odd", "even"])
def test_counts(name: str, parity: int) -> None:
    family = FAMILIES[name]
    _, after = tallies(name, family.sizes[parity])
    assert not family.after.differences(after.counts)


@families()
def test_modules_left(name: str) -> None:
    """A root that is itself a kind of linear layer keeps its class, but no weight of its own."""
    family = FAMILIES[name]
    _, fused = pair(name)
    layers = [m for m in fused.modules() if isinstance(m, _ConvNd | nn.Linear)]
    convs = [m for m in layers if m._parameters.get("weight") is not None]
    norms = [m for m in fused.modules() if isinstance(m, _BatchNorm)]
    assert len(convs) <= (most(family.after.convs) if family.modules is None else family.modules)
    assert len(norms) <= most(family.after.norms)
    assert family.holds(fused)


@families(lambda family: family.why is None)
def test_weights_are_made_once(name: str) -> None:
    _, after = tallies(name, FAMILIES[name].sizes[0])
    assert after.constant == 0


@families()
def test_nothing_is_dearer(name: str) -> None:
    for size in FAMILIES[name].sizes:
        before, after = tallies(name, size)
        assert after.macs <= before.macs
        for field in ("convs", "norms", "adds", "scales"):
            if not isinstance(getattr(FAMILIES[name].after, field), range):
                assert getattr(after.counts, field) <= getattr(before.counts, field), field


@families()
def test_model_is_not_modified(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(path, type(module), module.training) for path, module in model.named_modules()]
    reparam.fuse(model, **options(family, family.inputs(family.sizes[0])))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(path, type(module), module.training) for path, module in model.named_modules()] == modules


@families(lambda family: family.why is not None)
def test_plan_says_why(name: str) -> None:
    family = FAMILIES[name]
    plan = reparam.plan(family.make(), **options(family, family.inputs(family.sizes[0])))
    found = (*plan.left, *plan.boundaries)
    reasons = "\n".join(map(str, found))
    assert any(family.why.explains(refusal) for refusal in found), f"wanted: {family.why.text}\nfound:\n{reasons}"


@families(lambda family: bool(family.sweep))
# No shrinking: the values are few and small already.
@settings(
    deadline=None, max_examples=6, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_sweep(name: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    parameters = {key: data.draw(st.sampled_from(values), label=key) for key, values in family.sweep.items()}
    inputs = family.inputs(data.draw(st.sampled_from(family.sizes), label="size"), channels=parameters.get("channels"))
    model = family.make(data.draw(st.integers(0, 99), label="seed"), **parameters)
    fused = reparam.fuse(model, **options(family, inputs))
    assert_close(run(fused, inputs), run(model, inputs), 1e-10)
    after = tally(fused, inputs)
    assert not family.after.differences(after.counts)
    assert after.macs <= tally(model, inputs).macs


# --- the page --------------------------------------------------------------------------------------------------------


def make_blocks() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("make_blocks", PAGE.with_name("make_blocks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current() -> None:
    page = make_blocks().page()
    assert all(name in page for name in FAMILIES)
    assert PAGE.read_text() == page, "run: python docs/make_blocks.py"
