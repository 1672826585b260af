"""Updated weights, sent as int8 or int4 deltas to the replicas that the other processes hold.

Every process holds a replica of all weights, flat and divided into equal slices, and the exact fp32 weights of its own
slice. After a step the owner of a slice encodes (exact - replica), and all processes, the owner too, add what was
encoded to their replica: replicas stay identical to the bit, and the quantization error is part of the next delta. A
refresh sends the slices themselves.

A weight that has become exactly zero (a mask) has to be zero in the replicas at once, which a rounded delta cannot
guarantee. So a step in which some weight becomes zero is a refresh; a weight that was zero and stays zero has delta
zero, and its replica stays exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.pipeline import pipelined


class ReplicatedWeights:
    """The replicas of one flat group of weights.

    Args:
        replicas: (W * n,) the flat replica, any float dtype; slice r belongs to process r of `group`. At first, the own
            slice is the rounded exact one.
        chunk_elements: elements of all slices that are sent at a time.
    """

    def __init__(
        self, replicas: torch.Tensor, group: Any, codec: BlockCodec, chunk_elements: int = 1 << 20
    ) -> None:
        self.replicas, self.group, self.codec = replicas, group, codec
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.slice_numel = replicas.numel() // self.world_size
        self._chunk_numel = max(1, chunk_elements // self.world_size // codec.block) * codec.block
        # The optimizer overwrites the own slice before it is sent: this is what the other processes have.
        self._last_sent = self._own.clone()

    @property
    def _own(self) -> torch.Tensor:
        return self.replicas[self.rank * self.slice_numel : (self.rank + 1) * self.slice_numel]

    @torch.no_grad()
    def has_new_zeros(self, exact: torch.Tensor) -> bool:
        """Whether a weight of the own slice has become zero since it was last sent; not a collective."""
        return bool(((exact.to(self._last_sent.device) == 0) & (self._last_sent != 0)).any())

    @torch.no_grad()
    def refresh(self, exact: torch.Tensor) -> None:
        """All replicas become the rounded exact weights. exact: fp32 (n,), the own slice."""
        self._last_sent.copy_(exact)
        dist.all_gather_into_tensor(self.replicas, self._last_sent, group=self.group)

    @torch.no_grad()
    def update(self, exact: torch.Tensor) -> None:
        """All replicas move to the exact weights, up to quantization error. exact: fp32 (n,), the own slice."""
        exact = exact.to(self._last_sent.device)

        def start(chunk: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
            cut = slice(chunk * self._chunk_numel, min((chunk + 1) * self._chunk_numel, self.slice_numel))
            difference = exact[cut] - self._last_sent[cut]
            payload = torch.empty(
                self.codec.payload_bytes(difference.numel()), dtype=torch.uint8, device=difference.device
            )
            self.codec.encode(difference, payload)
            received = payload.new_empty((self.world_size, payload.numel()))
            work = dist.all_gather_into_tensor(received.view(-1), payload, group=self.group, async_op=True)
            return work, received, payload

        def finish(chunk: int, in_flight: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
            work, received, _ = in_flight
            work.wait()
            begin = chunk * self._chunk_numel
            numel = min(self._chunk_numel, self.slice_numel - begin)
            step = torch.empty(numel, device=received.device)
            for owner, payload in enumerate(received):
                self.codec.decode(payload, step)
                if owner == self.rank:
                    target = self._last_sent[begin : begin + numel]
                else:
                    first = owner * self.slice_numel + begin
                    target = self.replicas[first : first + numel]
                # In fp32 and rounded once, by the same instructions in every process.
                target.copy_(step.add_(target))

        pipelined(range(-(-self.slice_numel // self._chunk_numel)), start, finish)
        self._own.copy_(self._last_sent)
