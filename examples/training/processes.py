"""One process or many: who am I, which device is mine, and what do all of us have together.

Started by `torchrun`, every process finds its place in the environment; started by `python`, there is one process, and
everything here is the identity.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import InputError, chosen_device

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The processes of one training, seen from one of them.

    Args:
        rank: of this process, 0 to count - 1.
        count: of processes, on all nodes.
        device: that this process computes on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, as a new tensor."""
        summed = values.clone()
        if self.count > 1:
            dist.all_reduce(summed)
        return summed

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, by rank, on every process."""
        values: list[Value] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, net: nn.Module) -> None:
        """Give every process the buffers of process 0: statistics of batch norms are those of each process's images."""
        if self.count > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device_name: str) -> Iterator[Processes]:
    """The processes that `torchrun` has started, connected (nccl on CUDA, else gloo); or this one alone.

    Args:
        device_name: `auto`, or what `torch.device` understands. With several processes on one node, each takes the CUDA
            device that has its local rank.

    Raises:
        InputError: the device cannot be used, or there are fewer CUDA devices than processes on this node.
    """
    count, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = chosen_device(device_name)
    if "RANK" not in os.environ:
        yield Processes(0, 1, device)
        return
    if device.type == "mps":
        raise InputError("several processes cannot share one mps device: start with python, or take --device cpu")
    if device.type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > torch.cuda.device_count():
            raise InputError(
                f"{here} processes on a node with {torch.cuda.device_count()} CUDA devices; each process needs one of "
                f"its own: torchrun --nproc-per-node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()
