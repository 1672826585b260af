"""Operations of a training step and of serving, and the time that they take at least on a named device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.report.size_estimate import stored
from ds_compress.config.targets import Target
from ds_compress.estimate.buckets import owned_numel
from ds_compress.estimate.devices import Device
from ds_compress.estimate.products import Product, Work
from ds_compress.estimate.run_layout import RunLayout

NOT_COUNTED = (
    "not counted: norms, softmax, activation functions, losses, what gradient checkpointing and logits in chunks "
    "compute again, the KV cache, quantizing what is sent; times are those of a device at its peaks, so none is as fast"
)
_ITEM = 2
"""Bytes of an activation and of an uncompressed weight where it is served: 16 bits."""
_FP32 = 4
_BITS_OF_A_BYTE = 8
_PASSES = 6
"""Of fake quantization over a tensor: read and written in forward, again in backward, and its gradient."""
_SCALE_TENSORS = 2
"""Of those that `quant.fake_quantized_linear` keeps of a dynamic range: scales, and zero points or a shared scale."""


@dataclass(frozen=True)
class Latency:
    """One forward of so many tokens, in seconds at least. before: in 16 bits, uncompressed. after: as it is exported.

    is_memory_bound: whether the most of `after` is spent on reading weights.
    """

    tokens: int
    before: float
    after: float
    is_memory_bound: bool


@dataclass(frozen=True)
class Compute:
    """What one process computes in an optimizer step, and what the result costs to serve.

    tokens: of a micro-step. sequence: of a text. forward: operations of the model's forward in a micro-step,
    uncompressed. student, teacher: operations of a step; None: a teacher whose size nobody has said. moved: bytes that
    compression reads and writes in a step beside the training, by block. saved: bytes that fake quantization keeps
    for backward beside what an unquantized layer keeps, of a micro-step. seconds: of a step by
    "plain" and "compressed"; empty without a device, or with an unknown teacher.
    """

    tokens: int
    sequence: int
    forward: float
    student: float
    teacher: float | None
    moved: Mapping[str, int]
    saved: int
    device: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    latencies: tuple[Latency, ...] = ()
    notes: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Plain data: the key `compute` that `cli.results` describes."""
        plain = self.seconds.get("plain")
        return {
            "tokens": self.tokens,
            "sequence": self.sequence,
            "forward_flops": round(self.forward),
            "step_flops": {
                "student": round(self.student),
                "teacher": None if self.teacher is None else round(self.teacher),
            },
            "moved_bytes": dict(self.moved),
            "saved_bytes": self.saved,
            "device": self.device,
            "step_seconds": dict(self.seconds) or None,
            "step_ratio": self.seconds["compressed"] / plain if plain else None,
            "latencies": [
                {
                    "tokens": one.tokens,
                    "before_s": one.before,
                    "after_s": one.after,
                    "bound_by": "memory" if one.is_memory_bound else "products",
                }
                for one in self.latencies
            ],
            "notes": [*self.notes, NOT_COUNTED],
        }


def compute(
    plan: ResolvedPlan,
    work: Work,
    layout: RunLayout,
    tokens: int,
    sequence: int,
    teacher: Work | None = None,
    device: Device | None = None,
) -> Compute:
    """Of a process that trains `work` on `tokens` in each micro-step, in texts of `sequence` tokens.

    teacher: another model that teaches.

    Raises:
        ValueError: more tokens in a text than in a micro-step.
    """
    if sequence > tokens:
        raise ValueError(f"{tokens} tokens in a micro-step hold no text of {sequence}: say --sequence")
    in_step = tokens * layout.accumulation
    student = in_step * work.training_flops(sequence)
    taught = _teacher_flops(plan, work, teacher, in_step, sequence)
    moved = dict(_moved(plan, work, layout, tokens))
    seconds: dict[str, float] = {}
    latencies: tuple[Latency, ...] = ()
    if device is not None:
        latencies = tuple(_latency(plan, work, device, many, sequence) for many in sorted({1, tokens}))
        if taught is not None:
            seconds = _seconds(plan, layout, device, student, taught, moved)
    return Compute(
        tokens=tokens,
        sequence=sequence,
        forward=tokens * work.forward_flops(sequence),
        student=student,
        teacher=taught,
        moved=moved,
        saved=_saved(plan, work, tokens),
        device=None if device is None else device.name,
        seconds=seconds,
        latencies=latencies,
        notes=work.notes,
    )


def _teacher_flops(
    plan: ResolvedPlan, work: Work, teacher: Work | None, in_step: int, sequence: int
) -> float | None:
    """Of its forward."""
    block = plan.config.distillation
    if block is None or not block.enabled or block.teacher_cache is not None:
        return 0.0
    of = work if block.self_teacher is not None else teacher
    return None if of is None else in_step * of.forward_flops(sequence)


def _claims(plan: ResolvedPlan, key: str) -> tuple[Target, ...]:
    technique = plan.techniques.get(key)
    return technique.targets if technique is not None else ()


def _moved(plan: ResolvedPlan, work: Work, layout: RunLayout, tokens: int) -> Iterator[tuple[str, int]]:
    item = layout.weight_bytes or max((weight.itemsize for weight in plan.weights), default=_FP32)
    passes = _PASSES * item * layout.accumulation
    quantized = {
        target.param_name: math.prod(target.shape) for target in _claims(plan, "weight_quantization")
    }
    if quantized:
        yield "weight_quantization", passes * sum(quantized.values())
    inputs = _quantized_inputs(plan, work)
    if inputs:
        yield "activation_quantization", passes * tokens * sum(product.inputs for product in inputs)
    pruned = {target.param_name: math.prod(target.shape) for target in _claims(plan, "sparse_pruning")}
    if pruned:
        # Masks go over the fp32 weights that this process owns; scores and latent weights are read and written.
        targets = _claims(plan, "sparse_pruning")
        state = plan.weight_block("sparse_pruning").training_state(targets, layout.shards)
        masked = 2 * _FP32 * sum(pruned.values()) // layout.shards
        yield "sparse_pruning", masked + state.mask + 2 * (state.latent + state.scores)


def _quantized_inputs(plan: ResolvedPlan, work: Work) -> list[Product]:
    claimed = {target.module_name for target in _claims(plan, "activation_quantization")}
    return [product for product in work.products if product.module in claimed]


def _saved(plan: ResolvedPlan, work: Work, tokens: int) -> int:
    """Inputs and weights themselves are saved as an unquantized layer saves them: what is left are scales of tokens."""
    return sum(
        _SCALE_TENSORS * _FP32 * math.ceil(tokens * product.share)
        for product in _quantized_inputs(plan, work)
    )


def _seconds(
    plan: ResolvedPlan,
    layout: RunLayout,
    device: Device,
    student: float,
    teacher: float,
    moved: Mapping[str, int],
) -> dict[str, float]:
    trained = [weight for weight in plan.weights if weight.trainable]
    # The optimizer reads a gradient, reads and writes the fp32 weight and its moments, and writes the weight.
    step = owned_numel(trained, layout) * (2 * _ITEM + 2 * _FP32 * (1 + layout.moments))
    plain = device.seconds(student, 0) + device.moving(step)
    extra = device.seconds(teacher, 0) + device.moving(sum(moved.values()))
    return {"plain": plain, "compressed": plain + extra}


def product_seconds(plan: ResolvedPlan, work: Work, device: Device, tokens: int) -> dict[str, float]:
    """By module the time of its product in one forward of an export, at least."""
    return {product.module: spent for product, spent, _ in _spent(plan, work, device, tokens)}


def attention_seconds(work: Work, device: Device, tokens: int, sequence: int) -> float:
    """Of scores and values in one forward of an export; a single token looks back at a whole text."""
    seen = min(sequence, tokens) if tokens > 1 else sequence
    return device.seconds(tokens * work.attention.flops(seen) * work.attention.left, 0)


def _spent(
    plan: ResolvedPlan, work: Work, device: Device, tokens: int
) -> Iterator[tuple[Product, float, bool]]:
    """Of each product its time, and whether reading and writing takes all of it."""
    sizes, units = stored(plan), _units(plan)
    for product in work.products:
        nbytes = min(sizes[product.weight].after, product.left * _ITEM) * _seen(product.share_left, tokens)
        nbytes += _around(product, tokens)
        spent = device.seconds(tokens * product.flops_left, nbytes, units.get(product.module, "bf16"))
        yield product, spent, device.moving(nbytes) >= spent


def _around(product: Product, tokens: int) -> int:
    """Bytes of its inputs and outputs."""
    return tokens * (product.inputs + product.outputs) * _ITEM


def _latency(plan: ResolvedPlan, work: Work, device: Device, tokens: int, sequence: int) -> Latency:
    after = reading = 0.0
    for _, spent, is_reading in _spent(plan, work, device, tokens):
        after += spent
        reading += spent if is_reading else 0.0
    attention = attention_seconds(work, device, tokens, sequence)
    before = sum(
        device.seconds(
            tokens * product.flops,
            product.numel * _seen(product.share, tokens) * _ITEM + _around(product, tokens),
        )
        for product in work.products
    )
    before += attention / work.attention.left if work.attention.left else 0.0
    return Latency(tokens, before, after + attention, reading > (after + attention) / 2)


def _seen(share: Any, tokens: int) -> float:
    """Of the experts, those that so many tokens are sent to when they spread evenly."""
    return float(1 - (1 - share) ** tokens) if share < 1 else 1.0


def _units(plan: ResolvedPlan) -> dict[str, str]:
    """By module the kind of product that its formats allow; inputs in 16 bits mean products in 16 bits."""
    weights = {target.module_name: target.params for target in _claims(plan, "weight_quantization")}
    found = {}
    for target in _claims(plan, "activation_quantization"):
        weight = weights.get(target.module_name)
        kinds = {_kind(target.params), _kind(weight)} if weight is not None else {"bf16"}
        if kinds <= {"fp8", "fp4"}:
            found[target.module_name] = "fp4" if kinds == {"fp4"} else "fp8"
        else:
            found[target.module_name] = "int8" if kinds == {"int8"} else "bf16"
    return found


def _kind(params: Any) -> str:
    known = params.number_format
    if known is None:
        return "int8" if params.final_bits <= _BITS_OF_A_BYTE else "bf16"
    if params.format in ("nvfp4", "mxfp4"):
        return "fp4"
    return "bf16" if params.format == "nf4" else "fp8"
