"""Random nested nets: equal numbers in float64 at two sizes, never a dearer net, and fusing really happens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import HealthCheck, example, given, settings
from nets import fuse_purely, same
from random_nets import Recipe, dearer, recipes, share_gone, source

import reparam
from reparam.graph.options import Options
from reparam.graph.session import Session
from reparam.nn import BiasMap

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

KINDS = ("conv", "norm", "add", "calls")
common = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
    "report_multiple_bugs": False,
}


def check(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Fuse one random net and hold it to every promise; returns the counted calls before and after."""
    model = recipe.build()
    if hypothesis.currently_in_test_context():
        hypothesis.note(source(model))
    fused = fuse_purely(model)
    inputs = recipe.inputs()
    for x in inputs:
        same(model, fused, x, tolerance=1e-9, floor=0.01)
    gone = share_gone(model, fused, inputs[0])
    assert not dearer(gone), f"{dearer(gone)}, all: {gone}"
    return gone


def check_many(examples: int, derandomize: bool) -> tuple[Counter[str], Counter[str]]:
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=derandomize, **common)
    @given(recipes)
    def run(recipe: Recipe) -> None:
        for kind, (old, new) in check(recipe).items():
            before[kind] += old
            after[kind] += new

    run()
    return before, after


def record(
    before: Counter[str], after: Counter[str], record_property: Callable[[str, object], None]
) -> dict[str, float]:
    shares = {kind: 1 - after[kind] / max(before[kind], 1) for kind in KINDS}
    for kind, share in shares.items():
        record_property(f"share of {kind} gone", round(share, 3))
        print(f"{kind}: {before[kind]} -> {after[kind]}, {share:.0%} gone")
    return shares


def test_random_nets(record_property: Callable[[str, object], None]) -> None:
    shares = record(*check_many(250, derandomize=True), record_property)
    assert shares["norm"] > 0.7
    assert shares["add"] > 0.2
    assert shares["calls"] > 0.25


@pytest.mark.long
def test_two_thousand_random_nets(record_property: Callable[[str, object], None]) -> None:
    shares = record(*check_many(2000, derandomize=False), record_property)
    assert shares["norm"] > 0.7
    assert shares["add"] > 0.2
    assert shares["calls"] > 0.25


FAILED_ONCE = (
    Recipe(dims=2, channels=2, depth=1, statements=4, seed=3354410316),
    Recipe(dims=1, channels=4, depth=2, statements=6, seed=3946421309),
    Recipe(dims=1, channels=2, depth=0, statements=4, seed=711111128),
    Recipe(dims=2, channels=2, depth=1, statements=4, seed=1180605217),
    Recipe(dims=1, channels=2, depth=2, statements=1, seed=4249141494),
    Recipe(dims=3, channels=2, depth=2, statements=6, seed=660243832),
    Recipe(dims=3, channels=4, depth=1, statements=6, seed=696311732),
    Recipe(dims=3, channels=2, depth=1, statements=2, seed=255889939),
    Recipe(dims=1, channels=6, depth=1, statements=3, seed=3531704542),
    Recipe(dims=3, channels=6, depth=1, statements=3, seed=3842988348),
    Recipe(dims=1, channels=6, depth=0, statements=4, seed=2179720847),
    Recipe(dims=2, channels=2, depth=0, statements=6, seed=3290330503),
    Recipe(dims=1, channels=6, depth=1, statements=6, seed=282762397),
)


@pytest.mark.parametrize("recipe", FAILED_ONCE, ids=lambda recipe: str(recipe.seed))
def test_nets_that_failed_once(recipe: Recipe) -> None:
    check(recipe)


def test_a_recipe_decides_its_net() -> None:
    recipe = Recipe(dims=2, channels=4, depth=2, statements=5, seed=7)
    first, second = recipe.build(), recipe.build()
    assert source(first) == source(second)
    same(first, second, recipe.inputs()[0], tolerance=0)


@pytest.mark.parametrize("cost", [reparam.DEFAULT_COST, reparam.cost.always, reparam.cost.parameters])
def test_random_nets_of_one_size(cost: reparam.cost.Cost) -> None:
    """Biases become maps, and scales and shifts leave their norms, and no region fails its check."""
    made = 0

    @settings(max_examples=25, derandomize=True, **common)
    @example(Recipe(dims=1, channels=6, depth=1, statements=1, seed=1))  # a norm whose statistics are left in a sum
    @given(recipes)
    def run(recipe: Recipe) -> None:
        nonlocal made
        model, x = recipe.build(), recipe.inputs()[0]
        hypothesis.note(source(model))
        fused = copy.deepcopy(model)
        receipt = Session(fused, Options(cost, example_inputs=x, bias_maps=True)).apply(check=True)
        assert not [str(refusal) for refusal in receipt.left if refusal.rule == "check"]
        same(model, fused, x, tolerance=1e-9, floor=0.01)
        made += sum(isinstance(module, BiasMap) for module in fused.modules())

    run()
    assert made > 0 or cost is reparam.cost.parameters
