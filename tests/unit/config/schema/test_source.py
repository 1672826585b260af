"""Where a block comes from: itself, a DeepSpeed config, a file; and what is said of a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ds_compress import plan
from ds_compress.config import ConfigError, parse_config
from ds_compress.config.report.plan import Plan
from ds_compress.config.schema.source import block_of
from tests.unit.config.report.test_plan import pruning


class TestSource:
    def test_the_block_the_whole_config_and_a_file_mean_the_same(
        self, bert: nn.Module, tmp_path: Path
    ) -> None:
        block = pruning(["query"])
        whole = {"train_batch_size": 8, "compression_training": block}
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(whole))
        forms: list[Any] = [block, parse_config(block), whole, path, str(path)]
        texts = {str(plan(bert, form)) for form in forms}
        assert len(texts) == 1
        path.write_text(json.dumps(block))
        assert str(plan(bert, path)) in texts

    def test_the_plan_carries_its_config(self, bert: nn.Module) -> None:
        block = pruning(["query"])
        resolved = plan(bert, block, world_size=3)
        assert isinstance(resolved, Plan)
        assert (resolved.config, resolved.world_size) == (parse_config(block), 3)

    def test_no_processes(self, bert: nn.Module) -> None:
        with pytest.raises(ValueError, match="world_size is 0"):
            plan(bert, {}, world_size=0)

    @pytest.mark.parametrize(
        ("text", "place", "hint"),
        [
            ('{"a": 1,\n  "b": }', "line 2, column 8", "Expecting value"),
            ("", "line 1, column 1", "Expecting value"),
            ("[1, 2", "line 1", "delimiter"),
        ],
    )
    def test_broken_json(self, text: str, place: str, hint: str, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            block_of(path)
        (problem,) = caught.value.problems
        assert problem.path.startswith(str(path)) and place in problem.path
        assert hint in problem.hint

    def test_comments_are_fine_as_they_are_for_deepspeed(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text('{\n  // half\n  "compression_training": {"seed": 3},\n}')
        assert block_of(path) == {"seed": 3}

    def test_a_key_given_twice(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text('{"compression_training": {}, "compression_training": {}}')
        with pytest.raises(ConfigError, match="twice"):
            block_of(path)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            block_of(tmp_path / "absent.json")
        (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
        with pytest.raises(ConfigError, match="utf-8"):
            block_of(tmp_path / "latin.json")

    def test_endless_nesting(self, tmp_path: Path) -> None:
        path = tmp_path / "deep.json"
        path.write_text("[" * 200_000)
        with pytest.raises(ConfigError):
            block_of(path)

    def test_a_deepspeed_config_without_the_block(self) -> None:
        with pytest.raises(ConfigError) as caught:
            block_of({"train_batch_size": 8, "compresion_training": {}})
        (problem,) = caught.value.problems
        assert problem.path == "compresion_training"
        assert '"compression_training"' in problem.hint

    def test_a_deepspeed_config_without_any_block_is_one_problem(self) -> None:
        with pytest.raises(ConfigError) as caught:
            block_of(
                {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}
            )
        (problem,) = caught.value.problems
        assert 'the key "compression_training"' in problem.allowed

    @pytest.mark.parametrize("config", [3, None, [], "[1]"])
    def test_no_config_at_all(self, config: Any, tmp_path: Path) -> None:
        if isinstance(config, str):
            path = tmp_path / "list.json"
            path.write_text(config)
            config = path
        with pytest.raises(ConfigError, match="an object"):
            block_of(config)

    def test_a_misspelt_block_key_is_still_a_block(self) -> None:
        block = {"sparse_prunning": {}}
        assert block_of(block) is block
