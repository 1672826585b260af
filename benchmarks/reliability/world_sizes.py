"""R3: a compressed run goes on in another number of processes, or on another ZeRO stage, as plain DeepSpeed does.

All processes see the same data, so that their number should not matter. Each run is saved in mid-ramp and trains on;
another one loads what was saved and trains on, too. Plain DeepSpeed does the same without compression: how far its
losses are apart is what arithmetic costs, and the compressed run may differ by `SLACK` times as much. Stages 1 to 3 go
through a universal checkpoint; those of stage 0 load as they are.

A weight on the edge between two codes of its grid falls to either side by the last bit of a gradient, and a loss then
moves by 1e-5. Sums of three processes, and those of another stage, have other last bits. The same checkpoint is also
loaded where it was saved, and trained on with all losses multiplied by 1 + 2^-23: how far that run is from the unbroken
one is what last bits do here. A run that differs by more than plain DeepSpeed, but by no more than `SLACK` times that,
is counted as "as after a change of last bits".
"""

from __future__ import annotations

import functools
import random
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.reliability.trial import Trial, Verdict

NAME = "R3"
WHAT = "1->2, 2->1, 2->4, 4->2, 3->2 processes x ZeRO 0-3; stages 1<->2, 2<->3"
PASS = "masks, schedules, scales as saved; 20 losses as near to the unbroken run's as plain DeepSpeed's"
SIZES = ((1, 2), (2, 1), (2, 4), (4, 2), (3, 2))
STAGES = ((1, 2), (2, 1), (2, 3), (3, 2))
BEFORE, AFTER = 7, 20
SLACK = 10.0
ROUNDING = 1e-6
"""Of a loss; where plain DeepSpeed's are equal, so are ours, but for an order of sums that may change."""


def trials(rng: random.Random) -> list[Trial]:
    made = [(old, new, stage, stage) for old, new in SIZES for stage in range(4)]
    made += [(2, 2, old, new) for old, new in STAGES]
    return [
        Trial(f"{old}->{new} processes, ZeRO {was}->{then}", functools.partial(_trial, old, new, was, then))
        for old, new, was, then in made
    ]


def tenth(rng: random.Random) -> list[Trial]:
    """One pair of sizes, whose trials share their launches."""
    return [trial for trial in trials(rng) if trial.name.startswith("1->2")]


def _trial(old: int, new: int, was: int, then: int, folder: Path) -> Verdict:
    saved, loaded = _saved(old, was), _loaded(old, new, was, then)
    if isinstance(loaded, str):
        return Verdict(False, "not loaded", loaded)
    for what in ("masks", "schedule", "scales", "weights"):
        if not _equal(saved["ours"][what], loaded["ours"][what]):
            return Verdict(False, f"other {what}")
    apart = {kind: _apart(saved[kind]["losses"], loaded[kind]["losses"]) for kind in ("plain", "ours")}
    told = f"losses differ by {apart['ours']:.2g}, plain DeepSpeed's by {apart['plain']:.2g}"
    nudged = _apart(saved["ours"]["losses"], saved["ours"]["nudged"])
    if apart["ours"] == 0:
        return Verdict(True, "bit-equal", told)
    if apart["ours"] <= max(SLACK * apart["plain"], ROUNDING):
        return Verdict(True, "equal but for rounding", told)
    told += f", those after a change of last bits by {nudged:.2g}"
    return Verdict(apart["ours"] <= SLACK * nudged, "as after a change of last bits", told)


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Removed at the end of this process: what several trials load is saved once."""
    return tempfile.TemporaryDirectory(prefix="reliability-")


@functools.cache
def _saved(processes: int, stage: int) -> dict[str, Any]:
    """By kind; universal checkpoints lie beside the others."""
    import ds_compress
    from tests.multirank.launch import run_ranks

    root = Path(_folder().name)
    found: dict[str, Any] = run_ranks(processes, f"{__name__}:save", root=str(root), stage=stage)[0]
    for kind in KINDS if stage > 0 else ():
        where = root / f"{kind}-{processes}-{stage}"
        ds_compress.to_universal(where, where)
    return found


@functools.cache
def _loaded(old: int, new: int, was: int, then: int) -> Any:
    from tests.multirank.launch import run_ranks

    _saved(old, was)
    arguments: dict[str, Any] = {"root": _folder().name, "old": old, "was": was, "then": then}
    return run_ranks(new, f"{__name__}:load", **arguments)[0]


# -- in the processes ------------------------------------------------------------------------------------

KINDS = ("plain", "ours")


def block() -> dict[str, Any]:
    """Scores, masks, learned scales, ranges, a teacher that is an average: all that a layout could lose."""
    from tests.multirank.common import pruning_block, weight_quantization
    from tests.multirank.training import quantization_block

    schedule = {"schedule_offset": 2, "schedule_offset_end": 16, "schedule_offset_stride": 2}
    losses = {"logits": {}, "hidden": {"weight": 0.5, "final_weight": 0.0, "schedule_offset_end": 12}}
    average = {"weights": "ema", "decay": 0.9}
    static = {"range_calibration": "static"}
    return {
        **pruning_block("topk", scope="global", **schedule),
        **weight_quantization(8, "encoder.layer", learned_scale=True),
        "activation_quantization": quantization_block(activations=static)["activation_quantization"],
        "distillation": {"enabled": True, "losses": losses, "self_teacher": average},
    }


def engine_of(kind: str, stage: int, seed: int, **extra: Any) -> Any:
    import deepspeed

    from tests.models import tiny_bert
    from tests.multirank.common import ds_config

    schedule = {"total_num_steps": 60, "warmup_num_steps": 4, "warmup_max_lr": 1e-3}
    config = ds_config(
        stage,
        block() if kind == "ours" else None,
        scheduler={"type": "WarmupDecayLR", "params": {**schedule, "warmup_type": "linear"}},
        **extra,
    )
    model = tiny_bert(seed).train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def save(root: str, stage: int) -> dict[str, Any]:
    """Trains, saves and trains on."""
    from tests.multirank.common import batches, train

    found: dict[str, Any] = {}
    data = list(batches(BEFORE + AFTER))
    for kind in KINDS:
        folder = f"{root}/{kind}-{dist.get_world_size()}-{stage}"
        engine = engine_of(kind, stage, seed=0)
        train(engine, iter(data[:BEFORE]))
        engine.save_checkpoint(folder)
        kept = state_of(engine)
        found[kind] = {**kept, "losses": train(engine, iter(data[BEFORE:]))}
        engine.destroy()
        if kind == "ours":
            engine = engine_of(kind, stage, seed=5)
            engine.load_checkpoint(folder)
            found[kind]["nudged"] = _nudged(engine, data[BEFORE:])
            engine.destroy()
    return found


def _nudged(engine: Any, data: list[dict[str, torch.Tensor]]) -> list[float]:
    """Losses of a training whose gradients have other last bits."""
    losses = []
    for batch in data:
        loss = engine(**batch).loss
        engine.backward(loss * (1 + 2**-23))
        engine.step()
        losses.append(loss.item())
    return losses


def load(root: str, old: int, was: int, then: int) -> dict[str, Any] | str:
    """Goes on from what `old` processes saved on stage `was`, on stage `then`; or why not."""
    from tests.multirank.common import batches, train

    universal = {} if was == 0 else {"checkpoint": {"load_universal": True}}
    found: dict[str, Any] = {}
    for kind in KINDS:
        engine = engine_of(kind, then, seed=5, **universal)
        try:
            engine.load_checkpoint(f"{root}/{kind}-{old}-{was}")
        except Exception as error:
            return f"{kind}: {type(error).__name__}: {error} {traceback.format_exc(limit=-2)}"
        data = list(batches(BEFORE + AFTER))[BEFORE:]
        kept = state_of(engine)
        found[kind] = {**kept, "losses": train(engine, iter(data))}
        engine.destroy()
    return found


def state_of(engine: Any) -> dict[str, Any]:
    """What must not depend on processes and stage, whole; of plain DeepSpeed the weights."""
    from tests.multirank.common import full_weights

    weights = full_weights(engine.module)
    run = getattr(engine, "compression", None)
    if run is None:
        return {"weights": weights}
    state = run.state_dict()["stages"]
    return {
        "weights": weights,
        "masks": whole_state(run),
        "schedule": {"applied": run.applied_steps, "global": engine.global_steps, "lr": engine.get_lr()[0]},
        "scales": {
            "ranges": state["activation_quantization"]["ranges"],
            "learned": {name: value for name, value in weights.items() if "step_size" in name},
        },
    }


def whole_state(run: Any) -> dict[str, torch.Tensor]:
    """What techniques keep beside weights (masks, scores, averages), joined from all processes."""
    own = {
        f"{name} {kind} {parameter}": {run.shards.fragments[parameter].start: values.float()}
        for name, technique in run.techniques.items()
        for kind, by_parameter in technique.fragment_state().items()
        for parameter, values in by_parameter.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for theirs in everyone:
        for key, part in theirs.items():
            parts.setdefault(key, {}).update(part)
    return {key: torch.cat([part[start] for start in sorted(part)]) for key, part in parts.items()}
