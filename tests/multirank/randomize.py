"""Scenarios: a random choice by scores must not depend on ZeRO stage or world size, and must be replayed exactly."""

from __future__ import annotations

from typing import Any

import torch

import ds_compress  # noqa: F401  (registers)
from tests.models import tiny_bert
from tests.multirank.common import (
    batches,
    ds_config,
    engine_of,
    full_weights,
    pruning_block,
    structured_block,
    train,
)

STAGES = (0, 1, 2, 3)
RAMP: dict[str, Any] = {"schedule_offset": 2, "schedule_offset_end": 6, "schedule_offset_stride": 2}


def _randomize(seed: Any, temperature: float = 1.0) -> dict[str, Any]:
    return {"temperature": temperature, "seed": seed}


SEEDED: dict[str, dict[str, Any]] = {
    "l1-ramp-global": pruning_block("l1", scope="global", randomize=_randomize(3), **RAMP),
    "taylor-regrowth": pruning_block("taylor", regrowth=True, randomize=_randomize(3), **RAMP),
    "l1-4x3": pruning_block("l1", pattern="4x3", randomize=_randomize(3, 0.3)),
    "l1-2:4": pruning_block("l1", density=0.5, pattern="2:4", randomize=_randomize(3, 0.3)),
    "rows-global+heads": {
        "row_pruning": structured_block(scope="global", round_to=4, randomize=_randomize(3, 0.3), **RAMP),
        "head_pruning": structured_block(method="taylor", randomize=_randomize(4)),
    },
}
RAMP = {**RAMP, "schedule_offset": 1, "schedule_offset_end": 7}
SECRET = {
    **pruning_block("l1", randomize=_randomize("secret"), **RAMP),
    "row_pruning": structured_block(randomize=_randomize("secret"), **RAMP),
}


def everything(folder: str, stages: tuple[int, ...]) -> dict[str, Any]:
    """Masks with a seed of the JSON, and twice at the first stage; secret seeds, unbroken and resumed."""
    seeded: dict[Any, Any] = {}
    for name, block in SEEDED.items():
        for stage in stages:
            seeded[name, stage] = _masks(stage, block)
        seeded[name, "again"] = _masks(stages[0], block)
    return {"seeded": seeded, "secret": {stage: _secret(folder, stage) for stage in stages}}


def _masks(stage: int, block: dict[str, Any]) -> dict[str, Any]:
    model = tiny_bert()
    with engine_of(model, ds_config(stage, block)) as engine:
        train(engine, batches(7))
        kept = {name: units.tolist() for name, units in engine.compression.kept_units.items()}
        zeros = {name: weight == 0 for name, weight in full_weights(model).items()}
        return {"kept": kept, "zeros": zeros, "metrics": engine.compression.metrics()}


def _secret(folder: str, stage: int) -> dict[str, Any]:
    data = list(batches(8))
    model = tiny_bert()
    with engine_of(model, ds_config(stage, SECRET)) as engine:
        train(engine, iter(data[:4]))
        engine.save_checkpoint(f"{folder}/{stage}")
        losses = train(engine, iter(data[4:]))
        seeds, weights = engine.compression.secret_seeds, full_weights(model)
    model = tiny_bert(seed=5)
    with engine_of(model, ds_config(stage, SECRET)) as engine:
        before = engine.compression.secret_seeds
        engine.load_checkpoint(f"{folder}/{stage}")
        resumed = train(engine, iter(data[4:]))
        after, got = engine.compression.secret_seeds, full_weights(model)
    return {
        "seeds": seeds,
        "seeds_of_others": before,
        "seeds_resumed": after,
        "losses": (losses, resumed),
        "equal": all(torch.equal(weights[name], got[name]) for name in weights),
    }
