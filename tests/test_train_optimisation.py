"""What the training example decays, how its learning rate goes, how its average follows."""

import itertools
import math

import pytest
import torch
from nets import randomise
from torch import Tensor, nn

import reparam
from common import InputError, build
from reparam.models import RepVGGBlock
from training import equivalent_decay, optimisation


class TestOptimisation:
    def test_only_kernels_are_decayed(self) -> None:
        net = build("small", 10)
        decayed, others = optimisation.decay_groups(net, 1e-4)
        kernels = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert {*decayed["params"]} == {*kernels}
        assert len(decayed["params"]) + len(others["params"]) == len(list(net.parameters()))
        assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0)

    def test_vectors_are_known_by_shape_and_kernels_by_owner(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
                self.matrix = nn.Parameter(torch.ones(4, 4))
                self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
                self.narrow = nn.Linear(4, 1)
                self.norm = nn.LayerNorm((4, 4))
                self.again = self.narrow

        net = Odd()
        decayed, others = optimisation.decay_groups(net, 1)
        assert {*decayed["params"]} == {net.matrix, net.narrow.weight}
        assert {*others["params"]} == {net.scale, net.narrow.bias, *net.norm.parameters()}

    def test_rate_rises_in_a_line_and_falls_as_a_cosine(self) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.5)
        schedule = optimisation.cosine(optimizer, 4, 12)
        rates = []
        for _ in range(12):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
        assert rates[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0)

    def test_average_follows_weights_and_statistics(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        average = optimisation.average_of(net)
        expected: dict[str, Tensor] = {}
        for step in range(12):
            randomise(net, seed=step)
            optimisation.follow(average, net, 0.3, step)
            share = min(0.3, (1 + step) / (10 + step)) if step else 0
            for key, value in net.state_dict().items():
                expected[key] = share * expected.get(key, 0) + (1 - share) * value
        for key, value in average.module.state_dict().items():
            if value.is_floating_point():
                assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-6), key


class Parallel(nn.Module):
    """Kernels of several shapes, dilations and places, with a residual connection and a stranger in the sum."""

    def __init__(self) -> None:
        super().__init__()

        def branch(kernel: tuple[int, int], padding: tuple[int, int], dilation: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(4, 6, kernel, 2, padding, dilation, groups=2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(6))

        self.parallel = nn.ModuleList(
            [branch((3, 3), (1, 1)), branch((1, 3), (0, 1)), branch((1, 1), (0, 0)), branch((3, 3), (2, 2), 2)]
        )
        self.stranger = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))  # one group

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(branch(x) for branch in self.parallel) + self.stranger(x))


class TestEquivalentDecay:
    def test_it_is_the_fused_kernel_over_the_factors(self) -> None:
        """Against the kernel that `reparam.fuse` makes, which this code knows nothing of."""
        net = randomise(Parallel()).double().eval()
        (group,) = equivalent_decay.branches_of(net)
        assert group.kernels == [branch[0].weight for branch in net.parallel]

        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parallel = net.parallel

            def forward(self, x: Tensor) -> Tensor:
                return sum(branch(x) for branch in self.parallel)  # type: ignore[return-value]

        fused = reparam.fuse(Sum().eval(), cost=reparam.cost.always)
        (conv,) = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
        assert conv.kernel_size == (5, 5)
        reached = torch.zeros(4, 5, 5)  # branches, rows, columns
        reached[0, 1:4, 1:4] = reached[1, 2, 1:4] = reached[2, 2, 2] = reached[3, ::2, ::2] = 1
        factors = torch.stack([b[1].weight / (b[1].running_var + b[1].eps).sqrt() for b in net.parallel])
        divisor = torch.einsum("bo,brc->orc", factors**2, reached.double())[:, None]
        taps = reached.sum(0) > 0
        assert not conv.weight[..., ~taps].any()
        expected = (conv.weight**2 / divisor)[..., taps].sum()
        assert torch.allclose(group.penalty(), expected, rtol=1e-12)

    @torch.no_grad()
    def test_a_repvgg_block_as_published(self) -> None:
        """Outer taps of the 3×3 as they are; the middle, joined with the 1×1, over the sum of squared factors."""
        block = randomise(RepVGGBlock(3, 3)).double()
        (group,) = equivalent_decay.branches_of(block)
        wide, thin = block.dense.conv.weight, block.pointwise.conv.weight
        expected = 0.0
        for out, inward in itertools.product(range(3), range(3)):
            t = [
                float(norm.weight[out] / (norm.running_var[out] + norm.eps).sqrt())
                for norm in (block.dense.norm, block.pointwise.norm)
            ]
            for row, column in itertools.product(range(3), range(3)):
                tap = float(wide[out, inward, row, column])
                if (row, column) == (1, 1):
                    expected += (t[0] * tap + t[1] * float(thin[out, inward])) ** 2 / (t[0] ** 2 + t[1] ** 2)
                else:
                    expected += tap**2
        assert float(group.penalty()) == pytest.approx(expected, rel=1e-12)

    def test_every_block_is_found_and_only_kernels_learn_from_it(self) -> None:
        net = build("small", 10)
        groups = equivalent_decay.branches_of(net)
        blocks = [module for module in net.modules() if isinstance(module, RepVGGBlock)]
        assert [len(group.members) for group in groups] == [2] * len(blocks)
        equivalent_decay.penalty(groups).backward()
        kernels = {kernel for group in groups for kernel in group.kernels}
        assert {p for p in net.parameters() if p.grad is not None} == kernels
        decayed, others = optimisation.decay_groups(net, 1e-4, kernels)
        assert decayed["params"] == [net.head.weight]
        assert kernels <= {*others["params"]}

    def test_timms_own_repvgg(self) -> None:
        timm = pytest.importorskip("timm", reason="needs the extra 'zoo'")
        assert len(equivalent_decay.branches_of(timm.create_model("repvgg_a0", num_classes=2))) == 1 + 2 + 4 + 14 + 1

    def test_factors_of_zero_give_no_number_that_is_none(self) -> None:
        block = RepVGGBlock(4, 4)
        nn.init.zeros_(block.dense.norm.weight)
        nn.init.zeros_(block.pointwise.norm.weight)
        loss = equivalent_decay.penalty(equivalent_decay.branches_of(block))
        loss.backward()
        assert loss.item() == 0
        assert bool(block.dense.conv.weight.grad.isfinite().all())

    def test_nets_without_branches_or_unreadable_ones_are_refused(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.one(self.conv(x)) + self.two(self.conv(x))

        class Unread(Shared):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() > 0 else x

        for net, reason in ((Shared(), "no parallel branches"), (Unread(), "torch.fx cannot read this net")):
            with pytest.raises(InputError, match=f"--equivalent-decay: {reason}.*leave it out"):
                equivalent_decay.branches_of(net)
