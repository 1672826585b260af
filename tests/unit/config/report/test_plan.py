"""What a plan prints, and the arithmetic of what it predicts."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ds_compress import plan
from ds_compress.config import ConfigError, parse_config
from ds_compress.config.report.plan import Plan
from ds_compress.config.report.size_estimate import Stored, stored, total, training_state
from ds_compress.config.report.table import LineItem, collapse, lines_of, size_in_words
from ds_compress.config.schema.source import block_of


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=40,
            max_position_embeddings=8,
        )
    )


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def pruning(modules: list[str], ratio: float = 0.5, **shared: Any) -> dict[str, Any]:
    group = {"params": {"dense_ratio": ratio}, "modules": modules}
    return {
        "sparse_pruning": {"shared_parameters": {"enabled": True, **shared}, "different_groups": {"g": group}}
    }


def bits(
    modules: list[str], start: int = 8, target: int = 8, period: int = 1, **shared: Any
) -> dict[str, Any]:
    params = {"start_bits": start, "target_bits": target, "quantization_period": period}
    group = {"params": params, "modules": modules}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"g": group},
        }
    }


def inputs(modules: list[str], **shared: Any) -> dict[str, Any]:
    group = {"params": {"bits": 8}, "modules": modules}
    return {
        "activation_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"g": group},
        }
    }


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found


def on_a_narrow_terminal(text: str) -> None:
    """No line is longer than 80 columns, but for a name, which is never cut."""
    for row in text.splitlines():
        assert len(row) <= 80 or " " not in row.strip(), row
    assert "\u2026" not in text


class TestNarrowTerminal:
    """80 columns: pipes, logs of CI."""

    def test_nothing_is_cut(self, bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        block = {**pruning(["encoder"]), **bits(["encoder"]), "row_pruning": {"dense_ratio": 0.5, "shared_parameters": {
            "excluded_modules": ["layer.0.intermediate"]}}}  # fmt: skip
        text = str(plan(bert, block))
        on_a_narrow_terminal(text)
        rows = text.splitlines()
        at = rows.index("bert.encoder.layer.{0-5}.attention.self.query")
        assert rows[at + 1].startswith("    shape 16 x 16; pruning 0.5 kept")
        at = next(
            at for at, row in enumerate(rows) if row.startswith("bert.encoder.layer.{1-5}.intermediate.dense")
        )
        assert "row_pruning" in rows[at] or rows[at + 1].startswith("    block row_pruning; kept ")

    def test_without_a_terminal_it_is_80(self, bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        on_a_narrow_terminal(str(plan(bert, {**pruning(["encoder"]), **bits(["encoder"])})))

    def test_rich_takes_the_width_of_its_console(self, bert: nn.Module) -> None:
        paper = io.StringIO()
        Console(file=paper, width=80).print(plan(bert, {**pruning(["encoder"]), **bits(["encoder"])}))
        on_a_narrow_terminal(paper.getvalue())
        assert "bert.encoder.layer.{0-5}.attention.self.query\n" in paper.getvalue()


class TestPrintedPlan:
    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "300")

    def test_layers_that_are_treated_alike_share_a_line(self, bert: nn.Module) -> None:
        text = str(plan(bert, pruning(["query"], schedule_offset=100, schedule_offset_end=900)))
        row = line(text, "bert.encoder.layer.{0-5}.attention.self.query")
        assert "16 x 16" in row
        assert "0.5 kept, steps 100-900" in row
        # Six weights of 1,024 bytes; half of 256 weights of each stay.
        assert "6.14 kB" in row and "768" in row

    def test_layers_that_are_not_treated_alike_do_not(self, bert: nn.Module) -> None:
        text = str(plan(bert, {**pruning(["query"]), **bits([r"[0245]\.attention.self.query"])}))
        assert line(text, "bert.encoder.layer.{0,2,4-5}.attention.self.query")
        assert line(text, "bert.encoder.layer.{1,3}.attention.self.query")

    def test_a_line_says_what_a_weight_gets_and_when(self, bert: nn.Module) -> None:
        block = {
            **pruning(["pooler"], ratio=0.25, method="topk", schedule_offset=10),
            **bits(["pooler", "word_emb"], 8, 4, period=10, granularity="per_channel", schedule_offset=5),
            **inputs(["pooler"], schedule_offset=7),
        }
        text = str(plan(bert, block))
        row = line(text, "bert.pooler.dense")
        assert "0.25 kept, from step 10" in row
        assert "8 -> 4 bits, per_channel, steps 5-85" in row
        assert "8 bits, from step 7" in row
        assert "0.25" not in line(text, "bert.embeddings.word_embeddings")
        assert line(text, "sparse_pruning: 1 weight: method topk, pattern unstructured")
        assert line(text, "weight_quantization: 2 weights: symmetric, nearest rounding, narrow grid")
        assert line(text, "activation_quantization: 1 input: symmetric")

    def test_it_is_plain_text(self, bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        text = str(plan(bert, pruning(["query"])))
        assert "\x1b" not in text
        assert line(text, "bert.encoder.layer.{0-5}.attention.self.query").count("16 x 16") == 1

    def test_rich_prints_it_in_colour(self, bert: nn.Module) -> None:
        paper = io.StringIO()
        console = Console(file=paper, force_terminal=True, width=200, color_system="standard")
        console.print(plan(bert, pruning(["query"])))
        assert "\x1b[" in paper.getvalue() and "{0-5}" in paper.getvalue()

    def test_names_are_not_read_as_markup(self) -> None:
        model = nn.ModuleDict({"[bold]": nn.Linear(4, 4)})
        assert line(str(plan(model, pruning(["bold"]))), "[bold]")

    def test_a_tied_weight_is_counted_once(self, gpt2: nn.Module) -> None:
        text = str(plan(gpt2, {**pruning(["wte"]), **inputs(["lm_head"])}))
        assert "tied to transformer.wte" in line(text, "lm_head")
        assert line(text, "claimed: 640 of ")

    def test_totals(self, bert: nn.Module) -> None:
        text = str(plan(bert, pruning(["query"], method="topk"), world_size=2))
        assert line(text, f"claimed: 1,536 of {sum(p.numel() for p in bert.parameters()):,} parameters")
        assert "masks 96 B, latent weights 3.07 kB, scores 9.22 kB" in line(
            text, "training state of pruning in each of 2 processes"
        )

    def test_layer_reduction_and_distillation_in_words(self, bert: nn.Module) -> None:
        block = {
            "layer_reduction": {
                "enabled": True,
                "teacher_layer": [1, 3, 5],
                "other_module_name": ["classifier"],
            },
            "distillation": {
                "enabled": True,
                "teacher": "some/teacher",
                "teacher_dtype": "bf16",
                "losses": {
                    "logits": {"temperature": 2},
                    "hidden": {"weight": 0.5, "kind": "cosine"},
                    "attention": {},
                },
            },
        }
        text = str(plan(bert, block))
        assert text.splitlines() == [
            "layer_reduction: keeps 3 layers, from teacher layers 1, 3, 5; copies classifier",
            "distillation: teacher some/teacher in bf16 at ZeRO stage 3; loss = task x 1 + "
            "logits x 1 (forward_kl) + hidden x 0.5 (cosine) + attention x 1 (relation)",
        ]
        by_number = {"layer_reduction": {"enabled": True, "keep_number_layer": 1}}
        assert "keeps 1 layer, spread evenly" in str(plan(bert, by_number))

    def test_nothing_enabled(self, bert: nn.Module) -> None:
        assert str(plan(bert, {})) == "compression_training: nothing is enabled"

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1 kB"),
            (1_180_000, "1.18 MB"),
            (10**9, "1 GB"),
            (5 * 10**12, "5 TB"),
        ],
    )
    def test_sizes(self, size: int, text: str) -> None:
        assert size_in_words(size) == text

    def test_numbers_are_joined_only_where_they_form_a_grid(self) -> None:
        same = LineItem((2, 2), ("x", "-", "-"), "")
        grid = {f"stage.{i}.block.{j}": same for i in (0, 1) for j in (0, 1, 2)}
        assert collapse(grid) == [("stage.{0-1}.block.{0-2}", list(grid))]
        del grid["stage.1.block.2"]
        assert [name for name, _ in collapse(grid)] == list(grid)
        # A number inside a word is part of the name.
        words = {"conv1": same, "conv2": same}
        assert [name for name, _ in collapse(words)] == ["conv1", "conv2"]

    def test_lines_add_up_to_the_claimed_weights(self, bert: nn.Module) -> None:
        resolved = plan(bert, {**pruning(["attention"]), **bits(["dense"])})
        claimed = {t.param_name for technique in resolved.techniques.values() for t in technique.targets}
        parts = stored(resolved)
        assert total(row.stored for row in lines_of(resolved)) == total(parts[name] for name in claimed)


class TestForecast:
    def forecast(self, model: nn.Module, block: dict[str, Any], name: str = "0.weight") -> Stored:
        return stored(plan(model, block))[name]

    def test_untouched(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4)).to(torch.bfloat16)
        assert self.forecast(model, {}) == Stored(before=48, after=48, bitmask=48, nonzeros=24)

    def test_pruned(self) -> None:
        # ceil(0.3 * 24) weights stay; as bitmask: 24 bits and 8 fp32 values.
        block = pruning(["*"], ratio=0.3)
        assert self.forecast(nn.Sequential(nn.Linear(6, 4)), block) == Stored(96, 96, 3 + 32, 8)

    def test_the_ratio_is_the_decimal_of_the_json(self) -> None:
        assert math.ceil(0.07 * 100) == 8
        assert self.forecast(nn.Sequential(nn.Linear(10, 10)), pruning(["*"], ratio=0.07)).nonzeros == 7

    @pytest.mark.parametrize(
        ("shared", "scales"),
        [
            ({}, 4),
            ({"quantize_groups": 4}, 4),
            ({"granularity": "per_group", "quantize_groups": 8}, 8),
            ({"granularity": "per_tensor"}, 4),
            ({"granularity": "per_channel"}, 4),
            ({"granularity": "per_column_group", "group_size": 4}, 4 * 2),
            ({"quantization_type": "asymmetric", "granularity": "per_channel"}, 2 * 4 - 4),
        ],
    )
    def test_quantized(self, shared: dict[str, Any], scales: int) -> None:
        block = bits(["*"], target=3, **shared)
        assert self.forecast(nn.Sequential(nn.Linear(6, 4)), block).after == self.words(3) + 4 * scales

    def words(self, bits: int) -> int:
        """4 outputs of 6 codes, each of them in whole words, and the shape of the weight."""
        shape = 16
        return 4 * 4 * math.ceil(6 * bits / 32) + shape

    def test_channels_of_conv1d_are_its_columns(self, gpt2: nn.Module) -> None:
        block = bits(["c_attn"], granularity="per_channel")
        name = "transformer.h.0.attn.c_attn.weight"
        assert self.forecast(gpt2, block, name).after == 16 * 48 + 4 * 48

    def test_a_legacy_embedding_has_a_scale_per_row(self) -> None:
        model = nn.ModuleDict({"0": nn.Embedding(10, 4)})
        assert (
            self.forecast(model, bits(["0"], quantize_groups=3) | {"export_to": "torch"}).after == 40 + 4 * 10
        )

    def test_pruned_and_quantized(self) -> None:
        block = {**pruning(["*"]), **bits(["*"], target=4)}
        assert self.forecast(nn.Sequential(nn.Linear(6, 4)), block) == Stored(
            96, 4 * 4 + 16 + 4 * 4, 3 + 6 + 4, 12
        )

    @pytest.mark.parametrize(
        ("method", "hidden", "scores"),
        [
            ("l1", 0, 0),
            ("random", 0, 0),
            ("topk", 4, 12),
            ("movement", 4, 4),
            ("taylor", 0, 4),
            ("snip_momentum", 0, 4),
        ],
    )
    def test_training_state(self, method: str, hidden: int, scores: int) -> None:
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
        state = training_state(plan(model, pruning(["*"], method=method), world_size=4))
        share = 2 * 64 * 32 // 4
        assert (state.mask, state.latent, state.scores) == (share // 8, share * hidden, share * scores)
        assert state.total == share // 8 + share * (hidden + scores)

    def test_regrowth_keeps_hidden_values(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        assert training_state(plan(model, pruning(["*"], regrowth=True))).latent == 4 * 64

    def test_without_pruning_there_is_no_state(self, bert: nn.Module) -> None:
        assert training_state(plan(bert, bits(["query"]))).total == 0


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
