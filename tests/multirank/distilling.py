"""Scenarios: every loss and every kind of teacher, sharded and not, with logits in chunks and whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_compress
from tests.models import tiny_llama
from tests.multirank.common import device, ds_config, engine_of, full_weights, weight_quantization

STAGES = (0, 1, 2, 3)
VOCABULARY = 61
KINDS_OF_SELF = ("initial", "ema", "current")

EVERY_LOSS = {
    "logits": {"temperature": 2.0, "chunk_tokens": 7},
    "hidden": {"weight": 0.5},
    "attention": {"weight": 0.5},
    "embedding": {"weight": 0.5},
    "contrastive": {"weight": 0.2, "dimension": 8, "queue": 6, "pooling": "last"},
}
LANGUAGE_LOSSES: dict[str, dict[str, Any]] = {
    "every loss": EVERY_LOSS,
    "maps": {"attention": {"kind": "maps"}},
    "crd": {"contrastive": {"kind": "crd", "examples": 24, "dimension": 8}},
    "reverse": {"logits": {"kind": "reverse_kl", "top_k": 5, "chunk_tokens": 7}},
    "schedule": {"logits": {"weight": 1.0, "final_weight": 0.0, "schedule_offset_end": 2, "kind": "jsd"}},
}


def llama(hidden: int = 16, layers: int = 2, seed: int = 0, tied: bool = True, heads: int = 4) -> nn.Module:
    return tiny_llama(seed, layers, hidden, heads, intermediate=24, tied=tied, vocab_size=VOCABULARY)


def token_batches(
    steps: int, rows: slice = slice(None), labels: bool = True
) -> Iterator[dict[str, torch.Tensor]]:
    """`rows` of batches of 8 x 9 tokens, some of them padding."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (8, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 6:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        yield {name: value[rows].to(device()) for name, value in batch.items() if labels or name != "labels"}


def block(losses: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "losses": losses, "task_loss_weight": 0.5, **settings}}


def run(
    stage: int,
    compression: dict[str, Any],
    teacher: nn.Module | None = None,
    student: Any = llama,
    steps: int = 3,
    labels: bool = True,
    dtype: str = "fp32",
    **extra: Any,
) -> dict[str, Any]:
    """Losses, metrics and final weights of a short run in which each process has its own rows of the batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = ds_config(stage, compression, dtype, **extra)
    config["train_micro_batch_size_per_gpu"] = 8 // world
    model = student()
    torch.manual_seed(7)  # of what is learned beside the model
    losses = []
    initialize = functools.partial(ds_compress.initialize, teacher=teacher)
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
    for batch in token_batches(steps, slice(rank * 8 // world, (rank + 1) * 8 // world), labels):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    metrics = engine.compression.metrics()
    weights = full_weights(model)
    engine.compression.detach()
    left = [name for name, _ in model.named_parameters() if "auxiliary" in name]
    engine.destroy()
    return {"losses": losses, "metrics": metrics, "weights": weights, "left": left}


def teacher_of_more() -> nn.Module:
    return llama(hidden=32, layers=3, seed=3, tied=False)


def languages() -> dict[Any, Any]:
    """Each set of losses on each stage, with a wider, deeper teacher sharded by ZeRO-3; stage 0 also unchunked."""
    results: dict[Any, Any] = {}
    for name, losses in LANGUAGE_LOSSES.items():
        teacher = functools.partial(llama, layers=3, seed=3) if name == "maps" else teacher_of_more
        for stage in STAGES if name == "every loss" else (0, 3):
            results[name, stage] = run(stage, block(losses), teacher())
        if "logits" in losses:
            whole = {**losses, "logits": {**losses["logits"], "chunk_tokens": 0}}
            results[name, "whole"] = run(0, block(whole, teacher_zero_stage=0), teacher())
    bf16 = [block({"logits": {"chunk_tokens": chunk}}) for chunk in (7, 0)]
    results["bf16"] = [run(3, chosen, teacher_of_more().bfloat16(), dtype="bf16") for chosen in bf16]
    results["offload"] = run(2, block(EVERY_LOSS, teacher_offload="cpu"), teacher_of_more())
    results["label free"] = {
        stage: run(stage, block(EVERY_LOSS, task_loss_weight=0.0), teacher_of_more(), labels=False)
        for stage in (0, 3)
    }
    return results


def quantized(losses: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {
        **block(losses, **settings),
        **weight_quantization(3, "layers"),
    }


def selves(folder: str) -> dict[Any, Any]:
    """The model as its own teacher, and an average that survives a checkpoint."""
    results: dict[Any, Any] = {}
    for weights in KINDS_OF_SELF:
        chosen: dict[str, Any] = {"weights": weights, **({"decay": 0.75} if weights == "ema" else {})}
        for stage in (0, 2, 3):
            results[weights, stage] = run(stage, quantized({"logits": {}, "hidden": {}}, self_teacher=chosen))
    for stage in (0, 2, 3):
        results["resumed", stage] = _average_across_a_checkpoint(stage, f"{folder}/{stage}")
    cut = {"layer_reduction": {"enabled": True, "teacher_layer": [1]}}
    results["cut"] = run(
        3,
        cut | block({"logits": {}}, self_teacher={"weights": "initial"}),
        student=functools.partial(llama, layers=3),
    )
    return results


def layer_by_layer() -> dict[Any, Any]:
    """Post-training quantization, each layer for itself, on every stage and in bf16; masks and static ranges too."""
    return {
        (name, stage): _layer_by_layer(name, stage)
        for name in ("weights", "bf16", "static and sparse")
        for stage in ((0, 2, 3) if name == "weights" else (3,))
    }


def _layer_by_layer(name: str, stage: int) -> dict[str, Any]:
    compression = {key: value for key, value in quantized({}).items() if key != "distillation"}
    if name == "static and sparse":
        shared = {"enabled": True, "range_calibration": "static", "schedule_offset": 0}
        groups = {"all": {"params": {"bits": 8}, "modules": ["layers"]}}
        compression["activation_quantization"] = {"shared_parameters": shared, "different_groups": groups}
        shared = {"enabled": True, "method": "l1", "schedule_offset": 0, "schedule_offset_end": 1}
        groups = {"all": {"params": {"dense_ratio": 0.5}, "modules": ["mlp"]}}
        compression["sparse_pruning"] = {"shared_parameters": shared, "different_groups": groups}
    rank, model = dist.get_rank(), llama()
    config = ds_config(stage, compression, "bf16" if name == "bf16" else "fp32")
    with engine_of(model, config) as engine:
        if name == "static and sparse":
            for batch in token_batches(2):
                engine.backward(engine(**batch).loss)
                engine.step()
        batches = list(token_batches(2, slice(rank * 4, rank * 4 + 4)))
        results = ds_compress.distill_layers(engine, batches, steps=40, learning_rate=1e-3)
        fragments = engine.compression.shards.fragments.values()
        follow = all(torch.equal(f.values.to(f.parameter.dtype), _part_of(f)) for f in fragments)
        weights = full_weights(model)
    return {"results": results, "weights": weights, "masters follow": follow}


def _part_of(fragment: Any) -> torch.Tensor:
    parameter = fragment.parameter
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor[: fragment.numel]
    return parameter.detach().flatten()[fragment.start : fragment.start + fragment.numel]


def _average_across_a_checkpoint(stage: int, folder: str) -> dict[str, Any]:
    compression = block({"logits": {}}, self_teacher={"weights": "ema", "decay": 0.75})
    config = ds_config(stage, compression)
    model = llama()
    expected = {name: value.clone() for name, value in full_weights(model).items()}
    with engine_of(model, config) as engine:
        for batch in token_batches(3):
            engine.backward(engine(**batch).loss)
            engine.step()
            for name, value in full_weights(model).items():
                expected[name].lerp_(value, 0.25)
        engine.save_checkpoint(folder)
    again = llama(seed=9)
    with engine_of(again, config) as engine:
        engine.load_checkpoint(folder)
        found = full_weights(engine.compression.teacher.model)
    return {"expected": expected, "found": found}


def teacher_bytes(folder: str) -> dict[str, Any]:
    """Bytes of a named teacher in this process after a step, sharded from loading on, and the most it ever held."""
    if dist.get_rank() == 0:
        teacher_of_more().save_pretrained(folder)
    dist.barrier()
    compression = block({"logits": {}}, teacher=folder)
    model = llama()
    with engine_of(model, ds_config(2, compression)) as engine:
        sharded_when_loaded = all(hasattr(p, "ds_id") for p in engine.compression.teacher.model.parameters())
        for batch in token_batches(1):
            engine.backward(engine(**batch).loss)
            engine.step()
        teacher = engine.compression.teacher.model
        here = sum(
            p.ds_tensor.numel() * p.ds_tensor.element_size() + p.numel() * p.element_size()
            for p in teacher.parameters()
        )
        whole = sum(p.ds_numel * p.element_size() for p in teacher.parameters())
    return {"here": here, "whole": whole, "sharded when loaded": sharded_when_loaded}
