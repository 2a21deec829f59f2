"""Devices that are not here: tensors that have a device and no data say whether two of them meet.

Operations of a fake tensor on a CUDA device and one on the CPU raise the error that they raise on a machine with CUDA.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import Block, C, conv, conv_norm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import reparam
from reparam.models import repvgg_a0


class Sum(nn.Module):
    """The sum of branches, and an activation."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(branch(x) for branch in self.branches))


class Scaled(nn.Module):
    """Scales and shifts written out, numbers and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3)
        self.gain, self.shift = nn.Parameter(torch.ones(C, 1, 1)), nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu((self.conv(x) * self.gain + self.shift) * 0.5 + x / 3 - 1)


class Moved(nn.Module):
    """Channels that are split and put together, pools that leave the padding out, norms in front of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = conv(3), nn.BatchNorm2d(C), conv(1)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(x).chunk(2, 1)
        return torch.relu(self.pool(self.conv(x)) - x) + self.last(torch.cat([b, a], 1))


def pool() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, 1, 1)


def normed(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(C))


NETS: dict[str, Callable[[], nn.Module]] = {
    "pool + conv": lambda: Sum(pool(), conv(3)),
    "conv + pool": lambda: Sum(conv(3), pool()),
    "norms": lambda: Sum(normed(pool()), conv_norm(3), nn.BatchNorm2d(C)),
    "conv, pool": lambda: Sum(nn.Sequential(conv(1), nn.AvgPool2d(2))),
    "pool, conv": lambda: Sum(nn.Sequential(nn.AvgPool2d(2), conv(3))),
    "both": lambda: Sum(normed(nn.Sequential(conv(1), nn.AvgPool2d(2))), nn.Sequential(nn.AvgPool2d(2), conv(1))),
    "pad": lambda: Sum(nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)), conv(1)),
    "block": Block,
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(C, C, 2, 2), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)),
    "linear": lambda: nn.Sequential(
        nn.BatchNorm2d(C), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 3), nn.BatchNorm1d(3)
    ),
    "scaled": Scaled,
    "moved": Moved,
    "repvgg": lambda: repvgg_a0(num_classes=5),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without data, of which every condition holds."""

    def answers(name: str, answer: Any) -> None:
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self: answer if isinstance(self, FakeTensor) else real(self))

    for name, answer in {"__bool__": True, "__float__": 0.0, "__int__": 1, "item": 0.0}.items():
        answers(name, answer)
    monkeypatch.setattr(torch, "equal", lambda a, b: a.shape == b.shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def test_two_devices_do_not_meet(fake: None) -> None:
    """What these tests are built on."""
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_a_model_on_a_cuda_device(fake: None, net: Callable[[], nn.Module], check: bool) -> None:
    with torch.device("cuda"):
        model = net().eval()
    plan = reparam.plan(model)
    assert plan.regions
    fused = plan.apply(inplace=True, check=check)
    assert {tensor.device.type for tensor in (*fused.parameters(), *fused.buffers())} == {"cuda"}
    assert not reparam.plan(fused).regions


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_a_model_on_the_meta_device(net: Callable[[], nn.Module]) -> None:
    real = reparam.fuse(net().eval())
    with torch.device("meta"):
        model = net().eval()
    fused = reparam.fuse(model)
    assert {name: value.shape for name, value in fused.state_dict().items()} == {
        name: value.shape for name, value in real.state_dict().items()
    }
    assert all(value.is_meta for value in fused.state_dict().values())
