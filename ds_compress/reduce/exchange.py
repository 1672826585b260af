"""Sums of gradients over processes, sent in few bits: reduce-scatter and all-reduce.

Reduce-scatter: every process encodes, for each owner, the elements that the owner gets; an all-to-all sends the
payloads; the owner sums them in fp32, in the order of the ranks. One quantization. All-reduce: the same on equal
shards, then each process encodes its shard once more, an all-gather sends it, and all processes, the encoder included,
decode the same bytes: all end with identical bits.

Blocks end where a parameter ends. Segments that are `exact` are not quantized: they are sent as they are, in chunks of
their own, or by one all-reduce like DeepSpeed's where every process needs everything.

With `nodes`, the sum within each node is taken first, in fp32 and unquantized, and only that sum is encoded and sent to
the other nodes, by the process with the local rank of the receiver (the hierarchical all-reduce of Horovod and NCCL).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.reduce.codec import BlockCodec, Codec, PlainCodec
from ds_compress.reduce.nodes import Nodes
from ds_compress.reduce.pipeline import pipelined
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.slices import Part, Segment, Slices, packed, packed_numel, unpack


@dataclass
class _InFlight:
    """One chunk of an all-to-all; `received`, once `work` is done, is what each peer has sent."""

    work: Any
    received: torch.Tensor
    sent: torch.Tensor  # alive until the chunk has arrived


@dataclass(frozen=True)
class _Lane:
    """The part of a bucket that is sent with one codec."""

    slices: Slices
    codec: Codec


@dataclass
class Feedback:
    """Error feedback of one bucket: of what this process sends, and of the sums that it encodes again."""

    sent: Residuals
    summed: Residuals
    loss_scale: float = 1.0


class QuantizedSum:
    """Sums over the processes of `group`.

    Args:
        chunk_elements: elements of a bucket that are sent at a time.
        nodes: sum within a node first (see the module).
    """

    def __init__(
        self, group: Any, codec: BlockCodec, chunk_elements: int = 1 << 20, nodes: Nodes | None = None
    ) -> None:
        self.group = group
        self.codec = codec
        self.nodes = nodes
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._peers = self.world_size if nodes is None else nodes.layout.num_nodes
        self._peer_group = group if nodes is None else nodes.inter_node
        self._me = self.rank if nodes is None else nodes.node
        # Full blocks, so that no scale is sent for a part of one.
        self.chunk_numel = max(1, chunk_elements // self.world_size // codec.block) * codec.block

    # -- reduce-scatter --------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce_scatter(
        self,
        segments: Sequence[Segment],
        deliver: Callable[[Part, torch.Tensor], None],
        multiplier: float = 1.0,
        feedback: Feedback | None = None,
    ) -> None:
        """Gives each owner the sum of its segments over all processes, times `multiplier`.

        Args:
            segments: the whole bucket, with the same owners and sizes in every process.
            deliver: called for each part that this process owns with its sum, fp32 (part.numel,).
        """
        if self.world_size == 1:
            for segment in segments:
                deliver(Part(segment, 0, segment.numel), segment.values.float() * multiplier)
            return
        lanes = self._lanes(segments)
        chunks = [(lane, chunk) for lane in lanes for chunk in range(lane.slices.chunks)]

        def start(index: int) -> _InFlight:
            lane, chunk = chunks[index]
            kept = feedback if lane.codec is self.codec else None
            return self._send(self._contributions(lane.slices, chunk), lane.codec, kept)

        def finish(index: int, in_flight: _InFlight) -> None:
            lane, chunk = chunks[index]
            own = lane.slices.parts(self.rank, chunk)
            total = torch.empty(packed_numel(own), device=in_flight.received.device)
            in_flight.work.wait()
            if total.numel():
                lane.codec.sum(in_flight.received.view(self._peers, -1), total, multiplier)
            for part, values in zip(own, unpack(total, own), strict=True):
                deliver(part, values)

        pipelined(range(len(chunks)), start, finish)

    def _lanes(self, segments: Sequence[Segment]) -> list[_Lane]:
        quantized = [segment for segment in segments if not segment.exact]
        exact = [segment for segment in segments if segment.exact]
        lanes = [_Lane(Slices(quantized, self.world_size, self.chunk_numel, self.codec.block), self.codec)]
        if exact:
            plain = PlainCodec(exact[0].values.dtype)
            lanes.append(_Lane(Slices(exact, self.world_size, self.chunk_numel), plain))
        return lanes

    def _contributions(self, slices: Slices, chunk: int) -> list[tuple[list[Part], torch.Tensor]]:
        """For each peer: the parts of this chunk that it gets, and the values of this process for them (n,)."""
        parts = [slices.parts(owner, chunk) for owner in range(self.world_size)]
        device, dtype = _like(slices)
        if self.nodes is None:
            return [(own, packed(own) if own else torch.empty(0, device=device)) for own in parts]
        owners = self.nodes.layout.ranks
        by_local_rank = [
            [parts[owners[node][local_rank]] for node in range(self._peers)]
            for local_rank in range(len(owners[0]))
        ]
        empty = torch.empty(0, device=device, dtype=dtype)
        summed = self._sum_in_node(
            [torch.cat([packed(own) if own else empty for own in of_rank]) for of_rank in by_local_rank]
        )
        mine = by_local_rank[self.nodes.local_rank]
        return list(zip(mine, summed.split([packed_numel(own) for own in mine]), strict=True))

    def _sum_in_node(self, by_local_rank: list[torch.Tensor]) -> torch.Tensor:
        """The sum over the processes of this node of what they have for our local rank, fp32."""
        assert self.nodes is not None
        dtype = by_local_rank[0].dtype
        codec = PlainCodec(dtype)
        sizes = [codec.payload_bytes(values.numel()) for values in by_local_rank]
        own = sizes[self.nodes.local_rank]
        sent = torch.cat([values.view(torch.uint8) for values in by_local_rank])
        received = torch.empty(own * len(sizes), dtype=torch.uint8, device=sent.device)
        dist.all_to_all_single(received, sent, [own] * len(sizes), sizes, group=self.nodes.intra_node)
        total = torch.empty(by_local_rank[self.nodes.local_rank].numel(), device=sent.device)
        if total.numel():
            codec.sum(received.view(len(sizes), -1), total, 1.0)
        return total

    def _send(
        self,
        contributions: list[tuple[list[Part], torch.Tensor]],
        codec: Codec,
        feedback: Feedback | None,
    ) -> _InFlight:
        sizes = [codec.payload_bytes(values.numel()) for _, values in contributions]
        device = contributions[0][1].device
        sent = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for (parts, values), payload in zip(contributions, sent.split(sizes), strict=True):
            if not parts:
                continue
            residual = None if feedback is None else _load(feedback.sent, parts, values, feedback.loss_scale)
            codec.encode(values, payload, residual)
            if feedback is not None and residual is not None:
                _store(feedback.sent, parts, residual, feedback.loss_scale)
        own = sizes[self._me]
        received = torch.empty(own * self._peers, dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(
            received, sent, [own] * self._peers, sizes, group=self._peer_group, async_op=True
        )
        return _InFlight(work, received, sent)

    # -- all-reduce ------------------------------------------------------------------------------------

    @torch.no_grad()
    def all_reduce(
        self,
        segments: Sequence[Segment],
        multiplier: float = 1.0,
        feedback: Feedback | None = None,
    ) -> None:
        """Replaces the values of all segments by their sum over all processes, times `multiplier`.

        Owners are ignored. Every process ends with the same bits.
        """
        if self.world_size == 1:
            for segment in segments:
                segment.values.mul_(multiplier)
            return
        exact = _ExactSum([s for s in segments if s.exact], self.group, multiplier)
        quantized = [Segment(s.values, 0, s.key, s.start) for s in segments if not s.exact]
        bucket = Slices(quantized, 1, self.chunk_numel * self.world_size, self.codec.block)
        gathers: dict[int, tuple[Any, torch.Tensor, torch.Tensor]] = {}
        scattered: dict[int, _InFlight] = {}
        chunks = bucket.chunks
        # Two stages: while the all-to-all of a chunk is in flight, the chunk before it is summed and sent back.
        for step in range(chunks + 2):
            if step < chunks:
                scattered[step] = self._scatter(bucket, step, feedback)
            if 0 <= step - 1 < chunks:
                gathers[step - 1] = self._sum_and_gather(
                    bucket, step - 1, scattered.pop(step - 1), multiplier, feedback
                )
            if step >= 2:
                self._scatter_back(bucket, step - 2, gathers.pop(step - 2))
        for segment, values in exact.wait():
            segment.values.copy_(values)

    def _shard_numel(self, numel: int) -> int:
        """Elements of a chunk that one process sums: full blocks."""
        return -(-numel // (self.world_size * self.codec.block)) * self.codec.block

    def _first_shard(self) -> int:
        """The index of our shard; shards are in the order of (local rank, node)."""
        return self.rank if self.nodes is None else self.nodes.local_rank * self._peers + self._me

    def _scatter(self, bucket: Slices, chunk: int, feedback: Feedback | None) -> _InFlight:
        parts = bucket.parts(0, chunk)
        values = packed(parts)
        shard = self._shard_numel(values.numel())
        if self.nodes is not None:
            of_rank = self._peers * shard
            local_ranks = range(self.nodes.layout.ranks_per_node)
            values = self._sum_in_node(
                [values[rank * of_rank : (rank + 1) * of_rank] for rank in local_ranks]
            )
            parts = list(_within(bucket, chunk, self.nodes.local_rank * self._peers * shard, values.numel()))
        residual = None if feedback is None else _load(feedback.sent, parts, values, feedback.loss_scale)
        size = self.codec.payload_bytes(shard)
        sent = torch.empty((self._peers, size), dtype=torch.uint8, device=values.device)
        self.codec.encode_rows(values, sent, residual, shard)
        if feedback is not None and residual is not None:
            _store(feedback.sent, parts, residual, feedback.loss_scale)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received.view(-1), sent.view(-1), group=self._peer_group, async_op=True)
        return _InFlight(work, received, sent)

    def _sum_and_gather(
        self, bucket: Slices, chunk: int, in_flight: _InFlight, multiplier: float, feedback: Feedback | None
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        numel = packed_numel(bucket.parts(0, chunk))
        shard = self._shard_numel(numel)
        own = torch.empty(in_flight.received.shape[1], dtype=torch.uint8, device=in_flight.received.device)
        residual = None
        parts: list[Part] = []
        if feedback is not None:
            parts = list(_within(bucket, chunk, self._first_shard() * shard, shard))
            residual = _load(
                feedback.summed, parts, torch.empty(shard, device=own.device), feedback.loss_scale
            )
        in_flight.work.wait()
        self.codec.sum_and_encode(in_flight.received, own, residual, shard, multiplier)
        if feedback is not None and residual is not None:
            _store(feedback.summed, parts, residual, feedback.loss_scale)
        gathered = own.new_empty((self._peers, own.numel()))
        work = dist.all_gather_into_tensor(gathered.view(-1), own, group=self._peer_group, async_op=True)
        return work, gathered, own

    def _scatter_back(
        self, bucket: Slices, chunk: int, gather: tuple[Any, torch.Tensor, torch.Tensor]
    ) -> None:
        work, gathered, _ = gather
        work.wait()
        if self.nodes is not None:
            of_all = gathered.new_empty((self.world_size, gathered.shape[1]))
            dist.all_gather_into_tensor(of_all.view(-1), gathered.view(-1), group=self.nodes.intra_node)
            gathered = of_all
        parts = bucket.parts(0, chunk)
        numel = packed_numel(parts)
        shard = self._shard_numel(numel)
        if len(parts) == 1:
            self.codec.decode_rows(gathered, parts[0].values, shard)
            return
        decoded = torch.empty(numel, dtype=parts[0].values.dtype, device=gathered.device)
        self.codec.decode_rows(gathered, decoded, shard)
        for part, values in zip(parts, unpack(decoded, parts), strict=True):
            part.values.copy_(values)


class _ExactSum:
    """The sum of segments that are not quantized, times `multiplier`, in flight as one all-reduce."""

    def __init__(self, segments: Sequence[Segment], group: Any, multiplier: float) -> None:
        self._segments = segments
        if segments:
            # Multiplied first: in 16 bits the sum could overflow where the mean does not.
            self._flat = torch.cat([segment.values for segment in segments]).mul_(multiplier)
            self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Each segment and its sum, in its dtype and the same bits everywhere."""
        if self._segments:
            self._work.wait()
            sums = self._flat.split([segment.numel for segment in self._segments])
            yield from zip(self._segments, sums, strict=True)


def _within(bucket: Slices, chunk: int, begin: int, numel: int) -> Sequence[Part]:
    """The parts at positions [begin, begin + numel) of a chunk."""
    first = chunk * bucket.chunk_numel
    end = min(first + begin + numel, (chunk + 1) * bucket.chunk_numel)
    return list(bucket.of[0].parts(first + begin, end))


def _load(residuals: Residuals, parts: Sequence[Part], like: torch.Tensor, loss_scale: float) -> torch.Tensor:
    """Residuals of `parts`, a new fp32 tensor of the size and device of `like`, which the encoder overwrites."""
    loaded = torch.zeros(like.numel(), device=like.device)
    for part, values in zip(parts, unpack(loaded, parts), strict=True):
        values.copy_(residuals.load(part.segment.key, part.start, part.numel, like.device, loss_scale))
    return loaded


def _store(residuals: Residuals, parts: Sequence[Part], values: torch.Tensor, loss_scale: float) -> None:
    for part, lost in zip(parts, unpack(values, parts), strict=True):
        residuals.store(part.segment.key, part.start, lost, loss_scale)


def _like(slices: Slices) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a bucket that is not empty."""
    for one in slices.of:
        for part in one.parts(0, 1):
            return part.values.device, part.values.dtype
    raise AssertionError("an empty bucket has no chunks")
