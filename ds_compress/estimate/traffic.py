"""What one collective sends: bytes of a process, and bytes that leave a node.

All-reduce, all-gather and reduce-scatter count as rings over the ranks in order (NCCL's; gloo sends more in a
reduce-scatter). A ring leaves each node by one of its processes; an all-to-all by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_compress.estimate.run_layout import RunLayout


@dataclass(frozen=True)
class Traffic:
    """Of one step. sent: bytes, the mean over processes. leaving: bytes from all processes of one node to other nodes;
    where each node has one process, the same. collectives: how many are started."""

    sent: float = 0.0
    leaving: float = 0.0
    collectives: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent + other.sent, self.leaving + other.leaving, self.collectives + other.collectives
        )

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.sent * factor, self.leaving * factor, self.collectives * factor)


@dataclass(frozen=True)
class Collectives:
    """Those of a run with this layout; sizes in bytes."""

    layout: RunLayout

    def all_reduce(self, nbytes: float) -> Traffic:
        """nbytes: of the tensor that every process has."""
        return self.all_gather(nbytes) * 2 + Traffic(collectives=-1) if self._sends else Traffic()

    def all_gather(self, nbytes: float) -> Traffic:
        """nbytes: of the result."""
        if not self._sends:
            return Traffic()
        sent = nbytes * (1 - 1 / self.layout.world_size)
        return Traffic(sent, sent if self.layout.nodes > 1 else 0.0, 1)

    def reduce_scatter(self, nbytes: float) -> Traffic:
        """nbytes: of the tensor that every process has."""
        return self.all_gather(nbytes)

    def all_to_all(self, nbytes: float, count: float = 1) -> Traffic:
        """nbytes: of all payloads of one process, its own included, in `count` collectives."""
        layout = self.layout
        if not self._sends:
            return Traffic()
        leaving = layout.ranks_per_node * nbytes * (1 - layout.ranks_per_node / layout.world_size)
        return Traffic(nbytes * (1 - 1 / layout.world_size), leaving, count)

    def within_node(self, nbytes: float, count: float = 1) -> Traffic:
        """An all-to-all of so many bytes, or an all-gather with such a result, in each node."""
        return Traffic(nbytes * (1 - 1 / self.layout.ranks_per_node), 0.0, count)

    def between_nodes(self, nbytes: float, count: float = 1) -> Traffic:
        """Likewise between the processes that have one local rank, a process on each node."""
        sent = nbytes * (1 - 1 / self.layout.nodes)
        return Traffic(sent, sent * self.layout.ranks_per_node, count)

    @property
    def _sends(self) -> bool:
        return self.layout.world_size > 1
