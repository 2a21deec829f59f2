"""`reparam.restore`: a fused net gets its branches back, and computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import conv, conv_norm, difference, images, ready, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import reparam


def repvgg() -> nn.Module:
    return reparam.models.RepVGG(depths=(1, 2, 2), widths=(8, 16, 16), strides=(2, 2, 2), num_classes=10)


def stack() -> nn.Sequential:
    return nn.Sequential(
        *(conv(c_in=3, c_out=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 5, 2, 2, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 16, 3),
    )


class Residual(nn.Module):
    """Two inputs of one sum, a norm before a convolution without padding, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.thin = conv_norm(c_in=3), conv_norm(), conv_norm(1)
        self.before, self.valid = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = (x + self.two(x) + self.thin(x)).relu()
        x = self.valid(self.before(x)).relu()
        return self.head(self.norm(x.mean((2, 3))))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": repvgg,
    "residual": Residual,
    **{
        f"expanded by {preset}": lambda preset=preset: reparam.expand(stack().eval(), preset, preserve=False)
        for preset in reparam.nn.PRESETS
    },
}


@pytest.mark.parametrize("name", BUILDS)
def test_branches_come_back_and_the_function_stays(name: str) -> None:
    torch.manual_seed(0)
    build = BUILDS[name]
    net = ready(build())
    fused = reparam.fuse(net)
    before = snapshot(fused)
    for given in (fused, fused.state_dict()):
        restored = reparam.restore(given, build)
        assert type(restored) is type(net)
        assert not restored.training
        assert {k: v.shape for k, v in restored.state_dict().items()} == {
            k: v.shape for k, v in net.state_dict().items()
        }
        for size in ((17, 18), (20, 15)):
            same(fused, restored, images(size, channels=3))
        again = reparam.fuse(restored)
        same(fused, again, images((17, 18), channels=3))
        assert again.state_dict().keys() == fused.state_dict().keys()
    assert difference(before, snapshot(fused)) == 0


def test_branches_start_as_they_are_built() -> None:
    torch.manual_seed(0)
    fused = reparam.fuse(ready(repvgg()))
    torch.manual_seed(1)
    built = repvgg()
    torch.manual_seed(1)
    restored = reparam.restore(fused, repvgg)
    for block, new in zip(built.stages.modules(), restored.stages.modules(), strict=True):
        if isinstance(block, reparam.models.RepVGGBlock):
            assert torch.equal(new.pointwise.conv.weight, block.pointwise.conv.weight.double())
            assert not torch.allclose(new.dense.conv.weight, block.dense.conv.weight.double())


def test_calibrated_it_computes_the_same_in_training_mode() -> None:
    torch.manual_seed(0)
    fused = reparam.fuse(ready(repvgg()))
    x = images((40, 40), channels=3, batch=16)
    restored = reparam.restore(fused, repvgg, calibrate=[x])
    same(fused, restored, x)
    same(fused, restored.train(), x, tolerance=1e-8)


def test_it_goes_on_training() -> None:
    torch.manual_seed(0)
    fused = reparam.fuse(ready(repvgg()))
    x = images((40, 40), channels=3, batch=8)
    restored = reparam.restore(fused, repvgg, calibrate=[x]).train()
    restored(x).square().mean().backward()
    for name, parameter in restored.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_published_size() -> None:
    """RepVGG-A0 in single precision."""
    torch.manual_seed(0)
    fused = reparam.fuse(reparam.models.repvgg_a0(num_classes=10).eval())
    restored = reparam.restore(fused, lambda: reparam.models.repvgg_a0(num_classes=10))
    x = torch.randn(1, 3, 64, 64)
    assert {p.dtype for p in restored.parameters()} == {torch.float32}
    assert difference(fused(x), restored(x)) < 1e-4
    skips = [m for m in restored.modules() if isinstance(m, reparam.models.RepVGGBlock) and m.skip is not None]
    assert len(skips) == 17


def test_norms_written_as_functions_take_the_shift() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.thin, self.norm = conv(3, 3), conv(1, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.norm
            y = self.conv(x) + self.thin(x)
            return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    fused = reparam.fuse(ready(Functional()))
    restored = reparam.restore(fused, Functional)
    assert restored.state_dict().keys() == Functional().state_dict().keys()
    same(fused, restored, images(channels=3))


def narrow() -> nn.Module:
    """Fused where fewest operations are asked for: no single kernel can hold any product of the two."""
    return nn.Sequential(nn.Conv2d(6, 2, 1, bias=False), nn.Conv2d(2, 6, 1))


BAD: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "another architecture": (lambda: reparam.fuse(repvgg().eval()), stack, {}, "missing: .*not known: stages"),
    "another width": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), lambda: nn.Sequential(nn.Conv2d(3, 5, 1)), {},
        "of another shape: 0.weight, 0.bias",
    ),
    "a module": (lambda: reparam.fuse(repvgg().eval()), repvgg(), {}, "found RepVGG: write lambda"),
    "no kernel": (
        lambda: {"0.weight": torch.randn(6, 6, 1, 1), "0.bias": torch.zeros(6)}, narrow,
        {"cost": reparam.cost.always}, "lose channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error(case: str) -> None:
    make, build, options, message = BAD[case]
    with pytest.raises(reparam.ReparamError, match=message):
        reparam.restore(make(), build, **options)
