"""A program of a strictly typed user: `mypy --strict` accepts it, and it runs."""

import io
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reparam
from reparam import Cause, Cost, Difference, Formula, Plan, Receipt, Refusal, Region, Verification, Work
from reparam.models import RepVGG, load_weights, repvgg_a0


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def by_launches(work: Work) -> float:
    return work.macs + 1000 * work.launches


def is_head(path: str, module: nn.Module) -> bool:
    return path.startswith("head") and isinstance(module, nn.Linear)


def report(plan: Plan) -> list[str]:
    regions: tuple[Region, ...] = plan.regions
    left: tuple[Refusal, ...] = plan.left
    return [region.path for region in regions] + [f"{refusal.rule}: {refusal.remedy}" for refusal in left]


class Flipped(nn.Module):
    """A pointwise map that no lifting knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,bihw->bohw", self.weight, x)


def pointwise(module: Flipped, x: Tensor) -> Formula:
    return Formula(module.weight[:, :, None, None])


def declared() -> int:
    """How many regions a declared operation joins."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Flipped()).eval()
    return len(reparam.plan(net, liftings=(*reparam.LIFTINGS, reparam.declare(Flipped, pointwise))).regions)


def told(receipt: Receipt) -> tuple[int, float | None]:
    """What a receipt and its copy from JSON say."""
    copy: Receipt = Receipt.from_dict(json.loads(json.dumps(receipt.to_dict())))
    error: float | None = copy.regions[0].error
    return copy.totals.operations_after, error


def branches(model: nn.Module, x: Tensor) -> nn.Module:
    """Put branches in, fuse them again, and go back from the fused net."""
    recipe: reparam.nn.Recipe = reparam.nn.mobileone(2)
    choices: list[str | reparam.nn.Recipe | list[str | reparam.nn.Branch]] = [
        "repvgg", recipe, ["1x1", reparam.nn.dilated(2)]
    ]  # fmt: skip
    for given in choices:
        wide: nn.Module = reparam.expand(model, given, where=("0",), calibrate=[x])
    block: nn.Module = reparam.nn.block(nn.Conv2d(8, 8, 3, padding=1), "acnet", norm=nn.BatchNorm2d(8))
    assert len([*wide.parameters(), *block.parameters()]) > len([*model.parameters()])
    restored: nn.Module = reparam.restore(reparam.fuse(model), build, calibrate=[x])
    return restored


def files(model: nn.Module, x: Tensor, folder: Path) -> Verification:
    """Draw a plan, and write a program that is compared with the model."""
    plan: Plan = reparam.plan(model, example_inputs=x)
    drawn: list[Path] = [plan.draw(folder / "net.svg", module="0"), plan.draw_ranges(folder / "ranges.png")]
    widest: list[float] = [entry.spread_after for entry in plan.ranges()]
    text: str = plan.to_markdown()
    plan.show(file=io.StringIO())
    assert all(file.exists() for file in drawn)
    assert widest
    assert text
    return reparam.export(plan.apply(), x, folder / "net.pt2", original=model)


def main() -> None:
    model = build().eval()
    x: Tensor = torch.randn(1, 3, 8, 8)
    fused: nn.Module = reparam.fuse(
        model, cost=by_launches, exclude=("head.*", nn.Linear, is_head), only=("*",), example_inputs=x
    )
    print(report(reparam.plan(model, cost=reparam.cost.always, liftings=reparam.LIFTINGS)))
    result: Verification = reparam.verify(model, fused, x, modules=True)
    worst: float = max(difference.error for difference in result.outputs)
    agree: bool = result.ok and result.cause is Cause.ROUNDING
    print(agree, worst < 1e-5, result.where)
    shown: Difference = result.outputs[0]
    data: dict[str, Any] = result.to_dict()
    assert (shown.name, data["ok"]) == ("output", True)
    operations, error = told(reparam.receipt(fused))
    print(operations, error is not None and error < 1e-9, declared())
    slow: Cost = reparam.measured(x)
    assert reparam.DEFAULT_COST(Work(1.0, 0.0, 1, 1)) > 0
    print(type(branches(model, x)).__name__, len(reparam.plan(model, cost=slow).regions))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        reparam.save_deploy(fused, path, source="typed_user")
        loaded = reparam.load_deploy(build, path, fuse=partial(reparam.fuse, cost=by_launches))
        torch.save({"model": model.state_dict()}, Path(folder) / "net.pth")
        where: str = reparam.load_checkpoint(model, Path(folder) / "net.pth")
        program: Verification = files(model, x, Path(folder))
    print(type(loaded).__name__, where, program.ok)
    net: RepVGG = repvgg_a0(num_classes=10)
    load_weights(net, net.state_dict())
    try:
        reparam.fuse(net)
    except reparam.TrainingModeError as wrong:
        print(str(wrong).partition(",")[0])
    except reparam.CheckError as failed:
        print(failed.verification.detail)
    try:
        reparam.nn.block(nn.Conv2d(8, 8, 1), "acnet")
    except reparam.BlockError:
        print("no block")
    except reparam.MissingPackageError:
        print("no package")
    except reparam.ReparamError as refused:
        print(str(refused).partition(",")[0])


if __name__ == "__main__":
    main()
