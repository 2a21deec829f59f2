"""No fused net runs more operations than is committed, and the guard notices when one does."""

from functools import partial

import pytest
from torch import nn

import reparam
from benchmarks import guard

NETS = guard.present()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore")  # other packages warn while they build their nets
def test_no_count_has_grown(name: str) -> None:
    assert guard.regressions(guard.committed(), {name: guard.counts(NETS[name])}) == []


def test_every_net_is_committed() -> None:
    assert list(guard.committed()) == list(guard.NETS)


@pytest.mark.parametrize(
    ("worse", "grown"),
    [
        pytest.param(lambda net: net, {"conv", "norm", "add", "calls", "multiply_adds", "parameters"}, id="unfused"),
        pytest.param(partial(reparam.fuse, exclude=("*.skip",)), {"norm", "add", "calls"}, id="a norm is left"),
    ],
)
def test_a_worse_net_is_noticed(worse: guard.Fuse, grown: set[str]) -> None:
    name = "RepVGG, groups and squeeze-excite"
    found = guard.regressions(guard.committed(), {name: guard.counts(NETS[name], worse)})
    assert grown <= {line.split(": ")[1].split()[0] for line in found}


def test_one_more_addition_is_noticed() -> None:
    class OneMore(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):  # type: ignore[no-untyped-def]
            y = self.net(x)
            return y + y

    name = "diverse branch block"
    found = guard.regressions(
        guard.committed(), {name: guard.counts(NETS[name], lambda net: OneMore(reparam.fuse(net)))}
    )
    assert found == [f"{name}: add 0 -> 1", f"{name}: calls 2 -> 3"]


def test_fewer_operations_pass() -> None:
    assert guard.regressions({"net": {"conv": 2}}, {"net": {"conv": 1}}) == []
