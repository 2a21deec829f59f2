"""Children that are replaced are reached in other ways, too, and classes are asked for more than a forward."""

import functools
from abc import ABCMeta
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import C, call, conv, conv_norm, fuse_purely, images, owned, ready, same, stays_right
from torch import Tensor, nn


class Chain(nn.Module):
    """A convolution and its norm, the first reached by `reach`."""

    def __init__(self, hold: Callable[[Any], Any], reach: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.c, self.n = conv(3), nn.BatchNorm2d(C)
        self.reach = reach
        self.__dict__["held"] = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.reach(self, x))


HOLDERS = {
    "list": (lambda m: [m.c], lambda m, x: m.held[0](x)),
    "dict": (lambda m: {"c": m.c}, lambda m, x: m.held["c"](x)),
    "tuple": (lambda m: (m.c,), lambda m, x: m.held[0](x)),
    "nested": (lambda m: {"all": [(m.c,)]}, lambda m, x: m.held["all"][0][0](x)),
    "namespace": (lambda m: SimpleNamespace(c=m.c), lambda m, x: m.held.c(x)),
    "partial": (lambda m: functools.partial(m.c), lambda m, x: m.held(x)),
    "bound method": (lambda m: m.c.forward, lambda m, x: m.held(x)),
    "attribute": (lambda m: m.c, lambda m, x: m.held(x)),
    "closure": (lambda m: (lambda c: lambda x: c(x))(m.c), lambda m, x: m.held(x)),
    "closure over the module": (lambda m: lambda x: m.c(x), lambda m, x: m.held(x)),
    "closure over a list": (lambda m: (lambda cs: lambda x: cs[0](x))([m.c]), lambda m, x: m.held(x)),
    "default": (lambda m: lambda x, c=m.c: c(x), lambda m, x: m.held(x)),
    "functions in a list": (lambda m: [lambda x: m.c(x)], lambda m, x: m.held[0](x)),
}
COPIED = [holder for holder in HOLDERS if not holder.startswith(("closure", "default", "functions"))]


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_convolution_that_is_held_elsewhere(holder: str) -> None:
    hold, reach = HOLDERS[holder]
    stays_right(Chain(hold, reach))


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_norm_that_is_held_elsewhere(holder: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.c = conv(3), nn.BatchNorm2d(C)
            self.__dict__["held"] = HOLDERS[holder][0](self)

        def forward(self, x: Tensor) -> Tensor:
            return HOLDERS[holder][1](self, self.first(x))

    stays_right(Normed())


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_block_that_is_held_elsewhere(holder: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_norm(3), conv_norm(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = Sum()
            self.__dict__["held"] = HOLDERS[holder][0](self)

        def forward(self, x: Tensor) -> Tensor:
            return HOLDERS[holder][1](self, x).relu()

    fused = stays_right(Around())
    if holder in COPIED and holder != "bound method":
        assert owned(fused.odd) == {"convs": 1, "linears": 0, "norms": 0}


def test_a_function_that_reads_nothing_of_its_module_does_not_stop_fusing() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n, self.gain = conv(3), nn.BatchNorm2d(C), 0.5
            self.scale = lambda x: x * self.gain

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(self.n(self.c(x)).relu())

    assert owned(stays_right(Scaled()).odd) == {"convs": 1, "linears": 0, "norms": 0}


def test_functions_that_know_themselves() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = conv(3), nn.BatchNorm2d(C)
            kept = [self.c]

            def repeat(x: Tensor, times: int) -> Tensor:
                return x if not times else repeat(kept[0](x), times - 1)

            self.repeat, self.times = repeat, {repeat: 1}

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.repeat(x, self.times[self.repeat])).relu()

    stays_right(Repeats())


def test_a_tap_in_a_list() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = conv_norm(3)
            self.taps = [self.stage[0]]

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x).relu()

        def tapped(self, x: Tensor) -> Tensor:
            return self.taps[0](x)

    model = ready(Taps())
    fused = fuse_purely(model)
    same(model, fused, images())
    same(model.tapped, fused.tapped, images())


class Wide(nn.Module):
    """A sum that is one convolution, and what else its class has."""

    gain = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)

    @property
    def width(self) -> int:
        return 7

    def rescale(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = Wide()


class ClassAttribute(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).relu() * self.k.gain


class OrDefault(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).relu() * getattr(self.k, "gain", 1)


class Property(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).relu() * self.factor()

    def factor(self) -> int:
        return self.k.width


class Method(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.k.rescale(self.k(x).relu())


class HasMethod(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).relu() * (2 if hasattr(self.k, "rescale") else 1)


class HasChild(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).relu() * (2 if hasattr(self.k, "a") else 1)


class InComprehension(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return sum(m(x).relu() * m.gain for m in [self.k])


@pytest.mark.parametrize("kind", [ClassAttribute, OrDefault, Property, Method, HasMethod, HasChild, InComprehension])
def test_a_parent_reads_more_of_a_child_than_its_result(kind: type[nn.Module]) -> None:
    assert owned(stays_right(kind()).odd) == {"convs": 1, "linears": 0, "norms": 0}


def test_a_parent_reads_a_child_of_a_child() -> None:
    class Grandchild(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return self.k(x).relu() * self.k.a[0].out_channels

    stays_right(Grandchild())


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU())


class AfterClass(Asked):
    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        return y.tanh() if isinstance(self.q[1], nn.BatchNorm2d) else y


class AfterBias(Asked):
    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        return y.tanh() if self.q[0].bias is None else y


class Inner(Asked):
    def forward(self, x: Tensor) -> Tensor:
        return self.q[1](self.q[0](x)).relu()


class FromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y.tanh() if isinstance(self.inner.q[1], nn.BatchNorm2d) else y


@pytest.mark.parametrize("kind", [AfterClass, AfterBias, FromAbove])
def test_a_forward_asks_about_a_child_of_a_child(kind: type[nn.Module]) -> None:
    stays_right(kind())


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu()


def test_a_registry_of_subclasses_does_not_hear_of_generated_ones() -> None:
    table: dict[str, type] = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key: str, **keywords: Any) -> None:
            super().__init_subclass__(**keywords)
            if key in table:
                raise ValueError(f"{key} is registered")
            table[key] = cls

    class Model(Registered, Sum, key="model"):
        pass

    fused = stays_right(Model())
    assert table == {"model": Model}
    assert owned(fused.odd)["convs"] == 1

    class Later(type(fused.odd), key="later"):
        pass

    assert table == {"model": Model, "later": Later}


@pytest.mark.parametrize("plain", [type, ABCMeta])
def test_a_metaclass_does_not_hear_of_generated_classes(plain: type) -> None:
    seen: list[str] = []

    class Once(plain):
        def __new__(cls, name: str, *arguments: Any) -> Any:
            if name in seen:
                raise TypeError(f"{name} exists")
            seen.append(name)
            return super().__new__(cls, name, *arguments)

    class Model(Sum, metaclass=Once):
        pass

    fused = stays_right(Model())
    assert seen == ["Model"]
    assert owned(fused.odd)["convs"] == 1
    assert not isinstance(Model(), type(fused.odd))


def test_a_class_that_refuses_attributes() -> None:
    class Frozen(Sum):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["frozen"] = True

        def __setattr__(self, name: str, value: Any) -> None:
            if "frozen" in self.__dict__ and name != "training":
                raise AttributeError(name)
            super().__setattr__(name, value)

    assert owned(stays_right(Frozen()).odd)["convs"] == 1


def test_a_required_argument_that_may_be_none() -> None:
    class Masked(Sum):
        def forward(self, x: Tensor, m: Tensor | None) -> Tensor:
            return self.a(x) + self.b(x) + (0 if m is None else m)

    stays_right(Masked(), call(images(), None), call(images(), images(seed=1)))


@pytest.mark.parametrize("unused", [False, True])
def test_a_required_argument_that_is_never_none_does_not_stop_fusing(unused: bool) -> None:
    class Added(Sum):
        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            return y.relu() if unused else torch.cat([y + m, m.relu()], 1)

    assert owned(stays_right(Added(), call(images(), images(seed=1))).odd)["convs"] == 1


def test_a_method_that_takes_its_input_by_keyword() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n, self.d = conv(3), nn.BatchNorm2d(C), conv(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.c(x)).relu()

        def other(self, *, x: Tensor) -> Tensor:
            return self.n(self.d(x))

    model = ready(Other())
    fused = fuse_purely(model)
    same(model, fused, images())
    same(model.other, fused.other, x=images())


class Chained(nn.Module):
    """A chain of which its forward looks at more than the result."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(3), nn.BatchNorm2d(C)


class Nested(nn.Module):
    """A chain and a block with two branches, of which its forward looks at more than their results."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.w = conv_norm(3), Activated()


class Activated(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() + x


REGISTRIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a bias is missing": lambda m, y: y * (2 if m.c._parameters.get("bias") is None else 1),
    "a weight": lambda m, y: y * m.c._parameters["weight"].mean(),
    "a weight by names alone": lambda m, y: y * m._modules["c"]._parameters["weight"].mean(),
    "a statistic": lambda m, y: y + m.n._buffers["running_mean"].view(-1, 1, 1),
    "the number of buffers": lambda m, y: y * len(m.n._buffers),
}
ATTRIBUTES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "by name": lambda m, x: m.n(m.c(x)).relu() * m.n.__dict__["eps"],
    "through vars": lambda m, x: m.n(m.c(x)).relu() * (2 if "affine" in vars(m.n) else 1),
}
THROUGH_ALL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number of children": lambda m, y: y * len(list(m.w.children())),
    "names of children": lambda m, y: y * len(dict(m.w.named_children())),
    "number of modules": lambda m, y: y * len(list(m.w.modules())),
    "number of all modules": lambda m, y: y * sum(1 for _ in m.modules()),
    "number of norms": lambda m, y: y * sum(isinstance(k, nn.BatchNorm2d) for k in m.modules()),
    "number of parameters": lambda m, y: y * len(list(m.parameters())),
    "keys of the state": lambda m, y: y * len(m.k.state_dict()),
    "length of a chain": lambda m, y: y * len(m.k),
    "last of a chain": lambda m, y: y * (2 if isinstance(m.k[-1], nn.BatchNorm2d) else 1),
    "names of a block": lambda m, y: y * (2 if "b" in dir(m.w) else 1),
    "registry of a block": lambda m, y: y * len(m.w._modules),
}


@pytest.mark.parametrize("how", REGISTRIES)
def test_a_forward_looks_into_the_registries_of_a_child(how: str) -> None:
    net = type("Net", (Chained,), {"forward": lambda m, x: REGISTRIES[how](m, m.n(m.c(x)).relu())})
    stays_right(net())


@pytest.mark.parametrize("how", ATTRIBUTES)
def test_a_forward_looks_into_the_attributes_of_a_child(how: str) -> None:
    stays_right(type("Net", (Chained,), {"forward": ATTRIBUTES[how]})())


@pytest.mark.parametrize("how", THROUGH_ALL)
def test_a_forward_goes_through_all_of_a_child(how: str) -> None:
    net = type("Net", (Nested,), {"forward": lambda m, x: THROUGH_ALL[how](m, m.w(m.k(x)).relu())})
    stays_right(net())


def test_a_forward_goes_through_all_of_a_child_further_down() -> None:
    class Around(Nested):
        def forward(self, x: Tensor) -> Tensor:
            return self.w(self.k(x)).relu() * len(list(self.w.children()))

    assert owned(stays_right(nn.Sequential(Around(), nn.BatchNorm2d(C), conv(1))).odd)["convs"] <= 4


@pytest.mark.parametrize("children", [lambda m: m.children(), lambda m: m._modules.values(), lambda m: iter(m.k)])
def test_calling_all_children_in_turn_does_not_stop_fusing(children: Callable[[Any], Any]) -> None:
    class InTurn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = conv_norm(3)

        def forward(self, x: Tensor) -> Tensor:
            for child in children(self):
                x = child(x)
            return x.relu()

    assert owned(stays_right(InTurn()).odd) == {"convs": 1, "linears": 0, "norms": 0}
