"""Small wrong patches of the library, each of which must turn a named check red.

The battery consists of the checks of the other files at fixed geometry. `fuse` leaves a region alone that its own check
finds wrong, so the checks of whole modules look at the structure too, and run with `check=False` besides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import test_rules
import torch
from nets import ready
from oracle import error
from strategies import Layer, Norm, Skip, image, normal
from test_geometry import (
    EVEN,
    GROUPED,
    REPVGG,
    Sum,
    Weighted,
    branch,
    check_series,
    fused_to,
    inputs,
    inputs_of_sum,
    square,
)
from torch import Tensor, nn

import reparam
from reparam import algebra
from reparam.algebra import Affine, Border, Conv, Refusal, diagonal, identity

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

AFFINE = sys.modules["reparam.algebra.affine"]  # `reparam.algebra.branch_sum` and others are the functions
BRANCH_SUM = sys.modules["reparam.algebra.branch_sum"]
CONV_AFTER_CONV = sys.modules["reparam.algebra.conv_after_conv"]
GROUPS = sys.modules["reparam.algebra.groups"]
PENDING = sys.modules["reparam.algebra.pending"]
SOURCES = sys.modules["reparam.algebra.sources"]
ARITHMETIC = sys.modules[next(f for f in reparam.LIFTINGS if f.__name__ == "arithmetic_sum").__module__]

Check = Callable[[], None]
Patch = Callable[[pytest.MonkeyPatch], None]

# --- the battery ----------------------------------------------------------------------------------

INSIDE: dict[str, Any] = {"lo": (0, 0), "hi": (0, 0), "explicit": False}


def plain(kernel: int, groups: int = 1, **fields: Any) -> Layer:
    """A layer without a norm."""
    return square(kernel, groups, Norm.NONE, **fields)


def series_becomes_one(parts: Sequence[Layer], seed: int, check: bool) -> None:
    """Whatever the patched algebra thinks: one convolution, and the same numbers."""
    model = ready(nn.Sequential(*(branch(part) for part in parts)), seed)
    calls = inputs([part.conv for part in reversed(parts)], parts[0].in_channels, seed)
    fused_to(model, calls, one=True, check=check)


def sum_becomes_one(parts: Sequence[Layer | Skip], seed: int, check: bool) -> None:
    """The same for a sum."""
    fused_to(ready(Sum(parts), seed), inputs_of_sum(parts, seed), one=True, check=check)


def weighted_sum_becomes_one(pair: tuple[Layer, Layer], seed: int, check: bool) -> None:
    """The same for a weighted sum and its norm."""
    fused_to(ready(Weighted(*pair, -0.5), seed), inputs_of_sum(pair, seed), one=True, check=check)


def both_ways(check: Callable[..., object], *arguments: Any) -> Check:
    """A check of a whole module with and without `fuse`'s own check: each must notice by itself."""

    def run() -> None:
        failed = []
        for own in (True, False):
            try:
                check(*arguments, 0, check=own)
            except AssertionError as problem:
                failed.append((own, problem))
        if len(failed) == 1:
            raise RuntimeError(f"only noticed with check={failed[0][0]}: {failed[0][1]}")
        assert not failed, failed

    return run


def a_padded_chain_stays_apart() -> None:
    """A 1x1 convolution, its norm, and a padded 3x3 one: merged, the border would differ."""
    parts = (square(1), square(3))
    assert not check_series(parts, 0)
    model = ready(nn.Sequential(*(branch(part) for part in parts)))
    plan = reparam.plan(model, cost=reparam.cost.always)
    assert "border_rule" in {refusal.rule for refusal in plan.left}, str(plan)


def a_bias_shifts_once() -> None:
    """A norm after a sum of two values, whose own bias is moved through another scale."""
    total = Affine({"x": identity(3, 1), "z": diagonal(3, 1, normal((3,), 0, 1))}, True, normal((3,), 0, 2))
    norm = Affine({"sum": diagonal(3, 1, normal((3,), 0, 3))}, True, normal((3,), 0, 4))
    result = algebra.substitute(norm, {"sum": total})
    assert isinstance(result, Affine)
    x, z = image(3, (5,), 0), image(3, (5,), 1)
    wanted = oracle.affine(norm, {"sum": oracle.affine(total, {"x": x, "z": z})})
    assert error(wanted, oracle.affine(result, {"x": x, "z": z})) < 1e-12


STRIDE_TWO = (plain(1, stride=(2, 2)), plain(3))
BATTERY: dict[str, Check] = {
    "norm after conv": both_ways(series_becomes_one, (square(3, bias=True, **INSIDE), plain(1))),
    "block": both_ways(sum_becomes_one, REPVGG),
    "grouped branches": both_ways(sum_becomes_one, GROUPED),
    "even kernels": both_ways(sum_becomes_one, EVEN),
    "borders": both_ways(sum_becomes_one, (plain(3, border=Border.REFLECT), plain(5, border=Border.REFLECT), plain(1))),
    "weighted sum": both_ways(weighted_sum_becomes_one, (square(3), square(1))),
    "biases in a chain": both_ways(series_becomes_one, (plain(3, bias=True), square(3, **INSIDE))),
    "grouped chain": both_ways(series_becomes_one, (plain(1, 2), plain(3, 3))),
    "strided chain": both_ways(series_becomes_one, STRIDE_TWO),
    "padded chain": a_padded_chain_stays_apart,
    "bias of a sum": a_bias_shifts_once,
    "norm coefficients": lambda: test_rules.test_norm_coefficients(True, 1e-5, 1e-3),
    "strides of a sum": lambda: test_rules.test_branch_sum_just_outside("stride"),
    "slacks of a sum": lambda: test_rules.test_branch_sum_just_outside("slack at stride 2"),
    "lattice of a sum": lambda: test_rules.test_lattice_of_a_sum((3, 4, 4), (3, 2, 2), (5, 2, 4)),
    "lattice of a chain": lambda: test_rules.test_lattice_of_a_chain((3, 2, 1), (3, 1, 1), (7, 2, 1)),
    "groups of a sum": lambda: test_rules.test_groups_of_a_sum((12, 12), 4, 6, 2),
    "transposed chain": lambda: test_rules.test_transposed_convolutions_just_inside(2, 1),
    "just short of full": lambda: test_rules.test_border_rule_just_outside("one short of full before"),
    "full": lambda: test_rules.test_border_rule_just_inside("full, stride 2"),
    "fill below": lambda: test_rules.test_border_rule_just_inside("constant below"),
    "other fill": lambda: test_rules.test_border_rule_just_outside("other constant"),
    "pool": lambda: test_rules.test_pool_is_conv((3, 3), (2, 2), (1, 1), {"divisor": 5}),
}


def red(names: Iterable[str]) -> set[str]:
    """Which of these checks fail by an assertion; a crash is none."""
    failed = set()
    for name in names:
        try:
            BATTERY[name]()
        except AssertionError:
            failed.add(name)
    return failed


def everywhere(monkeypatch: pytest.MonkeyPatch, right: Callable[..., Any], wrong: Callable[..., Any]) -> None:
    """Replace a function under every name by which the library and the tests have imported it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reparam" or name in ("test_laws", "test_rules", "test_geometry"):
            for attribute, value in list(vars(module).items()):
                if value is right:
                    monkeypatch.setattr(module, attribute, wrong)


# --- the patches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A wrong patch and the checks that must notice it by an assertion."""

    patch: Patch
    noticed_by: tuple[str, ...]


def norm_without_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SOURCES.norm_coefficients

    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        scale, shift = right(*arguments, **options)
        return scale, torch.zeros_like(shift)

    everywhere(monkeypatch, right, wrong)


def eps_outside_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SOURCES.norm_coefficients

    def wrong(mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return right(mean, (variance.double().sqrt() + eps) ** 2, gamma, beta, 0.0)

    everywhere(monkeypatch, right, wrong)


def bias_dropped_in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AFFINE, "response", lambda conv, vector: torch.zeros(conv.out_channels, dtype=vector.dtype))


def bias_not_multiplied_in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AFFINE.response
    monkeypatch.setattr(
        AFFINE, "response", lambda conv, v: v if conv.in_channels == conv.out_channels else right(conv, v)
    )


def bias_per_term(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AFFINE.substitute

    def wrong(outer: Affine, formulas: Any, **options: Any) -> Affine | Refusal:
        result = right(outer, formulas, **options)
        if isinstance(result, Refusal) or result.bias is None:
            return result
        bias = result.bias
        for root, inner in formulas.items():
            if inner.bias is not None and root in outer.terms:
                bias = bias + (len(inner.terms) - 1) * AFFINE.response(outer.terms[root], inner.bias.double())
        return replace(result, bias=bias)

    everywhere(monkeypatch, right, wrong)


def tap_shifted_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BRANCH_SUM._placement

    def wrong(box: Conv, part: Conv) -> list[tuple[int, int, int]]:
        return [
            (first - 1 if first else min(1, n - step * (k - 1) - 1), step, k)
            for n, (first, step, k) in zip(box.kernel, right(box, part), strict=True)
        ]

    monkeypatch.setattr(BRANCH_SUM, "_placement", wrong)


def small_kernels_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BRANCH_SUM._placement

    def wrong(box: Conv, part: Conv) -> list[tuple[int, int, int]]:
        return [
            ((n - step * (k - 1) - 1) // 2, step, k)
            for n, (_, step, k) in zip(box.kernel, right(box, part), strict=True)
        ]

    monkeypatch.setattr(BRANCH_SUM, "_placement", wrong)


def group_order_swapped_in_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BRANCH_SUM.as_finer_blocks
    monkeypatch.setattr(BRANCH_SUM, "as_finer_blocks", lambda *arguments: right(*arguments).flip(-1))
    columns = PENDING.Pending._columns
    monkeypatch.setattr(PENDING.Pending, "_columns", lambda self, part: columns(self, part).flip(0))


def group_order_swapped_in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GROUPS.as_finer_blocks
    monkeypatch.setattr(GROUPS, "as_finer_blocks", lambda *arguments: right(*arguments).flip(-1))


def channels_not_swapped_in_a_transposed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: Tensor, groups: int) -> Tensor:
        a, b = weight.shape[:2]
        return weight.reshape(groups * b, a // groups, *weight.shape[2:])

    monkeypatch.setattr(GROUPS, "swap", wrong)


def stride_ignored_in_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CONV_AFTER_CONV._composed_box

    def wrong(outer: Conv, inner: Conv) -> Conv | Refusal:
        box = right(outer, inner)
        if isinstance(box, Refusal) or outer.axes != inner.axes or box.transposed:
            return box
        off = [(s - 1) * lo for s, lo in zip(inner.stride, outer.lo, strict=True)]
        lo = tuple(p - o for p, o in zip(box.lo, off, strict=True))
        hi = tuple(p + o for p, o in zip(box.hi, off, strict=True))
        return replace(box, lo=lo, hi=hi)

    monkeypatch.setattr(CONV_AFTER_CONV, "_composed_box", wrong)


def stride_ignored_between_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONV_AFTER_CONV, "s_d", lambda inner, outer, axis: outer.dilation[axis])


def condition_of_a_sum_ignored(edit: Callable[[Conv, Conv], Conv]) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = BRANCH_SUM.common_box
        monkeypatch.setattr(BRANCH_SUM, "common_box", lambda a, b: right(a, edit(a, b)))

    return patch


def same_slack(a: Conv, b: Conv) -> Conv:
    hi = tuple(h + p - q for h, p, q in zip(b.hi, a.slack, b.slack, strict=True)) if a.axes == b.axes else b.hi
    return replace(b, hi=hi)


def alpha_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ARITHMETIC._combine
    monkeypatch.setattr(
        ARITHMETIC, "_combine", lambda label, operands, known: right(label, [(v, 1.0) for v, _ in operands], known)
    )


def border_rule_always_true(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, AFFINE.border_rule, lambda outer, inner: None)


def constant_outside(holds: Callable[[Conv, int], bool]) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Conv, "constant_outside", holds)

    return patch


def any_fill_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AFFINE, "_same", lambda fill, inner: True)


def fill_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONV_AFTER_CONV, "_composed_border", lambda outer, inner: (inner.border, None))


def columns_scaled_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CONV_AFTER_CONV._scale_rows

    def wrong(scale: Tensor, weight: Tensor) -> Tensor:
        if weight.shape[0] != weight.shape[1]:
            return right(scale, weight)
        return weight.double() * scale.reshape(1, -1, *(1,) * (weight.dim() - 2))

    monkeypatch.setattr(CONV_AFTER_CONV, "_scale_rows", wrong)
    compute = PENDING.Pending.compute

    def computed(self: Any, *options: Any) -> Tensor:
        weight = compute(replace(self, parts=tuple(replace(part, scale=None) for part in self.parts)), *options)
        scale = self.parts[0].scale
        return weight if scale is None else wrong(scale, weight).to(weight.dtype)

    monkeypatch.setattr(PENDING.Pending, "compute", computed)


def taps_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CONV_AFTER_CONV._shifts
    monkeypatch.setattr(CONV_AFTER_CONV, "_shifts", lambda *arguments: right(*arguments)[::-1])


def identity_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BRANCH_SUM.add_into

    def wrong(total: Tensor, box: Conv, part: Conv) -> None:
        if not part.identity:
            right(total, box, part)

    monkeypatch.setattr(BRANCH_SUM, "add_into", wrong)
    add = PENDING.Pending._add

    def added(self: Any, block: Tensor, part: Any, *where: Any) -> None:
        if not part.conv.identity:
            add(self, block, part, *where)

    monkeypatch.setattr(PENDING.Pending, "_add", added)


def box_of_a_sum(edit: Callable[[Conv], Conv]) -> Patch:
    """The right map in a larger box than needed, or the wrong one."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = BRANCH_SUM.common_box

        def wrong(a: Conv, b: Conv) -> Conv | Refusal:
            box = right(a, b)
            return box if isinstance(box, Refusal) else edit(box)

        monkeypatch.setattr(BRANCH_SUM, "common_box", wrong)

    return patch


def without_dilation(box: Conv) -> Conv:
    return replace(box, kernel=tuple(e + 1 for e in box.extent), dilation=(1,) * box.axes)


def divisor_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SOURCES.pool_is_conv
    everywhere(monkeypatch, right, lambda *a, **options: right(*a, **{**options, "divisor": None}))


def _too_lax(conv: Conv, axis: int) -> bool:
    extent = conv.extent[axis]
    return conv.identity or (conv.lo[axis] >= extent - conv.stride[axis] and conv.hi[axis] >= extent)


def _too_strict(conv: Conv, axis: int) -> bool:
    extent = conv.extent[axis]
    return conv.identity or (conv.lo[axis] >= extent and conv.hi[axis] > extent)


MUTANTS = {
    "bias of a norm dropped": Mutant(norm_without_shift, ("norm after conv", "block", "norm coefficients")),
    "eps outside the root": Mutant(eps_outside_the_root, ("norm after conv", "block", "norm coefficients")),
    "bias dropped in a chain": Mutant(bias_dropped_in_a_chain, ("norm after conv", "biases in a chain")),
    "bias not multiplied": Mutant(bias_not_multiplied_in_a_chain, ("norm after conv", "biases in a chain")),
    "bias once per term": Mutant(bias_per_term, ("bias of a sum",)),
    "tap shifted by one": Mutant(tap_shifted_by_one, ("block", "even kernels", "grouped branches", "lattice of a sum")),
    "small kernels centred": Mutant(small_kernels_centred, ("even kernels",)),
    "identity branch forgotten": Mutant(identity_forgotten, ("grouped branches",)),
    "group order swapped in a sum": Mutant(group_order_swapped_in_a_sum, ("grouped branches", "groups of a sum")),
    "group order swapped in a chain": Mutant(group_order_swapped_in_a_chain, ("grouped chain",)),
    "groups of a sum given up": Mutant(box_of_a_sum(lambda box: replace(box, groups=1)), ("groups of a sum",)),
    "dilation of a sum given up": Mutant(box_of_a_sum(without_dilation), ("lattice of a sum",)),
    "border of a sum forgotten": Mutant(box_of_a_sum(lambda box: replace(box, border=Border.CONSTANT)), ("borders",)),
    "transposed weight not swapped": Mutant(channels_not_swapped_in_a_transposed_weight, ("transposed chain",)),
    "stride ignored in the padding": Mutant(stride_ignored_in_the_padding, ("strided chain",)),
    "stride ignored between taps": Mutant(stride_ignored_between_taps, ("strided chain",)),
    "stride ignored in a sum": Mutant(
        condition_of_a_sum_ignored(lambda a, b: same_slack(a, replace(b, stride=a.stride))), ("strides of a sum",)
    ),
    "slack ignored in a sum": Mutant(condition_of_a_sum_ignored(same_slack), ("slacks of a sum",)),
    "alpha ignored": Mutant(alpha_ignored, ("weighted sum",)),
    "border rule always true": Mutant(border_rule_always_true, ("padded chain", "just short of full", "other fill")),
    "full padding one short": Mutant(constant_outside(_too_lax), ("just short of full",)),
    "full padding one too many": Mutant(constant_outside(_too_strict), ("full",)),
    "any fill will do": Mutant(any_fill_will_do, ("other fill",)),
    "fill dropped": Mutant(fill_dropped, ("fill below",)),
    "columns scaled for rows": Mutant(columns_scaled_for_rows, ("norm after conv", "block")),
    "taps in another order": Mutant(taps_in_another_order, ("biases in a chain", "lattice of a chain")),
    "divisor ignored": Mutant(divisor_ignored, ("pool",)),
}


def test_the_battery_is_green() -> None:
    assert red(BATTERY) == set()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Structures are composed anew, by the patched functions, and what they gave is not remembered."""
    forget()
    yield
    forget()


def forget() -> None:
    CONV_AFTER_CONV._structure_after.cache_clear()
    BRANCH_SUM._common_structure.cache_clear()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_its_checks_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    with monkeypatch.context() as patched:
        mutant.patch(patched)
        failed = red(mutant.noticed_by)
    assert failed == set(mutant.noticed_by)
    forget()
    assert red(mutant.noticed_by) == set(), "the patch was not taken back"


def test_every_check_is_needed_by_a_mutant() -> None:
    """No check of the battery that no mutant is named for."""
    named = {check for mutant in MUTANTS.values() for check in mutant.noticed_by}
    assert named == set(BATTERY), f"unused: {sorted(set(BATTERY) - named)}, unknown: {sorted(named - set(BATTERY))}"
