"""The parts of the demo that can be had without training: launching, checking by stock transformers, stretching."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.hard_compression import with_steps
from ds_compress.examples import launch, stock_check
from ds_compress.examples.launch import StepFailed

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved classifier, twenty sentences, and its own logits, the first one moved by 0.25."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(**size, num_labels=2)).eval()
    with torch.no_grad():
        model.classifier.weight[0].zero_()
    model.save_pretrained(folder)
    tokens = [[5 + row] * (1 + row % 4) for row in range(20)]
    sentences: dict[str, Any] = {"tokens": tokens, "labels": [0] * 20, "pad_id": 0}
    sentences["batches"] = [list(range(0, 20, 2)), list(range(1, 20, 2))]
    logits = stock_check.predict(model, sentences, "test").clone()
    sentences["labels"] = [*logits.argmax(-1).tolist()[:15], *(1 - logits.argmax(-1)).tolist()[15:]]
    logits[0, 0] += 0.25
    save_file({"logits": logits}, folder / "logits.safetensors")
    (folder / "sentences.json").write_text(json.dumps(sentences))
    return folder


class TestStockCheck:
    def run(self, folder: Path) -> subprocess.CompletedProcess[str]:
        script = REPOSITORY / "ds_compress" / "examples" / "stock_check.py"
        command = [sys.executable, str(script), str(folder / "sentences.json"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder)

    def test_figures(self, folder: Path) -> None:
        done = self.run(folder)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)[str(folder)]
        model = BertForSequenceClassification.from_pretrained(folder)
        assert figures["accuracy"] == 0.75
        assert figures["difference_of_logits"] == pytest.approx(0.25)
        assert figures["parameters"] == sum(p.numel() for p in model.parameters())
        assert figures["non_zeros"] == sum(int((p != 0).sum()) for p in model.parameters())
        assert figures["bytes"] == (folder / "model.safetensors").stat().st_size
        assert figures["latency_ms"] > 0

    def test_refuses_to_run_beside_ds_compress(self, folder: Path) -> None:
        script = REPOSITORY / "ds_compress" / "examples" / "stock_check.py"
        program = f"import ds_compress, runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        command = [sys.executable, "-c", program, str(folder / "sentences.json"), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode != 0 and "ds_compress" in done.stderr.splitlines()[-1]


class TestLaunch:
    CONFIG: dict[str, Any] = {"scheduler": {"params": {"total_num_steps": 7}}}  # noqa: RUF012

    def started(self, monkeypatch: pytest.MonkeyPatch, code: int, processes: int = 2) -> list[list[str]]:
        """Replaces the launcher by a function that writes metrics and ends with `code`."""
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps({"processes": processes}))
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    def test_says_how_many_processes_and_steps(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commands = self.started(monkeypatch, code=0)
        launch.train(self.CONFIG, tmp_path, tmp_path / "model", seed=3)
        (command,) = commands
        assert command[command.index("--num_gpus") + 1] == "2"
        assert command[command.index("--steps") + 1] == "7"
        assert json.loads((tmp_path / "model.json").read_text()) == self.CONFIG

    def test_failure_names_the_log(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started(monkeypatch, code=1)
        with pytest.raises(StepFailed, match=r"code 1: see .*model\.log"):
            launch.train(self.CONFIG, tmp_path, tmp_path / "model", seed=0)

    def test_one_process_instead_of_two_is_a_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.started(monkeypatch, code=0, processes=1)
        with pytest.raises(StepFailed, match="started 1 processes, not 2"):
            launch.train(self.CONFIG, tmp_path, tmp_path / "model", seed=0)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StepFailed, match="cannot be read: No such file"):
            launch.load_json(tmp_path / "absent.json")


class TestConfigs:
    @pytest.mark.parametrize(
        "path", sorted((REPOSITORY / "ds_configs").rglob("*.json")), ids=lambda p: p.name
    )
    def test_shipped_configs_are_valid(self, path: Path) -> None:
        from ds_compress import parse_config

        content = json.loads(path.read_text())
        parse_config(content.get("compression_training", {}))
        if "scheduler" in content:
            scheduler, optimizer = content["scheduler"]["params"], content["optimizer"]["params"]
            assert scheduler["warmup_max_lr"] == optimizer["lr"]

    def test_other_numbers_of_steps_stretch_the_pruning_schedule(self) -> None:
        config = launch.load_json(REPOSITORY / "ds_configs" / "hard_zero2.json")
        before = config["compression_training"]["sparse_pruning"]["shared_parameters"]
        changed = with_steps(config, config["scheduler"]["params"]["total_num_steps"] // 2)
        after = changed["compression_training"]["sparse_pruning"]["shared_parameters"]
        assert after["schedule_offset_end"] == before["schedule_offset_end"] // 2
        assert after["schedule_offset"] == before["schedule_offset"] // 2
        assert with_steps(config, 0) is config


class TestVersion:
    def test_stands_in_one_place(self) -> None:
        import tomllib

        from ds_compress import __version__

        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
        assert "version" in project["project"]["dynamic"]
        assert (
            project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "ds_compress.version.__version__"
        )
        assert f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
