"""`gradient_compression` and `robust_reduction` share the one reduction that an engine has: here they meet.

Under `robust_reduction` every bucket of gradients is reduced here, quantized or not; under `gradient_compression` alone
those that it quantizes. What outlives a bucket is kept here and in the two: error feedback, who stood out, how many
steps were applied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.errors import Problem
from ds_compress.ops.sizes import chunk_elements
from ds_compress.reduce.outliers import FlagCounts, Report
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.robust import RobustSum
from ds_compress.reduce.slices import Segment
from ds_compress.techniques.base import Technique, TechniqueContext, engine_only
from ds_compress.techniques.gradient_compression import GradientCompression
from ds_compress.techniques.link_verdict import log_once
from ds_compress.techniques.robust_reduction import RobustReduction
from ds_compress.techniques.training_engine import Deliver, TrainingEngine

ALONE = "there is one data-parallel process, which sends nothing and has no other to compare with; this does nothing"
_OF_A_WORKER = ("sent", "momentum")
"""What belongs to the gradients of one process; "summed" belongs to the slice of a sum that it owns."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class GradientReduction(Technique):
    """What an engine calls instead of its own reductions of gradients; see `training_engine.GradientReducer`."""

    name = "gradient_reduction"

    @classmethod
    def of(cls, context: TechniqueContext) -> GradientReduction | None:
        compression, robust = context.config.gradient_compression, context.config.robust_reduction
        enabled = {
            "compression": GradientCompression(compression) if compression and compression.enabled else None,
            "robust": RobustReduction(robust) if robust and robust.enabled else None,
        }
        return cls(**enabled) if any(enabled.values()) else None  # type: ignore[arg-type]

    def __init__(self, compression: GradientCompression | None, robust: RobustReduction | None) -> None:
        self.compression, self.robust = compression, robust
        self._halves = [half for half in (compression, robust) if half is not None]
        self.residuals: dict[str, Residuals] = {}
        for half in self._halves:
            self.residuals |= half.residuals
        self._awaits_outcome = False
        self._undo: Callable[[], None] = lambda: None

    @property
    def blocks(self) -> list[str]:
        """The JSON blocks that are at work here."""
        named = {"gradient_compression": self.compression, "robust_reduction": self.robust}
        return [name for name, half in named.items() if half is not None]

    @property
    def flag_counts(self) -> FlagCounts:
        assert self.robust is not None
        return self.robust.flag_counts

    @property
    def last_report(self) -> Report | None:
        return None if self.robust is None else self.robust.last_report

    # -- life ------------------------------------------------------------------------------------------

    def follow(self, predecessor: Technique) -> None:
        if isinstance(predecessor, GradientReduction) and predecessor.compression and self.compression:
            self.compression.follow(predecessor.compression)

    def attach_engine(self, engine: TrainingEngine) -> None:
        """Takes over the reductions of `engine`; a collective.

        Raises:
            ConfigError: too few workers for `max_malicious`, or nodes of unequal size under `hierarchical`.
        """
        group = engine.data_parallel_group
        if self.robust is not None:
            self.robust.attach(engine)
        if dist.get_world_size(group) == 1:
            log_once(group, f"{' and '.join(self.blocks)}: {ALONE}", logging.WARNING)
        if self.robust is not None:
            self.robust.warn_of_two_momenta()
        if self.compression is not None:
            self.compression.attach(engine)
        self._device = engine.device
        self._undo = engine.replace_reductions(self)

    def detach(self) -> None:
        self._undo()

    def without_engine(self) -> Iterator[Problem]:
        for block in self.blocks:
            yield engine_only(block, "enabled", "true", "false")

    # -- buckets ---------------------------------------------------------------------------------------

    @property
    def needs_keys(self) -> bool:
        return self.compression is not None or bool(self.residuals)

    def handles(self, numel: int, dtype: torch.dtype) -> bool:
        if dtype not in _FLOATS:
            return False
        return self.robust is not None or self._quantizes(numel)

    def _quantizes(self, numel: int) -> bool:
        return self.compression is not None and self.compression.quantizes(numel)

    def reduce_scatter(
        self, group: Any, segments: Sequence[Segment], deliver: Deliver, multiplier: float
    ) -> None:
        self._begin(segments)
        if self.robust is not None:
            self._robust_sum(group, segments).reduce_scatter(segments, deliver, multiplier)
        elif self.compression is not None:
            self.compression.reduce_scatter(group, segments, deliver, multiplier)

    def all_reduce(self, group: Any, segments: Sequence[Segment], multiplier: float) -> None:
        self._begin(segments)
        if self.robust is not None:
            self._robust_sum(group, segments).all_reduce(segments, multiplier)
        elif self.compression is not None:
            self.compression.all_reduce(group, segments, multiplier)

    def _begin(self, segments: Sequence[Segment]) -> None:
        self._settle()
        if self.compression is not None:
            self.compression.begin()
        if self.robust is not None:
            self.robust.begin(segments)

    def _robust_sum(self, group: Any, segments: Sequence[Segment]) -> RobustSum:
        assert self.robust is not None
        compression, codec = self.compression, None
        if compression is not None and compression.quantizes(sum(s.numel for s in segments)):
            compression.count(segments)
            codec = compression.codec()
        size, dtype = dist.get_world_size(group), segments[0].values.dtype
        if compression is None:
            chunk = chunk_elements(None, size, 8 * dtype.itemsize)
        else:
            chunk = compression.block.chunk_elements(size)
        return self.robust.sum_over(group, dtype, codec, chunk)

    # -- steps -----------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        self._settle()
        self._awaits_outcome = True
        if self.robust is not None:
            self.robust.judge(step)

    def after_step(self, step: int) -> None:
        self._awaits_outcome = False
        for residuals in self.residuals.values():
            residuals.commit()

    def _settle(self) -> None:
        """A step that was begun and never reported as applied was skipped: what it sent was for nothing."""
        if self._awaits_outcome:
            self._awaits_outcome = False
            for residuals in self.residuals.values():
                residuals.rollback()

    def metrics(self) -> dict[str, float]:
        return {key: value for half in self._halves for key, value in half.metrics().items()}

    def history(self, step: int) -> Mapping[str, float | torch.Tensor]:
        numbers = {} if self.compression is None else self.compression.metrics()
        return {**numbers, **({} if self.robust is None else self.robust.history(step))}

    def report_details(self) -> dict[str, Any]:
        return {} if self.robust is None else self.robust.report_details()

    # -- checkpoints -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {} if self.compression is None else self.compression.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.compression is not None:
            self.compression.load_state_dict(state)

    def process_state(self) -> dict[str, Any]:
        self._settle()
        kept: dict[str, Any] = {
            kind: [{"run": dict(run), "stored": stored.cpu()} for run, stored in residuals.state()]
            for kind, residuals in self.residuals.items()
        }
        for half in self._halves:
            kept |= half.process_state()
        return kept

    def merge_process_states(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        # What one process owes to a sum, all of them owe to a mean: it stays the same when each owes the mean.
        merged: dict[str, Any] = {
            kind: list(residuals.mean_of([state.get(kind, ()) for state in states]))
            for kind, residuals in self.residuals.items()
            if kind in _OF_A_WORKER
        }
        for half in self._halves:
            merged |= half.merge_process_states(states)
        return merged

    def load_process_state(self, state: Mapping[str, Any] | None) -> None:
        for kind, residuals in self.residuals.items():
            residuals.clear()
            for item in (state or {}).get(kind, ()):
                residuals.restore(item["run"], item["stored"].to(self._device))
        for half in self._halves:
            half.load_process_state(state or {})
        self._awaits_outcome = False
