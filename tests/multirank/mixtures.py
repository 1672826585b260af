"""Scenarios: mixtures of experts are compressed alike at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import ds_compress
from tests.models import tiny_llama
from tests.multirank.common import ds_config, engine_of, full_weights
from tests.zoo.mixtures import VOCABULARY, mixture, tokens

STAGES = (0, 2, 3)

SPARSE: dict[str, dict[str, Any]] = {
    "layer": {"method": "l1", "scope": "layer"},
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


TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "more experts": ("qwen3_moe", {"num_experts": 8}),
    "dense student": ("mixtral", {}),
    "itself": ("deepseek_v3", {}),
}
"""{name: (architecture of the teacher, changes to its config)}"""


def _student(name: str) -> torch.nn.Module:
    if name == "dense student":
        return tiny_llama(hidden=16, heads=2, intermediate=24, vocab_size=VOCABULARY).eval()
    return mixture("qwen3_moe" if name == "more experts" else "deepseek_v3", seed=1)


def distilled(steps: int = 4) -> dict[tuple[str, int], dict[str, Any]]:
    """{(pair, stage): losses}: towards a mixture, without labels, whatever the model adds to the loss of its task."""
    results = {}
    for name, (architecture, changes) in TEACHERS.items():
        for stage in STAGES:
            teacher = None if name == "itself" else mixture(architecture, **changes)
            own = {"self_teacher": {"weights": "initial"}} if teacher is None else {}
            losses = {"logits": {}, "hidden": {"weight": 0.5}}
            block = {"enabled": True, "task_loss_weight": 0.0, "losses": losses, **own}
            model = _student(name).train()
            sparse = sparse_block("layer") if teacher is None else {}
            config = ds_config(stage, {"distillation": block, **sparse})
            engine, *_ = ds_compress.initialize(
                model=model, model_parameters=model.parameters(), config=config, teacher=teacher
            )
            values = []
            for step in range(steps):
                loss = engine(input_ids=tokens(4, 12, seed=step)).loss
                engine.backward(loss)
                engine.step()
                values.append(loss.item())
            results[name, stage] = {"losses": values, "weights": full_weights(model)}
            engine.destroy()
    return results
