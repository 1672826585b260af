"""Which processes of a group share a node, and the intra-node and inter-node groups that follow from it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

NODE_VARIABLE = "DS_COMPRESS_HOST"
"""Overrides the host name, for nodes that share one (containers, network namespaces)."""


class UnevenNodesError(ValueError):
    """Nodes run different numbers of processes."""


@dataclass(frozen=True)
class Layout:
    """ranks[n][l]: the process with local rank l on node n, as a rank of the group; nodes in order of first rank."""

    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Layout:
        """From the node name of each rank; raises UnevenNodesError."""
        by_name: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            by_name.setdefault(name, []).append(rank)
        if len({len(ranks) for ranks in by_name.values()}) > 1:
            counts = ", ".join(f"{len(ranks)} on {name}" for name, ranks in by_name.items())
            raise UnevenNodesError(
                f"hierarchical needs as many processes on each node as on any other: {counts}"
            )
        return cls(tuple(map(tuple, by_name.values())))

    @property
    def num_nodes(self) -> int:
        return len(self.ranks)

    @property
    def ranks_per_node(self) -> int:
        return len(self.ranks[0])

    def locate(self, rank: int) -> tuple[int, int]:
        """(node, local rank) of a rank of the group."""
        for node, ranks in enumerate(self.ranks):
            if rank in ranks:
                return node, ranks.index(rank)
        raise ValueError(f"no rank {rank} in {self.ranks}")


@dataclass(frozen=True)
class Nodes:
    """The layout, the place of this process in it, and its groups.

    intra_node: the processes of this node. inter_node: those with the same local rank on every node, in order of nodes.
    """

    layout: Layout
    node: int
    local_rank: int
    intra_node: Any
    inter_node: Any


def node_name() -> str:
    """What distinguishes this node from the others."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


def find_nodes(group: Any) -> Nodes | None:
    """The nodes of `group`; None when each process has its own, so that there is no intra-node sum.

    Makes process groups, so *every* process of the default group has to call it.

    Raises:
        UnevenNodesError: on all processes alike.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    names: list[Any] = [None] * size
    dist.all_gather_object(names, node_name(), group=group)
    layout = Layout.of(names)
    if layout.ranks_per_node == 1:
        return None

    def made(ranks: Sequence[int]) -> Any:
        return dist.new_group([dist.get_global_rank(group, r) if group else r for r in ranks])

    intra_node = [made(ranks) for ranks in layout.ranks]
    inter_node = [made(ranks) for ranks in zip(*layout.ranks, strict=True)]
    node, local_rank = layout.locate(rank)
    return Nodes(layout, node, local_rank, intra_node[node], inter_node[local_rank])
