"""Scenario: what leaves an engine is the fp32 master of each weight, whatever forwards have done to the copies."""

from __future__ import annotations

from typing import Any

import torch

import ds_compress
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, pruning_block, train

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CASES: dict[str, dict[str, Any]] = {
    "fetched": AUTOCAST,
    "persistent": {**AUTOCAST, "zero": {"stage3_param_persistence_threshold": 100_000}},
    "codes": {"parameter_compression": True},
}


def _masters(engine: Any) -> dict[str, torch.Tensor]:
    """Of each weight, whole, made of the masters of all processes."""
    shards, whole = engine.compression.shards, {}
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        flat = torch.zeros(torch.Size(shape).numel())
        fragment = shards.fragments.get(name)
        if fragment is not None:
            flat[fragment.start : fragment.start + fragment.numel] = fragment.values
        whole[name] = shards.sum(flat).view(shape)
    return whole


def differing(stage: int, names: tuple[str, ...]) -> dict[str, dict[str, list[str]]]:
    """{case: {what came out: names of the weights that are not their masters}}."""
    results = {}
    for name in names:
        settings = dict(CASES[name])
        block = pruning_block(schedule_offset=2)
        if settings.pop("parameter_compression", False):
            block["parameter_compression"] = {"enabled": True, "measure_link": False, "min_elements": 1}
        with engine_of(tiny_bert(), ds_config(stage, block, **settings)) as engine:
            train(engine, batches(4))
            masters = _masters(engine)
            batch = next(batches(1, seed=9))
            # In training mode a forward without a step leaves what it fetched, too.
            engine(**batch) if name == "codes" else _evaluate(engine, batch)
            exported = ds_compress.export_state_dict(engine)
            _evaluate(engine, batch)
            written = {"export": exported, "masters": _masters(engine)}
            final = full_weights(ds_compress.finalize(engine))
            written["finalize"] = final
        results[name] = {
            kind: [n for n in state if n in masters and not torch.equal(state[n], masters[n])]
            for kind, state in written.items()
        }
    return results


def update_lengths(stages: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """{stage: (length of an update by SGD with rate 1 and a limit of 0.01, the norm that DeepSpeed reports)}."""
    lengths = {}
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True}
    for stage in stages:
        block = pruning_block(density=0.05, schedule_offset=1)
        config = ds_config(stage, block, gradient_clipping=0.01, **sgd)
        with engine_of(tiny_bert(), config) as engine:
            data = list(batches(4, rank=torch.distributed.get_rank()))
            train(engine, iter(data[:3]))
            before = _masters(engine)
            train(engine, iter(data[3:]))
            after = _masters(engine)
            moved = torch.cat([(after[name] - values).flatten() for name, values in before.items()])
            lengths[stage] = float(moved.norm()), float(engine.get_global_grad_norm() or 0.0)
    return lengths


def _evaluate(engine: Any, batch: dict[str, torch.Tensor]) -> None:
    engine.eval()
    with torch.no_grad():
        engine(**batch)
