"""The processes of a save or a load: who writes for all, and how a failure of one reaches the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those that share a checkpoint.

    rank, count: among all. leader: who writes what a folder needs once; one process where all see one folder, one on
    every machine where each machine has its own (`"use_node_local_storage": true`). part, parts: its share of the work
    on the files of a folder.
    """

    rank: int = 0
    count: int = 1
    leader: int = 0
    part: int = 0
    parts: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == self.leader

    @classmethod
    def of(cls, engine: Any = None) -> Processes:
        if not dist.is_initialized():
            return cls()
        rank, count = dist.get_rank(), dist.get_world_size()
        if engine is not None and engine.use_node_local_storage():
            local, together = int(engine.local_rank), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            # Launchers number the processes of a machine in a row.
            return cls(rank, count, rank - local, local, max(together, local + 1))
        return cls(rank, count, 0, rank, count)

    def gather(self, own: Any) -> list[Any]:
        """What every process gives, small and picklable, by rank; a collective."""
        if self.count == 1:
            return [own]
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, own)
        return everyone

    def from_first(self, value: Any) -> Any:
        """What the first process gives; a collective."""
        if self.count == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]
