"""Methods beside forward: those that it calls are generated with it, and others find the children that they use."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Block, C, conv, conv_norm, count, fuse_purely, images, ready, same
from torch import Tensor, nn

import reparam
from reparam.graph.mentions import Mention, mentions

X, SMALL = images(), images((5, 6), seed=1)
Method = Callable[..., Any]


class Branches(nn.Module):
    """Two branches and what may follow; what its methods do is given by its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)
        self.c, self.n = conv(3), nn.BatchNorm2d(C)
        self.scale = 2.0


def net(**methods: Method) -> nn.Module:
    return ready(type("Net", (Branches,), methods)())


def entries_stay_right(model: nn.Module, *names: str, **expected: int) -> nn.Module:
    """Fuse; the forward and the methods give what they gave, with so many calls in the forward."""
    fused = fuse_purely(model)
    for x in (X, SMALL):
        same(model, fused, x)
        for name in names:
            same(getattr(model, name), getattr(fused, name), x)
    found = count(fused, X)
    assert {key: found[key] for key in expected} == expected
    return fused


def written(result: str) -> Method:
    """A forward that returns this expression."""
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, x):\n    return {result}", namespace)
    return namespace["forward"]  # type: ignore[no-any-return]


def summed(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.a(x) + self.b(x))


@pytest.mark.parametrize("name", ["_forward_impl", "forward_features", "embed", "stem", "trunk", "run"])
def test_a_method_that_is_all_of_the_forward(name: str) -> None:
    entries_stay_right(net(forward=written(f"self.{name}(x)"), **{name: summed}), name, conv=1, norm=0, add=0)


def test_a_method_that_is_a_part_of_the_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y) * 2 + y

    def head(self: Any, y: Tensor) -> Tensor:
        return self.n(self.c(y.flip(0))).tanh()

    entries_stay_right(net(forward=forward, embed=summed, head=head), "embed", "head", conv=2, norm=0)


def test_methods_within_each_other() -> None:
    def outer(self: Any, x: Tensor) -> Tensor:
        return self.inner(x * 3) + self.n(self.c(x)).relu()

    model = net(forward=lambda self, x: self.outer(x).tanh(), outer=outer, inner=summed)
    entries_stay_right(model, "outer", "inner", conv=2, norm=0)


def test_several_arguments_and_results() -> None:
    def both(self: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": self.a(x) + self.b(x), "more": [y, self.n(self.c(y))]}

    def forward(self: Any, x: Tensor) -> Tensor:
        found = self.both(x, x.relu())
        return found["sum"].relu() + found["more"][1] * found["more"][0]

    model = net(forward=forward, both=both)
    fused = entries_stay_right(model, conv=2, norm=0)
    same(model.both, fused.both, X, images(seed=5))
    same(model.both, fused.both, X, X)


def test_one_value_given_twice_is_not_taken_for_one() -> None:
    def both(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(y))

    model = net(forward=lambda self, x: self.both(x, x), both=both)
    fused = entries_stay_right(model)
    same(model.both, fused.both, X, images(seed=5))


@pytest.mark.parametrize("name", ["embed", "trunk", "forward_features", "encode"])
def test_no_convolution_takes_up_a_norm_behind_the_end_of_a_method(name: str) -> None:
    model = net(forward=written(f"self.n(self.{name}(x)).relu()"), **{name: lambda self, x: self.c(x)})
    entries_stay_right(model, name, conv=1, norm=1)
    reasons = {refusal.condition for refusal in reparam.plan(model).left if refusal.rule == "entry_point"}
    assert reasons == {f"{name} of the model can be called by itself"}


def test_a_head_that_is_given_the_result_of_another_entry_point() -> None:
    def head(self: Any, y: Tensor) -> Tensor:
        return self.c(y)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.n(self.head(self.embed(x))).relu()

    entries_stay_right(net(forward=forward, embed=summed, head=head), "embed", "head", conv=2, norm=1)


def test_a_private_method_may_be_joined_with_what_is_behind_it() -> None:
    model = net(forward=lambda self, x: self.n(self._convolved(x)).relu(), _convolved=lambda self, x: self.c(x))
    entries_stay_right(model, conv=1, norm=0)


def test_a_helper_that_is_given_what_was_computed_on_the_way() -> None:
    def normed(self: Any, y: Tensor) -> Tensor:
        return self.n(y)

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.normed(self.c(x)) + self.a(x))

    entries_stay_right(net(forward=forward, normed=normed), conv=1, norm=0, add=0)


def test_a_helper_that_is_called_for_every_branch() -> None:
    def branch(self: Any, x: Tensor, name: str) -> Tensor:
        return getattr(self, name)(x)

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x, "a") + self.branch(x, "b"))

    entries_stay_right(net(forward=forward, branch=branch), conv=1, norm=0, add=0)


def test_a_method_with_an_option_keeps_its_children() -> None:
    def trunk(self: Any, x: Tensor, last: bool = True) -> Tensor:
        y = self.a(x)
        return torch.relu(y + self.b(x)) if last else y

    model = net(forward=lambda self, x: self.trunk(x), trunk=trunk)
    fused = entries_stay_right(model, "trunk")
    same(model.trunk, fused.trunk, X, last=False)


@pytest.mark.parametrize("behind", ["", ".tanh()"])
def test_a_private_method_with_an_option_that_is_all_of_the_forward(behind: str) -> None:
    def _trunk(self: Any, x: Tensor, last: bool = True) -> Tensor:
        y = self.a(x)
        return torch.relu(y + self.b(x)) if last else y

    model = net(forward=written(f"self._trunk(x){behind}"), _trunk=_trunk)
    fused = fuse_purely(model)
    same(model, fused, X)
    if not behind:
        same(model._trunk, fused._trunk, X)
        same(model._trunk, fused._trunk, X, last=False)


def test_a_method_with_another_constant_than_its_own_is_not_generated() -> None:
    def trunk(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.a(x) + self.b(x)) * scale

    model = net(forward=lambda self, x: self.trunk(x, 3.0), trunk=trunk)
    fused = entries_stay_right(model, "trunk")
    same(model.trunk, fused.trunk, X, 5.0)


def test_generated_methods_survive_copies_and_fusing_again() -> None:
    model = ready(Described())
    fused = reparam.fuse(model)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), reparam.fuse(fused)):
        for name in ("forward", "embed", "scaled"):
            same(getattr(model, name), getattr(other, name), X)
    assert Described.embed.__doc__ == fused.embed.__doc__
    assert type(fused) is not Described
    assert isinstance(fused, Described)


class Described(Branches):
    def embed(self, x: Tensor) -> Tensor:
        """What the two branches give."""
        return torch.relu(self.a(x) + self.b(x))

    def convolved(self, x: Tensor) -> Tensor:
        return self.c(x)

    def scaled(self, x: Tensor) -> Tensor:
        return self.n(F.gelu(self.c(x)) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.embed(x))


def test_globals_of_the_same_name() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.embed(x))

    def embed(self: Any, x: Tensor, F: Any = None, relu: Any = None) -> Tensor:
        return torch.tanh(self.a(x) + self.b(x))

    entries_stay_right(net(forward=forward, embed=embed), "embed", conv=1, norm=0)


def looped(self: Any, x: Tensor) -> Tensor:
    for norm in (self.n,):
        x = norm(x)
    return x


def nested(self: Any, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return self.n(y)

    return inner(x)


def optional(self: Any, x: Tensor | None = None) -> Tensor:
    return self.n(X if x is None else x)


def by_keyword(self: Any, *, x: Tensor) -> Tensor:
    return self.n(x)


def through_another(self: Any, x: Tensor) -> Tensor:
    return self.apply_norm(x)


def with_its_weight(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.c.weight, padding=1)


def by_forward(self: Any, x: Tensor) -> Tensor:
    return self.n.forward(x)


OTHERS: dict[str, Method] = {
    "a loop": looped,
    "a function within": nested,
    "an optional argument": optional,
    "a decorator": torch.no_grad()(lambda self, x: self.n(x)),
    "another method": through_another,
    "its weight": with_its_weight,
    "its forward": by_forward,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_method_that_no_forward_calls_finds_its_children_as_they_are(other: Method) -> None:
    methods = {"other": other, "apply_norm": lambda self, x: self.n(x)}
    model = net(forward=lambda self, x: torch.relu(self.n(self.c(x))), **methods)
    entries_stay_right(model, "other", conv=1, norm=1)


def test_a_method_with_keywords_only_finds_its_children_as_they_are() -> None:
    model = net(forward=lambda self, x: torch.relu(self.n(self.c(x))), other=by_keyword)
    fused = fuse_purely(model)
    same(model.other, fused.other, x=X)


def test_a_method_that_uses_a_part_of_a_child() -> None:
    model = net(forward=lambda self, x: torch.relu(self.a(x)), other=lambda self, x: self.a[0](x))
    entries_stay_right(model, "other", conv=1, norm=1)
    model = net(forward=lambda self, x: torch.relu(self.a(x)), other=lambda self, x: self.a[1](self.a[0](x)))
    entries_stay_right(model, "other", conv=1, norm=0)


def test_a_method_that_uses_branches_of_a_sum() -> None:
    model = net(forward=summed, other=lambda self, x: self.a(x) - self.b(x))
    entries_stay_right(model, "other", conv=2, norm=0, add=1)
    reasons = {refusal.condition for refusal in reparam.plan(model).left}
    assert reasons == {"the method other of the model uses some of them"}


class Deep(nn.Module):
    """Its methods look into a block, and call it as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def other(self, x: Tensor) -> Tensor:
        return self.block.dense(x)

    def whole(self, x: Tensor) -> Tensor:
        return self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.block(x))


def test_a_method_that_looks_into_a_block() -> None:
    entries_stay_right(ready(Deep()), "other", "whole")


def test_a_method_that_only_sets_or_initialises_prevents_nothing() -> None:
    def init_weights(self: Any, pretrained: str | None = None) -> None:
        nn.init.zeros_(self.n.weight)
        self.c.weight.data.normal_()

    def reset(self: Any, channels: int) -> None:
        self.n = nn.BatchNorm2d(channels)

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.c(x)))

    entries_stay_right(net(forward=forward, init_weights=init_weights, reset=reset), conv=1, norm=0)


def test_methods_of_a_child_of_the_same_class_are_not_taken_for_ones_own() -> None:
    class Nested(Branches):
        def __init__(self, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.inner = inner

        def embed(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(x))

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x)
            return y if self.inner is None else self.inner.embed(y) * 2

    model = ready(Nested(Nested()))
    fused = fuse_purely(model)
    for x in (X, SMALL):
        same(model, fused, x)
        same(model.embed, fused.embed, x)
        same(model.inner.embed, fused.inner.embed, x)


def test_a_method_of_a_child_that_ends_before_the_norm() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = Described(), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.inner.convolved(x)))

    model = ready(Around())
    fused = fuse_purely(model)
    same(model, fused, X)
    same(model.inner.convolved, fused.inner.convolved, X)


def test_mentions() -> None:
    def method(self: Any, x: Any, flag: Any = None) -> Any:
        x = self.stem(x)
        x = self.norm(x)
        y = self.a[0](x) + self.d["key"](x) + self.b.c.conv(x)
        z = [self.inner(i) for i in self.blocks]
        return self.last(z) if flag else self.store[1:3], y

    assert mentions(method.__code__) == {
        Mention("stem", True),
        Mention("norm", True),
        Mention("a.0", True),
        Mention("d.key", True),
        Mention("b.c.conv", True),
        Mention("inner", True),
        Mention("blocks", False),
        Mention("last", True),
        Mention("store", False),
    }


class WithProperty(Branches):
    """Its norm is known by another name, and by a name that is looked up."""

    @property
    def head(self) -> nn.Module:
        return self.n

    def other(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.c(x)))


class LookedUp(WithProperty):
    def other(self, x: Tensor) -> Tensor:
        return getattr(self, "n")(x)  # noqa: B009 (what is tested)


@pytest.mark.parametrize("kind", [WithProperty, LookedUp])
def test_a_method_that_finds_a_child_by_another_name(kind: type[nn.Module]) -> None:
    entries_stay_right(ready(kind()), "other", conv=1, norm=1)


class Predicting(Block):
    """One convolution when fused, with a method of its own."""

    def predict(self, x: Tensor) -> Tensor:
        return self(x).sigmoid()


def test_a_module_with_methods_is_not_replaced() -> None:
    model = ready(nn.Sequential(Predicting(), nn.ReLU()))
    fused = fuse_purely(model)
    assert count(fused, X)["conv"] == 1
    assert isinstance(fused[0], Predicting)
    same(model[0].predict, fused[0].predict, X)


class Scaled(Branches):
    """A sum with a factor that its caller gives."""

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return torch.relu(self.a(x) * factor + self.b(x))


def test_a_constant_that_a_caller_gives_stays_an_argument() -> None:
    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, 0.5)

    model = ready(Calling())
    fused = fuse_purely(model)
    same(model, fused, X)
    for factor in (0.5, 2.0):
        same(model.inner, fused.inner, X, factor)


def normed(model: Any, x: Tensor) -> Tensor:
    return model.n(x)


def by_alias(self: Any, x: Tensor) -> Tensor:
    me = self
    return me.n(x)


def by_nested_alias(self: Any, x: Tensor) -> Tensor:
    me = self

    def inner(y: Tensor) -> Tensor:
        return me.n(y)

    return inner(x)


@pytest.mark.parametrize("other", [by_alias, by_nested_alias, lambda self, x: normed(self, x)])
def test_a_method_that_knows_its_module_by_another_name(other: Method) -> None:
    entries_stay_right(net(forward=lambda self, x: torch.relu(self.n(self.c(x))), other=other), "other", norm=1)


def test_a_static_method_that_is_given_the_module() -> None:
    model = net(forward=lambda self, x: torch.relu(self.n(self.c(x))), other=staticmethod(normed))
    fused = fuse_purely(model)
    same(model, fused, X)
    same(lambda x: model.other(model, x), lambda x: fused.other(fused, x), X)


class OfABase(Branches):
    """Its forward is called beside that of its subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(x))


class BySuper(OfABase):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.c(x)))

    def other(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ByName(BySuper):
    def other(self, x: Tensor) -> Tensor:
        return OfABase.forward(self, x)


@pytest.mark.parametrize("kind", [BySuper, ByName])
def test_a_method_that_calls_the_forward_of_a_base(kind: type[nn.Module]) -> None:
    entries_stay_right(ready(kind()), "other", conv=1, norm=1)


APART: dict[str, Method] = {
    "both on the input": lambda self, x: self.c(x) * self.n(x),
    "something between": lambda self, x: self.n(self.c(x).relu()),
    "the other way round": lambda self, x: self.c(self.n(x)),
    "the first one used twice": lambda self, x: self.n(y := self.c(x)) + y,
    "an option": lambda self, x, last=True: self.n(self.c(x)) if last else self.c(x),
    "an input that decides": lambda self, x: self.n(self.c(x)) if x.sum() > 0 else self.c(x),
    "a loop until the data say so": lambda self, x: self.n(self.c(x)) if float(x.sum()) > 1e9 else self.n(x),
}


@pytest.mark.parametrize("other", APART.values(), ids=APART.keys())
def test_a_method_that_no_forward_calls_and_that_does_not_join_what_the_forward_joins(other: Method) -> None:
    model = net(forward=lambda self, x: torch.relu(self.n(self.c(x))), other=other)
    fused = entries_stay_right(model, "other", conv=1, norm=1)
    same(model.other, fused.other, -X)


def test_a_method_that_no_forward_calls_and_that_joins_what_the_forward_joins() -> None:
    def other(self: Any, x: Tensor, indices: Any = None, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        y = self.n(self.c(x))
        return (y.tanh() if norm else y), ([] if indices is None else [y])

    model = net(forward=lambda self, x: torch.relu(self.n(self.c(x))), other=other)
    fused = entries_stay_right(model, "other", conv=1, norm=0)
    same(model.other, fused.other, X, [0], norm=True)


def test_a_method_that_takes_a_block_apart_and_joins_its_parts_otherwise() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = conv_norm(3), nn.BatchNorm2d(C)

        def apart(self, x: Tensor) -> Tensor:
            return self.block[1](self.block[0](x).relu())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).relu()

    class WithoutTheEnd(Around):
        def apart(self, x: Tensor) -> Tensor:
            return self.norm(self.block[0](x))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.block(x)).relu()

    entries_stay_right(ready(Around()), "apart", conv=1, norm=1)
    entries_stay_right(ready(WithoutTheEnd()), "apart")


def with_layers(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    found = []
    for layer in (self.c, self.n):
        x = layer(x)
        found.append(x)
    return found[-n:]


def in_several_lines(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    x = self.c(x)
    x = self.n(x)
    return [x, x][-n:]


def at_once(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    return [self.n(self.c(x))] * 2 + [self.n(self.c(x.flip(0)))][-n:]


def with_the_first_kept(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    y = self.c(x)
    z = self.n(y)
    return [y, z][-n:]


def in_two_orders(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    return [self.c(self.n(x)), self.n(self.c(x))][-n:]


@pytest.mark.parametrize(
    ("other", "norms"),
    [(with_layers, 1), (in_several_lines, 0), (at_once, 0), (with_the_first_kept, 1), (in_two_orders, 1)],
)
def test_a_method_that_cannot_be_read_for_all_values_of_its_options(other: Method, norms: int) -> None:
    """Its code shows whether it calls the norm wherever it calls the convolution."""
    model = net(forward=lambda self, x: torch.relu(self.n(self.c(x))), other=other)
    fused = entries_stay_right(model, "other", conv=1, norm=norms)
    same(model.other, fused.other, X, n=2)


class Layers(nn.Module):
    """A method of it may return what any of its layers gives."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def intermediate(self, x: Tensor, n: int = 1) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found[-n:]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize(
    ("layers", "norms"),
    [
        ((conv(3), nn.BatchNorm2d(C), nn.ReLU()), 1),
        ((conv_norm(3), nn.ReLU(), Block(), nn.ReLU()), 0),
        ((nn.Sequential(conv_norm(3), nn.ReLU()), nn.Sequential(Block(), conv_norm(1))), 0),
    ],
)
def test_a_method_that_goes_through_layers(layers: tuple[nn.Module, ...], norms: int) -> None:
    model = ready(Layers(*layers))
    fused = entries_stay_right(model, "intermediate", norm=norms)
    same(model.intermediate, fused.intermediate, X, n=9)


class Inner(Branches):
    """Called by no one: its caller uses what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.m = conv(3), nn.BatchNorm2d(C)

    def embed(self, x: Tensor) -> Tensor:
        return self.d(x)

    def _sum(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self._sum(x)) * 2 + self.n(self.c(x)) + self.m(self.embed(x))


PASSED_OVER: dict[str, tuple[str, dict[str, int]]] = {
    "a method instead of it": ("self.inner._sum(x).relu()", {"conv": 2, "norm": 0}),
    "its children": ("(self.inner.a(x) + self.inner.b(x)).relu()", {"conv": 2, "norm": 0}),
    "its children, as it does": ("self.inner.n(self.inner.c(x)).relu()", {"conv": 1, "norm": 0}),
    "its children, otherwise": ("self.inner.n(self.inner.c(x).relu())", {"conv": 1, "norm": 1}),
    "its children, parted by a method": ("self.inner.m(self.inner.d(x)).relu()", {"conv": 1, "norm": 1}),
    "a norm behind one of them": ("self.norm(self.inner.c(x)).relu()", {"conv": 1, "norm": 1}),
    "a norm behind the last of them": ("self.norm(self.inner.n(self.inner.c(x))).relu()", {"conv": 1, "norm": 1}),
}


@pytest.mark.parametrize(("result", "expected"), PASSED_OVER.values(), ids=PASSED_OVER.keys())
def test_a_module_of_which_only_the_children_are_called(result: str, expected: dict[str, int]) -> None:
    class Outer(nn.Module):
        forward = written(result)

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = Inner(), nn.BatchNorm2d(C)

    entries_stay_right(model := ready(Outer()), **expected)
    fused = fuse_purely(model)
    for method in ("forward", "_sum", "embed"):
        same(getattr(model.inner, method), getattr(fused.inner, method), X)


def asking(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    y = self.block.stem(x) if hasattr(self.block, "stem") else self.block(x)
    return [y, y.relu()][-n:]


def taking_children(self: Any, x: Tensor, n: int = 1) -> list[Tensor]:
    return [child(x) for child in self.block.children()][-n:]


@pytest.mark.parametrize(("other", "convs"), [(asking, 1), (taking_children, 2)])
def test_a_method_that_cannot_be_read_and_asks_for_what_a_block_has(other: Method, convs: int) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.block(x))

    model = ready(type("Asking", (Around,), {"other": other})())
    fused = entries_stay_right(model, "other", conv=convs)
    same(model.other, fused.other, X, n=2)
