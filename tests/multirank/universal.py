"""Scenarios: universal checkpoints carry what DeepSpeed's own load of them loses, on every stage."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import ds_compress  # noqa: F401  (registers)
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, full_weights, pruning_block, structured_block, train
from tests.multirank.common import weight_quantization as quantized
from tests.multirank.reduction import Odd, wire
from tests.multirank.training import quantization_block

STAGES = (1, 2, 3)
BEFORE, AFTER = 4, 5
BETWEEN = {"schedule_offset": 1, "schedule_offset_end": 7, "schedule_offset_stride": 2}


class Frozen(nn.Module):
    """A trained layer between a frozen one and a memory, as adapters and normalizations have."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(128, 16).requires_grad_(False)
        self.norm = nn.BatchNorm1d(16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        hidden = self.norm(self.embed(input_ids).mean(1))
        logits = self.head(torch.relu(self.layer(hidden)))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels)})


def _sparse(modules: str) -> dict[str, Any]:
    block = copy.deepcopy(pruning_block("l1", 0.5, **BETWEEN))
    block["sparse_pruning"]["different_groups"] = {
        "all": {"params": {"dense_ratio": 0.5}, "modules": [modules]}
    }
    return block


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    # Learned scales are a group of their own, without weight decay.
    "learned scales": (tiny_bert, quantized(8, "encoder.layer", learned_scale=True)),
    "static scales, ranges, masks": (
        tiny_bert,
        {
            **pruning_block("movement", **BETWEEN),
            **quantized(8, "encoder.layer", scales="static"),
            "activation_quantization": quantization_block(activations={"range_calibration": "static"})[
                "activation_quantization"
            ],
        },
    ),
    "shrunk": (
        tiny_bert,
        {
            "row_pruning": structured_block(schedule_offset=2, shrink_at_end_of_schedule=True),
            **pruning_block("topk", **BETWEEN),
        },
    ),
    "frozen weights and buffers": (Frozen, _sparse("embed|layer")),
    "error feedback": (lambda seed: Odd(), wire(4, error_feedback=True, error_feedback_bits=16)),
    "worker momentum": (
        lambda seed: Odd(),
        {
            "robust_reduction": {
                "enabled": True,
                "rule": "mean",
                "max_malicious": 0,
                "worker_momentum": 0.9,
            }
        },
    ),
}


def engine_of(name: str, stage: int, seed: int, universal: bool) -> Any:
    build, block = CASES[name]
    load = {"checkpoint": {"load_universal": True}} if universal else {}
    model = build(seed).train()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=ds_config(stage, copy.deepcopy(block), **load),
    )
    return engine


def save(folder: str) -> dict[Any, Any]:
    """{(case, stage): losses and weights after the save}; each process has data of its own."""
    found = {}
    for name in CASES:
        for stage in STAGES:
            engine = engine_of(name, stage, 0, universal=False)
            data = list(batches(BEFORE + AFTER, rank=dist.get_rank()))
            train(engine, iter(data[:BEFORE]))
            engine.save_checkpoint(f"{folder}/{name}-{stage}")
            losses = train(engine, iter(data[BEFORE:]))
            found[name, stage] = {"losses": losses, "weights": full_weights(engine.module)}
            engine.destroy()
    return found


def load(folder: str) -> dict[Any, Any]:
    """The same after a load of what became of these checkpoints."""
    found = {}
    for name in CASES:
        for stage in STAGES:
            engine = engine_of(name, stage, 5, universal=True)
            engine.load_checkpoint(f"{folder}/{name}-{stage}")
            loaded = {
                **full_weights(engine.module),
                **{n: b.clone() for n, b in engine.module.named_buffers()},
            }
            data = list(batches(BEFORE + AFTER, rank=dist.get_rank()))[BEFORE:]
            losses = train(engine, iter(data))
            found[name, stage] = {
                "losses": losses,
                "weights": full_weights(engine.module),
                "loaded": loaded,
                "applied": engine.compression.applied_steps,
            }
            engine.destroy()
    return found
