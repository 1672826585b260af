"""`"recipe": name` beside other keys: what is merged, where it works, and whose value an error is about."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ds_compress
from ds_compress.config.recipes import newest
from ds_compress.config.recipes.expand import Applied
from ds_compress.config.recipes.merge import holds, leaves, merged
from ds_compress.config.schema.run_length import refuse_unfinished
from ds_compress.config.schema.source import block_of
from ds_compress.hf.trainer import _require_distillation
from tests.models import tiny_bert
from tests.multirank.common import ds_config, engine_of
from tests.single import init_single_process

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("ab.", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


def rfc_7396(target: Any, patch: Any) -> Any:
    """The pseudo-code of section 2."""
    if isinstance(patch, dict):
        if not isinstance(target, dict):
            target = {}
        for name, value in patch.items():
            if value is None:
                if name in target:
                    del target[name]
            else:
                target[name] = rfc_7396(target.get(name), value)
        return target
    return patch


@given(below=OBJECT, over=OBJECT)
def test_it_merges_as_the_rfc_says_and_changes_neither(below: Any, over: Any) -> None:
    copies = json.loads(json.dumps([below, over]))
    result = merged(below, over)
    assert [below, over] == copies
    assert result == rfc_7396(*copies)


@given(value=OBJECT.filter(bool))
def test_paths_of_leaves_are_held(value: Any) -> None:
    for path in leaves(value):
        assert holds(value, path)
        assert not holds(value, f"{path}.nowhere")


def test_places_in_lists() -> None:
    value = {"a.b": {"c": [1, {"d": 2}]}}
    assert holds(value, "a.b.c[1].d") and holds(value, "a.b.c[0]")
    assert not holds(value, "a.b.c[2]") and not holds(value, "a.c") and not holds(value, "a")


def problems_of(block: Any) -> list[Any]:
    with pytest.raises(ds_compress.ConfigError) as error:
        ds_compress.parse_config(block)
    return list(error.value.problems)


class TestMerging:
    def test_objects_merge_values_replace_null_removes(self) -> None:
        block = {
            "recipe": "sparse",
            "sparse_pruning": {
                "shared_parameters": {"dense_ratio": 0.1, "schedule_offset_stride": None},
                "different_groups": {"layers": {"modules": ["encoder"]}},
            },
            "seed": 3,
        }
        parsed = ds_compress.parse_config(block)
        pruning = parsed.sparse_pruning
        assert pruning is not None and parsed.seed == 3
        assert pruning.shared_parameters.dense_ratio == 0.1
        assert pruning.shared_parameters.schedule_offset_end == 600
        assert pruning.shared_parameters.schedule_offset_stride == 1
        assert pruning.different_groups["layers"].modules == ("encoder",)

    def test_a_block_can_be_removed(self) -> None:
        parsed = ds_compress.parse_config({"recipe": "nvfp4_qad", "distillation": None})
        assert list(parsed.enabled_blocks()) == ["weight_quantization", "activation_quantization"]

    def test_auto_leaves_the_value_of_the_recipe(self) -> None:
        block = {"recipe": "sparse", "sparse_pruning": {"shared_parameters": {"dense_ratio": "auto"}}}
        assert ds_compress.parse_config(block) == ds_compress.parse_config(
            {"recipe": "sparse", "sparse_pruning": {"shared_parameters": {}}}
        )

    def test_no_recipe_is_none(self) -> None:
        for block in ({"recipe": None}, {"recipe": "auto"}, {}):
            assert ds_compress.parse_config(block).applied_recipe is None

    def test_the_callers_block_stays_as_it_is(self) -> None:
        block = {"recipe": "sparse", "seed": None}
        ds_compress.parse_config(block)
        assert block == {"recipe": "sparse", "seed": None}

    @pytest.mark.parametrize("name", newest())
    def test_it_means_what_its_block_means(self, name: str) -> None:
        whole, named = (ds_compress.parse_config(b) for b in (ds_compress.recipe(name), {"recipe": name}))
        assert whole.model_dump() == named.model_dump()
        assert "recipe" not in named.model_dump(exclude_unset=True)


class TestErrors:
    def test_a_value_of_the_recipe(self) -> None:
        (problem,) = problems_of({"recipe": "depth_kd", "distillation": {"teacher": "path"}})
        assert problem.path == "compression_training.distillation.self_teacher"
        assert '"depth_kd@1"' in problem.hint and "null" in problem.hint

    def test_a_value_of_the_user(self) -> None:
        block = {"recipe": "sparse", "sparse_pruning": {"shared_parameters": {"schedule_offset_end": 20}}}
        (problem,) = problems_of(block)
        assert problem.path == "compression_training.sparse_pruning.shared_parameters.schedule_offset_end"
        assert problem.got == "20" and 'merged over the recipe "sparse@1"' in problem.hint

    def test_groups_beside_the_scheme_of_the_recipe(self) -> None:
        groups = {"different_groups": {"a": {"params": {"target_bits": 3}}}}
        (problem,) = problems_of({"recipe": "w4a16", "weight_quantization": groups})
        assert problem.path == "compression_training.weight_quantization.different_groups"
        assert 'which sets "scheme"' in problem.hint

    def test_a_misspelt_key_is_that_of_the_user(self) -> None:
        (problem,) = problems_of(
            {"recipe": "sparse", "sparse_pruning": {"shared_parameters": {"dense_ration": 1}}}
        )
        assert problem.hint == 'did you mean "dense_ratio"?'

    def test_the_model_does_not_suit_the_recipe(self) -> None:
        with pytest.raises(ds_compress.ConfigError) as error:
            ds_compress.plan(tiny_bert(), {"recipe": "llm"})
        assert all('"llm@1"' in problem.hint for problem in error.value.problems)
        with pytest.raises(ds_compress.ConfigError) as error:
            ds_compress.plan(tiny_bert(hidden=72), {"recipe": "w4a16"})
        assert all('"w4a16@1"' in problem.hint for problem in error.value.problems)

    def test_the_run_is_shorter_than_the_recipe(self) -> None:
        with pytest.raises(ds_compress.ConfigError) as error:
            refuse_unfinished(ds_compress.parse_config({"recipe": "sparse"}), 300, "max_steps")
        (problem,) = error.value.problems
        assert problem.path.endswith("schedule_offset_end") and '"sparse@1"' in problem.hint

    def test_no_word_about_it_without_a_recipe(self) -> None:
        (problem,) = problems_of({"seed": -1})
        assert "recipe" not in problem.hint


class TestPython:
    def test_the_block_is_a_dict_of_your_own(self) -> None:
        block = ds_compress.recipe("w4a16")
        assert block == {"scheme": "W4A16", "export_to": "compressed-tensors"}
        block["scheme"] = "W8A8"
        assert ds_compress.recipe("w4a16")["scheme"] == "W4A16"

    def test_overrides(self) -> None:
        block = ds_compress.recipe("nvfp4_qad@1", distillation={"teacher_dtype": "bf16"}, export_to=None)
        assert block["distillation"]["teacher_dtype"] == "bf16" and "export_to" not in block
        assert block["distillation"]["self_teacher"] == {"weights": "initial"}

    def test_what_is_wrong_is_said_at_once(self) -> None:
        with pytest.raises(ds_compress.ConfigError, match="unknown key"):
            ds_compress.recipe("w4a16", sparse_prunning={})
        with pytest.raises(ds_compress.ConfigError, match=r"compression_training\.recipe"):
            ds_compress.recipe("nothing")


class TestWays:
    def test_a_plan_says_the_recipe(self) -> None:
        block = {"recipe": "w8a8", "seed": 5}
        lines = str(ds_compress.plan(tiny_bert(), {"compression_training": block})).splitlines()
        assert lines[0] == "recipe: w8a8@1; seed of the JSON"

    def test_a_file_with_the_block_alone(self, tmp_path: Path) -> None:
        (tmp_path / "block.json").write_text('{"recipe": "w8a8"}')
        assert block_of(tmp_path / "block.json") == {"recipe": "w8a8"}

    def test_the_old_api(self) -> None:
        found = ds_compress.compat.config.get_compression_config(
            {"compression_training": {"recipe": "sparse"}}
        )
        assert found["sparse_pruning"]["shared_parameters"]["enabled"] is True

    def test_distillation_trainer(self) -> None:
        class Config:
            config = {"compression_training": {"recipe": "depth_kd"}}  # noqa: RUF012

        _require_distillation(Config())

    def test_an_engine_says_it_and_saves_the_block_written_out(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        init_single_process()
        block = {
            "recipe": "sparse",
            "sparse_pruning": {"shared_parameters": {"schedule_offset": 0, "schedule_offset_stride": None}},
        }
        with (
            caplog.at_level(logging.INFO, "ds_compress"),
            engine_of(tiny_bert(), ds_config(2, block)) as engine,
        ):
            engine.save_checkpoint(str(tmp_path), tag="t")
        assert any(
            "recipe: sparse@1; sparse_pruning.shared_parameters.schedule_offset, "
            "sparse_pruning.shared_parameters.schedule_offset_stride of the JSON" in line
            for line in caplog.messages
        )
        saved = json.loads((tmp_path / "t" / "ds_compress" / "model.json").read_text())
        assert saved["recipe"] == "sparse@1"
        assert (
            saved["compression_training"]
            == Applied(newest()["sparse"], {k: v for k, v in block.items() if k != "recipe"}).block
        )

    def test_a_preparation_error_says_the_recipe(self) -> None:
        init_single_process()
        with (
            pytest.raises(ds_compress.ConfigError) as error,
            engine_of(tiny_bert(), ds_config(2, {"recipe": "lora"})),
        ):
            pass
        assert all('"lora@1"' in problem.hint for problem in error.value.problems)


def test_the_order_of_random_numbers_is_not_touched() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    ds_compress.recipe("all_in_one")
    assert torch.equal(torch.rand(2), expected)
