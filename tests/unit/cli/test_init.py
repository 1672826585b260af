"""`ds_compress init`: by flags and by questions; what it writes trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import ds_compress
from ds_compress.cli import app, questions
from ds_compress.config.recipes import newest
from ds_compress.config.schema.source import block_of
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, engine_of, train
from tests.single import init_single_process


def invoke(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], input=input)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "ds_config.json"


def refused(result: Result, out: Path) -> str:
    assert result.exit_code == 2 and not out.exists(), result.output
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_what_it_writes_trains_for_five_steps(out: Path, tmp_path: Path) -> None:
    init_single_process()
    tiny_bert(hidden=64).save_pretrained(tmp_path / "model")
    result = invoke(
        "--recipe", "sparse", "--model", tmp_path / "model", "--steps", 5, "--out", out,
        "--set", "sparse_pruning.shared_parameters.dense_ratio=0.25",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"ds_compress plan {tmp_path / 'model'} {out}" in result.stdout
    config = json.loads(out.read_text())
    with engine_of(tiny_bert(hidden=64), config) as engine:
        losses = train(engine, batches(5))
        sparsity = engine.compression.metrics()["sparse_pruning/sparsity"]
    assert all(map(math.isfinite, losses)) and sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("name", newest())
def test_every_recipe_can_be_written(name: str, out: Path) -> None:
    result = invoke(
        "--recipe", name, "--hardware", "gpu", "--zero-stage", "3", "--batch-size", 2, "--out", out
    )
    assert result.exit_code == 0, result.output
    config = json.loads(out.read_text())
    assert config["zero_optimization"]["stage"] == 3 and config["train_micro_batch_size_per_gpu"] == 2
    assert "torch_adam" not in config["optimizer"]["params"]
    written, named = (ds_compress.parse_config(block) for block in (block_of(out), {"recipe": name}))
    assert written.model_dump() == named.model_dump()


def test_list_has_a_line_for_each(out: Path) -> None:
    result = invoke("--list")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(newest())


def test_a_trainer_decides_for_itself(out: Path) -> None:
    result = invoke("--recipe", "w8a8", "--trainer", "--out", out)
    assert json.loads(out.read_text())["train_micro_batch_size_per_gpu"] == "auto"
    assert "TrainingArguments" in result.stdout


def test_nothing_is_overwritten_unasked(out: Path) -> None:
    out.write_text("mine")
    result = invoke("--recipe", "w8a8", "--out", out)
    assert result.exit_code == 2 and "--overwrite" in result.stderr and out.read_text() == "mine"
    assert invoke("--recipe", "w8a8", "--out", out, "--overwrite").exit_code == 0
    assert "W8A8" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "w4a61"), 'did you mean "w4a16"?'),
        (("--recipe", "w4a16@9"), '"w4a16@1"'),
        (("--recipe", "experts", "--model", "encoder"), "the kind mixture"),
        (("--recipe", "w8a8", "--model", "nowhere"), "no folder with a config.json"),
        (("--recipe", "bad_workers", "--processes", "2"), "needs 3 processes"),
        (("--recipe", "ternary", "--steps", "5"), "within the 5 optimizer steps"),
        (("--recipe", "w8a8", "--set", "zzz=W4A16"), "unknown key"),
        (("--recipe", "w8a8", "--set", "seed"), "say KEY=VALUE"),
        (("--recipe", "w8a8", "--set", "seed=1", "--set", "seed=2"), "say KEY=VALUE once"),
        (("--recipe", "w8a8", "--set", "seed=1", "--set", "seed.a=2"), "say KEY=VALUE once"),
        (("--recipe", "w8a8", "--out", "nowhere/config.json"), "nowhere is no folder"),
        ((), "say --recipe NAME"),
    ],
)
def test_what_is_unknown_or_does_not_fit_is_one_line(
    arguments: tuple[str, ...], words: str, out: Path
) -> None:
    given = arguments if "--out" in arguments else (*arguments, "--out", str(out))
    assert words in refused(invoke(*given), out)


def test_a_model_that_the_recipe_cannot_change(out: Path, tmp_path: Path) -> None:
    tiny_bert(hidden=72).save_pretrained(tmp_path / "model")
    said = refused(invoke("--recipe", "mxfp4", "--model", tmp_path / "model", "--out", out), out)
    assert "a multiple of 32" in said


class TestQuestions:
    @pytest.fixture(autouse=True)
    def at_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The runner's own input is no terminal.
        monkeypatch.setattr("ds_compress.cli.init._is_at_a_terminal", lambda: True)

    def test_they_lead_to_a_config(self, out: Path, tmp_path: Path) -> None:
        tiny_llama(hidden=64).save_pretrained(tmp_path / "model")
        answers = [str(tmp_path / "model"), "llm", "cpu", "2", "3", "8", "500"]
        result = invoke("--out", out, input="\n".join(answers) + "\n")
        assert result.exit_code == 0, result.output
        assert "experts " not in result.stdout, "a model without experts is not asked about them"
        config: dict[str, Any] = json.loads(out.read_text())
        assert config["zero_optimization"]["stage"] == 3 and config["train_micro_batch_size_per_gpu"] == 8
        assert config["compression_training"]["kv_cache"]["schedule_offset"] == 25

    def test_a_number_will_do(self, out: Path) -> None:
        result = invoke("--out", out, input="mixture\n1\n\n\n\n\n\n")
        assert result.exit_code == 0, result.output
        assert f"{out}: bad_workers@1" in result.stdout

    @pytest.mark.parametrize(
        ("answers", "words"),
        [
            ("nowhere\n", "no folder"),
            ("encoder\n99\n", "none of the above"),
            ("encoder\nexperts\n", "none of the above"),
            ("encoder\nw8a8\ntpu\n", "none of gpu, cpu"),
            ("encoder\nw8a8\ncpu\n2\n4\n", "not 1 to 3"),
            ("encoder\nw8a8\ncpu\n2\n2\n0\n", "not a number >= 1"),
        ],
    )
    def test_an_answer_that_is_none(self, answers: str, words: str, out: Path) -> None:
        result = invoke("--out", out, input=answers)
        assert result.exit_code == 2 and words in result.stderr and not out.exists()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "encoder"),
        ({"architectures": ["LlamaForCausalLM"], "num_experts": 0}, "decoder"),
        ({"architectures": ["GPT2LMHeadModel"]}, "decoder"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "mixture"),
        ({"architectures": None, "text_config": {"n_routed_experts": 4}}, "mixture"),
    ],
)
def test_kinds(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert questions.kind_of(str(tmp_path)) == kind
