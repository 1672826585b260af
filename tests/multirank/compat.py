"""Scenarios: the JSONs of the removed library through `compat` and through the new path, on every stage."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ds_compress.compat import compression_scheduler, init_compression, redundancy_clean
from ds_compress.compat.compress import student_initialization
from tests.legacy_blocks import CHANNELS, ENCODER_BLOCKS, HEADS, REDUCTION, ConvNet, images, row_pruning
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, train

STAGES = (0, 2, 3)
STEPS = 20
_VARIANTS = ("weight_quantization_asymmetric", "row_pruning_l1")
"""Seen by the unit tests only: a launch takes long enough."""
NAMES = (*(name for name in ENCODER_BLOCKS if name not in _VARIANTS), "channel_pruning")


def block_of(name: str) -> dict[str, Any]:
    return copy.deepcopy(CHANNELS if name == "channel_pruning" else ENCODER_BLOCKS[name])


def model_of(name: str) -> nn.Module:
    if name == "channel_pruning":
        return ConvNet()
    return tiny_bert(layers=4 if "layer_reduction" in ENCODER_BLOCKS[name] else 2)


def train_engine(name: str, engine: Any, rank: int) -> list[float]:
    if name != "channel_pruning":
        return train(engine, batches(STEPS, rank=rank, size=2, tokens=8))
    losses = []
    for batch in images(STEPS):
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def through(name: str, stage: int, rank: int, prepares: bool) -> dict[str, Any]:
    """20 steps of one JSON; `prepares`: with init_compression before deepspeed.initialize, and a scheduler."""
    config = ds_config(stage, block_of(name))
    model = model_of(name)
    if prepares:
        model = init_compression(model, config)
    with engine_of(model, config) as engine:
        if prepares:
            compression_scheduler(engine, config)
        losses = train_engine(name, engine, rank)
        weights = full_weights(engine.module)
        ranges = (
            engine.compression.state_dict()["stages"].get("activation_quantization", {}).get("ranges", {})
        )
        return {
            "losses": losses,
            "weights": weights,
            "metrics": engine.compression.metrics(),
            "ranges": {key: value.tolist() for key, value in ranges.items()},
        }


def legacy_jsons() -> dict[tuple[str, int], Any]:
    """For each JSON and stage: losses, whether masks and weights agree between the two paths, what was reached."""
    results = {}
    for name in NAMES:
        for stage in STAGES:
            new, old = (through(name, stage, dist.get_rank(), prepares) for prepares in (False, True))
            pairs = [(weight, old["weights"][key]) for key, weight in new["weights"].items()]
            results[name, stage] = {
                "losses": (new["losses"], old["losses"]),
                "masks": all(torch.equal(one == 0, other == 0) for one, other in pairs),
                "weights": all(torch.equal(one, other) for one, other in pairs),
                "zeros": sum(int((one == 0).sum()) for one, _ in pairs),
                "metrics": (new["metrics"], old["metrics"]),
                "ranges": old["ranges"],
            }
    return {
        "jsons": results,
        "cleaned": cleaned(),
        "student": initialised_student(),
        "loops": {name: in_ddp(name) for name in ("activation_quantization_static", "sparse_pruning_topk")},
    }


def in_ddp(name: str) -> dict[str, Any]:
    """Plain torch in two processes: DistributedDataParallel around a prepared model."""
    config = ds_config(0, block_of(name))
    model = init_compression(model_of(name), config)
    wrapped = nn.parallel.DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    scheduler = compression_scheduler(wrapped, config)
    losses = []
    for batch in batches(STEPS, rank=dist.get_rank(), size=2, tokens=8):
        loss = wrapped(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": full_weights(model), "state": scheduler.state_dict()["stages"]}


def cleaned() -> dict[int, Any]:
    """redundancy_clean of a sharded engine, against the masked model that it was made from."""
    results = {}
    for stage in STAGES:
        config = ds_config(stage, {**HEADS, **row_pruning("l1")})
        model = init_compression(tiny_bert(), config)
        batch = next(batches(1, seed=9))
        with engine_of(model, config) as engine:
            train(engine, batches(6))
            engine.eval()
            with torch.no_grad():
                expected = engine(**batch).logits
            smaller = redundancy_clean(engine, config)
            with torch.no_grad():
                got = smaller(**batch).logits
        results[stage] = {"expected": expected, "got": got, "rows": smaller.config.intermediate_size}
    return results


def initialised_student() -> bool:
    """A student and a teacher whose weights are spread over the ranks: all of the copy arrives."""
    # A ZeRO-3 engine partitions what it is given; under zero.Init transformers' own initialisation fails.
    teacher, student = tiny_bert(seed=2, layers=4), tiny_bert(seed=1)
    wanted = {name: value.clone() for name, value in teacher.state_dict().items()}
    engines = [deepspeed.initialize(model=m, config=ds_config(3))[0] for m in (teacher, student)]
    assert all(hasattr(parameter, "ds_id") for m in (teacher, student) for parameter in m.parameters())
    student_initialization(student, teacher, {"compression_training": REDUCTION})
    got = full_weights(student)
    for engine in engines:
        engine.destroy()
    return all(
        torch.equal(value, wanted[name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")])
        for name, value in got.items()
    )
