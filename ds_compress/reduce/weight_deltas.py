"""Updated weights, sent as int8 or int4 differences to what the other processes have.

Every process holds a copy of all weights, flat and cut into equal slices, and the exact fp32 weights of its own slice.
After a step the owner of a slice encodes (exact - copy) and everybody, the owner too, adds what was encoded to the
copy: copies stay identical to the bit, and what a message lost is part of the next difference. A refresh sends the
slices themselves.

A weight that has become exactly zero (a mask) has to be zero in the copies at once, and a rounded difference cannot
promise that. So a step in which some weight becomes zero is a refresh; a weight that was zero and stays
zero has difference zero, and its copy stays exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.pipeline import pipelined


class CopiedWeights:
    """The copies of one flat group of weights.

    Args:
        copies: (W * n,) the flat copies, any float dtype; slice r belongs to process r of `group`. At first, the own
            slice is the rounded exact one.
        piece_elements: elements of all slices that travel at a time.
    """

    def __init__(
        self, copies: torch.Tensor, group: Any, codec: BlockCodec, piece_elements: int = 1 << 20
    ) -> None:
        self.copies, self.group, self.codec = copies, group, codec
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.slice_numel = copies.numel() // self.world_size
        self._quantum = max(1, piece_elements // self.world_size // codec.block) * codec.block
        # The optimizer overwrites the own slice before anybody is told: what the others have is kept here.
        self._told = self._own.clone()

    @property
    def _own(self) -> torch.Tensor:
        return self.copies[self.rank * self.slice_numel : (self.rank + 1) * self.slice_numel]

    @torch.no_grad()
    def has_new_zeros(self, exact: torch.Tensor) -> bool:
        """Whether a weight of the own slice has become zero since the others were last told; not a collective."""
        return bool(((exact.to(self._told.device) == 0) & (self._told != 0)).any())

    @torch.no_grad()
    def refresh(self, exact: torch.Tensor) -> None:
        """All copies become the rounded exact weights. exact: fp32 (n,), the own slice."""
        self._told.copy_(exact)
        dist.all_gather_into_tensor(self.copies, self._told, group=self.group)

    @torch.no_grad()
    def update(self, exact: torch.Tensor) -> None:
        """All copies move to the exact weights as far as the codes go. exact: fp32 (n,), the own slice."""
        exact = exact.to(self._told.device)

        def start(piece: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
            cut = slice(piece * self._quantum, min((piece + 1) * self._quantum, self.slice_numel))
            difference = exact[cut] - self._told[cut]
            message = torch.empty(
                self.codec.message_bytes(difference.numel()), dtype=torch.uint8, device=difference.device
            )
            self.codec.encode(difference, message)
            received = message.new_empty((self.world_size, message.numel()))
            work = dist.all_gather_into_tensor(received.view(-1), message, group=self.group, async_op=True)
            return work, received, message

        def finish(piece: int, wire: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
            work, received, _ = wire
            work.wait()
            begin = piece * self._quantum
            numel = min(self._quantum, self.slice_numel - begin)
            step = torch.empty(numel, device=received.device)
            for owner, message in enumerate(received):
                self.codec.decode(message, step)
                if owner == self.rank:
                    target = self._told[begin : begin + numel]
                else:
                    first = owner * self.slice_numel + begin
                    target = self.copies[first : first + numel]
                # In fp32 and rounded once, by the same instructions in every process.
                target.copy_(step.add_(target))

        pipelined(range(-(-self.slice_numel // self._quantum)), start, finish)
        self._own.copy_(self._told)


@torch.no_grad()
def gather_encoded(
    shards: list[torch.Tensor], group: Any, codec: BlockCodec
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Starts an all-gather of the encoded shards, one message each; (work, received (W, bytes), sent).

    shards: flat, of equal sizes in every process.
    """
    sizes = [codec.message_bytes(shard.numel()) for shard in shards]
    sent = torch.empty(sum(sizes), dtype=torch.uint8, device=shards[0].device)
    for shard, message in zip(shards, sent.split(sizes), strict=True):
        codec.encode(shard, message)
    received = sent.new_empty((dist.get_world_size(group), sent.numel()))
    work = dist.all_gather_into_tensor(received.view(-1), sent, group=group, async_op=True)
    return work, received, sent
