"""How a run is divided over processes and nodes, by a DeepSpeed JSON; what it does not say has DeepSpeed's default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ADAM_MOMENTS = 2
_MOMENTS = {
    "adam": _ADAM_MOMENTS,
    "adamw": _ADAM_MOMENTS,
    "fusedadam": _ADAM_MOMENTS,
    "lamb": _ADAM_MOMENTS,
    "lion": 1,
    "adagrad": 1,
}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
"""By the words of DeepSpeed's JSON."""
_BUCKET_OF_STAGE_0 = 500_000_000
"""Elements that an engine reduces together when no ZeRO does."""


@dataclass(frozen=True)
class RunLayout:
    """What decides who holds and who sends what.

    stage: of ZeRO. weight_bytes: of a weight as forward reads it; None: as the model's own dtype has it. wire_bytes: of
    a gradient between processes, likewise. kept_gradient_bytes: of a gradient that is kept until the step, likewise.
    accumulation: micro-steps of a step. bucket: elements that are reduced together. reduces_whole: ZeRO-1 and 2
    without `reduce_scatter` or `contiguous_gradients`. contiguous: gradients are copied into buckets. persistent:
    parameters with at most so many elements stay whole under ZeRO-3. reuse: elements of layers within which it keeps a
    layer for its next use. prefetch: elements that it fetches ahead. moments: fp32 values that the optimizer keeps of
    each weight.
    """

    world_size: int = 1
    nodes: int = 1
    stage: int = 0
    weight_bytes: int | None = None
    wire_bytes: int | None = None
    kept_gradient_bytes: int | None = None
    accumulation: int = 1
    bucket: int = _BUCKET_OF_STAGE_0
    reduces_whole: bool = False
    contiguous: bool = True
    persistent: int = 100_000
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000
    moments: int = _ADAM_MOMENTS
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.nodes < 1 or self.world_size % self.nodes:
            raise ValueError(
                f"{self.nodes} nodes with {self.world_size} processes: give as many processes to each node as to the "
                "others, one at least"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.nodes

    @property
    def shards(self) -> int:
        """In how many parts fp32 weights and optimizer state are cut."""
        return self.world_size if self.stage else 1

    @property
    def reductions(self) -> int:
        """How often a gradient is reduced in a step: stages 2 and 3 keep no whole one until then."""
        return self.accumulation if self.stage >= 2 else 1

    @property
    def is_bf16_optimizer(self) -> bool:
        """Stage 1 in 16 bits with fp32 accumulation, which DeepSpeed has a wrapper of its own for."""
        return self.stage == 1 and self.weight_bytes == 2 and self.kept_gradient_bytes == 4

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        world_size: int = 1,
        nodes: int = 1,
        stage: int | None = None,
    ) -> RunLayout:
        """From a DeepSpeed JSON, or a block without one; "auto" counts as absent.

        Raises:
            ValueError: something that these predictions do not know.
        """
        config = _without_auto(config)
        zero = config.get("zero_optimization") or {}
        _refuse_unknown(config, zero)
        stage = int(zero.get("stage", 0)) if stage is None else stage
        if stage not in range(4):
            raise ValueError(f"ZeRO has stages 0 to 3, not {stage}")
        notes: list[str] = []
        half = any((config.get(key) or {}).get("enabled") for key in ("bf16", "fp16", "bfloat16"))
        sent = config.get("communication_data_type")
        kept = (config.get("data_types") or {}).get("grad_accum_dtype")
        weight_bytes = 2 if half else None
        return cls(
            world_size=world_size,
            nodes=nodes,
            stage=stage,
            weight_bytes=weight_bytes,
            # Without 16-bit weights DeepSpeed sends fp32, whatever the model has.
            wire_bytes=_BYTES.get(str(sent), 2 if half else 4),
            kept_gradient_bytes=_BYTES.get(str(kept), weight_bytes),
            accumulation=_accumulation(config, world_size),
            bucket=int(zero.get("reduce_bucket_size", 5e8)) if stage else _BUCKET_OF_STAGE_0,
            reduces_whole=not zero.get("reduce_scatter", True) or not zero.get("contiguous_gradients", True),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            persistent=int(_either(zero, "param_persistence_threshold", 1e5)),
            reuse=int(_either(zero, "max_reuse_distance", 1e9)),
            prefetch=int(_either(zero, "prefetch_bucket_size", 5e7)),
            moments=_moments(config, notes),
            notes=tuple(notes),
        )


def _either(zero: Mapping[str, Any], key: str, default: float) -> float:
    """DeepSpeed takes keys of ZeRO-3 with "stage3_" before them and without."""
    return float(zero.get(f"stage3_{key}", zero.get(key, default)))


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }


def _accumulation(config: Mapping[str, Any], world_size: int) -> int:
    given = config.get("gradient_accumulation_steps")
    if given is not None:
        return int(given)
    whole, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    return max(1, int(whole) // (int(micro) * world_size)) if whole and micro else 1


def _moments(config: Mapping[str, Any], notes: list[str]) -> int:
    optimizer = config.get("optimizer")
    if not optimizer:
        notes.append("the config names no optimizer: counted as AdamW, with two fp32 moments of each weight")
        return _ADAM_MOMENTS
    kind, params = str(optimizer.get("type", "")).lower(), optimizer.get("params") or {}
    if kind == "sgd":
        return 1 if params.get("momentum") else 0
    if kind not in _MOMENTS:
        notes.append(f"what {optimizer.get('type')} keeps is not known here: counted as AdamW's two moments")
    return _MOMENTS.get(kind, _ADAM_MOMENTS)


def _refuse_unknown(config: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    parallel = config.get("tensor_parallel") or {}
    unknown = {
        "torch_autocast": (config.get("torch_autocast") or {}).get("enabled"),
        "tensor_parallel": int(parallel.get("autotp_size", 1) or 1) > 1,
        "zero_optimization.offload_optimizer": (zero.get("offload_optimizer") or {}).get("device", "none")
        != "none",
        "zero_optimization.offload_param": (zero.get("offload_param") or {}).get("device", "none") != "none",
        "zero_optimization.zero_hpz_partition_size": int(zero.get("zero_hpz_partition_size", 1)) > 1,
        "zero_optimization.zero_quantized_weights": zero.get("zero_quantized_weights"),
        "zero_optimization.zero_quantized_gradients": zero.get("zero_quantized_gradients"),
        "zero_optimization.mics_shard_size": int(zero.get("mics_shard_size", -1)) > 0,
    }
    named = [key for key, value in unknown.items() if value]
    if named:
        raise ValueError(
            f"memory and bytes on the wire are not predicted with {', '.join(named)}: leave --world-size out"
        )
