"""What `estimate` predicts of a run, beside what runs of two and four processes send and hold."""

from __future__ import annotations

from typing import Any

import pytest

import ds_compress
from ds_compress.estimate import wire
from ds_compress.estimate.run_layout import RunLayout
from tests.multirank.footprint import config_of, model
from tests.multirank.launch import run_ranks

Results = list[dict[str, Any]]

WITHIN = 0.02
"""Of bytes on the wire; what is left is mostly padding of the last block of a chunk."""

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
    **{f"{stage} fp32": {"stage": stage, "dtype": "fp32"} for stage in (0, 2, 3)},
    **{f"{stage} twice": {"stage": stage, **TWICE} for stage in (1, 2)},
    "1 fp32 sums": {"stage": 1, **FP32_SUMS},
    "2 whole": {"stage": 2, "zero": {"reduce_scatter": False}},
    "3 keeps some": {"stage": 3, "zero": KEEPS_SOME},
    "3 persistent": {"stage": 3, "zero": FORGETS | {"stage3_param_persistence_threshold": 20_000}, **TWICE},
    **{f"{stage} int8": {"stage": stage, "block": INT8} for stage in range(4)},
    **{f"{stage} int4": {"stage": stage, "block": INT4} for stage in (0, 3)},
    **{f"{stage} chunks": {"stage": stage, "block": CHUNKS} for stage in (0, 2, 3)},
    "2 large only": {"stage": 2, "block": LARGE_ONLY},
    "2 whole int8": {"stage": 2, "block": INT8, "zero": {"reduce_scatter": False}},
    "1 both ways": {"stage": 1, "block": BOTH_WAYS},
    "3 both ways": {"stage": 3, "block": BOTH_WAYS_3},
    **{f"{stage} robust": {"stage": stage, "block": ROBUST} for stage in (0, 2, 3)},
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


@pytest.fixture(scope="module")
def two() -> Results:
    return run_ranks(2, "tests.multirank.footprint:sent", cases=ON_TWO)


@pytest.fixture(scope="module")
def four() -> Results:
    return run_ranks(4, "tests.multirank.footprint:sent", cases=ON_FOUR)


def predicted(case: dict[str, Any], world_size: int, nodes: int = 1) -> wire.Way:
    plan = ds_compress.plan(model(), case.get("block", {}))
    return wire.configured(plan.weights, RunLayout.of(config_of(case), world_size, nodes), plan.config)


def mean(ranks: Results, name: str, key: str) -> float:
    return float(sum(rank[name][key] for rank in ranks) / len(ranks))


def check(case: dict[str, Any], ranks: Results, name: str, nodes: int = 1) -> None:
    way = predicted(case, len(ranks), nodes)
    counted = mean(ranks, name, "reduced") + mean(ranks, name, "gathered")
    assert way.total.sent == pytest.approx(counted, rel=WITHIN)
    if nodes > 1:
        leaving = mean(ranks, name, "leaving") * len(ranks) / nodes
        assert way.total.leaving == pytest.approx(leaving, rel=WITHIN)


@pytest.mark.parametrize("name", ON_TWO)
def test_bytes_on_the_wire_of_two_processes(two: Results, name: str) -> None:
    check(ON_TWO[name], two, name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_bytes_on_the_wire_of_four_processes_on_two_nodes(four: Results, name: str) -> None:
    check(ON_FOUR[name], four, name, nodes=2)
