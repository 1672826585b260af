"""`robust_reduction`: the sum of gradients withstands bad contributions of a few workers, and names who sends them.

    "robust_reduction": {"enabled": true, "rule": "centered_clip", "max_malicious": 1, "on_outlier": "report"}

Threat model: bad *contributions*, of at most `max_malicious` workers: a broken device, a poisoned shard, a spoofed
gradient. A process that runs code of its own owns a slice of the result and is not held by this.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.config.schema.robust_reduction import RobustReductionConfig
from ds_compress.errors import ConfigError, Problem
from ds_compress.reduce.codec import BlockCodec, PlainCodec
from ds_compress.reduce.momentum import WorkerMomentum
from ds_compress.reduce.outliers import FlagCounts, OutlierAbortError, OutlierDetector, Report, report
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.robust import Policy, RobustSum, describe_flagged
from ds_compress.reduce.slices import Segment
from ds_compress.techniques.link_verdict import log_once
from ds_compress.techniques.training_engine import TrainingEngine

_TWO_MOMENTA = (
    "robust_reduction.worker_momentum stands for the momentum of the optimizer, which has one too: set betas[0] of "
    "Adam to 0; or momentum of SGD to 0, and its lr to lr / (1 - momentum)"
)


class RobustReduction:
    """Sums one engine's gradients by a robust rule; half of `gradient_reduction`, which gives it every bucket."""

    def __init__(self, block: RobustReductionConfig) -> None:
        self.block = block
        self.momentum = WorkerMomentum(block.worker_momentum) if block.worker_momentum else None
        self.residuals: dict[str, Residuals] = (
            {} if self.momentum is None else {"momentum": self.momentum.kept}
        )
        self.flag_counts = FlagCounts()
        self.last_report: Report | None = None
        self._detector = OutlierDetector(block.outlier_ratio)
        self._sums: dict[Any, RobustSum] = {}
        self._gram: torch.Tensor | None = None
        self._non_finite: set[int] = set()

    def attach(self, engine: TrainingEngine) -> None:
        """Raises ConfigError for too few workers for `max_malicious`."""
        self.engine, self.group = engine, engine.data_parallel_group
        workers = dist.get_world_size(self.group)
        if workers < 2 * self.block.max_malicious + 1:
            raise ConfigError(
                [
                    Problem(
                        "compression_training.robust_reduction.max_malicious",
                        str(self.block.max_malicious),
                        f"at most {(workers - 1) // 2} with {workers} data-parallel processes",
                        "f bad workers can be outvoted by 2 f + 1 or more: lower it, or start more processes",
                    )
                ]
            )

    def warn_of_two_momenta(self) -> None:
        """A collective of none: only looks at the optimizer."""
        if self.momentum is not None and self.engine.has_momentum():
            log_once(self.group, _TWO_MOMENTA, logging.WARNING)

    # -- buckets ---------------------------------------------------------------------------------------

    def begin(self, segments: Sequence[Segment]) -> None:
        """Makes of gradients what each worker contributes: its momentum, where it keeps one."""
        if self.momentum is not None:
            self.momentum.apply(segments, self.engine.loss_scale(), self.engine.reductions_per_step())

    def sum_over(
        self, group: Any, dtype: torch.dtype, codec: BlockCodec | None, chunk_elements: int
    ) -> RobustSum:
        """`codec`: how contributions travel; None: as they are, in `dtype`."""
        key = (group, codec is not None or dtype)
        if key not in self._sums:
            block = self.block
            self._sums[key] = RobustSum(
                group,
                PlainCodec(dtype) if codec is None else codec,
                Policy(
                    block.rule,
                    block.max_malicious,
                    block.on_outlier,
                    block.outlier_ratio,
                    block.neighbor_mixing,
                ),
                chunk_elements,
                self._add_report,
                lambda: self._detector.flagged,
            )
        return self._sums[key]

    def _add_report(self, gram: torch.Tensor, found: Report) -> None:
        """Adds one bucket to the step's inner products: those of full gradients are the sums over buckets."""
        self._non_finite.update(found.non_finite)
        finite = torch.nan_to_num(gram, 0.0, 0.0, 0.0)
        self._gram = finite if self._gram is None else self._gram + finite

    # -- steps -----------------------------------------------------------------------------------------

    def judge(self, step: int) -> None:
        """Judges the step whose gradients are reduced and not yet applied.

        Raises:
            OutlierAbortError: a worker stands out and `on_outlier` is abort; in all processes alike.
        """
        if self._gram is None:
            return
        found = self._detector.update(report(self._gram, sorted(self._non_finite), self.block.outlier_ratio))
        self._gram, self._non_finite = None, set()
        overflow = len(found.non_finite) > self.block.max_malicious
        if self.block.on_outlier == "abort" and found.flagged and not overflow:
            raise OutlierAbortError(
                f"step {step}: {describe_flagged(found)}; robust_reduction.on_outlier is abort"
            )
        if found.flagged and (self.last_report is None or found.flagged != self.last_report.flagged):
            log_once(self.group, f"step {step}: {describe_flagged(found)}", logging.WARNING)
        self.last_report = found
        self.flag_counts.add(found.flagged)
        self.engine.log_events(
            {f"Train/robust_reduction/{key}": value for key, value in self.metrics().items()}
        )

    def metrics(self) -> dict[str, float]:
        """Norm, cosine to the result and verdict of each worker in the last step."""
        if self.last_report is None:
            return {}
        result = {}
        numbers = zip(self.last_report.norms.tolist(), self.last_report.cosines.tolist(), strict=True)
        for worker, (norm, cosine) in enumerate(numbers):
            result[f"worker_{worker}_norm"] = norm
            result[f"worker_{worker}_cosine"] = cosine
            result[f"worker_{worker}_accused"] = float(worker in self.last_report.flagged)
        return result

    def history(self, step: int) -> Mapping[str, float]:
        """`flagged_workers`: how many of them the last step flagged; each one by itself would be thousands."""
        return {} if self.last_report is None else {"flagged_workers": float(len(self.last_report.flagged))}

    def report_details(self) -> dict[str, Any]:
        """`flagged_workers`: {worker: steps in which it was flagged}, of `judged_steps` since this process began."""
        counts = {str(worker): steps for worker, steps in sorted(self.flag_counts.counts.items())}
        judged = self.flag_counts.steps
        return {"flagged_workers": counts, "judged_steps": judged} if judged else {}

    def process_state(self) -> dict[str, Any]:
        return {"watch": self._detector.state()}

    def merge_process_states(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Workers are others: nobody has stood out yet."""
        return {}

    def load_process_state(self, state: Mapping[str, Any]) -> None:
        self._detector.restore(state.get("watch", {}))
