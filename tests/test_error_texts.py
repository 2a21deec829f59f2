"""Every public error says what was expected, what was found, where, and what to do: each text is compared once.

The last test finds every `raise` of a public error and asks for words of its text, which no other error has, in a test.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import conv, ready
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.algebra import Affine, Conv, Refusal, identity
from reparam.expansion import initial
from reparam.expansion.region import Region
from reparam.expansion.remainder import take_remainder
from reparam.nn import BRANCHES, Geometry, UnfitError
from reparam.nn.geometry import Window

ROOT = Path(__file__).resolve().parents[1]
RESTORING = import_module("reparam.expansion.restore")  # the package has a function of this name


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()


# --- options of fuse and plan -----------------------------------------------------------------------------------------

RULES = "to be a tuple of path patterns, module types or functions of (path, module)"
COST = "expected cost to be a function from reparam.Work to a number"
LIFTINGS = "expected liftings to be a tuple of functions such as reparam.LIFTINGS + (mine,)"
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a string": ({"exclude": "1"}, f"expected exclude {RULES}, found one string '1': write exclude=('1',)"),
    "a type": ({"only": nn.Linear}, f"expected only {RULES}, found Linear: put it into a tuple"),
    "a number in it": (
        {"exclude": (3,)}, f"expected exclude {RULES}, found int in it: name a module by its path, or give its type"
    ),
    "a module in it": (
        {"only": (nn.ReLU(),)}, f"expected only {RULES}, found ReLU in it: name a module by its path, or give its type"
    ),
    "no liftings": ({"liftings": None}, f"{LIFTINGS}, found NoneType"),
    "no lifting": ({"liftings": ("conv",)}, f"{LIFTINGS}, found str in it"),
    "a cost by name": ({"cost": "macs"}, f"{COST}, found the string 'macs': write cost=reparam.cost.macs"),
    "no cost": ({"cost": 3}, f"{COST}, found int"),
    "a cost without a number": ({"cost": lambda _: "a"}, f"{COST}, found one that returns str instead of a number"),
    "a cost that is no number": ({"cost": lambda _: float("nan")}, f"{COST}, found one that returns nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    options, text = OPTIONS[case]
    with pytest.raises(reparam.ReparamError) as info:
        reparam.plan(net(), **options)
    assert str(info.value) == text


def test_measured_needs_a_tensor() -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.fuse(net(), cost=reparam.measured({"x": 3}))  # type: ignore[arg-type]
    assert str(info.value) == (
        "expected example_inputs with a tensor (batch, channels, *sizes), found dict: pass what the model is called"
        " with"
    )


# --- branches ---------------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[Any, str]] = {
    "none": ([], "expected at least one branch, found none"),
    "a number": (3, "expected branches to be the name of a preset, a Recipe or a list of branches, found int"),
    "other numbers": ("acnet(2)", "'acnet(2)': acnet takes other numbers: "),
    "a ratio of nothing": ("expandnet(0)", "expandnet: expected a ratio of at least 1, found 0"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case: str) -> None:
    given, text = RECIPES[case]
    with pytest.raises(reparam.ReparamError) as info:
        reparam.nn.block(nn.Conv2d(4, 4, 3, padding=1), given)
    assert str(info.value).startswith(text)


def test_only_plain_convolutions_become_blocks() -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.nn.block(nn.ConvTranspose2d(4, 4, 3), "acnet")  # type: ignore[arg-type]
    assert str(info.value) == (
        "expected a plain nn.Conv1d, nn.Conv2d or nn.Conv3d, found torch.nn.modules.conv.ConvTranspose2d"
    )


UNFIT: dict[str, tuple[str, nn.Module, str]] = {
    "point": ("1x1", nn.Conv2d(4, 4, 1), "the kernel has one tap itself"),
    "average": ("avgpool", nn.Conv2d(4, 4, 1), "the kernel has one tap, and an average over it is the identity"),
    "chain": ("1x1-kxk", nn.Conv2d(4, 4, 1), "the kernel has one tap itself"),
    "a line": ("1xk", nn.Conv2d(4, 4, (3, 1)), "a kernel of (3, 1) has one tap along axis 1"),
    "identity": (
        "identity", nn.Conv2d(4, 5, 3), "input and output differ in shape, or no tap lies on the output's own place"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_branches_that_do_not_fit(case: str) -> None:
    name, module, text = UNFIT[case]
    with pytest.raises(UnfitError) as info:
        BRANCHES[name].make(Geometry.of(module), None)
    assert str(info.value) == text


def test_dilated_taps_need_room() -> None:
    with pytest.raises(UnfitError, match=r"^no three taps lie 3 apart in a kernel of \(3, 3\) taps$"):
        reparam.nn.dilated(3).make(Geometry.of(nn.Conv2d(4, 4, 3)), None)


def test_a_border_that_is_cropped_and_reflected() -> None:
    with pytest.raises(UnfitError, match=r"^one side would be cropped and another one padded in the mode 'reflect'$"):
        Window((1, 1), (1, 1), (1, -1), (1, -1)).pad("reflect")


# --- expand and restore -----------------------------------------------------------------------------------------------

EXPAND: dict[str, tuple[dict[str, Any], str]] = {
    "no convolution": (
        {"where": ("1",)}, "1: expected a convolution, found BatchNorm2d: name the convolutions in it, 1.*"
    ),
    "one input": (
        {"calibrate": torch.zeros(1, 4, 8, 8)},
        "expected calibrate to be an iterable of inputs, found Tensor: put it into a list",
    ),
    "no input": ({"calibrate": []}, "expected calibrate to give at least one input, found none"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPAND)
def test_expand(case: str) -> None:
    options, text = EXPAND[case]
    with pytest.raises(reparam.ReparamError) as info:
        reparam.expand(net(), "repvgg", **options)
    assert str(info.value) == text


def test_a_block_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the convolution that it replaces; here the comparison is given another one."""
    right = initial.evaluate

    def wrong(target: Affine, sources: Any) -> Tensor:
        return right(target, sources) + 1

    monkeypatch.setattr(initial, "evaluate", wrong)
    with pytest.raises(reparam.BlockError) as info:
        reparam.expand(net(), "repvgg")
    assert str(info.value).startswith("0: expected a block that computes what the convolution does, found a difference")
    assert str(info.value).endswith("a bug of this library, please report it, and leave the module out with where")


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 2, 1, bias=False), nn.Conv2d(2, 6, 1))


class Shared(nn.Module):
    """One kernel in two places, with a norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.conv2d(x, self.weight, padding=1)).relu()
        return self.second(F.conv2d(y, self.weight, padding=1)).relu()


RESTORE: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "no function": (
        lambda: reparam.fuse(net()), net(), {},
        "expected build to be a function that makes the net, found Sequential: write lambda: ...",
    ),
    "another net": (
        lambda: {"0.weight": torch.zeros(4, 4, 1, 1), "0.bias": torch.zeros(4)}, net, {},
        "expected the parameters of fuse(build()), found others (of another shape: 0.weight): pass what reparam.fuse"
        " made of this architecture, and the options that it was fused with",
    ),
    "too narrow": (
        lambda: {"0.weight": torch.randn(6, 6, 1, 1), "0.bias": torch.zeros(6)}, narrow, {"cost": reparam.cost.always},
        "1: expected maps of full rank around the kernel of 0, found that they lose channels: widen them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RESTORE)
def test_restore(case: str) -> None:
    make, build, options, text = RESTORE[case]
    with pytest.raises(reparam.ReparamError) as info:
        reparam.restore(make(), build, **options)
    assert str(info.value) == text


def test_one_kernel_of_two_regions() -> None:
    torch.manual_seed(0)
    state = reparam.fuse(Shared().eval()).state_dict()
    other = {key: torch.randn_like(value) for key, value in state.items()}
    with pytest.raises(reparam.BlockError) as info:
        reparam.restore(other, Shared)
    assert "expected a region that computes what the fused operation does, found a difference of" in str(info.value)
    assert str(info.value).endswith("one of its kernels is part of another region, too")


def test_a_norm_that_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that goes through a join is taken out of the kernel again; here that is refused."""
    refusal = Refusal("layout", "it stands elsewhere", "")
    monkeypatch.setattr(RESTORING, "wrapped", lambda *_: refusal)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.norm = conv(1), conv(3), nn.BatchNorm2d(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat((self.left(x), self.right(x)), 1)).relu()

    fused = reparam.fuse(ready(Joined()))
    with pytest.raises(reparam.ReparamError, match=r"^norm: expected a norm that can be taken out again: .*elsewhere"):
        reparam.restore(fused, Joined)


def test_a_parameter_that_nothing_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter of the fused net belongs to a region or to the net; here no region names its own."""
    right = RESTORING._wanted
    monkeypatch.setattr(RESTORING, "_wanted", lambda *given: (right(*given)[0], []))
    bare = lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))  # noqa: E731
    with pytest.raises(reparam.ReparamError) as info:
        reparam.restore(reparam.fuse(bare().eval()), bare)
    assert str(info.value) == "0.bias: expected a parameter of build(), found one that fusing makes"


def chain(*, first_bias: bool, last_bias: bool) -> Region:
    return Region.of(nn.Sequential(nn.Conv2d(4, 4, 3, bias=first_bias), nn.Conv2d(4, 4, 1, bias=last_bias)))


def target(region: Region, **changes: Any) -> Affine:
    """What the region computes, with other weights."""
    formula = region.formula()
    return Affine({root: replaced(one, **changes) for root, one in formula.terms.items()}, True, torch.ones(4).double())


def replaced(one: Conv, **changes: Any) -> Conv:
    from dataclasses import replace

    return replace(one, weight=torch.randn(one.weight_shape, dtype=torch.float64), **changes)


def test_a_remainder_that_no_region_takes() -> None:
    region = chain(first_bias=False, last_bias=True)
    with pytest.raises(reparam.ReparamError, match=r"^it: expected a region that reads the input a, found one that do"):
        take_remainder(region, Affine({"a": identity(4, 2)}), "it")
    with pytest.raises(
        reparam.ReparamError, match=r"^it: expected a region of the same geometry, found another one: br"
    ):
        take_remainder(region, target(region, stride=(2, 2)), "it")
    region = chain(first_bias=False, last_bias=False)
    with torch.no_grad(), pytest.raises(reparam.ReparamError) as info:
        take_remainder(region, target(region), "it")
    assert str(info.value) == "it: expected a region with a bias, found none: it cannot take the one of the target"
    region = chain(first_bias=True, last_bias=False)
    with torch.no_grad(), pytest.raises(reparam.ReparamError) as info:
        take_remainder(region, target(region), "it")
    assert str(info.value) == "it: expected a shift that can be set channel by channel, found none"


# --- models, files and convolutions that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        (
            "repvgg_a0", {},
            "expected a model as timm:NAME, torchvision:NAME, reparam:NAME, package.module:factory or"
            " path/file.py:factory, found 'repvgg_a0'; did you mean ",
        ),
        (
            "reparam:repvgg_a0", {"deep": 3},
            "expected reparam:repvgg_a0 to be built from {'deep': 3}, but it raises TypeError: ",
        ),
    ],
)  # fmt: skip
def test_models_by_name(name: str, kwargs: dict[str, Any], text: str) -> None:
    from reparam.cli.source import Source

    with pytest.raises(reparam.ReparamError) as info:
        Source(name, kwargs).build()
    assert str(info.value).startswith(text)


def test_nothing_to_expand() -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.expand(nn.Sequential(nn.Linear(3, 3)).eval(), "repvgg")
    assert str(info.value) == "expected a convolution that repvgg can expand, found none among 0"


def test_calibration_on_which_the_model_does_not_run() -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.expand(net(), "repvgg", calibrate=[torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8)])
    text = "expected inputs for calibrate on which the model runs, found number 2, on which it raises RuntimeError: "
    assert str(info.value).startswith(text)


def test_a_convolution_that_a_recipe_does_not_fit() -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.nn.block(nn.Conv2d(4, 4, 3, bias=False), [BRANCHES["1x1"].with_norm()], norm=None)
    text = str(info.value)
    assert text.startswith("expected a convolution that point fits, found Conv2d(4, 4, kernel_size=(3, 3)")
    assert text.endswith("point: its norm would add a bias, which the convolution has not")


def test_a_recipe_without_branches() -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.nn.block(nn.Conv2d(4, 4, 3), reparam.nn.Recipe("nothing", lambda geometry: ()))
    assert str(info.value).endswith("nothing has no branch for a kernel of (3, 3) taps")


def test_a_file_that_computes_something_else(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(reparam.CheckError) as info:
        reparam.export(net(), torch.randn(1, 4, 8, 8), tmp_path / "net.pt2", original=other)
    assert str(info.value).startswith(
        "expected net.pt2 to compute what Sequential computes, found another result (a: the net, b: the file), so the"
        " file was removed: not equal: "
    )
    assert list(tmp_path.iterdir()) == []


# --- packages that are not installed ----------------------------------------------------------------------------------


def missing(package: str, purpose: str, extra: str) -> str:
    return f"expected the package {package}, which {purpose}, found none: pip install 'reparam[{extra}]'"


PACKAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "checkpoints": (
        "safetensors.torch", lambda path: reparam.save_deploy(net(), path / "net.safetensors"),
        missing("safetensors", "reads and writes checkpoints", "deploy"),
    ),
    "ONNX": (
        "onnxscript", lambda path: reparam.export(net(), torch.zeros(1, 4, 8, 8), path / "net.onnx"),
        missing("onnxscript", "writes ONNX files", "onnx"),
    ),
    "pictures": (
        "pygraphviz", lambda path: reparam.plan(net()).draw(path / "net.svg"),
        missing("pygraphviz", "draws pictures", "draw"),
    ),
    "heat maps": (
        "matplotlib.colors", lambda path: reparam.plan(net()).draw_ranges(path / "net.png"),
        missing("matplotlib", "draws heat maps", "draw"),
    ),
    "trees": ("rich.tree", lambda _: reparam.plan(net()).__rich__(), missing("rich", "draws coloured trees", "cli")),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKAGES)
def test_missing_packages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, use, text = PACKAGES[case]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(reparam.MissingPackageError) as info:
        use(tmp_path)
    assert str(info.value) == text


def test_a_missing_runtime_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(reparam.MissingPackageError) as info:
        reparam.export(net(), torch.zeros(1, 4, 8, 8), tmp_path / "net.onnx")
    assert str(info.value) == missing("onnxruntime", "checks ONNX files", "onnx")


def test_a_missing_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam.cli.source import Source

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(reparam.MissingPackageError) as info:
        Source("timm:repvgg_a0", {}).build()
    assert str(info.value) == missing("timm", "has the model", "zoo")


# --- all of them ------------------------------------------------------------------------------------------------------

PUBLIC = ("ReparamError", "TrainingModeError", "CheckError", "BlockError", "MissingPackageError", "UnfitError")
WINDOW = 16  # characters of a text that only one error has


def raised() -> Iterator[tuple[str, list[str]]]:
    """Every place that raises a public error, with the fixed parts of its text."""
    for file in sorted((ROOT / "reparam").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).removeprefix("reparam.").removesuffix(".of")
                if name in PUBLIC:
                    parts = [part for argument in node.exc.args[:3] for part in fixed(argument)]
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", [part for part in parts if len(part) > 5]


def fixed(node: ast.expr) -> list[str]:
    """The constant parts of a text, in order."""
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]  # type: ignore[misc]
    if isinstance(node, ast.BoolOp):
        return [part for value in node.values for part in fixed(value)]
    if isinstance(node, ast.BinOp):
        return [*fixed(node.left), *fixed(node.right)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def windows(parts: list[str]) -> set[str]:
    return {part[at : at + WINDOW] for part in parts for at in range(max(1, len(part) - WINDOW + 1))}


def said_in_tests() -> str:
    """All strings of the tests and the pages, without the escapes of regular expressions."""
    strings: list[str] = []
    for file in (ROOT / "tests").glob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        strings += ["\0".join(fixed(node)) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    strings += [file.read_text(encoding="utf-8") for file in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]]
    strings += re.findall(r">>>.*?\n\s*\n", "\n\n".join(_docstrings()), re.DOTALL)
    return re.sub(r"\s+", " ", "\n".join(strings).replace("\\", ""))


def _docstrings() -> Iterator[str]:
    for file in (ROOT / "reparam").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield f"{ast.get_docstring(node) or ''}\n\n"


def test_every_public_error_has_a_test_of_its_text() -> None:
    sites = dict(raised())
    assert len(sites) > 90
    said = said_in_tests()
    untested = []
    for place, parts in sites.items():
        others = set().union(*(windows(other) for elsewhere, other in sites.items() if elsewhere != place))
        own = windows(parts) - others or windows(parts)
        if not any(window in said for window in own):
            untested.append(f"{place}: {' … '.join(parts)}")
    assert not untested, "no test compares the text of\n" + "\n".join(untested)
