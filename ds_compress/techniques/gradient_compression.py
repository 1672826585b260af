"""`gradient_compression`: gradients travel between processes as int8 or int4 values with a scale per block.

    "gradient_compression": {"enabled": true, "bits": 8}

ZeRO stages 2 and 3 reduce after every micro-step, stage 1 once per step: on a slow link, stage 1 with accumulation
sends less than any compression of stage 2 does.

A bucket stays DeepSpeed's own while `warmup_steps` last, when it is smaller than `min_elements`, and always when the
link was measured at the beginning of the run and sending more bytes is faster (see `link_verdict`). Gradients of small
and one-dimensional parameters are not quantized (see `reduce.uncompressed`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ds_compress.config.schema.gradient_compression import GradientCompressionConfig
from ds_compress.errors import ConfigError, Problem
from ds_compress.reduce import lopsided
from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.exchange import Feedback, QuantizedSum
from ds_compress.reduce.nodes import Nodes, UnevenNodesError, find_nodes
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.slices import Part, Segment
from ds_compress.reduce.stochastic import Dither, StochasticBlockCodec
from ds_compress.reduce.uncompressed import is_sent_uncompressed
from ds_compress.techniques.link_verdict import LinkVerdict, log_once
from ds_compress.techniques.training_engine import Deliver, TrainingEngine

_KINDS = ("sent", "summed")
_MUCH = 0.1
"""Share of elements that are not quantized from which on it is a warning."""


class GradientCompression:
    """Quantizes the buckets of one engine's gradients; half of `gradient_reduction`, which asks it bucket by bucket."""

    def __init__(self, block: GradientCompressionConfig) -> None:
        self.block = block
        bits = block.effective_error_feedback_bits
        self.residuals = {kind: Residuals(bits) for kind in _KINDS} if bits else {}
        self._nodes: Nodes | None = None
        self._verdict = LinkVerdict(block.key, block.measure_link)
        self._is_on_one_node = False
        self._sums: dict[Any, QuantizedSum] = {}
        self._quantized = self._exact = 0
        self._dither: Dither | None = None

    def attach(self, engine: TrainingEngine) -> None:
        """Looks at processes and, at the beginning of a run, at the link; a collective.

        Raises:
            ConfigError: nodes of unequal size under `hierarchical`.
        """
        self.engine, self.group = engine, engine.data_parallel_group
        if self.block.hierarchical:
            self._find_nodes()
        if self.block.rounding == "stochastic":
            self._dither = Dither(dist.get_rank(self.group) / dist.get_world_size(self.group))
        self._report_exact_share()
        if not self._is_on_one_node:
            self._verdict.take(lambda: engine.compare_reductions(self.sum_over(self.group)), self.group)

    def _find_nodes(self) -> None:
        try:
            self._nodes = find_nodes(self.group)
        except UnevenNodesError as error:
            path = "compression_training.gradient_compression.hierarchical"
            raise ConfigError([Problem(path, "true", str(error), "set it to false")]) from error
        if self._nodes is not None and self._nodes.layout.num_nodes == 1:
            self._is_on_one_node = True
            log_once(
                self.group, "gradient_compression is off: hierarchical, and all processes are on one host"
            )

    def _report_exact_share(self) -> None:
        """Small and one-dimensional parameters are not quantized, which should be next to nothing."""
        sizes = [0, 0]
        for shape in self.engine.parameter_shapes():
            sizes[is_sent_uncompressed(shape)] += shape.numel()
        share = sizes[True] / max(1, sum(sizes))
        text = f"gradient_compression: {100 * share:.2g} % of all gradients travel as DeepSpeed sends them"
        level = logging.INFO if share < _MUCH else logging.WARNING
        log_once(self.group, f"{text}, those of small and one-dimensional parameters", level)

    # -- buckets ---------------------------------------------------------------------------------------

    def quantizes(self, numel: int) -> bool:
        """Whether a bucket of `numel` elements is quantized now; the same in every process."""
        return (
            self._verdict.is_worthwhile
            and not self._is_on_one_node
            and numel >= self.block.min_elements
            and self.engine.applied_steps >= self.block.warmup_steps
        )

    def begin(self) -> None:
        """A bucket is about to be reduced."""
        if self._dither is not None:
            self._dither.begin()

    def count(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            if segment.exact:
                self._exact += segment.numel
            else:
                self._quantized += segment.numel

    def reduce_scatter(
        self, group: Any, segments: Sequence[Segment], deliver: Deliver, multiplier: float
    ) -> None:
        self.count(segments)
        if not is_lopsided(segments, dist.get_world_size(group)):
            self.sum_over(group).reduce_scatter(segments, deliver, multiplier, self._feedback())
            return
        self.sum_over(group).all_reduce(segments, multiplier, self._feedback())
        for segment in segments:
            if segment.owner == dist.get_rank(group):
                deliver(Part(segment, 0, segment.numel), segment.values.float())

    def all_reduce(self, group: Any, segments: Sequence[Segment], multiplier: float) -> None:
        self.count(segments)
        self.sum_over(group).all_reduce(segments, multiplier, self._feedback())

    def sum_over(self, group: Any) -> QuantizedSum:
        if group not in self._sums:
            # ZeRO-3 names the same processes by another object.
            fits = self._nodes is not None and _ranks(group) == _ranks(self.group)
            nodes = self._nodes if fits else None
            chunk = self.block.chunk_elements(dist.get_world_size(group))
            self._sums[group] = QuantizedSum(group, self.codec(), chunk, nodes)
        return self._sums[group]

    def codec(self) -> BlockCodec:
        if self._dither is None:
            return BlockCodec(self.block.bits, self.block.effective_block_size)
        return StochasticBlockCodec(self.block.bits, self.block.effective_block_size, self._dither)

    def _feedback(self) -> Feedback | None:
        if not self.residuals:
            return None
        return Feedback(self.residuals["sent"], self.residuals["summed"], self.engine.loss_scale())

    # -- numbers and state -----------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        return {"quantized_elements": float(self._quantized), "exact_elements": float(self._exact)}

    def follow(self, predecessor: GradientCompression) -> None:
        """Before `attach`: the run of `predecessor` goes on here, with another model."""
        self._verdict.follow(predecessor._verdict)

    def state_dict(self) -> dict[str, Any]:
        return {"link": self._verdict.state(), "nodes": self._layout()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._verdict.restore(state.get("link"), self.group)
        stored = state.get("nodes")
        if self.block.hierarchical and stored is not None and stored != self._layout():
            log_once(
                self.group,
                f"gradient_compression.hierarchical: the checkpoint is of processes on nodes {stored}, they are on "
                f"{self._layout()} now: what is summed exactly differs, and so do the last bits",
                logging.WARNING,
            )

    def _layout(self) -> list[list[int]] | None:
        """Ranks by node; None where each has its own, or where that does not matter."""
        return None if self._nodes is None else [list(ranks) for ranks in self._nodes.layout.ranks]

    def process_state(self) -> dict[str, Any]:
        return {} if self._dither is None else {"buckets": self._dither.buckets}

    def merge_process_states(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """All processes have drawn as often."""
        return {key: value for key, value in states[0].items() if key == "buckets"}

    def load_process_state(self, state: Mapping[str, Any]) -> None:
        if self._dither is not None:
            self._dither.buckets = state.get("buckets", 0)


def _ranks(group: Any) -> list[int]:
    return list(dist.get_process_group_ranks(group))


def is_lopsided(segments: Sequence[Segment], owners: int) -> bool:
    """`reduce.lopsided` of a bucket."""
    of_owner = [0] * owners
    for segment in segments:
        of_owner[segment.owner] += segment.numel
    return lopsided.is_lopsided(of_owner)
