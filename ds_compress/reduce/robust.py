"""The exchange under a robust rule: every owner gets the slices of all workers, and aggregates them.

    all-to-all -> inner products of my slices -> their sum over all owners -> who is bad, which weights -> my slice

All chunks of a bucket arrive before anything is decided, because a worker whose gradient is NaN somewhere is
excluded everywhere; what has arrived is stored as it was sent, at most one bucket of it. A bucket is one vector to
the rules: norms and distances are those of all its owners' slices together.

A worker with NaN or Inf is excluded before the rule, and counts as one of the f bad ones. When more than f workers are
non-finite, that is an overflow and not an attack: the result is NaN, and the loss scaler handles it as usual.

With a quantizing codec a bucket is sent in two lanes: what is quantized, and the segments that are `exact`, as they
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
from ds_compress.reduce.slices import Part, Segment, Slices, packed, packed_numel, unpack

# Elements of all workers that are decoded at a time.
_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class Policy:
    """What to do about bad workers: see `config.schema.robust_reduction`. The reader of the reports does "abort"."""

    rule: str = "centered_clip"
    max_malicious: int = 1
    on_outlier: str = "report"
    outlier_ratio: float = 5.0
    neighbor_mixing: bool = True


@dataclass(frozen=True)
class Decision:
    """Which workers are aggregated, and how; `trim` bad ones may be left among them.

    weights: fp64 (len(included),), for rules that have them. mixing: fp64 (len(included), len(included)), for the
    others, or None.
    """

    included: tuple[int, ...]
    trim: int
    weights: torch.Tensor | None
    mixing: torch.Tensor | None
    overflow: bool
    report: Report


def decide(
    gram: torch.Tensor, non_finite: Sequence[int], policy: Policy, flagged: Sequence[int] = ()
) -> Decision:
    """Pure: the same inner products give the same decision in every process.

    gram: fp64 (n, n) on the CPU; rows and columns of non-finite workers are ignored.
    flagged: outliers over the steps before (`outliers.OutlierDetector`), which one bucket cannot show.
    """
    found = report(gram, non_finite, policy.outlier_ratio**2)
    overflow = len(non_finite) > policy.max_malicious
    excluded = list(non_finite)
    if policy.on_outlier == "exclude":
        bad = {*flagged, *found.outliers} - {*non_finite}
        by_norm = sorted(bad, key=lambda i: (-float(found.norms[i]), i))
        excluded += by_norm[: max(0, policy.max_malicious - len(excluded))]
    included = tuple(i for i in range(len(gram)) if i not in set(excluded))
    trim = max(0, policy.max_malicious - len(excluded))
    weights = mixed = None
    part = gram[list(included)][:, list(included)]
    if policy.neighbor_mixing and policy.rule != "mean" and 0 < trim < len(included):
        mixed = mixing(part, trim)
    if policy.rule in WEIGHTS and included:
        weights = WEIGHTS[policy.rule](part if mixed is None else mixed @ part @ mixed.T)
        weights, mixed = (weights if mixed is None else weights @ mixed), None
    return Decision(included, trim, weights, mixed, overflow or not included, found)


def describe_flagged(found: Report) -> str:
    """A sentence on each flagged worker, e.g. "worker 3: gradient norm 10.4 times the median" (of this step)."""
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
    """The part of a bucket that is sent with one codec, and the payloads of all workers for us, chunk by chunk."""

    slices: Slices
    codec: Codec
    arrived: list[torch.Tensor]


class RobustSum:
    """`n` times the robust mean over the processes of `group`, so that it can replace a sum.

    Args:
        codec: how gradients are sent, as they are or quantized.
        chunk_elements: elements of a bucket that are sent at a time.
        on_report: called with the inner products and the report of every reduction.
        flagged: returns the outliers over the steps before; called at every reduction.
    """

    def __init__(
        self,
        group: Any,
        codec: Codec,
        policy: Policy,
        chunk_elements: int = 1 << 20,
        on_report: Callable[[torch.Tensor, Report], None] | None = None,
        flagged: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self.group, self.codec, self.policy = group, codec, policy
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.chunk_numel = max(1, chunk_elements // self.world_size // codec.alignment) * codec.alignment
        self._on_report = on_report or (lambda gram, found: None)
        self._flagged = flagged

    @torch.no_grad()
    def reduce_scatter(
        self,
        segments: Sequence[Segment],
        deliver: Callable[[Part, torch.Tensor], None],
        multiplier: float = 1.0,
    ) -> None:
        """As `QuantizedSum.reduce_scatter`; `deliver` gets the result of the rule times n times `multiplier`."""
        segments = [segment for segment in segments if segment.numel]
        if not segments:
            return
        lanes = self._lanes(segments)
        device = segments[0].values.device
        gram = torch.zeros((self.world_size, self.world_size), dtype=torch.float64)
        for lane in lanes:
            self._gather(lane, gram, device)
        decision = self._judge(gram, device)
        for lane in lanes:
            for chunk, payloads in enumerate(lane.arrived):
                self._combine(lane, chunk, payloads, decision, multiplier, deliver)

    @torch.no_grad()
    def all_reduce(self, segments: Sequence[Segment], multiplier: float = 1.0) -> None:
        """Replaces all values by what `reduce_scatter` gives the owners of equal shards; the same bits everywhere."""
        flat = torch.cat([segment.values for segment in segments])
        shard = -(-flat.numel() // self.world_size)
        own = torch.zeros(shard, dtype=flat.dtype, device=flat.device)
        shards: list[Segment] = []
        at = 0
        for segment in segments:
            end = at + segment.numel
            while at < end:
                owner = at // shard
                stop = min(end, (owner + 1) * shard)
                shards.append(Segment(flat[at:stop], owner, start=at - owner * shard, exact=segment.exact))
                at = stop

        def deliver(part: Part, values: torch.Tensor) -> None:
            own[part.start : part.start + part.numel].copy_(values)

        self.reduce_scatter(shards, deliver, multiplier)
        if shard:
            gathered = torch.empty(shard * self.world_size, dtype=flat.dtype, device=flat.device)
            dist.all_gather_into_tensor(gathered, own, group=self.group)
            sums = gathered[: flat.numel()].split([segment.numel for segment in segments])
            for segment, values in zip(segments, sums, strict=True):
                segment.values.copy_(values)

    def _lanes(self, segments: Sequence[Segment]) -> list[_Lane]:
        """Only lanes that are not empty; the same in every process."""
        if isinstance(self.codec, PlainCodec):
            return [_Lane(Slices(segments, self.world_size, self.chunk_numel), self.codec, [])]
        quantized = [segment for segment in segments if not segment.exact]
        exact = [segment for segment in segments if segment.exact]
        lanes = []
        if quantized:
            slices = Slices(quantized, self.world_size, self.chunk_numel, self.codec.alignment)
            lanes.append(_Lane(slices, self.codec, []))
        if exact:
            plain = PlainCodec(exact[0].values.dtype)
            lanes.append(_Lane(Slices(exact, self.world_size, self.chunk_numel), plain, []))
        return lanes

    def _gather(self, lane: _Lane, gram: torch.Tensor, device: torch.device) -> None:
        """Fills `lane.arrived`, and adds the inner products of what arrives."""

        def finish(chunk: int, in_flight: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
            work, received, _ = in_flight
            work.wait()
            lane.arrived.append(received.view(self.world_size, -1))
            self._add_products(gram, lane, chunk)

        pipelined(range(lane.slices.chunks), lambda chunk: self._send(lane, chunk, device), finish)

    def _send(self, lane: _Lane, chunk: int, device: torch.device) -> tuple[Any, torch.Tensor, torch.Tensor]:
        parts = [lane.slices.parts(owner, chunk) for owner in range(self.world_size)]
        sizes = [lane.codec.payload_bytes(packed_numel(own)) for own in parts]
        sent = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for own, payload in zip(parts, sent.split(sizes), strict=True):
            if own:
                lane.codec.encode(packed(own), payload)
        mine = sizes[self.rank]
        received = torch.empty(mine * self.world_size, dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(
            received, sent, [mine] * self.world_size, sizes, group=self.group, async_op=True
        )
        return work, received, sent

    def _add_products(self, gram: torch.Tensor, lane: _Lane, chunk: int) -> None:
        """Adds <x_i, x_j> of one chunk; NaN and Inf stay visible."""
        numel = packed_numel(lane.slices.parts(self.rank, chunk))
        rows = self._decoded(lane.codec, lane.arrived[chunk], numel)
        found = torch.zeros_like(gram, device=rows.device)
        for block in rows.split(max(1, _AT_A_TIME // self.world_size), dim=1):
            # fp32 products of a few thousand elements, fp64 sums of those.
            found += (block @ block.T).double()
        gram += found.cpu()

    def _decoded(self, codec: Codec, payloads: torch.Tensor, numel: int) -> torch.Tensor:
        rows = torch.empty((len(payloads), numel), device=payloads.device)
        if numel:
            for row, payload in zip(rows, payloads, strict=True):
                codec.decode(payload, row)
        return rows

    def _judge(self, gram: torch.Tensor, device: torch.device) -> Decision:
        gram = self._summed(gram, device)
        non_finite = [
            i for i, square in enumerate(gram.diagonal().tolist()) if not abs(square) < float("inf")
        ]
        decision = decide(gram, non_finite, self.policy, self._flagged())
        self._on_report(gram, decision.report)
        return decision

    def _summed(self, gram: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The sum over the processes of their (n, n): the same bits in all of them, so that all decide alike.

        Process i sums row i of all, in the order of the ranks, and sends the sum to all. So a process receives twice
        n * n numbers, and not those of n matrices.
        """
        sent, of_row = gram.to(device), torch.empty_like(gram, device=device)
        dist.all_to_all_single(of_row, sent, group=self.group)
        row = of_row.cpu().sum(0).to(device)
        dist.all_gather_into_tensor(sent.view(-1), row, group=self.group)
        return sent.to(gram)

    def _combine(
        self,
        lane: _Lane,
        chunk: int,
        payloads: torch.Tensor,
        decision: Decision,
        multiplier: float,
        deliver: Callable[[Part, torch.Tensor], None],
    ) -> None:
        parts = lane.slices.parts(self.rank, chunk)
        numel = packed_numel(parts)
        if not numel:
            return
        scale = multiplier * self.world_size
        if decision.overflow:
            result = torch.full((numel,), torch.nan, device=payloads.device)
        else:
            rows = self._decoded(lane.codec, payloads[list(decision.included)], numel)
            if decision.mixing is not None:
                rows = decision.mixing.to(rows) @ rows
            if decision.weights is None:
                result = COORDINATES[self.policy.rule](rows, decision.trim)
            else:
                result = decision.weights.to(rows) @ rows
            result.mul_(scale)
        for part, values in zip(parts, unpack(result, parts), strict=True):
            deliver(part, values)
