"""What of our own design grows with the number of processes, and is large with so many of them; largest first.

Estimates of order: what each is made of stands beside its limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.wire import CONFIGURED, Way
from ds_compress.ops.sizes import ENOUGH_PAYLOAD, payload_bytes

_BYTES_LIMIT = 100_000_000
"""Of what one process receives at once beside the training."""
_FILES_LIMIT = 1000
_COUNT_BYTES = 8
_SHARE_LIMIT = 0.1


@dataclass(frozen=True)
class Break:
    """times: how far it is above its limit. what: in words, with its size."""

    times: float
    what: str


def breaks(plan: ResolvedPlan, layout: RunLayout, found: list[Way]) -> list[Break]:
    """found: `wire.ways` of the same run."""
    every = [
        *_messages(plan, layout),
        *_leaving(layout, found),
        *_robust(plan, layout),
        *_files(layout),
        *_short_shards(plan, layout),
    ]
    return sorted((one for one in every if one.times > 1), key=lambda one: -one.times)


def _messages(plan: ResolvedPlan, layout: RunLayout) -> Iterator[Break]:
    for block in (plan.config.gradient_compression, plan.config.parameter_compression):
        # A layer of ZeRO-3 is fetched as a whole.
        in_chunks = layout.stage < 3 or block is plan.config.gradient_compression
        if block is None or not block.enabled or layout.world_size == 1 or not in_chunks:
            continue
        if block.piece_elements is None:
            # Grows with the number of processes.
            continue
        size = block.effective_block_size
        chunk = max(1, block.chunk_elements(layout.world_size) // layout.world_size // size) * size
        payload = payload_bytes(chunk, block.bits, size)
        yield Break(
            ENOUGH_PAYLOAD / payload,
            f"{block.key} sends {payload:,} bytes to each process at a time, where latency decides: leave "
            "piece_elements out",
        )


def _leaving(layout: RunLayout, found: list[Way]) -> Iterator[Break]:
    by_name = {way.name: way.total.leaving for way in found}
    plain, ours = found[0].total.leaving, by_name.get(CONFIGURED, 0.0)
    if layout.nodes > 1 and plain:
        yield Break(
            ours / plain,
            f"{ours / plain:.1f} times as many bytes leave a node as with plain DeepSpeed: each of its "
            f"{layout.ranks_per_node} processes sends to all others, where a ring leaves a node once; set "
            'gradient_compression to "hierarchical": true, or leave it out',
        )


def _robust(plan: ResolvedPlan, layout: RunLayout) -> Iterator[Break]:
    robust = plan.config.robust_reduction
    if robust is not None and robust.enabled:
        size = _COUNT_BYTES * layout.world_size**2
        yield Break(
            size / _BYTES_LIMIT,
            f"robust_reduction compares every two workers: twice {size / 1e6:,.0f} MB more from each process for each "
            f"bucket, 8 B x {layout.world_size:,} x {layout.world_size:,}",
        )


def _files(layout: RunLayout) -> Iterator[Break]:
    if layout.stage:
        of_ours, of_deepspeed = layout.world_size, layout.world_size * (2 if layout.stage == 3 else 1)
        yield Break(
            (of_ours + of_deepspeed) / _FILES_LIMIT,
            f"a checkpoint is a folder of about {of_ours + of_deepspeed:,} files: {of_deepspeed:,} of DeepSpeed and, "
            f"where there is state, {of_ours:,} of ours",
        )


def _short_shards(plan: ResolvedPlan, layout: RunLayout) -> Iterator[Break]:
    """Of ZeRO-3: a slice that is shorter than a block is padded, or sent as it is."""
    if layout.stage < 3:
        return
    for block in (plan.config.gradient_compression, plan.config.parameter_compression):
        if block is None or not block.enabled:
            continue
        size = block.effective_block_size
        trained = [weight for weight in plan.weights if weight.trainable and len(weight.shape) > 1]
        total = sum(weight.numel for weight in trained)
        short = sum(weight.numel for weight in trained if weight.numel < size * layout.world_size)
        yield Break(
            short / max(1, total) / _SHARE_LIMIT,
            f"{block.key}: {100 * short / max(1, total):.0f} % of the elements are in weights of which a process has "
            f"less than a block of {size}: set block_size lower",
        )
