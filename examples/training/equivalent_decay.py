"""Weight decay of the kernel that parallel branches amount to, in place of the decay of every branch's own kernel.

Branches Σ_b norm_b(conv_b(x)) fuse to one kernel W. With t_b = γ_b / sqrt(var_b + ε), one factor per output channel,
its tap at offset a is

    W[a] = Σ t_b · K_b[a]      over the branches b whose kernel reaches a

and the penalty that replaces Σ_b ‖K_b‖² is

    L = Σ_a ‖W[a]‖² / Σ t_b²   over the same branches; the t_b are constants

The divisor makes L independent of a factor that all t_b share. Where one branch alone reaches, the summand is
‖K_b[a]‖², as in ordinary decay. A branch without a convolution has no kernel to decay and does not count.

For RepVGG's 3×3 and 1×1 it is the "custom L2" of the code that was published with arXiv 2101.03697: the eight outer
taps of K_3×3 are decayed as they are, the middle as (t_3×3 · K_3×3[0] + t_1×1 · K_1×1)² / (t_3×3² + t_1×1²).

The branches are found in what `torch.fx` reads of the forward, whatever their classes are called.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from common import InputError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
SMALLEST = 1e-12  # divisor where all γ are 0


@dataclass(frozen=True)
class Branch:
    """A convolution whose result goes to a batch norm and nowhere else."""

    conv: _ConvNd
    norm: _BatchNorm

    @property
    def factor(self) -> Tensor:
        """t, (out, 1, ...), as a constant."""
        assert self.norm.running_var is not None
        factor = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        return factor.detach().view(-1, *[1] * (self.conv.weight.ndim - 1))

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """Least and largest offset of the taps, per axis."""
        assert not isinstance(self.conv.padding, str)
        return tuple(
            (-before, dilation * (extent - 1) - before)
            for before, dilation, extent in zip(
                self.conv.padding, self.conv.dilation, self.conv.kernel_size, strict=True
            )
        )


@dataclass(frozen=True)
class Branches:
    """Two or more branches of one input whose sum is one convolution."""

    members: tuple[Branch, ...]

    @property
    def kernels(self) -> list[Tensor]:
        """Of all branches."""
        return [branch.conv.weight for branch in self.members]

    def penalty(self) -> Tensor:
        """L of the module's docstring, a scalar through which the kernels get gradients."""
        boxes = [branch.box for branch in self.members]
        least = [min(box[axis][0] for box in boxes) for axis in range(len(boxes[0]))]
        most = [max(box[axis][1] for box in boxes) for axis in range(len(boxes[0]))]
        shape = (*self.kernels[0].shape[:2], *(high - low + 1 for low, high in zip(least, most, strict=True)))
        weight = self.kernels[0].new_zeros(shape)
        divisor = self.kernels[0].new_zeros((shape[0], 1, *shape[2:]))
        for branch, box in zip(self.members, boxes, strict=True):
            taps = (
                slice(None),
                slice(None),
                *(
                    slice(low - start, high - start + 1, dilation)
                    for (low, high), start, dilation in zip(box, least, branch.conv.dilation, strict=True)
                ),
            )
            here = torch.zeros_like(weight)
            here[taps] = branch.factor * branch.conv.weight
            weight = weight + here
            divisor[taps] += branch.factor**2
        return (weight**2 / divisor.clamp_min(SMALLEST)).sum()


def penalty(groups: Sequence[Branches]) -> Tensor:
    """The sum over all groups, a scalar."""
    return torch.stack([group.penalty() for group in groups]).sum()


def branches_of(net: nn.Module) -> list[Branches]:
    """All groups of parallel branches of a net.

    Raises:
        InputError: `torch.fx` cannot read the net, or it has no such branches.
    """
    try:
        graph = Reader().trace(net)
    except Exception as error:  # whatever the net's forward does with a value that is not a tensor
        raise InputError(f"--equivalent-decay: torch.fx cannot read this net ({error}); leave it out") from error
    groups = [Branches(tuple(members)) for members in candidates(graph, dict(net.named_modules())) if len(members) > 1]
    if not groups:
        raise InputError(
            "--equivalent-decay: no parallel branches of convolution and batch norm were found; take a net that has "
            "some, or leave it out"
        )
    return groups


class Reader(fx.Tracer):
    """Reads through every module but convolutions and norms."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of the module stay calls."""
        return isinstance(m, _ConvNd | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def candidates(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[list[Branch]]:
    """Branches that are summed, by everything that must agree."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if not is_sum(node) or within_a_sum(node):
            continue
        found: dict[tuple[object, ...], list[Branch]] = defaultdict(list)
        for term in terms(node):
            inner = term.args[0] if term.op == "call_module" else None
            if not isinstance(inner, fx.Node) or inner.op != "call_module" or len(inner.users) > 1:
                continue
            norm, conv = modules[str(term.target)], modules[str(inner.target)]
            if not calls.count(term.target) == calls.count(inner.target) == len(term.users) == 1:
                continue
            if is_branch_norm(norm) and is_branch_conv(conv):
                key = (inner.args[0], conv.stride, conv.groups, conv.weight.shape[:2], slack(conv))
                found[key].append(Branch(conv, norm))
        yield from found.values()


def is_sum(node: fx.Node) -> bool:
    return node.target in SUMS and "alpha" not in node.kwargs


def within_a_sum(node: fx.Node) -> bool:
    return len(node.users) == 1 and is_sum(next(iter(node.users)))


def terms(node: fx.Node) -> Iterator[fx.Node]:
    """What is added, through sums that are used nowhere else."""
    for argument in node.args:
        if isinstance(argument, fx.Node):
            if is_sum(argument) and within_a_sum(argument):
                yield from terms(argument)
            else:
                yield argument


def is_branch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """A batch norm with its own statistics; timm's, which hold an activation, where that is the identity."""
    bare = isinstance(module, NORMS) and all(isinstance(child, nn.Identity) for child in module.children())
    return bare and module.affine and module.track_running_stats


def is_branch_conv(module: nn.Module) -> TypeGuard[_ConvNd]:
    direct = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    return direct and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def slack(conv: _ConvNd) -> tuple[int, ...]:
    """What decides the size of the output beside the stride, per axis."""
    assert not isinstance(conv.padding, str)
    axes = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return tuple(2 * padding - dilation * (extent - 1) for padding, dilation, extent in axes)
