"""Scenarios: rows inside experts are pruned, finalized and shrunk alike on every ZeRO stage."""

from __future__ import annotations

from typing import Any

import ds_compress
from ds_compress.structure.vanilla_hf import vanilla_hf_obstacles
from tests.multirank.common import ds_config, engine_of
from tests.multirank.experts import evaluated, train
from tests.zoo.mixtures import mixture

STAGES = (0, 2, 3)
_SCHEDULE = {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-l1": ("mixtral", {"method": "l1"}),
    "gpt_oss-taylor": ("gpt_oss", {"method": "taylor"}),
    "deepseek_v3-topk": ("deepseek_v3", {"schedule_offset_end": 3, "method": "topk"}),
    "llama4-random": ("llama4", {"method": "random"}),
    "qwen2_moe-l2-global": ("qwen2_moe", {"method": "l2", "scope": "global"}),
    "stranger-l1": ("stranger", {"method": "l1"}),
}
AROUND = {
    "hidden_pruning": {"shared_parameters": {**_SCHEDULE, "method": "l1"}},
    "head_pruning": {"shared_parameters": {**_SCHEDULE, "method": "l1"}},
    "row_pruning": {"shared_parameters": {**_SCHEDULE, "method": "l1"}},
}


def _block(keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"row_pruning": {"shared_parameters": {**_SCHEDULE, **keys, **more}}}


def removed(names: tuple[str, ...], stages: tuple[int, ...] = STAGES) -> dict[tuple[str, int], Any]:
    """{(case, stage): kept units, losses, logits while masked and after finalize, what stock would build otherwise}."""
    results: dict[tuple[str, int], Any] = {}
    for name in names:
        architecture, keys = CASES.get(name, (name, {}))
        block = _block(keys) if name in CASES else AROUND
        for stage in stages:
            with engine_of(mixture(architecture), ds_config(stage, block)) as engine:
                losses = train(engine, 5)
                kept = {group: units.tolist() for group, units in engine.compression.kept_units.items()}
                masked = evaluated(engine)
                final = ds_compress.finalize(engine)
                results[name, stage] = {
                    "kept": kept,
                    "losses": losses,
                    "masked": masked,
                    "final": evaluated(final),
                    "obstacles": vanilla_hf_obstacles(final) if hasattr(final, "config") else [],
                    "parameters": sum(p.numel() for p in final.parameters()),
                }
    return results


def shrunk(names: tuple[str, ...], stages: tuple[int, ...] = STAGES) -> dict[Any, Any]:
    """{(case, stage, whether it shrinks in mid-run): losses, parameters in the end}."""
    results: dict[Any, Any] = {}
    for name in names:
        architecture, keys = CASES[name]
        for stage in stages:
            for shrinks in (True, False):
                block = _block(keys, shrink_at_end_of_schedule=shrinks)
                model = mixture(architecture)
                with engine_of(model, ds_config(stage, block)) as engine:
                    losses = train(engine, 6)
                    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
                    results[name, stage, shrinks] = {"losses": losses, "parameters": parameters}
    return results
