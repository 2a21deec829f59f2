"""Random nested nets from a recipe: geometry, structure and the style of every forward come from one seed.

Each owner gets a real Python `forward`, written as source: branches summed in many spellings, values kept, aliased
and changed in place, children shared, flags and loops. A recipe is small and printable, so hypothesis shrinks to small
nets; `source(model)` shows the forwards of a net.
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import random
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from nets import count, ready
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
SPAN = (8, 6, 4)  # most rows of padding together, by dimensions
SIZES = (((21,), (16,)), ((11, 9), (8, 12)), ((7, 5, 6), (6, 8, 5)))
HEADER = "import functools, operator\nimport torch\nimport torch.nn.functional as F\n\n"

_names = itertools.count()


@dataclasses.dataclass(frozen=True)
class Value:
    """A variable of a forward: its name, its channels, and how often its image was halved."""

    name: str
    channels: int
    level: int = 0


class Made(nn.Module):
    """Base of every generated owner; `source` is its forward."""

    source: str


class Scale(nn.Module):
    """A layer scale that multiplies, and at times shifts, each channel."""

    def __init__(self, channels: int, dims: int, batched: bool, shifted: bool) -> None:
        super().__init__()
        shape = ((1,) if batched else ()) + (channels,) + (1,) * dims
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape)) if shifted else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gamma
        return y if self.beta is None else y + self.beta


class Same(nn.modules.conv._ConvNd):
    """Pads as much as the size of its input asks for, so that the result has `ceil(size / stride)` elements."""

    def forward(self, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        settings = zip(x.shape[-dims:], self.kernel_size, self.stride, self.dilation, strict=True)
        missing = [max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0) for size, k, s, d in settings]
        x = F.pad(x, [side for m in reversed(missing) for side in (m // 2, m - m // 2)])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        weight = self.scaled() if self.standardised else self.weight
        return convolve(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)

    standardised = False

    def scaled(self) -> Tensor:
        axes = tuple(range(1, self.weight.dim()))
        return (self.weight - self.weight.mean(axes, keepdim=True)) * 0.5


SAME = tuple(type(f"Same{axes}d", (Same, kind), {}) for axes, kind in enumerate(CONVS, 1))


class Gate(nn.Module):
    """Squeeze and excite: a branch that is not linear."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.fc = CONVS[dims - 1](channels, channels, 1)
        self.axes = tuple(range(2, 2 + dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean(self.axes, keepdim=True)))


class Pair(nn.Module):
    """Two outputs, of which the parent uses one or both."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return y, self.second(y)


class Maker:
    """Draws modules and forwards from one random stream; `more` kinds of layers, or those that there were first."""

    def __init__(self, seed: int, dims: int, more: bool = False) -> None:
        self.rng, self.dims, self.more = random.Random(seed), dims, more

    # -- parts -------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def conv(self, c_in: int, c_out: int, stride: int = 1, *, padded: bool = True) -> nn.Module:
        """A convolution to `ceil(size / stride)`: padded by itself, by a pad before it, or not at all (1 tap)."""
        rng = self.rng
        kernel, dilation = [], []
        for _ in range(self.dims):
            d = rng.choice((1, 1, 1, 2, 3))
            k = rng.choice((1, 1, 2, 3, 3, 3, 4, 5)) if padded else 1
            while d * (k - 1) > SPAN[self.dims - 1]:
                k -= 1
            kernel.append(k)
            dilation.append(d)
        if self.chance(0.5):
            kernel, dilation = kernel[:1] * self.dims, dilation[:1] * self.dims
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        common = [g for g in range(1, c_in + 1) if c_in % g == 0 and c_out % g == 0]
        options: dict[str, Any] = {
            "stride": stride,
            "dilation": tuple(dilation),
            "groups": rng.choice((1, 1, rng.choice(common), common[-1])),
            "bias": self.chance(0.4),
        }
        build = CONVS[self.dims - 1]
        if self.more and self.chance(0.2):
            module = SAME[self.dims - 1](c_in, c_out, tuple(kernel), **options)
            module.standardised = self.chance(0.3)
            return module
        if any(span % 2 for span in spans) or self.chance(0.15):
            ahead = [(span // 2, span - span // 2) if self.chance(0.7) else (0, span) for span in spans]
            flat = [side for pair in reversed(ahead) for side in pair]
            pad = PADS[self.dims - 1](flat, 0.0 if self.chance(0.8) else 0.5)
            return nn.Sequential(pad, build(c_in, c_out, tuple(kernel), **options))
        padding: Any = tuple(span // 2 for span in spans)
        if max(padding) == 1 and self.chance(0.1):
            options["padding_mode"] = rng.choice(("reflect", "replicate", "circular"))
        if stride == 1 and self.chance(0.1):
            padding = "same"
        return build(c_in, c_out, tuple(kernel), padding=padding, **options)

    def norm(self, channels: int) -> nn.Module:
        if self.chance(0.06):
            return nn.GroupNorm(1, channels)
        return NORMS[self.dims - 1](channels, eps=self.rng.choice((1e-5, 1e-3, 0.1)), affine=self.chance(0.85))

    def act(self) -> nn.Module:
        return self.rng.choice((nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Hardtanh(inplace=True), nn.GELU()))

    def pool(self, stride: int) -> nn.Module:
        if self.more and self.chance(0.4):
            if self.chance(0.5):
                return POOLS[self.dims - 1](stride, stride, ceil_mode=True)
            pad = PADS[self.dims - 1]((0, 1) * self.dims, 0.0)
            return nn.Sequential(pad, POOLS[self.dims - 1](2, stride))
        kernel = self.rng.choice((1, 3, 3))
        return POOLS[self.dims - 1](kernel, stride, kernel // 2, count_include_pad=self.chance(0.8))

    def nothing(self) -> nn.Module:
        return self.rng.choice((nn.Identity(), nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.Sequential()))

    def branch(self, c_in: int, c_out: int, stride: int, depth: int) -> nn.Module:
        """One branch of a sum, from `c_in` to `c_out` channels."""
        kinds = ["conv_norm"] * 5 + ["conv"] * 2 + ["chain", "expand", "scaled", "pooled", "crooked"]
        if c_in == c_out and stride == 1:
            kinds += ["norm", "norm", "nothing", "scale"]
        if c_in == c_out:
            kinds += ["pool_norm"]
        if depth > 0:
            kinds += ["nested"] * 2
        kind = self.rng.choice(kinds)
        if kind == "conv_norm":
            parts = [self.conv(c_in, c_out, stride), self.norm(c_out)]
        elif kind == "conv":
            parts = [self.conv(c_in, c_out, stride)]
        elif kind == "chain":
            parts = [
                self.conv(c_in, c_out, stride),
                self.norm(c_out),
                self.conv(c_out, c_out, padded=False),
                self.norm(c_out),
            ]
        elif kind == "expand":
            wide = self.rng.choice((c_out, 2 * c_in))
            parts = [self.conv(c_in, wide, padded=False), self.norm(wide), self.conv(wide, c_out, stride)]
        elif kind == "scaled":
            parts = [self.conv(c_in, c_out, stride), self.nothing(), self.norm(c_out), self.scale(c_out)]
        elif kind == "pooled":
            parts = [self.conv(c_in, c_out, padded=False), self.norm(c_out), self.pool(stride)]
        elif kind == "crooked":
            parts = [self.conv(c_in, c_out, stride), self.act() if self.chance(0.5) else Gate(c_out, self.dims)]
        elif kind == "norm":
            parts = [self.norm(c_in)]
        elif kind == "nothing":
            parts = [self.nothing()]
        elif kind == "scale":
            parts = [self.scale(c_in)]
        elif kind == "pool_norm":
            parts = [self.pool(stride), self.norm(c_in)]
        else:
            parts = [self.made(c_in, c_out, stride, depth - 1, self.rng.randint(1, 3))]
        return parts[0] if len(parts) == 1 and self.chance(0.7) else nn.Sequential(*parts)

    def scale(self, channels: int) -> nn.Module:
        return Scale(channels, self.dims, self.chance(0.5), self.chance(0.3))

    # -- owners ------------------------------------------------------------------------------------

    def made(self, c_in: int, c_out: int, stride: int, depth: int, statements: int, *, outputs: bool = False) -> Made:
        """An owner whose forward has some statements; it gives a dictionary, tuple or list when `outputs`."""
        return Forward(self, c_in, c_out, stride, depth).build(statements, outputs)


class Forward:
    """The forward of one owner while it is being written."""

    def __init__(self, maker: Maker, c_in: int, c_out: int, stride: int, depth: int) -> None:
        self.maker, self.rng, self.c_in, self.c_out, self.depth = maker, maker.rng, c_in, c_out, depth
        self.level = stride - 1  # stride 1 or 2
        self.lines: list[str] = []
        self.children: dict[str, nn.Module] = {}
        self.shared: list[tuple[str, int, int]] = []  # children of stride 1, by channels in and out
        self.values = [Value("x", c_in)]
        self.fresh = 0

    def own(self, module: nn.Module) -> str:
        kind = "made" if isinstance(module, Made) else type(module).__name__.lower()
        name = f"{kind}_{len(self.children)}"
        self.children[name] = module
        return f"self.{name}"

    def let(self, expression: str, channels: int, level: int) -> Value:
        self.fresh += 1
        value = Value(f"v{self.fresh}", channels, level)
        self.lines.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def pick(self) -> Value:
        """An existing value, most often one of the last."""
        return self.rng.choice(self.values[-3:] if self.rng.random() < 0.75 else self.values)

    def partner(self, value: Value) -> Value | None:
        others = [v for v in self.values if (v.channels, v.level) == (value.channels, value.level)]
        return self.rng.choice(others) if others else None

    # -- statements --------------------------------------------------------------------------------

    def branches(self) -> None:
        """Several branches of one value, summed."""
        value = self.pick()
        stride = 2 if value.level < self.level and self.rng.random() < 0.5 else 1
        c_out = self.rng.choice((value.channels, value.channels, self.c_out))
        modules = [self.maker.branch(value.channels, c_out, stride, self.depth) for _ in range(self.rng.randint(2, 4))]
        level = value.level + stride - 1
        if self.rng.random() < 0.25:
            self.container(value, modules, c_out, level)
            return
        names = [self.own(module) for module in modules]
        if stride == 1:
            self.shared += [(name, value.channels, c_out) for name in names]
        terms = [f"{name}({value.name})" for name in names]
        if stride == 1 and c_out == value.channels and self.rng.random() < 0.4:
            terms.insert(self.rng.randrange(len(terms) + 1), value.name)
        if self.rng.random() < 0.3:  # some branches by name first, to be used again later
            terms = [self.let(term, c_out, level).name for term in terms]
        self.total(terms, c_out, level)
        if self.rng.random() < 0.3:
            self.let(f"{self.own(self.maker.norm(c_out))}({self.values[-1].name})", c_out, level)

    def container(self, value: Value, modules: list[nn.Module], c_out: int, level: int) -> None:
        kept = self.own(nn.ModuleList(modules))
        style = self.rng.randrange(4)
        if style == 0:
            total = self.let("0", c_out, level)
            self.lines += [f"for branch in {kept}:", f"    {total.name} = {total.name} + branch({value.name})"]
        elif style == 1:
            total = self.let(f"{kept}[0]({value.name})", c_out, level)
            self.lines += [f"for branch in {kept}[1:]:", f"    {total.name} += branch({value.name})"]
        elif style == 2:
            self.let(f"sum(branch({value.name}) for branch in {kept})", c_out, level)
        else:
            self.let(f"torch.stack([branch({value.name}) for branch in {kept}], 1).sum(dim=1)", c_out, level)

    def total(self, terms: list[str], channels: int, level: int) -> Value:
        style = self.rng.randrange(8)
        if style == 0:
            return self.let(f"sum([{', '.join(terms)}])", channels, level)
        if style == 1:
            return self.let(f"functools.reduce(operator.add, ({', '.join(terms)},))", channels, level)
        if style == 2:
            return self.let(f"torch.stack([{', '.join(terms)}]).sum(0)", channels, level)
        if style == 3:
            expression = terms[0]
            for term in terms[1:]:
                expression = f"torch.add({expression}, {term}, alpha={self.rng.choice((1, 0.5, -2))})"
            return self.let(expression, channels, level)
        if style == 4:
            signed = "".join(
                f" {self.rng.choice('+-')} {term}{self.rng.choice(('', ' * 0.5', ' / 2'))}" for term in terms[1:]
            )
            return self.let(f"{self.rng.choice(('0 + ', '-', '2 * '))}{terms[0]}{signed}", channels, level)
        if style == 5:
            value = self.let(f"{terms[0]} * 1.0", channels, level)  # a value of its own, which += may change
            self.lines += [f"{value.name} {self.rng.choice(('+=', '-='))} {term}" for term in terms[1:]]
            return value
        if style == 6:
            parts = ", ".join(f"'{index}': {term}" for index, term in enumerate(terms))
            return self.let(f"sum({{{parts}}}.values())", channels, level)
        return self.let(" + ".join(terms), channels, level)

    def layer(self) -> None:
        """One layer after a value."""
        value, maker = self.pick(), self.maker
        kind = self.rng.choice(
            ("conv", "norm", "act", "act", "nothing", "scale", "pool", "again", "again", "pair", "nested", "turned")
        )
        channels, level = value.channels, value.level
        if kind == "turned":  # a layer that has the channels last
            last = ", ".join(map(str, (0, *range(2, self.maker.dims + 2), 1)))
            first = ", ".join(map(str, (0, self.maker.dims + 1, *range(1, self.maker.dims + 1))))
            turned = f"{self.own(nn.Linear(channels, channels, self.rng.random() < 0.5))}({value.name}.permute({last}))"
            if self.rng.random() < 0.3:
                self.let(f"torch.tanh({turned}).permute({first})", channels, level)
            else:
                self.let(f"{turned}.permute({first})", channels, level)
            return
        if kind == "again":
            known = [name for name, c_in, c_out in self.shared if c_in == c_out == channels]
            if known:
                self.let(f"{self.rng.choice(known)}({value.name})", channels, level)
                return
            kind = "conv"
        if kind == "pair":
            pair = self.own(Pair(maker.branch(channels, channels, 1, 0), maker.branch(channels, channels, 1, 0)))
            first, second = f"v{self.fresh + 1}", f"v{self.fresh + 2}"
            self.fresh += 2
            self.lines.append(f"{first}, {second} = {pair}({value.name})")
            self.values += [Value(first, channels, level), Value(second, channels, level)]
            return
        if kind == "nested" and self.depth > 0:
            module: nn.Module = maker.made(channels, channels, 1, self.depth - 1, self.rng.randint(1, 3))
        elif kind in ("conv", "nested"):
            module = maker.conv(channels, channels)
        elif kind == "norm":
            module = maker.norm(channels)
        elif kind == "act":
            module = maker.act()
        elif kind == "scale":
            module = maker.scale(channels)
        elif kind == "pool":
            module = maker.pool(1)
        else:
            module = maker.nothing()
        name = self.own(module)
        if kind in ("conv", "norm", "scale", "nested"):
            self.shared.append((name, channels, channels))
        if kind == "act" and self.rng.random() < 0.2:
            self.lines.append(f"{name}({value.name})")  # a result that nobody reads
            return
        self.let(f"{name}({value.name})", channels, level)

    def arithmetic(self) -> None:
        value = self.pick()
        other = self.partner(value) or value
        a, b = value.name, other.name
        expression = self.rng.choice(
            (
                f"{a} + {b}",
                f"{a} - {b}",
                f"{a} + {b}",
                f"-{a}",
                f"{a} * 0.5 + {b}",
                f"{a} / 3",
                f"{a}.add({b}, alpha=2)",
                f"torch.relu({a})",
                f"{a} * {b}",
            )
        )
        self.let(expression, value.channels, value.level)

    def write(self) -> None:
        """A write in place, at times through an alias or a view."""
        value = self.pick()
        other = self.partner(value) or value
        a, b = value.name, other.name
        axes = ", ".join([":"] * self.maker.dims)
        self.lines += self.rng.choice(
            (
                [f"{a} += {b}"],
                [f"{a} *= 0.5"],
                [f"{a}.relu_()"],
                [f"{a}.sub_({b})"],
                [f"F.relu({a}, inplace=True)"],
                [f"{a}[:, :1] = {b}[:, -1:]"],
                [f"{a}[:, 0].mul_(3)"],
                [f"part = {a}[:, 1:]", "part += 1"],
                [f"{a}.chunk(2, 1)[0].neg_()"],
                [f"same = {a}", f"same += {b}"],
                [f"{a}[:, :, :1] = 0"],
                [f"{a}[:, 1, {axes}] = 0.5"],
            )
        )

    def join(self) -> None:
        """Channels put together, taken apart."""
        value = self.pick()
        other = self.partner(value) or value
        if self.rng.random() < 0.5:
            channels = value.channels + other.channels
            joined = self.let(
                f"torch.cat([{value.name}, {other.name}], {self.rng.choice(('1', 'dim=1'))})", channels, value.level
            )
            if self.rng.random() < 0.5:  # a norm that belongs to several convolutions in front of it
                joined = self.let(f"{self.own(self.maker.norm(channels))}({joined.name})", channels, value.level)
            conv = self.maker.conv(channels, value.channels, padded=self.rng.random() < 0.5)
            parts = [conv, self.maker.norm(value.channels)] if self.rng.random() < 0.5 else [conv]
            self.let(f"{self.own(nn.Sequential(*parts))}({joined.name})", value.channels, value.level)
        elif value.channels % 2 == 0:
            half = value.channels // 2
            left, right = f"v{self.fresh + 1}", f"v{self.fresh + 2}"
            self.fresh += 2
            call = self.rng.choice(
                (
                    f"{value.name}.chunk(2, 1)",
                    f"torch.split({value.name}, {half}, dim=1)",
                    f"list({value.name}.split([{half}, {half}], 1))",
                )
            )
            self.lines.append(f"{left}, {right} = {call}")
            conv = self.own(self.maker.conv(half, half))
            self.let(f"torch.cat(({conv}({left}), {right}), dim=1)", value.channels, value.level)

    def condition(self) -> None:
        """A flag, an attribute test or a loop around a layer."""
        value = self.pick()
        name = self.own(self.maker.branch(value.channels, value.channels, 1, 0))
        result = self.let(f"{value.name}", value.channels, value.level)
        test = self.rng.choice(
            (
                "self.flag",
                "not self.flag",
                f"hasattr({name}, 'weight')",
                f"isinstance({name}, torch.nn.Sequential)",
                f"{value.name}.ndim > 2",
            )
        )
        self.lines += self.rng.choice(
            (
                [f"if {test}:", f"    {result.name} = {name}({result.name})"],
                [
                    f"if {test}:",
                    f"    {result.name} = {result.name} + {name}({result.name})",
                    "else:",
                    f"    {result.name} = {result.name} * 2",
                ],
                [f"if {test}:", f"    {result.name} = {name}({value.name}) + {value.name}"],
            )
        )

    # -- the whole ---------------------------------------------------------------------------------

    def build(self, statements: int, outputs: bool) -> Made:
        kinds = [self.branches] * 5 + [self.layer] * 4 + [self.arithmetic] * 2
        kinds += [self.write, self.condition, self.join, self.join]
        self.branches()
        for _ in range(statements - 1):
            self.rng.choice(kinds)()
        last = self.values[-1]
        if (last.channels, last.level) != (self.c_out, self.level):
            conv = self.maker.conv(last.channels, self.c_out, 2 if last.level < self.level else 1)
            last = self.let(f"{self.own(conv)}({last.name})", self.c_out, self.level)
        self.lines.append(f"return {self.returned(last) if outputs else last.name}")
        return self.module()

    def returned(self, last: Value) -> str:
        extra = [v.name for v in self.rng.sample(self.values, min(len(self.values), self.rng.randrange(3)))]
        style = self.rng.randrange(4)
        if style == 0 or not extra:
            return last.name
        if style == 1:
            return f"({', '.join([last.name, *extra])})"
        if style == 2:
            return f"{{'out': {last.name}, 'rest': [{', '.join(extra)}]}}"
        return f"[{last.name}, {extra[0]} * 1]"

    def module(self) -> Made:
        number = next(_names)
        body = "\n".join(f"    {line}" for line in self.lines)
        source = f"{HEADER}def forward(self, x):\n{body}\n"
        file = f"<random net {number}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        space: dict[str, Any] = {}
        exec(compile(source, file, "exec"), space)
        kind = type(f"Made{number}", (Made,), {"forward": space["forward"], "source": source[len(HEADER) :]})
        module = kind()
        module.flag = self.rng.random() < 0.5
        for name, child in self.children.items():
            module.add_module(name, child)
        return module


# --- recipes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a random net."""

    dims: int
    channels: int
    depth: int
    statements: int
    seed: int
    more: bool = False

    def build(self) -> Made:
        """The net in float64, in eval mode, with wide random numbers."""
        maker = Maker(self.seed, self.dims, self.more)
        return ready(
            maker.made(self.channels, self.channels, self.seed % 2 + 1, self.depth, self.statements, outputs=True),
            self.seed,
        )

    def inputs(self) -> list[Tensor]:
        """An image of an odd and of an even size."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(2, self.channels, *size, generator=generator, dtype=torch.float64)
            for size in SIZES[self.dims - 1]
        ]


recipes = st.builds(
    Recipe,
    dims=st.sampled_from((2, 1, 3)),
    channels=st.sampled_from((2, 4, 6)),
    depth=st.integers(0, 2),
    statements=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    more=st.booleans(),
)


def source(model: nn.Module) -> str:
    """The forwards of all generated owners of a net."""
    return "\n".join(
        f"# {name or 'the net'}\n{module.source}" for name, module in model.named_modules() if isinstance(module, Made)
    )


def share_gone(model: nn.Module, fused: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """Calls in one run before and after fusing, by kind: how much of the net really went."""
    before, after = count(model, x), count(fused, x)
    return {kind: (before[kind], after[kind]) for kind in ("conv", "product", "norm", "add", "calls")}


def dearer(gone: dict[str, tuple[int, int]]) -> list[str]:
    """What a fused net runs more of: convolutions and products of matrices, norms, or operations.

    One kind may grow for another: a layer that has the channels last becomes a convolution, a stack and its sum two
    sums.
    """
    return [
        f"{after} {kind} instead of {before}"
        for kind, (before, after) in gone.items()
        if kind in ("product", "norm", "calls") and after > before
    ]
