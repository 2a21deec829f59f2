"""What a forward changes on the way, of its children, its buffers or elsewhere: nothing is lost or left behind."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import C, conv, conv_norm, images, owned, ready, same, stays_right
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.graph.proxy import Traced


class Two(nn.Module):
    """Two branches that could be one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)

    def both(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


# --- children that are changed for a while ---------------------------------------------------------------------------


class MonteCarlo(Two):
    """A norm that counts for training while it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C, momentum=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        self.norm.train()
        y = self.norm(y)
        self.norm.eval()
        return y


class OtherStride(Two):
    def forward(self, x: Tensor) -> Tensor:
        conv, old = self.a[0], self.a[0].stride
        conv.stride = (2, 2)
        y = self.a(x)
        conv.stride = old
        return y + self.b(x)[:, :, ::2, ::2]


class DoubledWeight(Two):
    """The numbers of a weight are others while it is used."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a[0].weight.data
        old = weight.clone()
        weight.mul_(2).clamp_(-0.1, 0.1)
        y = self.a(x)
        weight.copy_(old)
        return y + self.b(x)


class DoubledOwnWeight(Two):
    """The same for a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(C, C, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        old = self.kernel.detach().clone()
        with torch.no_grad():
            self.kernel[:, 0] = 1.0
        y = F.conv2d(x, self.kernel, padding=1)
        with torch.no_grad():
            self.kernel.copy_(old)
        return y + self.both(x)


class OtherWeight(Two):
    def forward(self, x: Tensor) -> Tensor:
        weight = {"weight": self.a[0].weight * 2}
        return torch.func.functional_call(self.a[0], weight, (x,)) + self.both(x)


class SizeOfBlocks(nn.Module):
    """Tells its blocks the size, as detectors with windows do."""

    class Window(Two):
        H: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x).view(x.shape[0], C, self.H, -1)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Window(), self.Window()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.H = x.shape[2]
            x = block(x)
        return x


class CallsTwice(nn.Module):
    class Doubled(Two):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x)

    def __init__(self) -> None:
        super().__init__()
        self.doubled, self.a, self.b = self.Doubled(), conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.doubled(x) + self.a(x) + self.b(x)


# --- state that no parameter is ---------------------------------------------------------------------------------------


class Counts(Two):
    """Does something else at every call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.dict = {"n": 0}
        self.nested = {"a": [0]}
        self.deque = deque([0], maxlen=1)
        self.space = SimpleNamespace(n=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dict":
            self.dict["n"] += 1
            n = self.dict["n"]
        elif self.kind == "nested":
            self.nested["a"][0] += 1
            n = self.nested["a"][0]
        elif self.kind == "deque":
            self.deque.append(self.deque[0] + 1)
            n = self.deque[0]
        elif self.kind == "space":
            self.space.n += 1
            n = self.space.n
        else:
            n = int(np.random.randint(1, 1000))  # noqa: NPY002 (the global generator is the point)
        return self.both(x) * n


class WritesBuffer(Two):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("k", torch.ones(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        if self.how == "copy":
            self.k.copy_(mean)
        elif self.how == "item":
            self.k[:, 0] = mean[:, 0]
        elif self.how == "view":
            self.k.view(-1).add_(mean.flatten())
        elif self.how == "out":
            torch.mean(x, (0, 2, 3), keepdim=True, out=self.k)
        return self.a(x) * self.k + self.b(x)


class TrainsNorm(Two):
    """A norm as a function, once with the statistics of the batch, which go into its buffers."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.a[1]
        y = F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        return self.a(x) + self.b(y)


# --- traced values ----------------------------------------------------------------------------------------------------


class SetsData(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        y.data = torch.tanh(y.data)
        return y * 2


class Floors(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        y.div_(2, rounding_mode="floor")
        return y


class AsksForGradients(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return y if torch.is_grad_enabled() else y * 3


@dataclasses.dataclass
class Doubled:
    y: Tensor

    def __post_init__(self) -> None:
        self.y = self.y * 2


class ReturnsDoubled(Two):
    def forward(self, x: Tensor) -> Doubled:
        return Doubled(self.both(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a norm is trained for a while": MonteCarlo,
    "another stride for a while": OtherStride,
    "other numbers for a while": DoubledWeight,
    "other numbers of its own": DoubledOwnWeight,
    "another weight for a call": OtherWeight,
    "the size is set on children": SizeOfBlocks,
    "a child's own call": CallsTwice,
    **{f"counts in {kind}": (lambda kind=kind: Counts(kind)) for kind in ("dict", "nested", "deque", "space")},
    **{f"writes a buffer: {how}": (lambda how=how: WritesBuffer(how)) for how in ("copy", "item", "view", "out")},
    "a norm as a function is trained": TrainsNorm,
    "data is set": SetsData,
    "rounds in place": Floors,
    "a result that changes its fields": ReturnsDoubled,
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_forward_changes(name: str) -> None:
    stays_right(MODELS[name]())


@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_that_asks_for_gradients(gradients: bool) -> None:
    model = ready(AsksForGradients())
    fused = reparam.fuse(model)
    with torch.set_grad_enabled(gradients):
        assert (model(images()) - fused(images())).abs().max() < 1e-12


def test_random_numbers_of_numpy() -> None:
    model = ready(Counts("numpy"))
    fused = reparam.fuse(model)
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002
        expected = model(images())
        np.random.seed(seed)  # noqa: NPY002
        assert (expected - fused(images())).abs().max() < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_reading_stays_in_the_model(name: str) -> None:
    model = ready(MODELS[name]())
    reparam.plan(model)
    for module in model.modules():
        assert not any(isinstance(value, Traced) for value in vars(module).values())
    if isinstance(model, Counts):
        assert (model.dict, model.nested, list(model.deque), model.space.n) == ({"n": 0}, {"a": [0]}, [0], 0)


CACHE: dict[str, Any] = {}


def test_nothing_of_the_reading_stays_in_a_cache() -> None:
    class Caches(Two):
        def forward(self, x: Tensor) -> Tensor:
            if "grid" not in CACHE:
                CACHE["grid"] = x.new_ones(1, 1, x.shape[2], 1)
            return self.both(x) * CACHE["grid"]

    CACHE.clear()
    model = ready(Caches())
    reparam.plan(model)
    assert not CACHE
    fused = reparam.fuse(model)
    same(model, fused, images())
    assert type(CACHE["grid"]) is Tensor
    CACHE.clear()


def test_a_scale_of_a_wider_type_widens_the_result() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3)
            self.scale = nn.Parameter(torch.rand(1, C, 1, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.scale

    model = Scaled().eval()
    fused = reparam.fuse(model)
    x = images().float()
    assert fused(x).dtype == model(x).dtype == torch.float64
    assert (fused(x) - model(x)).abs().max() < 1e-6


def test_settings_that_do_not_fit_the_weights() -> None:
    """A convolution and its norm that were cut by hand, their numbers of channels left as they were."""
    model = ready(nn.Sequential(conv_norm(3), nn.ReLU(), conv_norm(3), nn.ReLU(), conv_norm(3)))
    cut = model[2]
    cut[0].weight = nn.Parameter(cut[0].weight[:4].detach())
    for name in ("weight", "bias"):
        setattr(cut[1], name, nn.Parameter(getattr(cut[1], name)[:4].detach()))
    for name in ("running_mean", "running_var"):
        setattr(cut[1], name, getattr(cut[1], name)[:4])
    model[4][0].weight = nn.Parameter(model[4][0].weight[:, :4].detach())
    fused = reparam.fuse(model)
    same(model, fused, images())
    assert owned(fused)["norms"] == 0


def test_a_fused_exported_model_can_be_fused() -> None:
    class Plain(Two):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.both(x))

    model = ready(Plain())
    exported = torch.export.export(model, (images(),)).module()
    fused = reparam.fuse(reparam.fuse(exported))
    assert (fused(images()) - model(images())).abs().max() < 1e-10


# --- hooks that use other modules than their own ---------------------------------------------------------------------


class Gated(Two):
    """A chain, and a gate before it that has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.c, self.n = conv(1), conv(3), nn.BatchNorm2d(C)
        self.seen: Any = None
        self.register()

    def register(self) -> None:
        self.gate.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.n(self.c(x)).relu() + gate


class SetsAWeight(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        self.c.weight.data = torch.ones_like(self.c.weight) * output.mean()


class WritesAStatistic(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        self.n.running_mean.fill_(float(output.mean()))


class WritesByAMethod(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        self.rescale(output)

    def rescale(self, output: Tensor) -> None:
        self.n.weight.data = self.n.weight.data * 0 + output.std()


class WritesByAFunction(Gated):
    def register(self) -> None:
        self.gate.register_forward_pre_hook(lambda module, args: fill(self.n, args[0]))


def fill(norm: Any, value: Tensor) -> None:
    norm.bias.data = torch.ones_like(norm.bias) * value.mean()


class WritesByAPartial(Gated):
    def register(self) -> None:
        self.gate.register_forward_hook(functools.partial(filled, self.n))


def filled(norm: Any, module: nn.Module, args: Any, output: Tensor) -> None:
    fill(norm, output)


class WritesByAnObject(Gated):
    def register(self) -> None:
        self.gate.register_forward_hook(Filler(self))


class Filler:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        fill(self.net.n, output)


class ReadsAWeight(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        return output * self.c.weight.mean()


class CallsAModule(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        return output + self.c(output)


class SetsAnAttribute(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        self.seen = output

    def forward(self, x: Tensor) -> Tensor:
        gate, y = self.gate(x), self.both(x)
        return gate + (y.relu() if self.seen is None else self.n(self.c(y * self.seen.sigmoid())))


class OfItsChildren(Gated):
    def register(self) -> None:
        def shrink(module: Any, args: Any) -> None:
            module[0].weight.data.clamp_(-0.01, 0.01)
            module[-1].weight.data.clamp_(-0.5, 0.5)

        self.a.register_forward_pre_hook(shrink)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x).relu()


HOOKED = [SetsAWeight, WritesAStatistic, WritesByAMethod, WritesByAFunction, WritesByAPartial, WritesByAnObject]


@pytest.mark.parametrize(
    "net", [*HOOKED, ReadsAWeight, CallsAModule, SetsAnAttribute, OfItsChildren], ids=lambda net: net.__name__
)
def test_hooks_that_use_other_modules(net: type[nn.Module]) -> None:
    """In place: the hooks of a copy would go on using the modules of the original."""
    model, other = ready(net()), ready(net())
    fused = reparam.fuse(other, inplace=True)
    for size in ((9, 11), (12, 8)):
        for _ in range(2):
            same(model, fused, images(size))


class Collects(Gated):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        self.seen = {type(module).__name__: output.detach()}

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.n(self.c(x)).relu() + self.both(x))


def test_hooks_that_keep_results_do_not_stop_fusing() -> None:
    assert owned(stays_right(Collects()).odd)["norms"] == 0
