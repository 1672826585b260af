"""`gradient_compression` and `robust_reduction` at work: what DeepSpeed's reductions call instead of all-reduce.

    "gradient_compression": {"enabled": true, "bits": 8}
    "robust_reduction": {"enabled": true, "rule": "centered_clip", "max_malicious": 1, "on_outlier": "report"}

Stages 2 and 3 reduce after every micro-step, stage 1 once per step: on a slow link, stage 1 with accumulation sends
less than any compression of stage 2 does.

`GradientReduction` decides for each bucket of gradients whether it is ours, and keeps what outlives a bucket: error
feedback, who stood out, how many steps were applied. Where DeepSpeed calls it is `reduction_seams`.

A bucket stays DeepSpeed's own while `warmup_steps` last, when it is smaller than `min_elements`, and always when the
link was measured and sending more bytes is faster. Under `robust_reduction` every bucket is ours, quantized or not.

Threat model of `robust_reduction`: bad *contributions*, of at most `max_malicious` workers: a broken device, a poisoned
shard, a spoofed gradient. A process that runs code of its own owns a slice of the result and is not held by this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.engine.comm import reduction_points
from ds_compress.engine.zero import internals
from ds_compress.errors import ConfigError, Problem
from ds_compress.reduce.codec import BlockCodec, PlainCodec
from ds_compress.reduce.exchange import Feedback, QuantizedSum
from ds_compress.reduce.momentum import WorkerMomentum
from ds_compress.reduce.nodes import Nodes, UnevenNodesError, find_nodes
from ds_compress.reduce.outliers import FlagCounts, OutlierAbortError, OutlierDetector, Report, report
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.robust import Policy, RobustSum, describe_flagged
from ds_compress.reduce.slices import Part, Segment
from ds_compress.reduce.stochastic import Dither, StochasticBlockCodec
from ds_compress.reduce.uncompressed import is_sent_uncompressed
from ds_compress.techniques.base import Technique

logger = logging.getLogger("ds_compress")

Deliver = Callable[[Part, torch.Tensor], None]

_KINDS = ("sent", "summed")
_TWO_MOMENTA = (
    "robust_reduction.worker_momentum stands for the momentum of the optimizer, which has one too: set betas[0] of "
    "Adam to 0; or momentum of SGD to 0, and its lr to lr / (1 - momentum)"
)
_MUCH = 0.1
"""Share of elements that are not quantized from which on it is a warning."""
ALONE = "there is one data-parallel process, which sends nothing and has no other to compare with; this does nothing"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class GradientReduction(Technique):
    """See the module."""

    name = "gradient_reduction"

    @classmethod
    def of(cls, config: CompressionConfig) -> GradientReduction | None:
        """None when neither block is enabled."""
        blocks = (config.gradient_compression, config.robust_reduction)
        return cls(config) if any(block is not None and block.enabled for block in blocks) else None

    def __init__(self, config: CompressionConfig) -> None:
        wire, robust = config.gradient_compression, config.robust_reduction
        self.wire = wire if wire is not None and wire.enabled else None
        self.robust = robust if robust is not None and robust.enabled else None
        bits = self.wire.effective_error_feedback_bits if self.wire else None
        self.residuals = {kind: Residuals(bits) for kind in _KINDS} if bits else {}
        beta = self.robust.worker_momentum if self.robust else 0.0
        self.momentum = WorkerMomentum(beta) if beta else None
        if self.momentum is not None:
            self.residuals["momentum"] = self.momentum.kept
        self.flag_counts = FlagCounts()
        self._detector = OutlierDetector(self.robust.outlier_ratio) if self.robust else None
        self.last_report: Report | None = None
        self._nodes: Nodes | None = None
        self._link_is_slow = True
        self._awaits_outcome = False
        self._sums: dict[Any, QuantizedSum] = {}
        self._robust_sums: dict[Any, RobustSum] = {}
        self._gram: torch.Tensor | None = None
        self._non_finite: set[int] = set()
        self._quantized = self._exact = 0
        self._dither: Dither | None = None
        self._undo: Callable[[], None] = lambda: None

    # -- life ------------------------------------------------------------------------------------------

    def attach_engine(self, engine: Any) -> None:
        """Takes over the reductions of `engine`; a collective.

        Raises:
            ConfigError: too few workers for `max_malicious`, or hosts of unequal size under `hierarchical`.
        """
        self.engine = engine
        self.group = internals.data_parallel_group(engine)
        self._check_workers()
        if dist.get_world_size(self.group) == 1:
            blocks = {"gradient_compression": self.wire, "robust_reduction": self.robust}
            names = " and ".join(name for name, block in blocks.items() if block is not None)
            _say(self.group, f"{names}: {ALONE}", logging.WARNING)
        if self.momentum is not None and internals.has_momentum(engine):
            _say(self.group, _TWO_MOMENTA, logging.WARNING)
        if self.wire is not None and self.wire.hierarchical:
            self._find_nodes()
        if self.wire is not None and self.wire.rounding == "stochastic":
            self._dither = Dither(dist.get_rank(self.group) / dist.get_world_size(self.group))
        if self.wire is not None:
            self._say_what_is_exact()
        if self.wire is not None and self.wire.measure_link and self._link_is_slow:
            self._measure_link(self.wire.min_elements)
        self._undo = reduction_points.connect(engine, self)

    def detach(self) -> None:
        self._undo()

    def _check_workers(self) -> None:
        workers = dist.get_world_size(self.group)
        if self.robust is None or workers >= 2 * self.robust.max_malicious + 1:
            return
        raise ConfigError(
            [
                Problem(
                    "compression_training.robust_reduction.max_malicious",
                    str(self.robust.max_malicious),
                    f"at most {(workers - 1) // 2} with {workers} data-parallel processes",
                    "f bad workers can be outvoted by 2 f + 1 or more: lower it, or start more processes",
                )
            ]
        )

    def _find_nodes(self) -> None:
        try:
            self._nodes = find_nodes(self.group)
        except UnevenNodesError as error:
            path = "compression_training.gradient_compression.hierarchical"
            raise ConfigError([Problem(path, "true", str(error), "set it to false")]) from error
        if self._nodes is not None and self._nodes.layout.num_nodes == 1:
            self._link_is_slow = False
            _say(self.group, "gradient_compression is off: hierarchical, and all processes are on one host")

    def _say_what_is_exact(self) -> None:
        """Small and one-dimensional parameters are not quantized, which should be next to nothing."""
        sizes = [0, 0]
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                sizes[is_sent_uncompressed(shape)] += shape.numel()
        share = sizes[True] / max(1, sum(sizes))
        text = f"gradient_compression: {100 * share:.2g} % of all gradients travel as DeepSpeed sends them"
        few = share < _MUCH
        _say(
            self.group,
            f"{text}, those of small and one-dimensional parameters",
            logging.INFO if few else logging.WARNING,
        )

    def _measure_link(self, min_elements: int) -> None:
        if dist.get_world_size(self.group) == 1:
            return
        found = reduction_points.measure(self.engine, self._sum_over(self.group))
        self._link_is_slow = found.is_worthwhile
        state = "on" if found.is_worthwhile else "off on this link; measure_link: false insists"
        _say(self.group, f"gradient_compression is {state}: {found}")

    # -- for the seams ---------------------------------------------------------------------------------

    @property
    def needs_keys(self) -> bool:
        """Whether segments have to end where their parameter does, and to say which it is."""
        return self.wire is not None or bool(self.residuals)

    def handles(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a bucket of `numel` elements in all is ours; the same in every process."""
        if dtype not in _FLOATS:
            return False
        return self.robust is not None or self._quantizes(numel)

    def _quantizes(self, numel: int) -> bool:
        return (
            self.wire is not None
            and self._link_is_slow
            and numel >= self.wire.min_elements
            and self.engine.compression.applied_steps >= self.wire.warmup_steps
        )

    def reduce_scatter(
        self, group: Any, segments: Sequence[Segment], deliver: Deliver, multiplier: float
    ) -> None:
        """Gives each owner `multiplier` times the sum of its segments: see `reduce.exchange`."""
        numel, dtype = self._begin(segments)
        if self.robust is not None:
            self._robust_sum(group, segments, numel, dtype).reduce_scatter(segments, deliver, multiplier)
            return
        self._count(segments)
        if is_lopsided(segments, dist.get_world_size(group)):
            self._sum_over(group).all_reduce(segments, multiplier, self._feedback())
            for segment in segments:
                if segment.owner == dist.get_rank(group):
                    deliver(Part(segment, 0, segment.numel), segment.values.float())
        else:
            self._sum_over(group).reduce_scatter(segments, deliver, multiplier, self._feedback())

    def all_reduce(self, group: Any, segments: Sequence[Segment], multiplier: float) -> None:
        """Replaces all segments by `multiplier` times their sum, with the same bits everywhere."""
        numel, dtype = self._begin(segments)
        if self.robust is None:
            self._count(segments)
            self._sum_over(group).all_reduce(segments, multiplier, self._feedback())
            return
        self._robust_sum(group, segments, numel, dtype).all_reduce(segments, multiplier)

    def _count(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            if segment.exact:
                self._exact += segment.numel
            else:
                self._quantized += segment.numel

    def _begin(self, segments: Sequence[Segment]) -> tuple[int, torch.dtype]:
        """Makes of gradients what is sent; the elements and dtype of the bucket."""
        self._settle()
        if self._dither is not None:
            self._dither.begin()
        if self.momentum is not None:
            per_step = internals.reductions_per_step(self.engine)
            self.momentum.apply(segments, internals.loss_scale(self.engine.optimizer), per_step)
        return sum(segment.numel for segment in segments), segments[0].values.dtype

    def _sum_over(self, group: Any) -> QuantizedSum:
        if group not in self._sums:
            assert self.wire is not None
            hosts = self._nodes if group is self.group else None
            self._sums[group] = QuantizedSum(group, self._codec(), self.wire.piece_elements, hosts)
        return self._sums[group]

    def _codec(self) -> BlockCodec:
        assert self.wire is not None
        if self._dither is None:
            return BlockCodec(self.wire.bits, self.wire.effective_block_size)
        return StochasticBlockCodec(self.wire.bits, self.wire.effective_block_size, self._dither)

    def _robust_sum(
        self, group: Any, segments: Sequence[Segment], numel: int, dtype: torch.dtype
    ) -> RobustSum:
        quantizes = self._quantizes(numel)
        if quantizes:
            self._count(segments)
        key = (group, quantizes or dtype)
        if key not in self._robust_sums:
            robust, wire = self.robust, self.wire
            assert robust is not None
            policy = Policy(
                robust.rule,
                robust.max_malicious,
                robust.on_outlier,
                robust.outlier_ratio,
                robust.neighbor_mixing,
            )
            codec: BlockCodec | PlainCodec = PlainCodec(dtype)
            if quantizes and wire is not None:
                codec = self._codec()
            pieces = wire.piece_elements if wire is not None else 1 << 20
            self._robust_sums[key] = RobustSum(
                group,
                codec,
                policy,
                pieces,
                self._add_report,
                lambda: self._detector.flagged if self._detector else (),
            )
        return self._robust_sums[key]

    def _feedback(self) -> Feedback | None:
        if "sent" not in self.residuals:
            return None
        unit = internals.loss_scale(self.engine.optimizer)
        return Feedback(self.residuals["sent"], self.residuals["summed"], unit)

    # -- steps -----------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        self._settle()
        self._awaits_outcome = True
        if self._gram is not None:
            self._report(step)

    def after_step(self, step: int) -> None:
        self._awaits_outcome = False
        for residuals in self.residuals.values():
            residuals.commit()

    def _settle(self) -> None:
        """A step that was begun and never reported as applied was skipped: its messages were for nothing."""
        if self._awaits_outcome:
            self._awaits_outcome = False
            for residuals in self.residuals.values():
                residuals.rollback()

    def _add_report(self, gram: torch.Tensor, found: Report) -> None:
        """Adds one bucket to the step's inner products: those of whole gradients are the sums over buckets."""
        self._non_finite.update(found.non_finite)
        finite = torch.nan_to_num(gram, 0.0, 0.0, 0.0)
        self._gram = finite if self._gram is None else self._gram + finite

    def _report(self, step: int) -> None:
        """Judges the step whose gradients are reduced and not yet applied.

        Raises:
            OutlierAbort: a worker stands out and `on_outlier` is abort; in all processes alike.
        """
        assert self.robust is not None and self._detector is not None and self._gram is not None
        found = self._detector.update(report(self._gram, sorted(self._non_finite), self.robust.outlier_ratio))
        self._gram, self._non_finite = None, set()
        overflow = len(found.non_finite) > self.robust.max_malicious
        if self.robust.on_outlier == "abort" and found.flagged and not overflow:
            raise OutlierAbortError(
                f"step {step}: {describe_flagged(found)}; robust_reduction.on_outlier is abort"
            )
        if found.flagged and (self.last_report is None or found.flagged != self.last_report.flagged):
            _say(self.group, f"step {step}: {describe_flagged(found)}", logging.WARNING)
        self.last_report = found
        self.flag_counts.add(found.flagged)
        monitor = getattr(self.engine, "monitor", None)
        if monitor is not None and monitor.enabled:
            samples = self.engine.global_samples
            monitor.write_events(
                [(f"Train/robust_reduction/{key}", value, samples) for key, value in self._workers().items()]
            )

    def metrics(self) -> dict[str, float]:
        counts = (
            {}
            if self.wire is None
            else {
                "quantized_elements": float(self._quantized),
                "exact_elements": float(self._exact),
            }
        )
        return {**counts, **self._workers()}

    def _workers(self) -> dict[str, float]:
        if self.last_report is None:
            return {}
        result = {}
        for worker, (norm, cosine) in enumerate(
            zip(self.last_report.norms.tolist(), self.last_report.cosines.tolist(), strict=True)
        ):
            result[f"worker_{worker}_norm"] = norm
            result[f"worker_{worker}_cosine"] = cosine
            result[f"worker_{worker}_accused"] = float(worker in self.last_report.flagged)
        return result

    # -- checkpoints -----------------------------------------------------------------------------------

    def process_state(self) -> dict[str, Any]:
        self._settle()
        kept: dict[str, Any] = {
            kind: [{"run": dict(run), "stored": stored.cpu()} for run, stored in residuals.state()]
            for kind, residuals in self.residuals.items()
        }
        if self._dither is not None:
            kept["buckets"] = self._dither.buckets
        return kept if self._detector is None else {**kept, "watch": self._detector.state()}

    def load_process_state(self, state: Mapping[str, Any] | None) -> None:
        for kind, residuals in self.residuals.items():
            residuals.clear()
            for item in (state or {}).get(kind, ()):
                residuals.restore(item["run"], item["stored"].to(self.engine.device))
        if self._dither is not None:
            self._dither.buckets = (state or {}).get("buckets", 0)
        if self._detector is not None:
            self._detector.restore((state or {}).get("watch", {}))
        self._awaits_outcome = False


def is_lopsided(segments: Sequence[Segment], owners: int) -> bool:
    """Whether one owner gets so much of a bucket that its link would be the wall.

    All W - 1 others send it their n_w elements; an all-reduce brings 2 (W - 1) / W of all n elements to everybody. With
    many buckets a bucket of ZeRO-2 belongs to one or two of all processes.
    """
    of_owner = [0] * owners
    for segment in segments:
        of_owner[segment.owner] += segment.numel
    return owners > 2 and max(of_owner) * owners > 2 * sum(of_owner)


def _say(group: Any, text: str, level: int = logging.INFO) -> None:
    if dist.get_rank(group) == 0:
        logger.log(level, "ds_compress: %s", text)
