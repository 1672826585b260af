"""Which processes of a group share a machine, and the two smaller groups that follow from it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

HOST_VARIABLE = "DS_COMPRESS_HOST"
"""Overrides the host name, for machines that share one (containers, network namespaces)."""


class UnevenNodesError(ValueError):
    """Hosts run different numbers of processes."""


@dataclass(frozen=True)
class Layout:
    """ranks[h][l]: the process with place l on host h, as a rank of the group; hosts in order of first rank."""

    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Layout:
        """From the host name of each rank; raises UnevenHosts."""
        by_name: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            by_name.setdefault(name, []).append(rank)
        if len({len(ranks) for ranks in by_name.values()}) > 1:
            counts = ", ".join(f"{len(ranks)} on {name}" for name, ranks in by_name.items())
            raise UnevenNodesError(
                f"hierarchical needs as many processes on each host as on any other: {counts}"
            )
        return cls(tuple(map(tuple, by_name.values())))

    @property
    def hosts(self) -> int:
        return len(self.ranks)

    @property
    def per_host(self) -> int:
        return len(self.ranks[0])

    def place(self, rank: int) -> tuple[int, int]:
        """(host, place on the host) of a rank."""
        for host, ranks in enumerate(self.ranks):
            if rank in ranks:
                return host, ranks.index(rank)
        raise ValueError(f"no rank {rank} in {self.ranks}")


@dataclass(frozen=True)
class Nodes:
    """The layout, where this process is in it, and the groups it shares.

    inside: the processes of this host. across: the processes with the same place on every host, in order of hosts.
    """

    layout: Layout
    host: int
    place: int
    inside: Any
    across: Any


def host_name() -> str:
    """What tells this machine from the others."""
    return os.environ.get(HOST_VARIABLE) or socket.gethostname()


def find_nodes(group: Any) -> Nodes | None:
    """The hosts of `group`; None when each process has its own, so that nothing can be summed inside one.

    Makes process groups, so *every* process of the default group has to call it.

    Raises:
        UnevenHosts: on all processes alike.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    names: list[Any] = [None] * size
    dist.all_gather_object(names, host_name(), group=group)
    layout = Layout.of(names)
    if layout.per_host == 1:
        return None

    def made(ranks: Sequence[int]) -> Any:
        return dist.new_group([dist.get_global_rank(group, r) if group else r for r in ranks])

    inside = [made(ranks) for ranks in layout.ranks]
    across = [made(ranks) for ranks in zip(*layout.ranks, strict=True)]
    host, place = layout.place(rank)
    return Nodes(layout, host, place, inside[host], across[place])
