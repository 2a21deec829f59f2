"""Forwards whose way depends on more than a reading shows: what their argument is, errors, identity, counters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from nets import C, call, conv, conv_norm, fuse_purely, images, owned, ready, same, stays_right
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import reparam

X, Z = images(), images(seed=1)


class Two(nn.Module):
    """Two branches that could be one, and a chain that could be one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)
        self.c, self.n = conv(3), nn.BatchNorm2d(C)

    def _both(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def made(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """A net with this forward."""
    model = type("Made", (Two,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


# --- state that is not of the module ----------------------------------------------------------------------------------

CALLS, LISTED, TABLE = 0, [0], {"n": 0}
COUNTER = itertools.count(1)


@dataclasses.dataclass
class State:
    n: int = 0


STATE = State()


def global_number(net: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return net._both(x) * CALLS


def global_list(net: Any, x: Tensor) -> Tensor:
    LISTED[0] += 1
    return net._both(x) * LISTED[0]


def global_dict(net: Any, x: Tensor) -> Tensor:
    TABLE["n"] += 1
    return net._both(x) * TABLE["n"]


def global_object(net: Any, x: Tensor) -> Tensor:
    STATE.n += 1
    return net._both(x) * STATE.n


def global_iterator(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * next(COUNTER)


def _step() -> int:
    global CALLS
    CALLS += 1
    return CALLS


def in_a_helper(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * _step()


@pytest.fixture
def _from_the_start() -> Iterator[None]:
    yield
    _reset()


def _reset() -> None:
    global CALLS, COUNTER
    CALLS, COUNTER = 0, itertools.count(1)
    LISTED[0] = TABLE["n"] = STATE.n = 0


@pytest.mark.usefixtures("_from_the_start")
@pytest.mark.parametrize(
    "forward", [global_number, global_list, global_dict, global_object, global_iterator, in_a_helper]
)
def test_global_state(forward: Callable[..., Tensor]) -> None:
    model = ready(made(forward))
    fused = fuse_purely(model)
    _reset()
    expected = [model(X) for _ in range(3)]
    _reset()
    for value in expected:
        assert (fused(X) - value).abs().max() < 1e-10


class OfTheClass(Two):
    count = 0
    seen: list[int] = []  # noqa: RUF012 (what authors write)

    def forward(self, x: Tensor) -> Tensor:
        OfTheClass.count += 1
        return self._both(x) * OfTheClass.count


class OfItsType(OfTheClass):
    def forward(self, x: Tensor) -> Tensor:
        type(self).count += 1
        return self._both(x) * self.count


class ListOfTheClass(OfTheClass):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self._both(x) * len(self.seen)


@pytest.mark.parametrize("kind", [OfTheClass, OfItsType, ListOfTheClass])
def test_state_of_a_class(kind: type[OfTheClass]) -> None:
    def reset() -> None:
        OfTheClass.count = 0
        OfTheClass.seen.clear()
        if "count" in vars(OfItsType):
            del OfItsType.count

    reset()
    model = ready(kind())
    fused = fuse_purely(model)
    assert (OfTheClass.count, OfTheClass.seen, "count" in vars(OfItsType)) == (0, [], False)
    expected = [model(X) for _ in range(3)]
    reset()
    for value in expected:
        assert (fused(X) - value).abs().max() < 1e-10
    reset()


ADVANCED: dict[str, Callable[[], Any]] = {
    "count": lambda: itertools.count(1),
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "list": lambda: iter([1, 2, 3, 4, 5, 6, 7, 8]),
    "generator": lambda: (k for k in range(1, 9)),
}


@pytest.mark.parametrize("kind", ADVANCED)
def test_an_iterator_that_is_advanced(kind: str) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net._both(x) * next(net.numbers)

    model = ready(made(forward))
    model.numbers = None
    with_iterator = fused_with(model, lambda net: setattr(net, "numbers", ADVANCED[kind]()))
    for _ in range(3):
        assert (with_iterator[0](X) - with_iterator[1](X)).abs().max() < 1e-10


def fused_with(model: nn.Module, start: Callable[[nn.Module], None]) -> tuple[nn.Module, nn.Module]:
    """A net and its fused form, each of which is given something that cannot be copied."""
    other = ready(made(type(model).forward))
    start(model)
    start(other)
    return model, reparam.fuse(other, inplace=True)


def test_an_object_that_counts() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.state.n += 1
        return net._both(x) * net.state.n

    fused = stays_right(made(forward, state=State()))
    assert owned(fused.odd)["convs"] == 3


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def step(self) -> int:
        self.n += 1
        return self.n


def stepping() -> Callable[[], int]:
    n = 0

    def step() -> int:
        nonlocal n
        n += 1
        return n

    return step


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "random": (lambda: random.Random(0), lambda held: held.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda held: held.random()),
    "array": (lambda: np.zeros(2), lambda held: float(held.__iadd__(1)[0])),
    "iterator in a dict": (lambda: {"it": iter(range(1, 99))}, lambda held: next(held["it"])),
    "iterator in a list": (lambda: [iter(range(1, 99))], lambda held: next(held[0])),
    "slots": (Slotted, lambda held: held.step()),
    "closure": (stepping, lambda held: held()),
}


@pytest.mark.parametrize("name", HELD)
def test_state_that_an_attribute_holds(name: str) -> None:
    make, draw = HELD[name]

    def forward(net: Any, x: Tensor) -> Tensor:
        return net._both(x) * draw(net.held)

    model, fused = fused_with(ready(made(forward)), lambda net: setattr(net, "held", make()))
    for _ in range(3):
        assert (model(X) - fused(X)).abs().max() < 1e-10


def test_a_variable_of_the_function_around_a_forward() -> None:
    def build() -> nn.Module:
        n = [0]

        def forward(net: Any, x: Tensor) -> Tensor:
            n[0] += 1
            return net._both(x) * n[0]

        return ready(made(forward))

    model, fused = build(), reparam.fuse(build())
    for _ in range(3):
        assert (model(X) - fused(X)).abs().max() < 1e-10


class Counting(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.n, self.held = how, 0, [0]
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self, w: Tensor) -> Tensor:
        if self.how == "number":
            self.n += 1
            return w * self.n
        if self.how == "list":
            self.held[0] += 1
            return w * self.held[0]
        if self.how == "buffer":
            self.steps.add_(1)
            return w * self.steps
        return w * 2


@pytest.mark.parametrize("how", ["number", "list", "buffer", "nothing"])
def test_a_parametrization_that_counts(how: str) -> None:
    model = made(lambda net, x: net._both(x))
    parametrize.register_parametrization(model.a[0], "weight", Counting(how), unsafe=True)
    model = ready(model)
    counting = model.a[0].parametrizations.weight[0]
    before = (counting.n, counting.held[0], float(counting.steps))
    fused = fuse_purely(model)
    assert (counting.n, counting.held[0], float(counting.steps)) == before
    for _ in range(3):
        same(model, fused, X)
    assert owned(fused)["convs"] == (2 if how == "nothing" else 3)


# --- classes of children ----------------------------------------------------------------------------------------------


def by_name(net: Any, x: Tensor) -> Tensor:
    for layer in net.q:
        x = layer(x).tanh() if layer.__class__.__name__ == "BatchNorm2d" else layer(x)
    return x


def by_class(net: Any, x: Tensor) -> Tensor:
    for layer in net.q:
        x = layer(x).tanh() if layer.__class__ is nn.BatchNorm2d else layer(x)
    return x


def by_type(net: Any, x: Tensor) -> Tensor:
    for layer in net.q:
        x = layer(x).tanh() if type(layer) is nn.BatchNorm2d else layer(x)
    return x


def by_name_of_type(net: Any, x: Tensor) -> Tensor:
    for layer in net.q:
        x = layer(x).tanh() if type(layer).__name__.startswith("Batch") else layer(x)
    return x


def by_types(net: Any, x: Tensor) -> Tensor:
    scales = [2 if type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) else 1 for layer in net.q]
    return net.q(x) * sum(scales)


@pytest.mark.parametrize("forward", [by_name, by_class, by_type, by_name_of_type, by_types])
def test_a_class_is_asked_for_by_name_or_type(forward: Callable[..., Tensor]) -> None:
    model = made(forward)
    model.q = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU())
    stays_right(model)


class Sum(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self._both(x).relu()


def test_the_type_of_a_block_that_would_be_generated() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.k(x) * (2 if type(net.k) is Sum else 1)

    model = made(forward)
    model.k = Sum()
    stays_right(model)


def test_a_class_is_made_while_types_are_asked_for() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        class Meta(type):
            pass

        class Local(metaclass=Meta):
            pass

        known = isinstance(Local, type) and type(Local) is Local.__class__ and type(Meta).__name__ == "type"
        return net._both(x).relu() * (2 if known else 1) * len(type("T", (), {}).__name__)

    assert owned(stays_right(made(forward)).odd)["convs"] == 2


def test_its_own_class_may_be_asked_for() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        assert x.dim() == 4, f"{net.__class__.__name__} wants images, not {x.shape}"
        if type(net).__name__ != "Made":
            raise TypeError(type(net))
        return net._both(x).relu()

    assert owned(stays_right(made(forward)).odd)["convs"] == 2


# --- what the argument is ---------------------------------------------------------------------------------------------


def summed_list(net: Any, x: Any) -> Tensor:
    if isinstance(x, (list, tuple)):
        x = sum(x)
    return net._both(x)


def joined_list(net: Any, x: Any) -> Tensor:
    if isinstance(x, (list, tuple)):
        x = torch.cat([t[:, : C // 2] for t in x], 1)
    return net.n(net.c(x)).relu()


def unless_tensor(net: Any, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        x = x[0] - x[1]
    return net.n(net.c(net._both(x))).relu()


def type_is_list(net: Any, x: Any) -> Tensor:
    if type(x) is list:
        x = x[0] * x[1]
    return net._both(x).relu()


def asks_torch(net: Any, x: Any) -> Tensor:
    return net._both(x if torch.is_tensor(x) else x[0]).relu()


def class_is_list(net: Any, x: Any) -> Tensor:
    return net._both(sum(x) if x.__class__ is list else x).relu()


def has_a_shape(net: Any, x: Any) -> Tensor:
    return net._both(x if hasattr(x, "shape") else x[0]).relu()


def between_in_a_list(net: Any, x: Any) -> Tensor:
    y = net.c(x[0] if isinstance(x, list) else x)
    return net.n(y.relu() if isinstance(x, list) else y)


@pytest.mark.parametrize(
    "forward",
    [summed_list, joined_list, unless_tensor, type_is_list, asks_torch, class_is_list, has_a_shape, between_in_a_list],
)
def test_a_tensor_or_a_list(forward: Callable[..., Tensor]) -> None:
    model = ready(made(forward))
    fused = fuse_purely(model)
    same(model, fused, X)
    same(model, fused, [X, Z])
    if forward is joined_list:
        assert not isinstance(fused.n, nn.BatchNorm2d)


def test_a_child_that_takes_a_list_too() -> None:
    model = ready(nn.Sequential(made(summed_list), nn.ReLU()))
    fused = fuse_purely(model)
    same(model, fused, X)
    same(model, fused, [X, Z])


def test_a_child_that_is_given_a_tensor_is_fused() -> None:
    model = ready(nn.Sequential(nn.ReLU(), made(summed_list)))
    fused = fuse_purely(model)
    same(model, fused, X)
    assert owned(fused)["norms"] == 0


def test_an_assertion_about_the_argument_does_not_stop_fusing() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        if isinstance(x, (list, tuple)):
            raise TypeError("no list")
        return net._both(x).relu()

    assert owned(stays_right(made(forward)).odd)["convs"] == 2


@dataclasses.dataclass
class Nested:
    tensors: Tensor

    def decompose(self) -> tuple[Tensor, None]:
        return self.tensors, None


def has_method(net: Any, x: Any) -> Tensor:
    if hasattr(x, "decompose"):
        x, _ = x.decompose()
    return net._both(x)


def gets_attribute(net: Any, x: Any) -> Tensor:
    return net._both(getattr(x, "tensors", x))


def is_a_class(net: Any, x: Any) -> Tensor:
    return net._both(x.tensors if isinstance(x, Nested) else x)


@pytest.mark.parametrize("forward", [has_method, gets_attribute, is_a_class])
def test_a_tensor_or_an_object(forward: Callable[..., Tensor]) -> None:
    model = ready(made(forward))
    fused = fuse_purely(model)
    same(model, fused, X)
    same(model, fused, Nested(X))


# --- errors, identity, lookups ----------------------------------------------------------------------------------------


def catches(net: Any, x: Tensor) -> Tensor:
    try:
        y = x.view(2, C, 99)
    except RuntimeError:
        y = x.flatten(2)
    return net._both(x).relu() + y.mean(-1)[..., None, None]


def catches_all(net: Any, x: Tensor) -> Tensor:
    try:
        n = float(int(x.shape[2]))
    except Exception:
        n = 1.0
    return net._both(x) * n


def _sized(x: Tensor) -> float:
    try:
        return float(x.shape[2])
    except TypeError:
        return 1.0


def catches_in_a_function(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * _sized(x)


def suppresses(net: Any, x: Tensor) -> Tensor:
    n = 1.0
    with contextlib.suppress(TypeError):
        n = float(x.shape[2])
    return net._both(x) * n


def other_chain(net: Any, x: Tensor) -> Tensor:
    try:
        y = net.n(net.c(x.view(2, C, 9, 11)))
    except RuntimeError:
        y = net.n(net.c(x).tanh())
    return y.relu()


def identity(net: Any, x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, net.training)
    return net._both(x) * (1 if y is x else 2)


def identity_of_element(net: Any, x: Tensor) -> Tensor:
    parts = [x.to(x.dtype), x]
    return net._both(x) * (1 if parts[0] is parts[1] else 2)


def keyed_by_type(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * {torch.float64: 2.0}.get(x.dtype, 1.0)


def in_a_set(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * (2 if x.dtype in {torch.float64} else 1)


def keyed_by_device(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * {"cpu": 3.0}.get(x.device.type, 1.0)


def keyed_by_text(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * {"9x11": 2.0}.get(f"{x.shape[2]}x{x.shape[3]}", 1.0)


def keyed_by_str(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * (2 if str(x.dtype) == "torch.float64" else 1)


def keyed_by_sizes(net: Any, x: Tensor) -> Tensor:
    return net._both(x) * {(9, 11): 2.0}.get((x.shape[2], x.shape[3]), 1.0)


@pytest.mark.parametrize(
    "forward",
    [
        catches,
        catches_all,
        catches_in_a_function,
        suppresses,
        other_chain,
        identity,
        identity_of_element,
        keyed_by_type,
        in_a_set,
        keyed_by_device,
        keyed_by_text,
        keyed_by_str,
        keyed_by_sizes,
    ],
)
def test_a_way_that_a_reading_does_not_show(forward: Callable[..., Tensor]) -> None:
    stays_right(made(forward))


PLAIN: dict[str, Callable[[Tensor], bool]] = {
    "int": lambda x: isinstance(x.shape[2], int),
    "tuple": lambda x: isinstance(x.shape, tuple),
    "type": lambda x: type(x.shape[2]) is int,
    "iterable": lambda x: not isinstance(x.size(2), Iterable),
    "float": lambda x: isinstance(x.shape[2] / 2, float),
    "dtype": lambda x: isinstance(x.dtype, torch.dtype),
    "device": lambda x: isinstance(x.device, torch.device),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_class_of_a_size(name: str) -> None:
    asks = PLAIN[name]

    def forward(net: Any, x: Tensor) -> Tensor:
        return net._both(x) * (2 if asks(x) else 1)

    stays_right(made(forward))


@pytest.mark.parametrize("name", ["autocast", "inference"])
def test_a_mode_that_is_asked_for(name: str) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        on = torch.is_autocast_enabled("cpu") if name == "autocast" else torch.is_inference_mode_enabled()
        return net._both(x) * (2 if on else 1)

    model = ready(made(forward))
    fused = reparam.fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16) if name == "autocast" else torch.inference_mode():
        assert (model(X) - fused(X)).abs().max() < 1e-10
    assert (model(X) - fused(X)).abs().max() < 1e-10


@pytest.mark.parametrize(("forward", "reason"), [(catches, "catches errors"), (identity, "one object")])
def test_the_reason_is_given(forward: Callable[..., Tensor], reason: str) -> None:
    plan = reparam.plan(ready(made(forward)))
    assert any(reason in str(refusal) for refusal in plan.left)


def test_handlers_that_raise_again_and_with_blocks_do_not_stop_fusing() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        try:
            with torch.profiler.record_function("block"):
                y = net._both(x)
        except RuntimeError as error:
            raise ValueError("of another size") from error
        finally:
            net._both  # noqa: B018
        return y.relu()

    assert owned(stays_right(made(forward)).odd)["convs"] == 2


# --- what a child writes ----------------------------------------------------------------------------------------------


class Collects(Two):
    def forward(self, x: Tensor, found: Any) -> Tensor:
        y = self._both(x)
        if isinstance(found, dict):
            found["y"] = y
        else:
            found.append(y)
        return y.relu()


@pytest.mark.parametrize("kind", [list, dict])
def test_a_collection_that_a_child_fills(kind: Callable[[], Any]) -> None:
    def forward(net: Any, x: Tensor) -> Any:
        found = kind()
        y = net.k(x, found)
        return net._both(y), found

    model = made(forward)
    model.k = Collects()
    stays_right(model)


def test_a_list_to_which_a_child_adds_another() -> None:
    class Adds(Two):
        def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
            found += [self._both(x)]
            return x

    def forward(net: Any, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        return net._both(net.k(x, found)) + sum(found)

    model = made(forward)
    model.k = Adds()
    stays_right(model)


def test_a_list_that_a_child_changes_and_nobody_reads_does_not_stop_fusing() -> None:
    class InPlace(Two):
        def forward(self, parts: list[Tensor]) -> list[Tensor]:
            parts[0] = self._both(parts[0])
            return parts

    def forward(net: Any, x: Tensor) -> Tensor:
        parts = net.k([net.n(net.c(x)).relu(), x])
        return parts[0] + parts[1]

    model = made(forward)
    model.k = InPlace()
    assert not isinstance(getattr(stays_right(model).odd, "n", None), nn.BatchNorm2d)


def test_a_list_that_a_child_reads_does_not_stop_fusing() -> None:
    class Joins(nn.Module):
        def forward(self, parts: list[Tensor]) -> Tensor:
            found: list[Tensor] = []
            found.append(parts[0].relu())
            found.extend(parts[1:])
            return torch.cat(found, 1)

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.k([net._both(x), x])

    model = made(forward)
    model.k = Joins()
    assert owned(stays_right(model).odd)["convs"] == 2


class Masked(nn.Conv2d):
    mask: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.mask is None else y * self.mask


def test_a_mask_that_is_set_on_a_grandchild() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.q[0].mask = (x.mean(1, keepdim=True) > 0).to(x.dtype)
        return net.q(x).relu() + net._both(x)

    model = made(forward)
    model.q = nn.Sequential(Masked(C, C, 3, padding=1), nn.BatchNorm2d(C))
    stays_right(model, call(X), call(Z))


# --- children that are taken apart ------------------------------------------------------------------------------------


def _stop(x: Tensor) -> Tensor:
    """What no reading gets past."""
    for _ in range(int(x.abs().sum()) % 2):
        x = x + 1
    return x


def calls_a_part(net: Any, x: Tensor) -> Tensor:
    x = _stop(x)
    return net.q(x) + net.q[0](x)


def goes_through_a_part(net: Any, x: Tensor) -> Tensor:
    y = net.q(_stop(x))
    for layer in net.q[:1]:
        x = layer(x)
    return x + y


def looks_at_a_part(net: Any, x: Tensor) -> Tensor:
    x = _stop(x)
    return net.q(x) * (2 if isinstance(net.q[1], nn.BatchNorm2d) else 1)


def taps(net: Any, x: Tensor) -> Tensor:
    x, found = _stop(x), []
    for at, layer in enumerate(net.q):
        x = layer(x)
        if at == 0:
            found.append(x)
    return x + found[0]


def taps_by_name(net: Any, x: Tensor) -> Tensor:
    x = y = _stop(x)
    for name, layer in net.q.named_children():
        x = layer(x)
        y = x if name == "0" else y
    return x + y


def slices(net: Any, x: Tensor) -> Tensor:
    return net.q[:2](x).relu() + net.q[0](x)


@pytest.mark.parametrize("forward", [calls_a_part, goes_through_a_part, looks_at_a_part, taps, taps_by_name, slices])
def test_a_chain_that_is_taken_apart(forward: Callable[..., Tensor]) -> None:
    model = made(forward)
    model.q = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), conv_norm(3))
    fused = stays_right(model)
    assert owned(fused.odd.q[3])["norms"] == 0


def test_a_child_of_a_child_is_called() -> None:
    class Chain(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.c(x)).relu()

    def forward(net: Any, x: Tensor) -> Tensor:
        x = _stop(x)
        return net.k(x) + net.k.c(x)

    model = made(forward)
    model.k = Chain()
    stays_right(model)


def test_a_slice_of_a_chain_is_read() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.q[2:](net.q[:2](x))

    model = made(forward)
    model.q = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), conv(3), nn.BatchNorm2d(C))
    assert owned(stays_right(model).odd.q)["norms"] == 0


# --- parts of an input that may be None -----------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)


@dataclasses.dataclass
class Sample:
    image: Any
    mask: Any = None


def of_an_object(net: Any, sample: Any) -> Tensor:
    y = net.a(sample.image) + net.b(sample.image)
    if sample.mask is not None:
        y = y * sample.mask
    return y


def of_a_dict(net: Any, batch: Any) -> Tensor:
    mask = batch.get("mask")
    y = net.a(batch["image"]) + net.b(batch["image"])
    return y if mask is None else y * mask


def of_a_tuple(net: Any, pair: Any) -> Tensor:
    image, mask = pair
    y = net.a(image) + net.b(image)
    if mask is None:
        return y
    return y * mask


PARTS: dict[str, tuple[Any, Any]] = {
    "of an object": (of_an_object, Sample),
    "of a dict": (of_a_dict, lambda image, mask: {"image": image, "mask": mask}),
    "of a tuple": (of_a_tuple, lambda image, mask: (image, mask)),
}


@pytest.mark.parametrize(("function", "make"), PARTS.values(), ids=PARTS.keys())
def test_a_part_of_the_input_that_may_be_none(function: Any, make: Any) -> None:
    model = ready(type("Net", (Branches,), {"forward": function})())
    fused = fuse_purely(model)
    for mask in (None, Z):
        same(model, fused, make(X, mask))
    assert owned(fused)["norms"] == 0  # within the branches it does not matter


def test_a_type_that_is_asked_of_the_buffers() -> None:
    model = ready(made(lambda net, x: net.a(x.to(next(net.a.buffers()).dtype))))
    same(model, fuse_purely(model), X)


def by_pattern(net: Any, x: Any) -> Tensor:
    match x:
        case list():
            x = sum(x)
        case _:
            x = x * 3
    return (net.a(x) + net.b(x)).relu()


def children_by_pattern(net: Any, x: Tensor) -> Tensor:
    x = x[0] if isinstance(x, list) else x
    for layer in net.a:
        match layer:
            case nn.BatchNorm2d():
                x = torch.tanh(layer(x))
            case _:
                x = layer(x)
    return x


@pytest.mark.parametrize("forward", [by_pattern, children_by_pattern])
def test_patterns_of_classes(forward: Any) -> None:
    model = ready(type("Net", (Branches,), {"forward": forward})())
    fused = fuse_purely(model)
    same(model, fused, X)
    same(model, fused, [X, Z])


class Twice(Sample):
    """A data class with a way of its own to be made."""

    def __init__(self, image: Any) -> None:
        super().__init__(image, image)


def test_a_data_class_that_is_made_otherwise() -> None:
    model = ready(type("Net", (Branches,), {"forward": lambda net, x: Twice(net.a(x) + net.b(x))})())
    fused = fuse_purely(model)
    same(lambda x: model(x).mask, lambda x: fused(x).mask, X)


@functools.singledispatch
def gain(value: Any) -> float:
    return 1.0


@gain.register
def _(value: nn.Conv2d) -> float:
    return 2.0


@gain.register
def _(value: nn.BatchNorm2d) -> float:
    return 3.0


@gain.register
def _(value: nn.Identity) -> float:
    return 5.0


@gain.register
def _(value: nn.Sequential) -> float:
    return 7.0


@gain.register
def _(value: Tensor) -> float:
    return 11.0


class DispatchesOnAChild(Two):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu() * gain(self.a) + gain(self.b)


class DispatchesOnANorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(x)).relu() * gain(self.n)


class DispatchesOnTheInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu() * gain(x)


class DispatchesInAMethod(DispatchesOnANorm):
    @functools.singledispatchmethod
    def shift(self, value: nn.Module) -> float:
        return 1.0

    @shift.register
    def _(self, value: nn.BatchNorm2d) -> float:
        return 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(x)).relu() + self.shift(self.n)


@pytest.mark.parametrize(
    "net",
    [DispatchesOnAChild, DispatchesOnANorm, DispatchesOnTheInput, DispatchesInAMethod],
    ids=lambda net: net.__name__,
)
def test_functions_that_dispatch_on_the_class_of_their_argument(net: type[nn.Module]) -> None:
    stays_right(net())


class AsksWhetherTheInputIsCalled(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return y * 2 if callable(x) or isinstance(x, Callable) else y.relu()


class TakesAFunction(Two):
    def forward(self, x: Tensor, after: Any = None) -> Tensor:
        y = self.a(x) + self.b(x)
        return after(y) if callable(after) else y


def test_whether_an_input_can_be_called() -> None:
    stays_right(AsksWhetherTheInputIsCalled())
    stays_right(TakesAFunction(), call(images()), call(images(), torch.relu))
