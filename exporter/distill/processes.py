"""One process or several: gradients are summed over those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's rank, how many there are, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @staticmethod
    def join(device: str) -> Processes:
        """From torchrun's environment; alone without it."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return Processes()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(BACKENDS[device])
        return Processes(int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"]))

    def leave(self) -> None:
        """End the group, when all have come so far."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def told(self, word: str | None) -> str | None:
        """Process 0's ``word`` on all of them."""
        words = [word]
        if self.world > 1:
            dist.broadcast_object_list(words, 0)
        return words[0]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes that of process 0, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)
