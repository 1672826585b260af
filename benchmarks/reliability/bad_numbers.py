"""R4: NaN and infinities in a step: it is skipped, and nothing of it remains.

A run takes good steps, a bad one, and good ones again. The bad one must change no weight, mask, score, scale, range or
residual, and no counter of the compression; after it training goes on with finite numbers. fp16 runs on a CPU, too, by
answering DeepSpeed's question whether it is supported.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.reliability.trial import Trial, Verdict

NAME = "R4"
WHAT = "NaN, Inf x {one rank, all, loss, one layer} x {bf16, fp32, fp16} x {prune, QAT, KD, reductions}"
PASS = "no non-finite weight, counters exact, masks and all other state untouched"
COUNT = 40
TOGETHER = 10
"""Trials that share a launch of two processes."""
GOOD = 3
NUMBERS = {"NaN": float("nan"), "Inf": float("inf")}
PLACES = ("one rank", "all", "loss", "one layer")
DTYPES = ("bf16", "fp32", "fp16")
TECHNIQUES = ("prune", "QAT", "KD", "reductions")


def trials(rng: random.Random) -> list[Trial]:
    chosen = rng.sample(list(itertools.product(NUMBERS, PLACES, DTYPES, TECHNIQUES)), COUNT)
    # Stages take turns.
    cases = tuple((*case, number % 4) for number, case in enumerate(chosen))
    return [
        Trial(
            f"{case[0]} in {case[1]}, {case[2]}, {case[3]}, ZeRO {case[4]}",
            functools.partial(_trial, cases[number // TOGETHER * TOGETHER :][:TOGETHER], number % TOGETHER),
        )
        for number, case in enumerate(cases)
    ]


def _trial(cases: tuple[tuple[Any, ...], ...], number: int, folder: Path) -> Verdict:
    for rank, found in enumerate(_tried(cases)):
        problems = found[number]
        if problems:
            return Verdict(False, "something remained", f"process {rank}: {'; '.join(problems)}")
    return Verdict(True, "skipped")


@functools.cache
def _tried(cases: tuple[tuple[Any, ...], ...]) -> list[list[list[str]]]:
    from tests.multirank.launch import run_ranks

    return run_ranks(2, f"{__name__}:run_all", cases=cases)


# -- in the processes ------------------------------------------------------------------------------------


def run_all(cases: tuple[tuple[str, str, str, str, int], ...]) -> list[list[str]]:
    """What is wrong after each case; nothing, where all is well."""
    return [_problems(*case) for case in cases]


def block(technique: str) -> dict[str, Any]:
    from tests.multirank.common import pruning_block, weight_quantization
    from tests.multirank.training import quantization_block

    if technique == "prune":
        schedule = {"schedule_offset": 1, "schedule_offset_end": 8, "schedule_offset_stride": 1}
        return pruning_block("topk", **schedule)
    if technique == "QAT":
        static = quantization_block(activations={"range_calibration": "static"})
        return {
            **weight_quantization(8, "encoder.layer", learned_scale=True),
            "activation_quantization": static["activation_quantization"],
        }
    if technique == "KD":
        losses: dict[str, Any] = {"logits": {}, "hidden": {}}
        average = {"weights": "ema", "decay": 0.9}
        quantized = weight_quantization(8, "encoder.layer")
        return {**quantized, "distillation": {"enabled": True, "losses": losses, "self_teacher": average}}
    rule = {"enabled": True, "rule": "mean", "max_malicious": 0, "worker_momentum": 0.5}
    wire = {"enabled": True, "measure_link": False, "min_elements": 0, "piece_elements": 2048}
    return {"gradient_compression": wire, "robust_reduction": rule}


def _problems(number: str, place: str, dtype: str, technique: str, stage: int) -> list[str]:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast

    from tests.models import tiny_bert
    from tests.multirank.common import batches, ds_config, engine_of

    accelerator = get_accelerator()
    answer = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        config = ds_config(stage, block(technique), dtype)
        if dtype == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}
        with engine_of(tiny_bert().train(), config) as engine:
            data = list(batches(2 * GOOD + 1, rank=dist.get_rank()))
            for batch in data[:GOOD]:
                _step(engine, batch)
            if engine.skipped_steps:
                return [f"{engine.skipped_steps} good steps were skipped"]
            before = _state(engine)
            _step(engine, data[GOOD], NUMBERS[number], place)
            after = _state(engine)
            wrong = [f"{key} changed" for key in before if before[key] != after.get(key)][:3]
            if engine.skipped_steps != 1:
                wrong.append(f"DeepSpeed counts {engine.skipped_steps} skipped steps")
            losses = [_step(engine, batch) for batch in data[GOOD + 1 :]]
            applied = engine.compression.applied_steps
            if applied != 2 * GOOD:
                wrong.append(f"{applied} applied steps instead of {2 * GOOD}")
            if not all(map(torch.isfinite, map(torch.tensor, losses))):
                wrong.append(f"losses {losses}")
            return wrong + _non_finite(engine)
    finally:
        accelerator.is_fp16_supported = answer
        # DeepSpeed keeps the settings of an averaged teacher's autocast in its module, for every later engine.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def _step(engine: Any, batch: dict[str, torch.Tensor], bad: float | None = None, place: str = "") -> float:
    handles = []
    loss = engine(**batch).loss
    value = float(loss)
    if bad is not None and (place == "loss" or (place == "one rank" and dist.get_rank() == 0)):
        loss = loss * bad
    if bad is not None and place in ("all", "one layer"):
        names = "" if place == "all" else "layer.1.intermediate"
        spoiled = [p for name, p in engine.module.named_parameters() if p.requires_grad and names in name]
        handles = [parameter.register_hook(lambda gradient: gradient * bad) for parameter in spoiled]
    engine.backward(loss)
    engine.step()
    for handle in handles:
        handle.remove()
    return value


def _state(engine: Any) -> dict[str, str]:
    """Digests of all weights and of what techniques keep, and their counters."""
    from tests.multirank.common import full_weights

    run = engine.compression
    kept = {name: technique.fragment_state() for name, technique in run.techniques.items()}
    own = {name: technique.process_state() for name, technique in run.techniques.items()}
    masters = {name: fragment.values for name, fragment in run.shards.fragments.items()}
    whole = {"weights": full_weights(engine.module), "masters": masters, "kept": kept, "of this process": own}
    found = _flat({**whole, "state": run.state_dict()})
    # Who sent bad numbers is remembered: that is what it is for.
    return {key: value for key, value in found.items() if "/watch/" not in key}


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return {path: hashlib.sha256(raw.numpy().tobytes()).hexdigest()}
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in _flat(item, f"{path}/{key}").items()}
    return {path: repr(value)}


def _non_finite(engine: Any) -> list[str]:
    from tests.multirank.common import full_weights

    weights = full_weights(engine.module)
    return [f"{name} is not finite" for name, value in weights.items() if not bool(value.isfinite().all())][
        :3
    ]
