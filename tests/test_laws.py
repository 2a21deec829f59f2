"""The laws of the algebra: one suite over all rules that join two operands, each acceptance against direct summation.

A rule takes part by a line in `RULES`: what it joins, what the result must compute, and in which operands it is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
import strategies
import torch
from hypothesis import example, given, settings
from hypothesis.strategies import SearchStrategy
from oracle import Array, error
from strategies import all_numbered, common_images, images, normal, numbered, seeds
from torch import Tensor

from reparam import algebra
from reparam.algebra import Affine, Conv, Refusal, diagonal, identity, pointwise
from reparam.algebra.groups import rows

TOLERANCE = 1e-12
Joined = Conv | Refusal


@dataclass(frozen=True)
class Rule:
    """A rule that joins two convolutions.

    Args:
        name: of the rule.
        operands: structures that it can mostly join, for a number of operands.
        join: the rule; the second operand is the inner one of a composition.
        meaning: what the result must compute.
        slots: sets of operands in which it is linear.
        sums: whether it adds (and commutes) or composes.
    """

    name: str
    operands: Callable[[int], SearchStrategy[tuple[Conv, ...]]]
    join: Callable[[Conv, Conv], Joined]
    meaning: Callable[[Conv, Conv, Array], Array]
    slots: tuple[tuple[int, ...], ...]
    sums: bool = False

    def images(self, operands: tuple[Conv, ...], seed: int) -> list[Array]:
        """An input of an odd and one of an even size."""
        return common_images(operands, seed) if self.sums else images(operands, seed)


def add(a: Conv, b: Conv) -> Joined:
    return algebra.branch_sum([a, b])


def add_formulas(a: Conv, b: Conv) -> Joined:
    """The sum of two values, into which their formulas are put."""
    total = Affine({"a": identity(a.out_channels, a.axes), "b": identity(b.out_channels, b.axes)})
    result = algebra.substitute(total, {"a": Affine({"x": a}), "b": Affine({"x": b})})
    return result if isinstance(result, Refusal) else result.terms["x"]


def compose(outer: Conv, inner: Conv) -> Joined:
    """A composition, asked for only where the border rule holds, as its contract says."""
    refused = algebra.border_rule(outer, Affine({"x": inner}))
    return algebra.conv_after_conv(outer, inner) if refused is None else refused


def compose_formulas(outer: Conv, inner: Conv) -> Joined:
    """The formula of a value put in the place of the value."""
    result = algebra.substitute(Affine({"v": outer}), {"v": Affine({"x": inner})})
    return result if isinstance(result, Refusal) else result.terms["x"]


def sum_of(a: Conv, b: Conv, x: Array) -> Array:
    return oracle.add(oracle.direct(a, x), oracle.direct(b, x))


def chain_of(outer: Conv, inner: Conv, x: Array) -> Array:
    return oracle.direct(outer, oracle.direct(inner, x))


STRIDED = Conv(1, 1, kernel=(2,), stride=(2,), dilation=(1,), lo=(0,), hi=(0,))
BOTH, EACH = ((0, 1),), ((0,), (1,))
SUMS = (
    Rule("branch_sum", strategies.parallel, add, sum_of, BOTH, sums=True),
    Rule("substitute in a sum", strategies.parallel, add_formulas, sum_of, BOTH, sums=True),
)
CHAINS = (
    Rule("conv_after_conv", strategies.chain, compose, chain_of, EACH),
    Rule("scale after conv", strategies.scaled_after, compose, chain_of, EACH),
    Rule("scale before conv", strategies.scaled_before, compose, chain_of, EACH),
    Rule("substitute in a chain", strategies.chain, compose_formulas, chain_of, EACH),
)
RULES = (*SUMS, *CHAINS)
every_rule = pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
every_sum = pytest.mark.parametrize("rule", SUMS, ids=[rule.name for rule in SUMS])
every_chain = pytest.mark.parametrize("rule", CHAINS, ids=[rule.name for rule in CHAINS])


def forall(
    check: Callable[..., None],
    *arguments: SearchStrategy[Any],
    times: int,
    found: tuple[tuple[Any, ...], ...] = (),
    **options: Any,
) -> None:
    """Run a check on drawn arguments, and on those that have failed before."""
    test = settings(max_examples=strategies.times(times), **options)(given(*arguments)(check))
    for case in found:
        test = example(*case)(test)
    test()


@dataclass
class Share:
    """How often a rule accepted: a law that holds only because nothing was accepted is no law."""

    asked: int = 0
    accepted: int = 0

    def of(self, *results: Joined) -> bool:
        """Count; whether all were accepted."""
        self.asked += 1
        accepted = not any(isinstance(result, Refusal) for result in results)
        self.accepted += accepted
        return accepted

    def enough(self, share: float) -> None:
        """Assert the least share of acceptances."""
        assert self.accepted >= share * self.asked, f"only {self.accepted} of {self.asked} were accepted"


def equal(a: Conv, b: Conv, inputs: list[Array]) -> None:
    """Two convolutions compute the same."""
    for x in inputs:
        assert error(oracle.direct(a, x), oracle.direct(b, x)) < TOLERANCE


def as_map(conv: Conv) -> Conv:
    """An identity with its one tap written out, anything else as it is."""
    return replace(conv, weight=rows(conv), identity=False) if conv.identity else conv


# --- the oracles ----------------------------------------------------------------------------------


@settings(max_examples=strategies.times(60))
@given(strategies.any_conv, seeds)
def test_direct_summation_agrees_with_torch(conv: Conv, seed: int) -> None:
    conv = numbered(conv, seed)
    for x in images((conv,), seed):
        assert error(oracle.by_torch(conv, x), oracle.direct(conv, x)) < TOLERANCE


@settings(max_examples=strategies.times(40))
@given(strategies.any_conv.filter(lambda conv: not conv.transposed), seeds)
def test_direct_summation_agrees_with_one_product_at_a_time(conv: Conv, seed: int) -> None:
    conv = numbered(conv, seed)
    for x in images((conv,), seed):
        y = oracle.direct(conv, x)
        for channel in {0, conv.out_channels - 1}:
            for at in {(0,) * conv.axes, tuple(n // 2 for n in y.shape[1:]), tuple(n - 1 for n in y.shape[1:])}:
                assert abs(y[(channel, *at)] - oracle.literal(conv, x, channel, at)) < TOLERANCE * 100


@settings(max_examples=strategies.times(60))
@given(strategies.any_conv, seeds)
def test_slack_alone_fixes_the_length(conv: Conv, seed: int) -> None:
    if conv.transposed:
        return
    for x in images((conv,), seed):
        wanted = tuple(
            (n + slack - 1) // s + 1 for n, slack, s in zip(x.shape[1:], conv.slack, conv.stride, strict=True)
        )
        assert oracle.direct(numbered(conv, seed), x).shape[1:] == wanted


# --- what an accepted result computes -------------------------------------------------------------


@every_rule
def test_an_accepted_result_computes_what_its_operands_do(rule: Rule) -> None:
    share = Share()

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        a, b = all_numbered(operands, seed)
        result = rule.join(a, b)
        if share.of(result):
            for x in rule.images((a, b), seed):
                assert error(rule.meaning(a, b, x), oracle.direct(result, x)) < TOLERANCE

    forall(check, rule.operands(2), seeds, times=150)
    share.enough(0.5)


@every_rule
def test_structure_is_decided_without_weights(rule: Rule) -> None:
    """The same decision and geometry with and without numbers, so that a deploy checkpoint always fits."""

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        a, b = all_numbered(operands, seed)
        if not rule.sums and a.fill is not None and not a.never_outside:
            return  # a border filled by numbers needs them
        result, structure = rule.join(a, b), rule.join(a.structure, b.structure)
        if isinstance(result, Refusal):
            assert result == structure
            return
        assert not isinstance(structure, Refusal)
        assert structure.weight is None
        for field in ("out_channels", "in_channels", "kernel", "stride", "dilation", "lo", "hi", "groups", "identity",
                      "border", "transposed", "output_padding"):  # fmt: skip
            assert getattr(result, field) == getattr(structure, field), field

    forall(check, rule.operands(2), seeds, times=60)


@every_rule
def test_operands_are_not_changed(rule: Rule) -> None:
    def check(operands: tuple[Conv, ...], seed: int) -> None:
        numbers = all_numbered(operands, seed)
        before = [None if conv.weight is None else conv.weight.clone() for conv in numbers]
        rule.join(*numbers)
        for conv, weight in zip(numbers, before, strict=True):
            assert weight is None or torch.equal(conv.weight, weight)

    forall(check, rule.operands(2), seeds, times=30)


@every_rule
def test_linear(rule: Rule) -> None:
    """`join(p a + q a', ...) = p join(a, ...) + q join(a', ...)`, in every operand of a chain, jointly in a sum."""

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        first = tuple(as_map(conv) for conv in all_numbered(operands, seed))
        second = tuple(as_map(conv) for conv in all_numbered(operands, seed + 1000))
        p, q = -0.75, 1.5
        for slots in rule.slots:

            def mixed(u: float, v: float, slots: tuple[int, ...] = slots) -> Joined:
                return rule.join(
                    *(
                        replace(a, weight=u * weight(a) + v * weight(b)) if i in slots else a
                        for i, (a, b) in enumerate(zip(first, second, strict=True))
                    )
                )

            both, left, right = mixed(p, q), mixed(1, 0), mixed(0, 1)
            if isinstance(both, Refusal) or isinstance(left, Refusal) or isinstance(right, Refusal):
                assert left == right == both
                continue
            assert both.lo == left.lo == right.lo
            assert torch.allclose(weight(both), p * weight(left) + q * weight(right), rtol=1e-12, atol=1e-12)

    unfilled = rule.operands(2).filter(lambda convs: rule.sums or convs[0].fill is None)
    forall(check, unfilled, seeds, times=50)


def weight(conv: Conv) -> Tensor:
    assert conv.weight is not None
    return conv.weight


@every_rule
def test_associative(rule: Rule) -> None:
    share = Share()

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        c, b, a = all_numbered(operands, seed)
        inner, outer = rule.join(b, a), rule.join(c, b)
        if isinstance(inner, Refusal) or isinstance(outer, Refusal):
            share.of(inner)
            return
        right, left = rule.join(c, inner), rule.join(outer, a)
        if rule.sums:
            assert isinstance(left, Refusal) == isinstance(right, Refusal), f"{left} / {right}"
        if not share.of(left, right):
            return
        assert not isinstance(left, Refusal)
        assert not isinstance(right, Refusal)
        assert (left.lo, left.slack, left.stride) == (right.lo, right.slack, right.stride)
        assert (left.kernel, left.dilation, left.groups) == (right.kernel, right.dilation, right.groups)
        equal(left, right, rule.images((c, b, a), seed))

    forall(check, rule.operands(3), seeds, times=60)
    share.enough(0.1)


@every_sum
def test_commutative(rule: Rule) -> None:
    share = Share()

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        a, b = all_numbered(operands, seed)
        one, other = rule.join(a, b), rule.join(b, a)
        assert isinstance(one, Refusal) == isinstance(other, Refusal), f"{one} / {other}"
        if not share.of(one, other):
            return
        assert not isinstance(one, Refusal)
        assert not isinstance(other, Refusal)
        assert (one.kernel, one.dilation, one.lo, one.groups) == (other.kernel, other.dilation, other.lo, other.groups)
        assert one.weight is not None
        assert torch.equal(one.weight, other.weight)

    forall(check, rule.operands(2), seeds, times=50)
    share.enough(0.5)


def identities(channels: int, axes: int) -> list[Conv]:
    """The neutral element of composition in its spellings."""
    ones = torch.ones(channels, dtype=torch.float64)
    return [
        identity(channels, axes),
        identity(channels, axes, ones),
        diagonal(channels, axes, ones),
        pointwise(channels, channels, axes, weight=torch.eye(channels, dtype=torch.float64)),
    ]


FILLED = Conv(1, 1, kernel=(2,), stride=(1,), dilation=(1,), lo=(1,), hi=(0,), fill=torch.zeros(1))


@every_chain
def test_the_identity_map_is_neutral(rule: Rule) -> None:
    """On both sides, whatever the other operand is, and how the identity is written."""

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        conv = numbered(operands[-1], seed, 1)
        inputs = images((conv,), seed)
        for one in identities(conv.out_channels, conv.axes):
            result = rule.join(one, conv)
            assert not isinstance(result, Refusal), str(result)
            equal(conv, result, inputs)
        for one in identities(conv.in_channels, conv.axes):
            if conv.fill is not None and not one.identity:
                continue  # a weight that happens to be the identity, before a border of other constants than zero
            result = rule.join(conv, one)
            assert not isinstance(result, Refusal), str(result)
            equal(conv, result, inputs)

    forall(check, rule.operands(2), seeds, times=50, found=(((FILLED,), 0),))


@every_sum
def test_zero_is_neutral(rule: Rule) -> None:
    """A convolution of zeros, of any other geometry that can be added, changes nothing."""
    share = Share()

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        conv, other = all_numbered(operands, seed)
        zero = replace(other, weight=torch.zeros(other.weight_shape, dtype=torch.float64), identity=False)
        result = rule.join(conv, zero)
        if share.of(result):
            assert not isinstance(result, Refusal)
            equal(conv, result, common_images((conv, other), seed))

    forall(check, rule.operands(2), seeds, times=50)
    share.enough(0.5)


@every_chain
def test_distributive_from_the_left(rule: Rule) -> None:
    """`c (a + b) = c a + c b`."""
    share = Share()

    def check(operands: tuple[Conv, ...], data: Any, seed: int) -> None:
        outer, a, b = all_numbered((*operands, data), seed)
        total, one, other = add(a, b), rule.join(outer, a), rule.join(outer, b)
        if not share.of(total, one, other):
            return
        assert not isinstance(total, Refusal)
        left, right = rule.join(outer, total), add(one, other)
        assert not isinstance(left, Refusal), str(left)
        assert not isinstance(right, Refusal), str(right)
        equal(left, right, rule.images((outer, total), seed))

    def with_branch(operands: tuple[Conv, ...]) -> SearchStrategy[Conv]:
        return strategies.beside(operands[1])

    pairs = rule.operands(2).flatmap(lambda ops: with_branch(ops).map(lambda b: (ops, b)))
    forall(lambda pair, seed: check(*pair, seed), pairs, seeds, times=50)
    share.enough(0.1)


@every_chain
def test_distributive_from_the_right(rule: Rule) -> None:
    """`(a + b) c = a c + b c`."""
    share = Share()

    def check(a: Conv, inner: Conv, b: Conv, seed: int) -> None:
        a, inner, b = all_numbered((a, inner, b), seed)
        total, one, other = add(a, b), rule.join(a, inner), rule.join(b, inner)
        if not share.of(total, one, other):
            return
        assert not isinstance(total, Refusal)
        left, right = rule.join(total, inner), add(one, other)
        assert not isinstance(left, Refusal), str(left)
        assert not isinstance(right, Refusal), str(right)
        equal(left, right, rule.images((total, inner), seed))

    triples = rule.operands(2).flatmap(lambda ops: strategies.beside(ops[0]).map(lambda b: (*ops, b)))
    forall(lambda triple, seed: check(*triple, seed), triples, seeds, times=50)
    share.enough(0.1)


# --- formulas with several roots and a bias -------------------------------------------------------


def test_a_bias_is_kept_once_per_value() -> None:
    """A norm after a sum shifts once, and the biases of the summands are scaled once each."""

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        a, b = all_numbered(operands, seed)
        channels, axes = a.out_channels, a.axes
        bias = [normal((channels,), seed, 10 + i) for i in range(3)]
        norm = Affine({"sum": numbered(diagonal(channels, axes), seed, 5)}, biased=True, bias=bias[0])
        total = Affine({"a": identity(channels, axes), "b": identity(channels, axes)})
        formulas = {
            "a": Affine({"x": a}, biased=True, bias=bias[1]),
            "b": Affine({"x": b, "z": numbered(diagonal(channels, axes), seed, 6)}, biased=True, bias=bias[2]),
        }
        result = algebra.substitute(norm, {"sum": total})
        assert isinstance(result, Affine), str(result)
        result = algebra.substitute(result, formulas)
        if isinstance(result, Refusal):
            return
        assert set(result.terms) == {"x", "z"}
        for x in common_images((a, b), seed):
            y = oracle.add(oracle.direct(a, x), oracle.direct(b, x))
            z = strategies.image(channels, y.shape[1:], seed + 1)
            values = {name: oracle.affine(f, {"x": x, "z": z}) for name, f in formulas.items()}
            wanted = oracle.affine(norm, {"sum": oracle.affine(total, values)})
            assert error(wanted, oracle.affine(result, {"x": x, "z": z})) < TOLERANCE

    forall(check, strategies.parallel(2), seeds, times=60)


def test_substitution_may_be_done_in_any_order() -> None:
    """Two formulas put in together, one after the other, or the other way round give one value."""

    def check(operands: tuple[Conv, ...], seed: int) -> None:
        a, b = all_numbered(operands, seed)
        channels, axes = a.out_channels, a.axes
        total = Affine({"a": identity(channels, axes), "b": numbered(diagonal(channels, axes), seed, 7)})
        formulas = {
            "a": Affine({"x": a}, biased=True, bias=normal((channels,), seed, 11)),
            "b": Affine({"x": b}, biased=True, bias=normal((channels,), seed, 12)),
        }
        together = algebra.substitute(total, formulas)
        for first, second in (("a", "b"), ("b", "a")):
            step = algebra.substitute(total, {first: formulas[first]})
            assert isinstance(step, Affine), str(step)
            step = algebra.substitute(step, {second: formulas[second]})
            assert isinstance(step, Refusal) == isinstance(together, Refusal)
            if isinstance(step, Affine) and isinstance(together, Affine):
                for x in common_images((a, b), seed):
                    assert error(oracle.affine(together, {"x": x}), oracle.affine(step, {"x": x})) < TOLERANCE

    forall(check, strategies.parallel(2), seeds, times=50)


def test_a_convolution_may_follow_itself() -> None:
    """One object as both operands, as a module that is called twice in a row gives it."""

    def check(conv: Conv, seed: int) -> None:
        conv = numbered(replace(conv, out_channels=conv.in_channels, groups=1), seed)
        result = compose(conv, conv)
        if isinstance(result, Conv):
            for x in images((conv, conv), seed):
                assert error(chain_of(conv, conv, x), oracle.direct(result, x)) < TOLERANCE

    forall(check, strategies.convs(reach=strategies.Reach.INSIDE), seeds, times=40, found=((STRIDED, 0),))


def test_one_object_may_be_added_to_itself() -> None:
    conv = numbered(STRIDED, 0)
    result = add(conv, conv)
    assert isinstance(result, Conv)
    for x in images((conv,), 0):
        assert error(2 * oracle.direct(conv, x), oracle.direct(result, x)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_joined_in_float64(dtype: torch.dtype) -> None:
    """Narrow operands are added and multiplied in float64, so that the result is rounded once."""
    dense = replace(numbered(Conv(4, 4, (3,), (1,), (1,), (1,), (1,)), 0), weight=normal((4, 4, 3), 0).to(dtype))
    point = pointwise(4, 4, 1, weight=normal((4, 4), 1).to(dtype))
    scale = diagonal(4, 1, normal((4,), 2).to(dtype))
    for result, wanted in (
        (algebra.branch_sum([dense, point]), lambda x: sum_of(dense, point, x)),
        (algebra.conv_after_conv(dense, point), lambda x: chain_of(dense, point, x)),
        (algebra.conv_after_conv(scale, dense), lambda x: chain_of(scale, dense, x)),
        (algebra.conv_after_conv(dense, scale), lambda x: chain_of(dense, scale, x)),
    ):
        assert isinstance(result, Conv)
        assert result.weight is not None
        assert result.weight.dtype is torch.float64
        for x in images((dense,), 0):
            assert error(wanted(x), oracle.direct(result, x)) < TOLERANCE


def test_linear_layers_obey_the_laws() -> None:
    """No axes at all: `W2 (W1 x + b1) + b2` and `(W + s B A) x`."""
    first, second = normal((3, 4), 0, 1), normal((5, 3), 0, 2)
    low, up, scale = normal((2, 4), 0, 3), normal((5, 2), 0, 4), 0.5
    b1, b2 = normal((3,), 0, 5), normal((5,), 0, 6)
    x = normal((4,), 0, 7).numpy()
    inner = Affine({"x": pointwise(3, 4, 0, weight=first)}, biased=True, bias=b1)
    outer = Affine({"v": pointwise(5, 3, 0, weight=second)}, biased=True, bias=b2)
    result = algebra.substitute(outer, {"v": inner})
    assert isinstance(result, Affine)
    wanted = second.numpy() @ (first.numpy() @ x + b1.numpy()) + b2.numpy()
    assert error(wanted, oracle.affine(result, {"x": x})) < TOLERANCE
    adapter = algebra.conv_after_conv(pointwise(5, 2, 0, weight=scale * up), pointwise(2, 4, 0, weight=low))
    assert isinstance(adapter, Conv)
    dense = pointwise(5, 4, 0, weight=normal((5, 4), 0, 8))
    total = algebra.branch_sum([dense, adapter])
    assert isinstance(total, Conv)
    assert total.weight is not None
    assert np.allclose(total.weight.numpy(), (normal((5, 4), 0, 8) + scale * up @ low).numpy(), rtol=0, atol=1e-12)
