"""The table of a plan: what it says of blocks, weights and sizes, on terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from torch import nn

from ds_compress import plan
from ds_compress.config.report.size_estimate import stored, total
from ds_compress.config.report.table import LineItem, collapse, lines_of, size_in_words
from tests.unit.config.report.test_plan import bits, inputs, line, pruning


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
