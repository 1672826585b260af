"""Sums of gradients over processes, sent as few bits: reduce-scatter and all-reduce.

Reduce-scatter: every process encodes, for each owner, the elements that the owner is to get; an all-to-all carries the
messages; the owner adds them up in fp32, in the order of the ranks. One quantization. All-reduce: the same on equal
chunks, then each process encodes its chunk once more, an all-gather carries it, and everybody, the encoder included,
reads the same bytes: all processes end with identical bits.

Blocks end where a parameter ends. Segments that are `exact` are not quantized: they travel as they are, in pieces of
their own, or by one all-reduce like DeepSpeed's where everybody needs everything.

With `hosts`, what the processes of one host have is added up first, in fp32 and unquantized, and only that sum is
encoded and sent to the other hosts, by the process with the same place as the receiver (Horovod's and NCCL's two
levels).
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
from ds_compress.reduce.slices import Part, Segment, Slices, count, joined, spread


@dataclass
class _OnTheWire:
    """One piece of an all-to-all: what each peer sends us, once `work` is done."""

    work: Any
    received: torch.Tensor
    sent: torch.Tensor  # alive until the piece has arrived


@dataclass(frozen=True)
class _Lane:
    """The part of a bucket that one codec carries."""

    slices: Slices
    codec: Codec


@dataclass
class Feedback:
    """Error feedback of one bucket: of what this process sends, and of the sums that it encodes once more."""

    sent: Residuals
    summed: Residuals
    unit: float = 1.0


class QuantizedSum:
    """Sums over the processes of `group`.

    Args:
        piece_elements: elements of a bucket that travel at a time.
        hosts: sum inside a host first (see the module).
    """

    def __init__(
        self, group: Any, codec: BlockCodec, piece_elements: int = 1 << 20, hosts: Nodes | None = None
    ) -> None:
        self.group = group
        self.codec = codec
        self.hosts = hosts
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._peers = self.world_size if hosts is None else hosts.layout.hosts
        self._peer_group = group if hosts is None else hosts.across
        self._me = self.rank if hosts is None else hosts.host
        # Whole blocks, so that no scale is spent on a part of one.
        self.quantum = max(1, piece_elements // self.world_size // codec.block) * codec.block

    # -- reduce-scatter --------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce_scatter(
        self,
        segments: Sequence[Segment],
        take: Callable[[Part, torch.Tensor], None],
        multiplier: float = 1.0,
        feedback: Feedback | None = None,
    ) -> None:
        """Gives each owner the sum of its segments over all processes, times `multiplier`.

        Args:
            segments: the whole bucket, with the same owners and sizes in every process.
            take: called for each part that this process owns with its sum, fp32 (part.numel,).
        """
        if self.world_size == 1:
            for segment in segments:
                take(Part(segment, 0, segment.numel), segment.values.float() * multiplier)
            return
        lanes = self._lanes(segments)
        pieces = [(lane, piece) for lane in lanes for piece in range(lane.slices.pieces)]

        def start(index: int) -> _OnTheWire:
            lane, piece = pieces[index]
            kept = feedback if lane.codec is self.codec else None
            return self._send(self._contributions(lane.slices, piece), lane.codec, kept)

        def finish(index: int, wire: _OnTheWire) -> None:
            lane, piece = pieces[index]
            own = lane.slices.parts(self.rank, piece)
            total = torch.empty(count(own), device=wire.received.device)
            wire.work.wait()
            if total.numel():
                lane.codec.sum(wire.received.view(self._peers, -1), total, multiplier)
            for part, values in zip(own, spread(total, own), strict=True):
                take(part, values)

        pipelined(range(len(pieces)), start, finish)

    def _lanes(self, segments: Sequence[Segment]) -> list[_Lane]:
        quantized = [segment for segment in segments if not segment.exact]
        exact = [segment for segment in segments if segment.exact]
        lanes = [_Lane(Slices(quantized, self.world_size, self.quantum, self.codec.block), self.codec)]
        if exact:
            plain = PlainCodec(exact[0].values.dtype)
            lanes.append(_Lane(Slices(exact, self.world_size, self.quantum), plain))
        return lanes

    def _contributions(self, slices: Slices, piece: int) -> list[tuple[list[Part], torch.Tensor]]:
        """For each peer that we send to: what it gets of this piece, and our values for it (n,)."""
        parts = [slices.parts(owner, piece) for owner in range(self.world_size)]
        device, dtype = _like(slices)
        if self.hosts is None:
            return [(own, joined(own) if own else torch.empty(0, device=device)) for own in parts]
        owners = self.hosts.layout.ranks
        for_place = [[parts[owners[h][place]] for h in range(self._peers)] for place in range(len(owners[0]))]
        empty = torch.empty(0, device=device, dtype=dtype)
        summed = self._sum_inside(
            [torch.cat([joined(own) if own else empty for own in place]) for place in for_place]
        )
        mine = for_place[self.hosts.place]
        return list(zip(mine, summed.split([count(own) for own in mine]), strict=True))

    def _sum_inside(self, for_place: list[torch.Tensor]) -> torch.Tensor:
        """The sum over this host of what its processes have for our place, fp32."""
        assert self.hosts is not None
        dtype = for_place[0].dtype
        codec = PlainCodec(dtype)
        sizes = [codec.message_bytes(values.numel()) for values in for_place]
        own = sizes[self.hosts.place]
        sent = torch.cat([values.view(torch.uint8) for values in for_place])
        received = torch.empty(own * len(sizes), dtype=torch.uint8, device=sent.device)
        dist.all_to_all_single(received, sent, [own] * len(sizes), sizes, group=self.hosts.inside)
        total = torch.empty(for_place[self.hosts.place].numel(), device=sent.device)
        if total.numel():
            codec.sum(received.view(len(sizes), -1), total, 1.0)
        return total

    def _send(
        self,
        contributions: list[tuple[list[Part], torch.Tensor]],
        codec: Codec,
        feedback: Feedback | None,
    ) -> _OnTheWire:
        sizes = [codec.message_bytes(values.numel()) for _, values in contributions]
        device = contributions[0][1].device
        sent = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for (parts, values), message in zip(contributions, sent.split(sizes), strict=True):
            if not parts:
                continue
            residual = None if feedback is None else _load(feedback.sent, parts, values, feedback.unit)
            codec.encode(values, message, residual)
            if feedback is not None and residual is not None:
                _store(feedback.sent, parts, residual, feedback.unit)
        own = sizes[self._me]
        received = torch.empty(own * self._peers, dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(
            received, sent, [own] * self._peers, sizes, group=self._peer_group, async_op=True
        )
        return _OnTheWire(work, received, sent)

    # -- all-reduce ------------------------------------------------------------------------------------

    @torch.no_grad()
    def all_reduce(
        self,
        segments: Sequence[Segment],
        multiplier: float = 1.0,
        feedback: Feedback | None = None,
    ) -> None:
        """Replaces the values of all segments by their sum over all processes, times `multiplier`; owners do not count.

        Every process ends with the same bits.
        """
        if self.world_size == 1:
            for segment in segments:
                segment.values.mul_(multiplier)
            return
        exact = _ExactSum([s for s in segments if s.exact], self.group, multiplier)
        quantized = [Segment(s.values, 0, s.key, s.start) for s in segments if not s.exact]
        whole = Slices(quantized, 1, self.quantum * self.world_size, self.codec.block)
        gathers: dict[int, tuple[Any, torch.Tensor, torch.Tensor]] = {}
        scattered: dict[int, _OnTheWire] = {}
        pieces = whole.pieces
        # Two stages: while the all-to-all of a piece travels, the piece before it is summed and sent back.
        for step in range(pieces + 2):
            if step < pieces:
                scattered[step] = self._scatter(whole, step, feedback)
            if 0 <= step - 1 < pieces:
                gathers[step - 1] = self._sum_and_gather(
                    whole, step - 1, scattered.pop(step - 1), multiplier, feedback
                )
            if step >= 2:
                self._spread(whole, step - 2, gathers.pop(step - 2))
        for segment, values in exact.wait():
            segment.values.copy_(values)

    def _chunk(self, numel: int) -> int:
        """Elements of a piece that one process adds up: whole blocks."""
        return -(-numel // (self.world_size * self.codec.block)) * self.codec.block

    def _first_chunk(self) -> int:
        """Chunks are in the order of (place, host): those of one place lie together."""
        return self.rank if self.hosts is None else self.hosts.place * self._peers + self._me

    def _scatter(self, whole: Slices, piece: int, feedback: Feedback | None) -> _OnTheWire:
        parts = whole.parts(0, piece)
        values = joined(parts)
        chunk = self._chunk(values.numel())
        if self.hosts is not None:
            places = self.hosts.layout.per_host
            cuts = [values[p * self._peers * chunk : (p + 1) * self._peers * chunk] for p in range(places)]
            values = self._sum_inside(cuts)
            parts = list(_within(whole, piece, self.hosts.place * self._peers * chunk, values.numel()))
        residual = None if feedback is None else _load(feedback.sent, parts, values, feedback.unit)
        size = self.codec.message_bytes(chunk)
        sent = torch.empty((self._peers, size), dtype=torch.uint8, device=values.device)
        self.codec.quantize_rows(values, sent, residual, chunk)
        if feedback is not None and residual is not None:
            _store(feedback.sent, parts, residual, feedback.unit)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received.view(-1), sent.view(-1), group=self._peer_group, async_op=True)
        return _OnTheWire(work, received, sent)

    def _sum_and_gather(
        self, whole: Slices, piece: int, wire: _OnTheWire, multiplier: float, feedback: Feedback | None
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        numel = count(whole.parts(0, piece))
        chunk = self._chunk(numel)
        own = torch.empty(wire.received.shape[1], dtype=torch.uint8, device=wire.received.device)
        residual = None
        parts: list[Part] = []
        if feedback is not None:
            parts = list(_within(whole, piece, self._first_chunk() * chunk, chunk))
            residual = _load(feedback.summed, parts, torch.empty(chunk, device=own.device), feedback.unit)
        wire.work.wait()
        self.codec.sum_and_encode(wire.received, own, residual, chunk, multiplier)
        if feedback is not None and residual is not None:
            _store(feedback.summed, parts, residual, feedback.unit)
        gathered = own.new_empty((self._peers, own.numel()))
        work = dist.all_gather_into_tensor(gathered.view(-1), own, group=self._peer_group, async_op=True)
        return work, gathered, own

    def _spread(self, whole: Slices, piece: int, gather: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
        work, gathered, _ = gather
        work.wait()
        if self.hosts is not None:
            everyones = gathered.new_empty((self.world_size, gathered.shape[1]))
            dist.all_gather_into_tensor(everyones.view(-1), gathered.view(-1), group=self.hosts.inside)
            gathered = everyones
        parts = whole.parts(0, piece)
        numel = count(parts)
        chunk = self._chunk(numel)
        if len(parts) == 1:
            self.codec.decode_rows(gathered, parts[0].values, chunk)
            return
        read = torch.empty(numel, dtype=parts[0].values.dtype, device=gathered.device)
        self.codec.decode_rows(gathered, read, chunk)
        for part, values in zip(parts, spread(read, parts), strict=True):
            part.values.copy_(values)


class _ExactSum:
    """The sum of segments that are not quantized, times `multiplier`, under way as one all-reduce."""

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


def _within(whole: Slices, piece: int, begin: int, numel: int) -> Sequence[Part]:
    """The parts at places [begin, begin + numel) of a piece."""
    first = piece * whole.quantum
    end = min(first + begin + numel, (piece + 1) * whole.quantum)
    return list(whole.of[0].parts(first + begin, end))


def _load(residuals: Residuals, parts: Sequence[Part], like: torch.Tensor, unit: float) -> torch.Tensor:
    """A new fp32 tensor with the places of `like`, on its device, to be changed by an encoder."""
    loaded = torch.zeros(like.numel(), device=like.device)
    for part, place in zip(parts, spread(loaded, parts), strict=True):
        place.copy_(residuals.load(part.segment.key, part.start, part.numel, like.device, unit))
    return loaded


def _store(residuals: Residuals, parts: Sequence[Part], values: torch.Tensor, unit: float) -> None:
    for part, lost in zip(parts, spread(values, parts), strict=True):
        residuals.store(part.segment.key, part.start, lost, unit)


def _like(slices: Slices) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a bucket that is not empty."""
    for one in slices.of:
        for part in one.parts(0, 1):
            return part.values.device, part.values.dtype
    raise AssertionError("an empty bucket has no pieces")
