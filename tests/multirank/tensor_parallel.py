"""Scenarios: sparse pruning of layers that AutoTP shards, beside the same run without tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

import ds_compress
from tests.models import tiny_llama
from tests.multirank.combinations import block, text
from tests.multirank.common import ds_config, engine_of, full_weights, train

STEPS = 5
SAVED_AT = 2
LAYERS = ("mlp", "self_attn")
METHODS: dict[str, dict[str, Any]] = {
    "l1": {},
    "l1-global": {"scope": "global"},
    "taylor": {"method": "taylor", "scope": "group"},
    "movement": {"method": "movement"},
    "frozen": {"scope": "global"},
}


def runs(folder: str, cases: list[tuple[str, int]]) -> dict[Any, Any]:
    """{(method, stage): losses and whole weights with tensor parallelism over 2 processes, and without}."""
    # First, because DeepSpeed's tensor-parallel groups stay for the rest of the process.
    plain = {case: _plain(*case) for case in cases}
    results: dict[Any, Any] = {
        case: plain[case] | _sharded(*case, f"{folder}/{case[0]}-{case[1]}") for case in cases
    }
    return results | {"broken": broken_gradients(), "refused": refused()}


def _model(method: str, seed: int = 0) -> Any:
    model: Any = tiny_llama(seed)
    if method == "frozen":
        model.model.layers[0].requires_grad_(False)
    return model


def _plain(method: str, stage: int) -> dict[str, Any]:
    model = _model(method)
    with engine_of(model, _config(stage, block(LAYERS, quantized=False, **METHODS[method]), 1)) as engine:
        return {"plain": train(engine, text(STEPS)), "expected": full_weights(model)}


def _sharded(method: str, stage: int, where: str) -> dict[str, Any]:
    config = _config(stage, block(LAYERS, quantized=False, **METHODS[method]), 2)
    data = list(text(STEPS))
    with engine_of(_model(method), config) as engine:
        losses = train(engine, iter(data[:SAVED_AT]))
        engine.save_checkpoint(where)
        ds_compress.export_state_dict(
            engine
        )  # which takes shards apart and together: training goes on after it
        losses += train(engine, iter(data[SAVED_AT:]))
        result = {
            "losses": losses,
            "whole": ds_compress.export_state_dict(engine),
            "metrics": engine.compression.metrics(),
            "refused": _refusals(engine, where),
            "mask_bytes": engine.compression.techniques["sparse_pruning"].mask_bytes(),
        }
    with engine_of(_model(method, seed=9), config) as engine:
        engine.load_checkpoint(where)
        result["resumed"] = train(engine, iter(data[SAVED_AT:]))
        result["applied"] = engine.compression.applied_steps
    return result


def _config(stage: int, compression: dict[str, Any], size: int) -> dict[str, Any]:
    extra = {"tensor_parallel": {"autotp_size": size}} if size > 1 else {}
    return ds_config(stage, compression, **extra)


def _refusals(engine: Any, checkpoint: str) -> list[str]:
    """What would take this process' shards for the model."""
    said = []
    for ask in (
        lambda: ds_compress.finalize(engine),
        lambda: ds_compress.export(engine, Path(checkpoint) / "exported"),
        lambda: ds_compress.export(checkpoint, Path(checkpoint) / "exported"),
    ):
        try:
            ask()
            said.append("")
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def broken_gradients() -> dict[str, Any]:
    """A gradient that is NaN in one shard only: stage 0 in fp32 has no check of its own."""
    with engine_of(tiny_llama(), _config(0, block(LAYERS, quantized=False), 2)) as engine:
        for batch in text(1):
            engine.backward(engine(**batch).loss)
            if dist.get_rank() == 1:
                weight = engine.module.model.layers[0].mlp.up_proj.weight
                weight.grad.view(-1)[0] = float("nan")
            engine.step()
        skipped, applied = engine.skipped_steps, engine.compression.applied_steps
        losses = train(engine, text(1))
    return {"skipped": skipped, "applied": applied, "losses": losses}


def refused() -> dict[str, str]:
    """What a block may not ask for beside tensor parallelism."""
    wishes: dict[str, dict[str, Any]] = {
        "quantization": block(LAYERS),
        "random": block(LAYERS, quantized=False, method="random"),
        "2:4": block(LAYERS, quantized=False, pattern="2:4"),
        "rows": {"row_pruning": {"dense_ratio": 0.5}},
        "layers": {"layer_reduction": {"enabled": True, "teacher_layer": [0]}},
    }
    said = {}
    for name, wish in wishes.items():
        try:
            with engine_of(tiny_llama(), _config(2, wish, 2)):
                said[name] = ""
        except ds_compress.ConfigError as error:
            said[name] = str(error)
    return said
