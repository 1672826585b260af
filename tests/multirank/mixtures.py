"""Scenarios: mixtures of experts are compressed alike at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import ds_compress  # noqa: F401  (registers)
from tests.multirank.common import ds_config, engine_of, full_weights
from tests.zoo.mixtures import mixture, tokens

STAGES = (0, 2, 3)

SPARSE: dict[str, dict[str, Any]] = {
    "layer": {"method": "l1", "scope": "layer"},
    "global": {"method": "l1", "scope": "global"},
    "taylor": {
        "method": "taylor",
        "scope": "layer",
        "schedule_offset_end": 4,
        "schedule_offset_stride": 1,
    },
    "regrowth": {"method": "l1", "regrowth": True, "schedule_offset_end": 4, "schedule_offset_stride": 1},
    "2:4": {"method": "l1", "pattern": "2:4"},
    "2x2": {"method": "l1", "pattern": "2x2", "scope": "layer"},
}


def sparse_block(name: str) -> dict[str, Any]:
    """Half of every matrix in the layers."""
    return {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "pattern": "unstructured", **SPARSE[name]},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": [r"layers\.1\."]}},
        }
    }


def trained(
    names: Sequence[str], blocks: Mapping[str, dict[str, Any]], stages: Sequence[int] = STAGES, steps: int = 5
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """{(architecture, block, stage): losses, final weights, metrics}; all processes see the same batches."""
    results = {}
    for name in names:
        for key, block in blocks.items():
            for stage in stages:
                model = mixture(name).train()
                with engine_of(model, ds_config(stage, block)) as engine:
                    losses = []
                    for step in range(steps):
                        ids = tokens(4, 12, seed=step)
                        loss = engine(input_ids=ids, labels=ids).loss
                        engine.backward(loss)
                        engine.step()
                        losses.append(loss.item())
                    results[name, key, stage] = {
                        "losses": losses,
                        "weights": full_weights(model),
                        "metrics": engine.compression.metrics(),
                    }
    return results


def sparse(names: Sequence[str], kinds: Sequence[str]) -> dict[tuple[str, str, int], dict[str, Any]]:
    return trained(names, {kind: sparse_block(kind) for kind in kinds})


def experts_without_tokens() -> dict[int, dict[str, torch.Tensor]]:
    """{stage: weights after steps in which the processes see other tokens, and most experts see none}."""
    results = {}
    for stage in STAGES:
        model = mixture("qwen3_moe", num_experts=16).train()
        with engine_of(model, ds_config(stage, sparse_block("taylor"))) as engine:
            rank = torch.distributed.get_rank()
            for step in range(4):
                ids = tokens(1, 2, seed=10 * step + rank)
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
            results[stage] = full_weights(model)
    return results
