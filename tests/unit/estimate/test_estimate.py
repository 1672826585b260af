"""Predictions of runs that no test can start: models of 70 to 671 billion parameters, up to 4,096 processes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ds_compress
from ds_compress.estimate.run_estimate import RunEstimate, estimate
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.traffic import Collectives
from tests.models import tiny_bert

JSON = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}}
LLAMA = {"num_key_value_heads": 8, "tie_word_embeddings": False, "vocab_size": 128_256}
PRUNED = {
    "sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 1}}
}
BOTH_WAYS = {"gradient_compression": {"enabled": True}, "parameter_compression": {"enabled": True}}
ROBUST = {"robust_reduction": {"enabled": True}}
BLOCKS: dict[str, Any] = {**PRUNED, **BOTH_WAYS, **ROBUST}


@functools.cache
def large(name: str) -> nn.Module:
    """On the meta device, with public sizes."""
    sizes: dict[str, dict[str, int]] = {
        "llama-70b": {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        "dense-405b": {
            "hidden_size": 16_384,
            "intermediate_size": 53_248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
        },
    }
    with torch.device("meta"):
        if name == "mixture-671b":
            return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes[name], **LLAMA))


@functools.cache
def planned(name: str, blocks: tuple[str, ...]) -> Any:
    return ds_compress.plan(large(name), {key: BLOCKS[key] for key in blocks})


def run(name: str, block: dict[str, Any], world_size: int, **settings: Any) -> RunEstimate:
    return estimate(planned(name, tuple(block)), JSON, world_size, **settings)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-70b", 70.6), ("dense-405b", 405.9), ("mixture-671b", 671.0)]
)
@pytest.mark.parametrize("world_size", [64, 512, 4096])
def test_state_of_zero3_is_sixteen_bytes_of_each_parameter(
    name: str, billions: float, world_size: int
) -> None:
    found = run(name, {}, world_size, zero_stage=3, nodes=world_size // 8)
    state = found.held.total - found.held.buckets
    assert state * world_size == pytest.approx(16 * billions * 1e9, rel=0.02)
    plain, others = found.ways[0], 1 - 1 / world_size
    # All but the last half billion elements are fetched twice.
    assert plain.weights.sent == pytest.approx(2 * (2 * billions - 0.5) * 1e9 * others, rel=0.01)
    assert plain.gradients.sent == pytest.approx(2 * billions * 1e9 * others, rel=0.01)


def test_what_breaks_first() -> None:
    few = run("llama-70b", PRUNED, 64, zero_stage=3, nodes=8)
    assert few.breaks == ()
    many = run("mixture-671b", PRUNED, 4096, zero_stage=3, nodes=512)
    (files,) = (one.what for one in many.breaks)
    assert "12,288 files" in files
    robust = run("llama-70b", ROBUST, 4096, zero_stage=2, nodes=512)
    compared = next(one for one in robust.breaks if "robust_reduction" in one.what)
    assert "twice 134 MB more from each process for each bucket" in compared.what
    quantized = run("llama-70b", BOTH_WAYS, 512, zero_stage=3, nodes=64)
    leaving, _ = (one.what for one in quantized.breaks)
    assert "1.7 times as many bytes leave a node" in leaving
    small = {"gradient_compression": {"enabled": True, "piece_elements": 1 << 20}}
    in_pieces = estimate(
        ds_compress.plan(large("llama-70b"), small), JSON, 512, zero_stage=3, nodes=64
    ).breaks[0]
    assert "sends 2,064 bytes to each process at a time" in in_pieces.what
    assert "leave piece_elements out" in in_pieces.what


def test_chunks_in_flight_grow_with_the_processes() -> None:
    few, many = (
        dict(run("llama-70b", BOTH_WAYS, size, zero_stage=2, nodes=size // 8).passing) for size in (64, 4096)
    )
    for block in BOTH_WAYS:
        assert few[f"chunks of {block} in flight"] == 6 * (1 << 22) * 516 // 512
        assert many[f"chunks of {block} in flight"] == 6 * (1 << 28) * 516 // 512
    assert "chunks of parameter_compression in flight" not in dict(
        run("llama-70b", BOTH_WAYS, 64, zero_stage=3, nodes=8).passing
    )


def test_an_all_to_all_leaves_a_node_by_every_process_and_a_ring_once() -> None:
    collectives = Collectives(RunLayout(world_size=16, nodes=2))
    ring, spread = collectives.all_reduce(1600), collectives.all_to_all(1600)
    assert (ring.sent, ring.leaving, ring.collectives) == (3000, 3000, 1)
    assert (spread.sent, spread.leaving) == (1500, 8 * 800)
    alone = Collectives(RunLayout())
    assert alone.all_reduce(1600).sent == alone.all_to_all(1600).leaving == 0


def test_hierarchical_sends_less_out_of_a_node() -> None:
    found = run("llama-70b", {}, 512, zero_stage=3, nodes=64, gbit_per_s=400)
    by_name = {way.name: way for way in found.ways}
    assert list(by_name) == ["plain DeepSpeed", "8 bits both ways", "8 bits both ways, hierarchical"]
    plain, flat, hierarchical = by_name.values()
    assert hierarchical.total.leaving < plain.total.leaving < flat.total.leaving
    assert flat.total.sent < hierarchical.total.sent < plain.total.sent
    assert found.seconds(plain) == pytest.approx(plain.total.leaving * 8 / 400e9)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RunLayout.of(config, 2)


def test_layouts() -> None:
    config = {
        "bf16": {"enabled": True},
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_reuse_distance": 7},
    }
    layout = RunLayout.of(config, 8, 2)
    assert (layout.accumulation, layout.reductions, layout.moments, layout.reuse) == (4, 4, 1, 7)
    assert (layout.bucket, layout.shards, layout.weight_bytes, layout.notes) == (500_000_000, 8, 2, ())
    assert "AdamW" in RunLayout.of({}, 1).notes[0]
    assert "Muon" in RunLayout.of({"optimizer": {"type": "Muon"}}, 1).notes[0]
    with pytest.raises(ValueError, match="3 nodes with 8 processes"):
        RunLayout.of(config, 8, 3)
    with pytest.raises(ValueError, match="--nodes"):
        estimate(ds_compress.plan(tiny_bert(), {}), {}, 8, gbit_per_s=10)


def test_an_unknown_teacher_is_said_to_be_unknown() -> None:
    losses = {"losses": {"logits": {}}}
    plan = ds_compress.plan(tiny_bert(), {"distillation": {"enabled": True, **losses}})
    unknown = estimate(plan, JSON, 4, zero_stage=2)
    assert unknown.held.teacher is None and unknown.as_data()["memory_bytes"]["teacher"] is None
    known = estimate(plan, JSON, 4, zero_stage=2, teacher=plan.weights)
    numel = sum(weight.numel for weight in plan.weights)
    assert known.held.teacher == pytest.approx(numel, rel=0.01), "fp32, sharded over four"
    assert known.held.total == unknown.held.total + (known.held.teacher or 0)
