"""Model files that packages ship, without their own conversion: writes the table of docs/migration.md.

From each block class the methods that only convert are taken out of the source. What is left is fused, and compared in
float64 with what the package's own converter makes of the original.

    python benchmarks/migration.py            prints the table
    python benchmarks/migration.py --write    puts it into docs/migration.md
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the path comes first)
from nets import count, difference, images, ready  # noqa: E402
from package_nets import quiet  # noqa: E402
from torch import nn  # noqa: E402

import reparam  # noqa: E402
from benchmarks.marks import put  # noqa: E402

PAGE = ROOT / "docs" / "migration.md"
BLOCK = "table: benchmarks/migration.py"


@dataclass(frozen=True)
class Migration:
    """One file.

    Args:
        package: that ships it.
        module: in which the blocks are.
        conversion: by class, the methods that only convert.
        build: a net of these blocks.
        convert: the package's own conversion, of a copy.
    """

    package: str
    module: str
    conversion: dict[str, tuple[str, ...]]
    build: Callable[[], nn.Module]
    convert: Callable[[nn.Module], nn.Module]


def repvgg() -> nn.Module:
    return importlib.import_module("repvgg_pytorch.repvgg").RepVGG([2, 2, 2, 1], 10, [0.25] * 4, {2: 2})


def repvgg_converted(model: nn.Module) -> nn.Module:
    return importlib.import_module("repvgg_pytorch.repvgg").repvgg_model_convert(model)


def timm_net() -> nn.Module:
    return importlib.import_module("timm").create_model("mobileone_s0", num_classes=10)


def timm_converted(model: nn.Module) -> nn.Module:
    return importlib.import_module("timm.utils.model").reparameterize_model(model)


def ultralytics_net() -> nn.Module:
    conv = importlib.import_module("ultralytics.nn.modules.conv")
    return nn.Sequential(conv.Conv(3, 16, 3, 2), conv.RepConv(16, 16, bn=True), conv.RepConv(16, 32), nn.Flatten())


def ultralytics_converted(model: nn.Module) -> nn.Module:
    conv = importlib.import_module("ultralytics.nn.modules.conv")
    for module in model.modules():
        if isinstance(module, conv.RepConv):
            module.fuse_convs()
            module.forward = module.forward_fuse
    return model


MIGRATIONS = (
    Migration(
        "repvgg_pytorch",
        "repvgg_pytorch.repvgg",
        {
            "RepVGGBlock": (
                "get_equivalent_kernel_bias", "_pad_1x1_to_3x3_tensor", "_fuse_bn_tensor", "switch_to_deploy",
            )
        },
        repvgg,
        repvgg_converted,
    ),
    Migration(
        "timm",
        "timm.models.byobnet",
        {
            "RepVggBlock": ("reparameterize", "_get_kernel_bias", "_fuse_bn_tensor"),
            "MobileOneBlock": ("reparameterize", "_get_kernel_bias", "_fuse_bn_tensor"),
        },
        timm_net,
        timm_converted,
    ),
    Migration(
        "ultralytics",
        "ultralytics.nn.modules.conv",
        {
            "RepConv": (
                "forward_fuse", "get_equivalent_kernel_bias", "_pad_1x1_to_3x3_tensor", "_fuse_bn_tensor", "fuse_convs",
            )
        },
        ultralytics_net,
        ultralytics_converted,
    ),
)  # fmt: skip


def without(kind: type[nn.Module], methods: tuple[str, ...]) -> tuple[type[nn.Module], int]:
    """A class from the source of ``kind`` without some methods, and the number of lines that went."""
    source = textwrap.dedent(inspect.getsource(kind))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    gone = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in methods]
    assert len(gone) == len(methods), f"{kind.__name__} has no {set(methods) - {node.name for node in gone}}"
    lines = source.splitlines()
    number = 0
    for node in reversed(gone):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert node.end_lineno is not None
        del lines[first - 1 : node.end_lineno]
        number += node.end_lineno - first + 1
    namespace = dict(vars(sys.modules[kind.__module__]))
    exec(compile("\n".join(lines), f"<{kind.__name__} without conversion>", "exec"), namespace)
    return namespace[kind.__name__], number


def migrated(migration: Migration, model: nn.Module) -> tuple[nn.Module, int]:
    """A copy of a net whose blocks can no longer convert themselves, and the number of lines that went."""
    module, model, total = importlib.import_module(migration.module), copy.deepcopy(model), 0
    for name, methods in migration.conversion.items():
        kind = getattr(module, name)
        stripped, lines = without(kind, methods)
        total += lines
        for block in model.modules():
            if type(block) is kind:
                block.__class__ = stripped
    return model, total


@dataclass(frozen=True)
class Outcome:
    """What was measured of one file."""

    lines: int
    error: float
    theirs: float
    ours_left: dict[str, int]
    theirs_left: dict[str, int]


def measure(migration: Migration) -> Outcome:
    torch.manual_seed(0)
    x, kept = images((33, 40), channels=3), torch.get_default_dtype()
    model = ready(quiet(migration.build))
    plain, lines = migrated(migration, model)
    torch.set_default_dtype(torch.float64)  # converters make float32 layers otherwise
    try:
        converted = quiet(lambda: migration.convert(copy.deepcopy(model)))
    finally:
        torch.set_default_dtype(kept)
    fused = reparam.fuse(plain)
    with torch.no_grad():
        wanted = model(x)
        errors = [difference(wanted, net(x)) for net in (fused, converted)]
    return Outcome(lines, *errors, count(fused, x), count(converted, x))


def table() -> str:
    """One row for each file."""
    lines = [
        "| file | blocks | lines that go | convolutions, norms, sums left | by its converter | error | its error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for migration in MIGRATIONS:
        found = measure(migration)
        left = [", ".join(str(c[k]) for k in ("conv", "norm", "add")) for c in (found.ours_left, found.theirs_left)]
        blocks = ", ".join(f"`{name}`" for name in migration.conversion)
        file = migration.module.replace(".", "/") + ".py"
        cells: tuple[Any, ...] = (f"`{file}`", blocks, found.lines, *left, f"{found.error:.0e}", f"{found.theirs:.0e}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/migration.md")
    text = table()
    if parser.parse_args().write:
        put(PAGE, BLOCK, text)
    print(text, end="")


if __name__ == "__main__":
    main()
