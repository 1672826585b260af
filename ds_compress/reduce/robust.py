"""The exchange under a robust rule: every owner gets the slices of all workers, and decides what they say together.

    all-to-all -> inner products of my slices -> one small all-reduce -> who is bad, which weights -> my slice

All pieces of a bucket arrive before anything is decided, because a worker whose gradient is NaN somewhere is
dropped everywhere; what has arrived is kept as it was sent, at most one bucket of it. A bucket is one vector to
the rules: norms and distances are those of all its owners' slices together.

A worker with NaN or Inf is dropped before the rule, and counts as one of the f bad ones. When more than f workers are
non-finite it is an overflow and no attack: the result is NaN, and the loss scaler does what it does without us.

Under a quantizing codec a bucket travels in two lanes: what is quantized, and the segments that are `exact`, as they
are. To the rules both are one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.reduce.codec import Codec, PlainCodec
from ds_compress.reduce.outliers import Report, report
from ds_compress.reduce.pipeline import pipelined
from ds_compress.reduce.rules import COORDINATES, WEIGHTS, mixing
from ds_compress.reduce.slices import Part, Segment, Slices, count, joined, spread

# Elements of all workers that are decoded at a time.
_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class Policy:
    """What to do about bad workers: see `config.robust_reduction`. "abort" is up to whoever reads the reports."""

    rule: str = "centered_clip"
    max_malicious: int = 1
    on_outlier: str = "report"
    outlier_ratio: float = 5.0
    neighbor_mixing: bool = True


@dataclass(frozen=True)
class Verdict:
    """Who takes part, and how; `trim` bad workers may be left among them.

    weights: fp64 (len(keep),), for rules that have them. mixing: fp64 (len(keep), len(keep)), for the others, or None.
    """

    keep: tuple[int, ...]
    trim: int
    weights: torch.Tensor | None
    mixing: torch.Tensor | None
    overflow: bool
    report: Report


def judge(
    gram: torch.Tensor, non_finite: Sequence[int], policy: Policy, suspects: Sequence[int] = ()
) -> Verdict:
    """Pure: the same inner products give the same verdict in every process.

    gram: fp64 (n, n) on the CPU; rows and columns of non-finite workers are ignored.
    suspects: who kept standing out in the steps before (`workers.Watch`), which one bucket cannot tell.
    """
    found = report(gram, non_finite, policy.outlier_ratio**2)
    overflow = len(non_finite) > policy.max_malicious
    dropped = list(non_finite)
    if policy.on_outlier == "exclude":
        bad = {*suspects, *found.outliers} - {*non_finite}
        by_norm = sorted(bad, key=lambda i: (-float(found.norms[i]), i))
        dropped += by_norm[: max(0, policy.max_malicious - len(dropped))]
    keep = tuple(i for i in range(len(gram)) if i not in set(dropped))
    trim = max(0, policy.max_malicious - len(dropped))
    weights = mixed = None
    kept = gram[list(keep)][:, list(keep)]
    if policy.neighbor_mixing and policy.rule != "mean" and 0 < trim < len(keep):
        mixed = mixing(kept, trim)
    if policy.rule in WEIGHTS and keep:
        weights = WEIGHTS[policy.rule](kept if mixed is None else mixed @ kept @ mixed.T)
        weights, mixed = (weights if mixed is None else weights @ mixed), None
    return Verdict(keep, trim, weights, mixed, overflow or not keep, found)


def accusation(found: Report) -> str:
    """In words, e.g. "worker 3: gradient norm 10.4 times the median" (of this step)."""
    finite = found.norms[torch.isfinite(found.norms)]
    middle = float(finite.quantile(0.5)) if finite.numel() else 0.0
    said = [f"worker {i}: NaN, Inf or values too large to square in its gradient" for i in found.non_finite]
    said += [
        f"worker {i}: gradient norm {float(found.norms[i]) / middle:.1f} times the median"
        if middle
        else f"worker {i}: gradient norm {float(found.norms[i]):.3g}, the median is 0"
        for i in found.outliers
    ]
    return "; ".join(said)


@dataclass(frozen=True)
class _Lane:
    """The part of a bucket that one codec carries, and the messages of all workers for us, piece by piece."""

    slices: Slices
    codec: Codec
    arrived: list[torch.Tensor]


class RobustSum:
    """`n` times the robust mean over the processes of `group`, so that it stands where a sum stood.

    Args:
        codec: how gradients travel, as they are or quantized.
        piece_elements: elements of a bucket that travel at a time.
        on_report: told about every reduction.
        suspects: asked at every reduction who kept standing out before it.
    """

    def __init__(
        self,
        group: Any,
        codec: Codec,
        policy: Policy,
        piece_elements: int = 1 << 20,
        on_report: Callable[[torch.Tensor, Report], None] | None = None,
        suspects: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self.group, self.codec, self.policy = group, codec, policy
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.quantum = max(1, piece_elements // self.world_size // codec.granule) * codec.granule
        self._on_report = on_report or (lambda gram, found: None)
        self._suspects = suspects

    @torch.no_grad()
    def reduce_scatter(
        self,
        segments: Sequence[Segment],
        take: Callable[[Part, torch.Tensor], None],
        multiplier: float = 1.0,
    ) -> None:
        """As `QuantizedSum.reduce_scatter`; `take` gets the rule's result times n times `multiplier`."""
        segments = [segment for segment in segments if segment.numel]
        if not segments:
            return
        lanes = self._lanes(segments)
        device = segments[0].values.device
        gram = torch.zeros((self.world_size, self.world_size), dtype=torch.float64)
        for lane in lanes:
            self._gather(lane, gram, device)
        verdict = self._judge(gram, device)
        for lane in lanes:
            for piece, messages in enumerate(lane.arrived):
                self._combine(lane, piece, messages, verdict, multiplier, take)

    @torch.no_grad()
    def all_reduce(self, segments: Sequence[Segment], multiplier: float = 1.0) -> None:
        """Replaces all values by what `reduce_scatter` would give equal chunks' owners; the same bits everywhere."""
        flat = torch.cat([segment.values for segment in segments])
        chunk = -(-flat.numel() // self.world_size)
        own = torch.zeros(chunk, dtype=flat.dtype, device=flat.device)
        chunks: list[Segment] = []
        at = 0
        for segment in segments:
            end = at + segment.numel
            while at < end:
                owner = at // chunk
                stop = min(end, (owner + 1) * chunk)
                chunks.append(Segment(flat[at:stop], owner, start=at - owner * chunk, exact=segment.exact))
                at = stop

        def take(part: Part, values: torch.Tensor) -> None:
            own[part.start : part.start + part.numel].copy_(values)

        self.reduce_scatter(chunks, take, multiplier)
        if chunk:
            whole = torch.empty(chunk * self.world_size, dtype=flat.dtype, device=flat.device)
            dist.all_gather_into_tensor(whole, own, group=self.group)
            sums = whole[: flat.numel()].split([segment.numel for segment in segments])
            for segment, values in zip(segments, sums, strict=True):
                segment.values.copy_(values)

    def _lanes(self, segments: Sequence[Segment]) -> list[_Lane]:
        """Only lanes that carry something; the same in every process."""
        if isinstance(self.codec, PlainCodec):
            return [_Lane(Slices(segments, self.world_size, self.quantum), self.codec, [])]
        quantized = [segment for segment in segments if not segment.exact]
        exact = [segment for segment in segments if segment.exact]
        lanes = []
        if quantized:
            slices = Slices(quantized, self.world_size, self.quantum, self.codec.granule)
            lanes.append(_Lane(slices, self.codec, []))
        if exact:
            plain = PlainCodec(exact[0].values.dtype)
            lanes.append(_Lane(Slices(exact, self.world_size, self.quantum), plain, []))
        return lanes

    def _gather(self, lane: _Lane, gram: torch.Tensor, device: torch.device) -> None:
        """Fills `lane.arrived`, and adds the inner products of what arrives."""

        def finish(piece: int, wire: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
            work, received, _ = wire
            work.wait()
            lane.arrived.append(received.view(self.world_size, -1))
            self._add_products(gram, lane, piece)

        pipelined(range(lane.slices.pieces), lambda piece: self._send(lane, piece, device), finish)

    def _send(self, lane: _Lane, piece: int, device: torch.device) -> tuple[Any, torch.Tensor, torch.Tensor]:
        parts = [lane.slices.parts(owner, piece) for owner in range(self.world_size)]
        sizes = [lane.codec.message_bytes(count(own)) for own in parts]
        sent = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for own, message in zip(parts, sent.split(sizes), strict=True):
            if own:
                lane.codec.encode(joined(own), message)
        mine = sizes[self.rank]
        received = torch.empty(mine * self.world_size, dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(
            received, sent, [mine] * self.world_size, sizes, group=self.group, async_op=True
        )
        return work, received, sent

    def _add_products(self, gram: torch.Tensor, lane: _Lane, piece: int) -> None:
        """Adds <x_i, x_j> of one piece; NaN and Inf come through."""
        numel = count(lane.slices.parts(self.rank, piece))
        rows = self._decoded(lane.codec, lane.arrived[piece], numel)
        found = torch.zeros_like(gram, device=rows.device)
        for block in rows.split(max(1, _AT_A_TIME // self.world_size), dim=1):
            # fp32 products of a few thousand elements, fp64 sums of those.
            found += (block @ block.T).double()
        gram += found.cpu()

    def _decoded(self, codec: Codec, messages: torch.Tensor, numel: int) -> torch.Tensor:
        rows = torch.empty((len(messages), numel), device=messages.device)
        if numel:
            for row, message in zip(rows, messages, strict=True):
                codec.decode(message, row)
        return rows

    def _judge(self, gram: torch.Tensor, device: torch.device) -> Verdict:
        # Added up in the order of the ranks, so that all of them judge by the same bits.
        everyones = torch.empty((self.world_size, gram.numel()), dtype=gram.dtype, device=device)
        dist.all_gather_into_tensor(everyones.view(-1), gram.view(-1).to(device), group=self.group)
        gram = everyones.cpu().sum(0).view_as(gram)
        non_finite = [
            i for i, square in enumerate(gram.diagonal().tolist()) if not abs(square) < float("inf")
        ]
        verdict = judge(gram, non_finite, self.policy, self._suspects())
        self._on_report(gram, verdict.report)
        return verdict

    def _combine(
        self,
        lane: _Lane,
        piece: int,
        messages: torch.Tensor,
        verdict: Verdict,
        multiplier: float,
        take: Callable[[Part, torch.Tensor], None],
    ) -> None:
        parts = lane.slices.parts(self.rank, piece)
        numel = count(parts)
        if not numel:
            return
        scale = multiplier * self.world_size
        if verdict.overflow:
            result = torch.full((numel,), torch.nan, device=messages.device)
        else:
            rows = self._decoded(lane.codec, messages[list(verdict.keep)], numel)
            if verdict.mixing is not None:
                rows = verdict.mixing.to(rows) @ rows
            if verdict.weights is None:
                result = COORDINATES[self.policy.rule](rows, verdict.trim)
            else:
                result = verdict.weights.to(rows) @ rows
            result.mul_(scale)
        for part, values in zip(parts, spread(result, parts), strict=True):
            take(part, values)
