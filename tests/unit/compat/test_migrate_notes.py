"""Each note of `migrate` is there when it applies, and only then."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ds_compress.compat.migrate import migrate
from ds_compress.config import parse_config

Block = dict[str, Any]


def weights(shared: Block | None = None, params: Block | None = None) -> Block:
    own = {"enabled": True, "schedule_offset": 0, "quantize_weight_in_forward": False, **(shared or {})}
    group = {"start_bits": 8, "target_bits": 8, "quantization_period": 50, **(params or {})}
    return {
        "weight_quantization": {
            "shared_parameters": own,
            "different_groups": {"a": {"params": group, "modules": ["x"]}},
        }
    }


def inputs(**shared: Any) -> Block:
    own = {"enabled": True, "schedule_offset": 0, **shared}
    groups = {"a": {"params": {"bits": 8}, "modules": ["x"]}}
    return {"activation_quantization": {"shared_parameters": own, "different_groups": groups}}


def sparse(**shared: Any) -> Block:
    own = {"enabled": True, "schedule_offset": 0, "method": "l1", **shared}
    groups = {"a": {"params": {"dense_ratio": 0.5}, "modules": ["x"]}}
    return {"sparse_pruning": {"shared_parameters": own, "different_groups": groups}}


def units(key: str, related: bool = True, two: bool = False, **shared: Any) -> Block:
    own = {"enabled": True, "schedule_offset": 0, "method": "topk", **shared}
    group: Block = {"params": {"dense_ratio": 0.5}, "modules": ["x", "y"] if two else ["x"]}
    if related:
        group["related_modules"] = [["z"]] * (2 if two else 1)
    if key == "head_pruning":
        own["num_heads"] = 4
    return {key: {"shared_parameters": own, "different_groups": {"a": group}}}


def without(block: Block, *path: str) -> Block:
    changed = copy.deepcopy(block)
    here = changed
    for step in path[:-1]:
        here = here[step]
    here.pop(path[-1], None)
    return changed


# (what the note says, a block that needs it, one that does not)
CASES: list[tuple[str, Block, Block]] = [
    ("used target_bits at once", weights({"quantize_weight_in_forward": True}, {"start_bits": 12, "target_bits": 4}),
     weights(None, {"start_bits": 12, "target_bits": 4})),
    ("used target_bits at once", weights({"quantize_weight_in_forward": True}, {"start_bits": 12, "target_bits": 4}),
     weights({"quantize_weight_in_forward": True})),
    ("not quantized while their bits are above 8", weights(None, {"start_bits": 12}), weights()),
    ("needed an fp16 optimizer", weights(), weights({"quantize_weight_in_forward": True})),
    ("where the old code rounded to nearest",
     weights({"quantize_weight_in_forward": True, "rounding": "stochastic"}),
     weights({"quantize_weight_in_forward": True})),
    ("where the old code rounded to nearest",
     weights({"quantize_weight_in_forward": True, "rounding": "stochastic"}), weights({"rounding": "stochastic"})),
    ("blended in forward too",
     weights({"quantize_weight_in_forward": True, "fp16_mixed_quantize": {"enabled": True}}),
     weights({"quantize_weight_in_forward": True, "fp16_mixed_quantize": {"enabled": False}})),
    ("insists on compiled kernels", weights({"quantizer_kernel": True}), weights({"quantizer_kernel": False})),
    ("values that clip get no gradient", weights({"quantize_weight_in_forward": True}), weights()),
    ('"narrow_range": true', weights(), weights({"quantization_type": "asymmetric"})),
    ("averaged once per optimizer step", inputs(range_calibration="static"), inputs(range_calibration="dynamic")),
    ("0 written: documented so", without(inputs(), "activation_quantization", "shared_parameters", "schedule_offset"),
     inputs()),
    ("0 written: documented so", without(sparse(), "sparse_pruning", "shared_parameters", "schedule_offset"), sparse()),
    ("scores are no parameters of the model", sparse(method="topk"), sparse()),
    ("masked once, after the optimizer", sparse(), sparse(method="topk")),
    ("read for topk as well", sparse(method="topk", schedule_offset_stride=3), sparse(method="topk")),
    ("removed: without an end", sparse(schedule_offset_stride=3),
     sparse(schedule_offset_stride=3, schedule_offset_end=9)),
    ("1 written: ceil", units("row_pruning"), units("head_pruning")),
    ("raised NotImplementedError", units("head_pruning", method="l1"), units("head_pruning")),
    ("raised NotImplementedError", units("head_pruning", method="l1"), units("row_pruning", method="l1")),
    ("cut with its own mask", units("row_pruning", two=True), units("row_pruning")),
    ("found from the model", units("row_pruning", related=False), units("row_pruning")),
    ("pruned first and quantized then", {**weights(), **sparse()}, weights()),
    ("pruned first and quantized then", {**weights(), **sparse()}, {**weights(), **inputs()}),
    ("absent means every Linear", without(sparse(), "sparse_pruning", "different_groups", "a", "modules"), sparse()),
    ("null removed", {"sparse_pruning": {**sparse()["sparse_pruning"], "different_groups": {
        "a": {"params": {"dense_ratio": 0.5}, "modules": ["x"], "related_modules": None}}}}, sparse()),
    ("no version ever read it", {"sparse_pruning": {**sparse()["sparse_pruning"], "different_groups": {
        "a": {"params": {"dense_ratio": 0.5}, "modules": ["x"], "something_else": 3}}}}, sparse()),
]  # fmt: skip


@pytest.mark.parametrize(("text", "needs_it", "does_not"), CASES)
def test_a_note_comes_when_it_applies_and_only_then(text: str, needs_it: Block, does_not: Block) -> None:
    def notes(block: Block) -> list[str]:
        result = migrate({"compression_training": copy.deepcopy(block)})
        parse_config(result.config["compression_training"])
        return [note.text for note in result.notes if text in note.text]

    assert len(notes(needs_it)) == 1
    assert notes(does_not) == []


def test_a_disabled_block_has_no_notes_of_what_it_would_do() -> None:
    for block in (weights(), inputs(), sparse(), units("row_pruning")):
        (key,) = block
        off = copy.deepcopy(block)
        off[key]["shared_parameters"]["enabled"] = False
        assert not [note for note in migrate({"compression_training": off}).notes if note.kind != "changed"]
