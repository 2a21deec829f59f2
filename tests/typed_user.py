"""A program of a strictly typed user: `mypy --strict` accepts it, and it runs."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import reparam
from reparam import Cause, Plan, Refusal, Region, Verification, Work
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        reparam.save_deploy(fused, path, source="typed_user")
        loaded = reparam.load_deploy(build, path, fuse=partial(reparam.fuse, cost=by_launches))
        torch.save({"model": model.state_dict()}, Path(folder) / "net.pth")
        where: str = reparam.load_checkpoint(model, Path(folder) / "net.pth")
    print(type(loaded).__name__, where)
    net: RepVGG = repvgg_a0(num_classes=10)
    load_weights(net, net.state_dict())
    try:
        reparam.fuse(net)
    except reparam.TrainingModeError as error:
        print(str(error).partition(",")[0])
    except reparam.CheckError as error:
        print(error.verification.detail)


if __name__ == "__main__":
    main()
