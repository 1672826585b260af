"""Engines whose gradients travel quantized or under a robust rule, run in several processes by test_reduction.py."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.engine.comm import measure as measuring
from ds_compress.engine.zero.internals import loss_scale
from ds_compress.engine.zero.shards import shards_of
from ds_compress.reduce.bandwidth import Comparison
from tests.multirank.common import batches, device, ds_config, engine_of, full_weights, pruning_block, train

LAYOUTS: dict[str, dict[str, Any]] = {
    "0 fp32": {"stage": 0},
    "0 bf16": {"stage": 0, "dtype": "bf16", "gradient_accumulation_steps": 2},
    "1 bf16": {"stage": 1, "dtype": "bf16"},
    "1 bf16, fp32 accumulation": {"stage": 1, "dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}},
    "2 fp32": {"stage": 2},
    "2 bf16, fp32 accumulation": {
        "stage": 2,
        "dtype": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_accumulation_steps": 2,
    },
    "2 round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "2 small buckets": {"stage": 2, "zero": {"reduce_bucket_size": 3000}},
    "2 overlap": {"stage": 2, "zero": {"overlap_comm": True}},
    "2 offload": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "2 no reduce-scatter": {"stage": 2, "zero": {"reduce_scatter": False}},
    "1 not contiguous": {"stage": 1, "zero": {"contiguous_gradients": False}},
    "3 bf16": {"stage": 3, "dtype": "bf16", "gradient_accumulation_steps": 2},
    "3 small buckets": {"stage": 3, "zero": {"reduce_bucket_size": 3000}},
    "3 offload": {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}},
}


WITH_ALL_KINDS = ("0 bf16", "2 fp32", "3 bf16")


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Odd(torch.nn.Module):
    """Shapes that divide by nothing, one parameter of a single element, two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(128, 37)
        self.first = torch.nn.Linear(37, 53)
        self.second = torch.nn.Linear(53, 37)
        self.scale = Scale()
        self.head = torch.nn.Linear(37, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed(input_ids).mean(1)
        hidden = hidden + self.scale(self.second(torch.nn.functional.gelu(self.first(hidden))))
        loss = torch.nn.functional.cross_entropy(self.head(hidden).float(), labels)
        return type("Output", (), {"loss": loss})

    def groups(self) -> list[dict[str, Any]]:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def wire(bits: int = 8, **settings: Any) -> dict[str, Any]:
    return {
        "gradient_compression": {
            "enabled": True,
            "bits": bits,
            "min_elements": 0,
            "measure_link": False,
            "piece_elements": 2048,
            **settings,
        }
    }


@contextmanager
def engine_for(layout: dict[str, Any], block: dict[str, Any] | None, **extra: Any) -> Iterator[Any]:
    layout = copy.deepcopy(layout)
    config = ds_config(
        layout.pop("stage"), block, layout.pop("dtype", "fp32"), layout.pop("zero", None), **layout
    )
    config |= extra
    model = Odd()
    with engine_of(model, config, model_parameters=model.groups()) as engine:
        yield engine


def final_gradients(engine: Any, steps: int = 1) -> dict[str, torch.Tensor]:
    """Whole gradients of the last step as the optimizer sees them, in every process."""
    seen: dict[str, torch.Tensor] = {}
    accumulation = engine.gradient_accumulation_steps()

    shards = shards_of(engine).fragments

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        master = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for fragment in shards.values():
            if id(fragment.master) in master and fragment.gradient is not None:
                whole = seen.setdefault(fragment.name, torch.zeros(fragment.shape, device=device()).flatten())
                whole[fragment.start : fragment.start + fragment.numel] = fragment.gradient.float()

    handle = engine.basic_optimizer.register_step_pre_hook(look)
    train(engine, batches(steps * accumulation, rank=dist.get_rank()))
    handle.remove()
    spread = any(fragment.group is not None for fragment in shards.values())
    for name, parameter in engine.module.named_parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        whole = seen.setdefault(name, torch.zeros(numel, device=device()))
        if spread:
            dist.all_reduce(whole)
    return seen


def gradients(names: list[str]) -> dict[str, Any]:
    """For each layout: how far quantized and robust gradients are from those of stock DeepSpeed."""
    found: dict[str, Any] = {}
    blocks = {
        "int8": wire(8),
        "int4": wire(4, block_size=64),
        "feedback": wire(8, error_feedback=True),
        "mean": {"robust_reduction": {"enabled": True, "rule": "mean", "max_malicious": 0}},
    }
    for name in names:
        with engine_for(LAYOUTS[name], None) as engine:
            stock = final_gradients(engine)
        found[name] = {}
        for kind, block in blocks.items():
            if kind not in ("int8", "mean") and name not in WITH_ALL_KINDS:
                continue
            with engine_for(LAYOUTS[name], block) as engine:
                ours = final_gradients(engine)
                metrics = engine.compression.metrics()
                weights = full_weights(engine.module)
                residual_bytes = sum(
                    r.nbytes for r in engine.compression.techniques["gradient_reduction"].residuals.values()
                )
            found[name][kind] = {
                "error": {key: relative(ours[key], stock[key]) for key in stock},
                "largest": max(float((ours[k] - stock[k]).abs().max()) for k in stock)
                / max(float(stock[k].abs().max()) for k in stock),
                "metrics": metrics,
                "residual_bytes": residual_bytes,
                "weights": {key: value.numpy().tobytes() for key, value in weights.items()},
            }
    return found


def joined(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def relative(ours: torch.Tensor, stock: torch.Tensor) -> float:
    return float((ours - stock).norm() / stock.norm().clamp(min=1e-12))


def muon() -> dict[int, tuple[float, float]]:
    """{stage: how far weights are from stock Muon's, exact and quantized}; a matrix may have two owners."""
    found = {}
    optimizer = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}}
    exact = {"robust_reduction": {"enabled": True, "rule": "mean", "max_malicious": 0}}
    for stage in (0, 1, 2):
        weights = []
        for block in (None, exact, wire(8)):
            with engine_for(
                {"stage": stage, "zero": {"reduce_bucket_size": 3000}}, block, **optimizer
            ) as engine:
                train(engine, batches(3, rank=dist.get_rank()))
                weights.append(joined(full_weights(engine.module)))
        found[stage] = (relative(weights[1], weights[0]), relative(weights[2], weights[0]))
    return found


def masks() -> dict[str, Any]:
    """sparse_pruning under quantized gradients: still exact."""
    found = {}
    for stage in (0, 2, 3):
        sparse = copy.deepcopy(pruning_block(density=0.4))
        sparse["sparse_pruning"]["different_groups"] = {
            "all": {"params": {"dense_ratio": 0.4}, "modules": ["first", "second"]}
        }
        with engine_for({"stage": stage, "dtype": "bf16"}, {**sparse, **wire()}) as engine:
            train(engine, batches(4, rank=dist.get_rank()))
            weight = full_weights(engine.module)["first.weight"]
            found[stage] = (int(weight.count_nonzero()), weight.numel())
    return found


def special_steps() -> dict[str, Any]:
    """Warm-up, small buckets, an unmeasured and a measured link."""
    found: dict[str, Any] = {}
    with engine_for({"stage": 2}, wire(warmup_steps=2)) as engine:
        counts = []
        for _ in range(3):
            train(engine, batches(1))
            counts.append(engine.compression.metrics()["gradient_reduction/quantized_elements"])
        found["warmup"] = counts
    with engine_for({"stage": 2}, wire(min_elements=10**6)) as engine:
        train(engine, batches(1))
        found["small"] = engine.compression.metrics()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_compress").addHandler(handler)
    logging.getLogger("ds_compress").setLevel(logging.INFO)
    for kind, comparison in (
        ("really", None),
        ("slow", Comparison(2.0, 1.0, 0.5, 1, 5)),
        ("fast", Comparison(1.0, 2.0, 2.0, 1, 5)),
    ):
        measure = measuring.compare_reductions
        if comparison is not None:
            measuring.compare_reductions = lambda engine, quantized, found=comparison: found
        messages.clear()
        with engine_for({"stage": 2}, wire(measure_link=True, piece_elements=1 << 20)) as engine:
            train(engine, batches(1))
            quantized = engine.compression.metrics()["gradient_reduction/quantized_elements"]
        measuring.compare_reductions = measure
        said = [message for message in messages if "gradient_compression is" in message]
        found[kind] = (quantized, "".join(said))
    logging.getLogger("ds_compress").removeHandler(handler)
    return found


def loss_scales() -> dict[str, Any]:
    """fp16 on the CPU: the loss scale of every step, stock, quantized, and with NaN hidden from the scaler."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    fp16 = {"enabled": True, "initial_scale_power": 17, "loss_scale_window": 2, "hysteresis": 1}
    found: dict[str, Any] = {}
    for stage in (0, 2, 3):
        for kind in ("stock", "int8", "feedback", "nan_to_num"):
            block = None if kind == "stock" else wire(error_feedback=kind == "feedback")
            with engine_for({"stage": stage}, block, fp16=fp16) as engine:
                engine.module.half()
                reduction = engine.compression.techniques["gradient_reduction"] if block else None
                if kind == "nan_to_num":
                    hide_overflow(reduction)
                scales, kept = [], []
                overflows = overflow_at(engine, {0, 4, 7})
                for step, batch in enumerate(batches(12, rank=dist.get_rank())):
                    overflows["step"] = step
                    engine.backward(engine(**batch).loss)
                    engine.step()
                    scales.append(loss_scale(engine.optimizer))
                    if kind == "feedback":
                        kept.append(all_residuals(reduction))
                found[f"{stage} {kind}"] = (scales, engine.skipped_steps)
                if kind == "feedback":
                    finite = all(bool(torch.isfinite(r).all()) for state in kept for r in state.values())
                    skipped = [not state for state in kept]
                    found[f"{stage} residuals"] = (finite, skipped[0], skipped[-1])
    return found


def overflow_at(engine: Any, steps: set[int]) -> dict[str, int]:
    """One gradient of one process becomes Inf in these steps; set "step" of the result.

    DeepSpeed's unfused stage 0 does not multiply the loss by its scale, so nothing overflows there by itself.
    """
    now = {"step": 0}

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if now["step"] in steps else 1.0)

    if dist.get_rank() == 1:
        next(iter(engine.module.second.parameters())).register_hook(hook)
    return now


def hide_overflow(reduction: Any) -> None:
    original = reduction.reduce_scatter, reduction.all_reduce

    def clean(segments: Any) -> Any:
        for segment in segments:
            torch.nan_to_num_(segment.values, 0.0, 0.0, 0.0)
        return segments

    reduction.reduce_scatter = lambda group, segments, deliver, m: original[0](
        group, clean(segments), deliver, m
    )
    reduction.all_reduce = lambda group, segments, m: original[1](group, clean(segments), m)


def all_residuals(reduction: Any) -> dict[str, torch.Tensor]:
    """Decoded residuals by what they belong to, as a checkpoint of now would have them."""
    reduction.process_state()
    return {
        f"{kind} {run['key']} {run['start']}": residuals.load(
            run["key"], run["start"], run["numel"], torch.device("cpu"), run["unit"]
        )
        for kind, residuals in reduction.residuals.items()
        for run, _ in residuals.state()
    }


def checkpoints(folder: str) -> dict[str, Any]:
    """Training goes on from a checkpoint as if it had never stopped, error feedback included."""
    found = {}
    for stage in (0, 2, 3):
        block = wire(4, error_feedback=True, block_size=256)
        rank = dist.get_rank()
        with engine_for({"stage": stage}, block) as engine:
            train(engine, batches(2, rank=rank))
            engine.save_checkpoint(f"{folder}/{stage}")
            train(engine, batches(2, seed=2, rank=rank))
            unbroken = full_weights(engine.module)
        outcome = []
        for drop in (False, True):
            with engine_for({"stage": stage}, block) as engine:
                engine.load_checkpoint(f"{folder}/{stage}")
                reduction = engine.compression.techniques["gradient_reduction"]
                if drop:
                    reduction.load_process_state(None)
                train(engine, batches(2, seed=2, rank=rank))
                weights = full_weights(engine.module)
            outcome.append(all(torch.equal(unbroken[k], weights[k]) for k in unbroken))
        found[stage] = outcome
    return found
