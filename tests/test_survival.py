"""A fused net is a net like any other: copies, checkpoints, compilers and exporters take it; fusing is safe to try."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from nets import SIZES, Block, C, conv, conv_norm, count, difference, images, is_fused, owned, ready, same, snapshot
from torch import Tensor, nn

import reparam

X = images()


class Inline(nn.Module):
    """Branches in the forward of their owner, which must be written anew: two roots, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = conv_norm(3), conv_norm(1), conv_norm(3), nn.BatchNorm2d(C)
        self.scale = nn.Parameter(torch.ones(C, 1, 1))
        self.note = "kept"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.a(x) + self.b(x)) * self.scale + x
        z = torch.relu(y)
        return {"y": y, "z": self.c(z) + z}

    def describe(self) -> str:
        return f"{type(self).__name__} {self.note}"


class Net(nn.Module):
    """All three ways of rewriting: a chain, whole containers, and forwards written anew."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(), Block(stride=2)])
        self.inline = Inline()
        self.norm, self.head = nn.BatchNorm1d(C), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y = self.inline(x)
        return self.head(self.norm(y["z"].mean((2, 3)))), y["y"]


class Plain(nn.Module):
    """A net that TorchScript can read: one tensor in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.act = (
            conv_norm(3),
            conv_norm(3),
            conv_norm(1),
            nn.BatchNorm2d(C),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.act(self.a(x) + self.b(x) + self.c(x))


class Decides(nn.Module):
    """Control flow that depends on data, with blocks inside."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = Block(), nn.Sequential(Block(), Block()), Net()

    def forward(self, x: Tensor) -> Any:
        if x.mean() > 0:
            return self.last(self.left(x))
        return self.last(self.right(x))


class Spelled(nn.Module):
    """Names that take care to write: a keyword, an argument like a module, a class in a class, a size."""

    class Result(NamedTuple):
        y: Tensor
        size: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"global": conv_norm(3), "1x1": conv_norm(1)})

    def forward(self, torch: Tensor, /, device: float = 0.5) -> Any:
        y = nn.functional.elu(self.branches["global"](torch) + self.branches["1x1"](torch))
        return self.Result(y.clamp(max=float("inf")), TWO)


TWO = torch.Size([1, 2])
NETS = [Net, Inline, Plain, Decides, Block, Spelled]


def both(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    model = ready(build())
    return model, reparam.fuse(model)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch._dynamo.reset()


# --- copies and checkpoints -----------------------------------------------------------------------


def deep_copied(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def shallow_copied(net: nn.Module) -> nn.Module:
    return copy.copy(net)


def pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled_twice(net: nn.Module) -> nn.Module:
    return copy.deepcopy(pickled(copy.deepcopy(pickled(net))))


@pytest.mark.parametrize("build", NETS)
@pytest.mark.parametrize("through", [deep_copied, shallow_copied, pickled, saved, pickled_twice])
def test_copies(build: Callable[[], nn.Module], through: Callable[[nn.Module], nn.Module]) -> None:
    model, fused = both(build)
    other = through(fused)
    assert type(other) is type(fused) or type(other).__name__ == type(fused).__name__
    assert isinstance(other, build)
    assert not other.training
    for size in SIZES:
        same(model, other, images(size))
    assert count(other, X) == count(fused, X)
    assert difference(snapshot(fused)["state"], snapshot(other)["state"]) == 0


def test_a_deep_copy_is_independent() -> None:
    model, fused = both(Net)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    same(model, fused, X)
    assert difference(other(X)[0], fused(X)[0].new_zeros(2, 4)) < 1e-12


def test_attributes_and_methods_are_kept() -> None:
    _, fused = both(Net)
    assert fused.inline.describe().endswith("kept")
    assert fused.inline.note == "kept"
    assert len(fused.blocks) == 2
    assert fused.blocks[1].stride == 2
    assert isinstance(fused.stem, nn.Sequential)
    assert len(fused.stem) == 3
    assert type(fused).__module__ == Net.__module__ or isinstance(fused, Net)


@pytest.mark.parametrize("build", NETS)
def test_a_checkpoint_loads_into_a_freshly_built_and_fused_net(build: Callable[[], nn.Module]) -> None:
    model, fused = both(build)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    fresh = reparam.fuse(build().to(torch.float64).eval())
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for size in SIZES:
        same(model, fresh, images(size))


@pytest.mark.parametrize("build", NETS)
def test_structure_does_not_depend_on_weights_dtype_or_device(build: Callable[[], nn.Module]) -> None:
    expected = {key: value.shape for key, value in reparam.fuse(ready(build())).state_dict().items()}
    others = {
        "other weights": reparam.fuse(ready(build(), seed=7)),
        "as built": reparam.fuse(build().eval()),
        "half": reparam.fuse(build().eval().half()),
        "unchecked": reparam.fuse(build().eval(), check=False),
    }
    with torch.device("meta"):
        others["meta"] = reparam.fuse(build().eval())
    assert all(value.is_meta for value in others["meta"].state_dict().values())
    for name, other in others.items():
        assert {key: value.shape for key, value in other.state_dict().items()} == expected, name


def test_a_meta_net_takes_a_real_checkpoint() -> None:
    model, fused = both(Net)
    with torch.device("meta"):
        empty = Net().eval()
    shell = reparam.fuse(empty)
    shell.load_state_dict(fused.state_dict(), assign=True)
    same(model, shell, X)


def test_fusing_twice_changes_nothing_more() -> None:
    model, fused = both(Net)
    again = reparam.fuse(fused)
    same(model, again, X)
    assert count(again, X) == count(fused, X)
    assert again.state_dict().keys() == fused.state_dict().keys()


# --- compilers and exporters ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [Net, Plain, Block])
def test_jit_trace(build: Callable[[], nn.Module]) -> None:
    model, fused = both(build)
    traced = torch.jit.trace(fused, X)
    for size in SIZES:
        same(model, traced, images(size))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", [Plain, lambda: nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), Plain())])
def test_jit_script(build: Callable[[], nn.Module]) -> None:
    model, fused = both(build)
    torch.jit.script(copy.deepcopy(model))  # the original can be scripted, so the fused net must be
    scripted = torch.jit.script(fused)
    for size in SIZES:
        same(model, scripted, images(size))


@pytest.mark.parametrize("build", [Net, Inline, Plain, Block])
@pytest.mark.parametrize("strict", [False, True])
def test_export(build: Callable[[], nn.Module], strict: bool) -> None:
    model, fused = both(build)
    program = torch.export.export(fused, (X,), strict=strict)
    same(model, program.module(), X)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_export_with_dynamic_sizes() -> None:
    model, fused = both(Plain)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(fused, (X,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for size in SIZES:
        same(model, program.module(), images(size))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", [Net, Inline, Plain, Block, Spelled])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(build: Callable[[], nn.Module], backend: str) -> None:
    model, fused = both(build)
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    for size in SIZES:
        same(model, compiled, images(size))


def test_symbolic_trace() -> None:
    model, fused = both(Plain)
    same(model, torch.fx.symbolic_trace(fused), X)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_low_precision_is_within_the_rounding_of_one_convolution(dtype: torch.dtype, eps: float) -> None:
    """Against the same (rounded) weights in float64: no further than one rounding of weights, input and output."""
    model = ready(Block()).to(dtype)
    exact = copy.deepcopy(model).to(torch.float64)
    fused = reparam.fuse(model)
    assert is_fused(fused)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    for size in SIZES:
        x = images(size).to(dtype)
        with torch.no_grad():
            expected, found, before = exact(x.double()), fused(x).double(), model(x).double()
        scale = expected.abs().max()
        ours, theirs = (found - expected).abs().max() / scale, (before - expected).abs().max() / scale
        assert ours <= max(4 * eps, 1.5 * theirs), f"fused {ours:.1e}, unfused {theirs:.1e}"
    weight = next(p for p in fused.parameters() if p.ndim == 4)
    reference = next(p for p in reparam.fuse(exact).parameters() if p.ndim == 4)
    assert (weight.double() - reference).abs().max() <= eps * reference.abs().max(), (
        "the weight was rounded more than once"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_nets_in_low_precision(dtype: torch.dtype) -> None:
    model = ready(Net()).to(dtype)
    fused = reparam.fuse(model)
    assert owned(fused)["norms"] == 0
    same(model, fused, X.to(dtype), tolerance=0.1)


# --- safe to try ----------------------------------------------------------------------------------


def test_in_place_rewrites_the_argument() -> None:
    model = ready(Net())
    kept = copy.deepcopy(model)
    assert reparam.fuse(model, inplace=True) is model
    same(kept, model, X)
    assert owned(model)["norms"] == 0


@pytest.mark.parametrize("build", NETS)
def test_by_default_the_argument_is_not_modified(build: Callable[[], nn.Module]) -> None:
    model = ready(build())
    before, pointers = snapshot(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    fused = reparam.fuse(model)
    reparam.plan(model)
    assert difference(before, snapshot(model)) == 0
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert difference(before, snapshot(model)) == 0, "fused and original share memory"


class Interrupted(Exception):
    """Raised from inside torch while fuse is at work."""


@pytest.mark.parametrize("after", [0, 1, 3, 6, 10])
@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Conv2d.__init__",
        "torch.nn.Module.__setattr__",
        "torch.nn.Module.__delattr__",
        "torch.nn.Module._apply",
    ],
)
def test_a_failed_in_place_fuse_leaves_the_model_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, target: str, after: int
) -> None:
    model = ready(Net())
    before, pointers = snapshot(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    expected = model(X)
    owner, name = target.rsplit(".", 1)
    kind = {"torch.nn.Conv2d": nn.Conv2d, "torch.nn.Module": nn.Module}[owner]
    original, calls = getattr(kind, name), 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interrupted
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, failing)
        try:
            reparam.fuse(model, inplace=True)
        except Interrupted:
            interrupted = True
        except reparam.ReparamError as error:
            interrupted = isinstance(error.__cause__, Interrupted)
        else:
            interrupted = False
    if not interrupted:  # fuse did not get there, or left the region alone; then the net is a fused one, and right
        assert difference(expected, model(X)) < 1e-10
        return
    assert difference(before, snapshot(model)) == 0
    assert modules == dict(model.named_modules()), "other module objects"
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert difference(expected, model(X)) == 0


def test_a_wrong_region_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares in float64: a norm whose eval forward lies to the reader by a hair is seen."""

    class Lies(nn.BatchNorm2d):
        pass

    model = ready(nn.Sequential(conv(3), Lies(C), nn.ReLU(), Block()))
    plain = nn.BatchNorm2d.forward
    monkeypatch.setattr(
        Lies,
        "forward",
        lambda self, x: plain(self, x) * (1.0 if isinstance(x, torch.fx.Proxy) else 1.001),
        raising=False,
    )
    fused = reparam.fuse(model)
    same(model, fused, X)
    assert is_fused(fused[3])


def test_training_mode_is_refused_with_the_remedy() -> None:
    model = Net()
    for function in (reparam.fuse, reparam.plan):
        with pytest.raises(reparam.TrainingModeError, match=r"model\.eval\(\)"):
            function(model)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        reparam.fuse(model, inplace=True)
    assert model.training


def test_what_is_no_module_is_refused() -> None:
    for wrong in (None, "model", lambda x: x, {}, torch.zeros(1)):
        with pytest.raises((TypeError, reparam.ReparamError)):
            reparam.fuse(wrong)  # type: ignore[arg-type]


def test_excluded_modules_are_left() -> None:
    model = ready(Net())
    fused = reparam.fuse(model, exclude=("blocks.0",))
    same(model, fused, X)
    assert owned(fused.blocks[0]) == owned(model.blocks[0])
    assert is_fused(fused.blocks[1])


# --- use after fusing -----------------------------------------------------------------------------


def test_control_flow_that_depends_on_data() -> None:
    model, fused = both(Decides)
    for x in (X, X - 2, X + 2):
        same(model, fused, x)
    assert owned(fused)["norms"] == 0
    assert all(is_fused(block) for block in (fused.left, *fused.right, *fused.last.blocks))


@pytest.mark.parametrize("build", NETS)
def test_gradients_flow_through_the_fused_convolutions(build: Callable[[], nn.Module]) -> None:
    model, fused = both(build)
    gradients = []
    for net in (model, fused):
        x = X.clone().requires_grad_()
        output = net(x)
        tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
        sum(t.square().sum() for t in tensors if isinstance(t, Tensor)).backward()
        gradients.append(x.grad)
    assert difference(*gradients) < 1e-8
    used = [p for m in fused.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()]
    assert used
    assert all(p.requires_grad for p in used)
    if build is not Decides:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in used)


def test_frozen_parameters_stay_frozen() -> None:
    model = ready(Block())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in reparam.fuse(model).parameters())


def test_the_fused_net_moves_and_casts() -> None:
    model, fused = both(Net)
    same(model.float(), fused.float(), X.float(), tolerance=1e-4)
    assert fused.to("meta")(X.float().to("meta"))[0].shape == (2, 4)


def test_the_fused_net_trains_on() -> None:
    _, fused = both(Net)
    fused.train()
    optimizer = torch.optim.SGD(fused.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = fused(X)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_hooks_registered_after_fusing_run() -> None:
    _, fused = both(Net)
    seen: list[str] = []
    for name in ("stem", "blocks.0", "inline", "head"):
        fused.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    fused(X)
    assert seen == ["stem", "blocks.0", "inline", "head"]


def test_the_representation_can_be_printed() -> None:
    _, fused = both(Net)
    assert "Net(" in repr(fused) or "Net" in type(fused).__name__
    assert "Conv2d" in repr(fused)
