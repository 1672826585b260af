"""What `estimate` predicts of a run, beside what runs of two and four processes send and hold."""

from __future__ import annotations

from typing import Any

import pytest

import ds_compress
from ds_compress.estimate import memory, wire
from ds_compress.estimate.run_layout import RunLayout
from tests.multirank.common import pruning_block, weight_quantization
from tests.multirank.footprint import config_of, model
from tests.multirank.launch import run_ranks

Results = list[dict[str, Any]]

WITHIN = 0.02
"""Of bytes on the wire; what is left is mostly padding of the last block of a chunk."""
HELD_WITHIN = 0.01
"""Of bytes in memory."""

ON = {"enabled": True, "measure_link": False, "min_elements": 0}
INT8 = {"gradient_compression": ON}
INT4 = {"gradient_compression": {**ON, "bits": 4}}
CHUNKS = {"gradient_compression": {**ON, "piece_elements": 16384}}
HIERARCHICAL = {"gradient_compression": {**ON, "hierarchical": True}}
BOTH_WAYS = {**INT8, "parameter_compression": {**ON, "refresh_interval": 2}}
BOTH_WAYS_3 = {**INT8, "parameter_compression": ON}
LARGE_ONLY = {"gradient_compression": {**ON, "min_elements": 120_000}}
ROBUST = {"robust_reduction": {"enabled": True, "max_malicious": 0, "neighbor_mixing": False}}
TWICE = {"gradient_accumulation_steps": 2}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
FORGETS = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
KEEPS_SOME = {"stage3_max_reuse_distance": 300_000, "stage3_prefetch_bucket_size": 0}

ON_TWO: dict[str, dict[str, Any]] = {
    **{f"{stage} bf16": {"stage": stage} for stage in range(4)},
    "2 fp32": {"stage": 2, "dtype": "fp32"},
    "2 twice": {"stage": 2, **TWICE},
    "1 fp32 sums": {"stage": 1, **FP32_SUMS},
    "3 keeps some": {"stage": 3, "zero": KEEPS_SOME},
    "3 persistent": {"stage": 3, "zero": FORGETS | {"stage3_param_persistence_threshold": 20_000}, **TWICE},
    **{f"{stage} int8": {"stage": stage, "block": INT8} for stage in (0, 2, 3)},
    "3 int4": {"stage": 3, "block": INT4},
    "2 chunks": {"stage": 2, "block": CHUNKS},
    "2 large only": {"stage": 2, "block": LARGE_ONLY},
    "2 whole int8": {"stage": 2, "block": INT8, "zero": {"reduce_scatter": False}},
    "1 both ways": {"stage": 1, "block": BOTH_WAYS},
    "3 both ways": {"stage": 3, "block": BOTH_WAYS_3},
    **{f"{stage} robust": {"stage": stage, "block": ROBUST} for stage in (0, 3)},
    "2 robust int8": {"stage": 2, "block": ROBUST | INT8},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "0 bf16": {"stage": 0, "ranks_per_node": 2},
    "2 bf16": {"stage": 2, "ranks_per_node": 2},
    "3 forgets": {"stage": 3, "ranks_per_node": 2, "zero": FORGETS},
    **{f"{stage} int8": {"stage": stage, "ranks_per_node": 2, "block": INT8} for stage in (0, 2, 3)},
    "2 int8, one bucket": {
        "stage": 2,
        "ranks_per_node": 2,
        "block": INT8,
        "zero": {"reduce_bucket_size": 1_000_000},
    },
    "2 hierarchical, one bucket": {
        "stage": 2,
        "ranks_per_node": 2,
        "block": HIERARCHICAL,
        "zero": {"reduce_bucket_size": 1_000_000},
    },
    **{
        f"{stage} hierarchical": {"stage": stage, "ranks_per_node": 2, "block": HIERARCHICAL}
        for stage in (0, 2, 3)
    },
    "1 both ways": {"stage": 1, "ranks_per_node": 2, "block": BOTH_WAYS},
    "3 both ways": {"stage": 3, "ranks_per_node": 2, "block": BOTH_WAYS_3},
    **{f"{stage} robust": {"stage": stage, "ranks_per_node": 2, "block": ROBUST} for stage in (0, 2)},
}


def pruned(method: str) -> dict[str, Any]:
    return pruning_block(method, schedule_offset=1, schedule_offset_end=90, schedule_offset_stride=40)


def taught(weights: str) -> dict[str, Any]:
    distillation = {"enabled": True, "self_teacher": {"weights": weights}, "losses": {"logits": {}}}
    return {"distillation": distillation, **weight_quantization(8, "encoder")}


FEEDBACK = {"gradient_compression": {**ON, "error_feedback": True}}
MOMENTA = {"robust_reduction": {**ROBUST["robust_reduction"], "worker_momentum": 0.5}}
HELD_BY_ONE: dict[str, dict[str, Any]] = {
    **{f"{stage} bf16": {"stage": stage} for stage in range(4)},
    "0 fp32": {"stage": 0, "dtype": "fp32"},
    "2 topk": {"stage": 2, "block": pruned("topk")},
    "3 snip": {"stage": 3, "block": pruned("snip_momentum")},
}
HELD_BY_TWO: dict[str, dict[str, Any]] = {
    **{f"{stage} bf16": {"stage": stage} for stage in range(4)},
    "2 fp32": {"stage": 2, "dtype": "fp32"},
    **{f"{stage} fp32 sums": {"stage": stage, **FP32_SUMS} for stage in (1, 3)},
    "3 persistent": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 20_000}},
    "0 topk": {"stage": 0, "block": pruned("topk")},
    "3 topk": {"stage": 3, "block": pruned("topk")},
    "0 feedback": {"stage": 0, "block": FEEDBACK},
    "3 feedback": {"stage": 3, "block": FEEDBACK},
    "1 both ways": {"stage": 1, "block": BOTH_WAYS},
    "2 momenta": {"stage": 2, "block": MOMENTA},
    "3 initial": {"stage": 3, "block": taught("initial")},
    "0 ema": {"stage": 0, "block": taught("ema")},
}
HELD_BY_FOUR: dict[str, dict[str, Any]] = {
    **{f"{stage} bf16": {"stage": stage} for stage in range(4)},
    "2 fp32": {"stage": 2, "dtype": "fp32"},
    "2 fp32 sums": {"stage": 2, **FP32_SUMS},
    "2 topk": {"stage": 2, "block": pruned("topk")},
}


@pytest.fixture(scope="module")
def one() -> Results:
    return run_ranks(1, "tests.multirank.footprint:run", wire={}, memory=HELD_BY_ONE)


@pytest.fixture(scope="module")
def two() -> Results:
    return run_ranks(2, "tests.multirank.footprint:run", wire=ON_TWO, memory=HELD_BY_TWO)


@pytest.fixture(scope="module")
def four() -> Results:
    return run_ranks(4, "tests.multirank.footprint:run", wire=ON_FOUR, memory=HELD_BY_FOUR)


def planned(case: dict[str, Any], world_size: int, nodes: int = 1) -> tuple[Any, RunLayout]:
    plan = ds_compress.plan(model(), case.get("block", {}))
    return plan, RunLayout.of(config_of(case), world_size, nodes)


def check(case: dict[str, Any], ranks: Results, name: str, nodes: int = 1) -> None:
    plan, layout = planned(case, len(ranks), nodes)
    way = wire.configured(plan.weights, layout, plan.config)

    def mean(key: str) -> float:
        return float(sum(rank["sent"][name][key] for rank in ranks) / len(ranks))

    assert way.total.sent == pytest.approx(mean("reduced") + mean("gathered"), rel=WITHIN)
    assert way.gradients.sent > 0 and (way.weights.sent > 0) == (layout.stage > 0)
    if nodes > 1:
        assert way.total.leaving == pytest.approx(mean("leaving") * len(ranks) / nodes, rel=WITHIN)


def check_memory(case: dict[str, Any], ranks: Results, name: str) -> None:
    plan, layout = planned(case, len(ranks))
    found = memory.held(plan, layout)
    most = max((rank["held"][name] for rank in ranks), key=lambda held: held["total"])
    assert found.total == pytest.approx(most["total"], rel=HELD_WITHIN)
    for kind in most.keys() - {"total"}:
        counted = most[kind]
        if kind == "scores" and "topk" in name:
            counted *= 3  # the moments of the scores are the score's own
        assert getattr(found, kind) == pytest.approx(counted, rel=0.03), kind


@pytest.mark.parametrize("name", ON_TWO)
def test_bytes_on_the_wire_of_two_processes(two: Results, name: str) -> None:
    check(ON_TWO[name], two, name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_bytes_on_the_wire_of_four_processes_on_two_nodes(four: Results, name: str) -> None:
    check(ON_FOUR[name], four, name, nodes=2)


@pytest.mark.parametrize("name", HELD_BY_ONE)
def test_bytes_that_one_process_holds(one: Results, name: str) -> None:
    check_memory(HELD_BY_ONE[name], one, name)


@pytest.mark.parametrize("name", HELD_BY_TWO)
def test_bytes_that_each_of_two_processes_holds(two: Results, name: str) -> None:
    check_memory(HELD_BY_TWO[name], two, name)


@pytest.mark.parametrize("name", HELD_BY_FOUR)
def test_bytes_that_each_of_four_processes_holds(four: Results, name: str) -> None:
    check_memory(HELD_BY_FOUR[name], four, name)
