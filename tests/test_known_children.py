"""What forwards and hooks know of other modules: what these are made of, hold and weigh."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import C, conv, conv_norm, fuse_purely, images, owned, ready, same, stays_right
from torch import Tensor, nn

import reparam


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu()


def double_first(net: Any) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        net.conv.weight.data.mul_(2)

    return hook


class Doubles:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *_: Any) -> None:
        self.module.weight.data.mul_(2)

    def method(self, *_: Any) -> None:
        self(*_)


def double(module: nn.Module, *_: Any) -> None:
    module.weight.data.mul_(2)


CHANGING: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "closure of the net": double_first,
    "closure of the child": lambda net: double_first(SimpleNamespace(conv=net.conv)),
    "weight": lambda net: functools.partial(double, SimpleNamespace(weight=net.conv.weight)),
    "default": lambda net: lambda *_, conv=net.conv: double(conv),
    "object": lambda net: Doubles(net.conv),
    "bound method": lambda net: Doubles(net.conv).method,
    "partial": lambda net: functools.partial(double, net.conv),
    "method of the net": lambda net: net.double,
    "scale of the net": lambda net: net.rescale,
}


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.last = conv(3), nn.BatchNorm2d(C), nn.ReLU(), conv_norm(3)

    def double(self, *_: Any) -> None:
        self.conv.weight.data.mul_(2)

    def rescale(self, *_: Any) -> None:
        self.norm.running_mean.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.conv(x))))


@pytest.mark.parametrize("before", [True, False], ids=["pre-hook", "hook"])
@pytest.mark.parametrize("way", CHANGING)
def test_a_hook_that_changes_another_module(way: str, before: bool) -> None:
    def made() -> Any:
        net = ready(Changed())
        hook = CHANGING[way](net)
        register = net.act.register_forward_pre_hook if before else net.act.register_forward_hook
        register(hook)
        return net

    model, fused = made(), reparam.fuse(made(), inplace=True)
    for _ in range(3):
        same(model, fused, images())
    assert owned(fused)["norms"] == 1, "what the hook does not reach is fused"


def test_a_hook_that_names_a_child_of_its_module() -> None:
    class Renewing(Changed):
        pass

    def renew(module: Any, *_: Any) -> None:
        module.conv.weight.data.mul_(2)

    model = ready(nn.Sequential(Renewing(), nn.ReLU()))
    model[0].register_forward_pre_hook(renew)
    fused = fuse_purely(model)
    for _ in range(3):
        same(model, fused, images())
    assert owned(fused)["norms"] == 1


def test_a_hook_that_only_keeps_what_it_sees() -> None:
    class Keeping(Changed):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.act.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen.append(output)

    model = ready(Keeping())
    fused = reparam.fuse(model)
    same(model, fused, images())
    assert owned(fused)["norms"] == 0


@functools.singledispatch
def gain(module: nn.Module) -> float:
    return 1.0


@gain.register(nn.BatchNorm2d)
def _(module: nn.Module) -> float:
    return 2.0


@gain.register(Sum)
def _(module: nn.Module) -> float:
    return 3.0


def gain_of(module: nn.Module) -> float:
    return gain(module)


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "dispatch on a norm": lambda m: gain(m.n),
    "dispatch on a block": lambda m: gain(m.k),
    "dispatch on an element": lambda m: gain(m.q[1]),
    "dispatch in a function": lambda m: gain_of(m.n),
    "_parameters": lambda m: 2.0 if m.c._parameters.get("bias") is None else 3.0,
    "_buffers": lambda m: 2.0 + m.n._buffers["running_mean"].mean(),
    "_modules": lambda m: 2.0 + len(m.k._modules),
    "own _modules": lambda m: 2.0 + m._modules["c"].weight.mean(),
    "__dict__": lambda m: 2.0 + (m.c.__dict__["_parameters"]["bias"] is None),
    "vars": lambda m: 2.0 + (vars(m.c)["_parameters"]["bias"] is None),
    "children": lambda m: 2.0 + len(list(m.k.children())),
    "named children": lambda m: 2.0 + sum(name == "b" for name, _ in m.k.named_children()),
    "modules": lambda m: 2.0 + len(list(m.k.modules())),
    "own modules": lambda m: 2.0 + sum(isinstance(child, nn.BatchNorm2d) for child in m.modules()),
    "length": lambda m: 2.0 + len(m.q),
    "length and class": lambda m: 2.0 + len(m.q) + isinstance(m.q[1], nn.BatchNorm2d),
    "stride of an element": lambda m: 2.0 + m.q[0].stride[0] + isinstance(m.q[1], nn.BatchNorm2d),
    "state": lambda m: 2.0 + len(m.k.state_dict()) + len(m.c.state_dict()),
    "apply": lambda m: 2.0 + len({id(child) for child in m.k.apply(lambda child: None).modules()}),
    "name of the class": lambda m: 2.0 + len(m.n._get_name()),
    "number of parameters": lambda m: 2.0 + len(list(m.c.parameters())) + sum(1 for _ in m.k.parameters()),
    "dir": lambda m: 2.0 + ("running_mean" in dir(m.n)),
    "callable": lambda m: 2.0 + callable(m.n),
}


class Asking(nn.Module):
    """A chain, a pair and a block in a row, and a question about one of them."""

    def __init__(self, question: str) -> None:
        super().__init__()
        self.c, self.n, self.q, self.k = conv(3), nn.BatchNorm2d(C), conv_norm(3), Linear()
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(self.n(self.c(x)).relu()).relu()
        return self.k(y).tanh() * QUESTIONS[self.question](self)


class Linear(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_forward_asks_what_a_child_is_made_of(question: str) -> None:
    fused = stays_right(Asking(question))
    assert owned(fused.odd)["norms"] < 4, "only what is asked about stays"


def test_a_forward_asks_all_parameters_of_a_child_for_their_type() -> None:
    class Typed(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).relu() * len({p.dtype for p in self.q.parameters()})

    assert owned(stays_right(Typed("")).odd.q)["norms"] == 0


def test_a_method_that_dispatches_on_a_child() -> None:
    class Dispatching(Asking):
        @functools.singledispatchmethod
        def factor(self, module: nn.Module) -> float:
            return 1.0

        @factor.register
        def _(self, module: nn.BatchNorm2d) -> float:
            return 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.c(x)).relu() * self.factor(self.n)

    stays_right(Dispatching(""))


@pytest.mark.parametrize("reach", ["closure", "default", "keyword"])
def test_a_function_holds_a_child(reach: str) -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            c = self.c = conv(3)
            self.n = nn.BatchNorm2d(C)
            if reach == "closure":
                self.f: Any = lambda x: c(x)
            elif reach == "default":
                self.f = lambda x, c=c: c(x)
            else:
                self.f = self.keyword(c)

        @staticmethod
        def keyword(c: nn.Module) -> Callable[[Tensor], Tensor]:
            def f(x: Tensor, *, c: nn.Module = c) -> Tensor:
                return c(x)

            return f

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.f(x))

    stays_right(Stage())
    model = ready(Stage())
    inputs = images()
    expected = model(inputs)
    fused = reparam.fuse(model, inplace=True)
    torch.testing.assert_close(fused(inputs), expected, rtol=1e-10, atol=1e-10)


def test_an_input_is_not_callable() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_norm(3), conv_norm(1)

        def forward(self, x: Any) -> Tensor:
            x = x() if callable(x) else x
            return self.a(x) + self.b(x)

    model = ready(Lazy())
    fused = fuse_purely(model)
    same(model, fused, images())
    same(model, fused, images)


def test_a_child_that_is_given_a_list_is_not_gone_through() -> None:
    """Whether it changes the list is asked by going through its modules, which is no question of the forward."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Sum(), Sum()

        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            return [self.first(maps[0]), self.second(maps[1])]

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes = Mixes()

        def forward(self, x: Tensor) -> list[Tensor]:
            return self.mixes([x, x.relu()])  # type: ignore[no-any-return]

    model = ready(Mixing())
    fused = fuse_purely(model)
    same(model, fused, images())
    assert owned(fused)["convs"] == 2
