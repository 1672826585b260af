from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import record


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class TestAppend:
    def test_one_line_per_figure_with_its_conditions(self, tmp_path: Path) -> None:
        path = record.append("thing", "--quick", {"plain": {"ratio": 1.0}, "l1": {"ratio": 1.25}}, tmp_path)
        first, second = rows(path)
        assert path == tmp_path / "thing.csv"
        assert (second["variant"], second["figure"], second["value"]) == ("l1", "ratio", "1.25")
        assert first["arguments"] == "--quick" and "torch 2." in first["versions"]
        assert all(first[column] for column in record.COLUMNS)

    def test_names_the_instruction_set_of_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DS_COMPRESS_CPU_ISA", "scalar")
        assert ", scalar" in record.conditions()["cpu"]
        monkeypatch.delenv("DS_COMPRESS_CPU_ISA")
        assert f", {record.instruction_set()}" in record.conditions()["cpu"]

    def test_appends_below_one_header(self, tmp_path: Path) -> None:
        for value in (1.0, 2.0):
            path = record.append("thing", "", {"a": {"x": value}}, tmp_path)
        assert [row["value"] for row in rows(path)] == ["1", "2"]
        assert path.read_text().count("variant") == 1

    def test_json_is_one_line_with_every_figure(self) -> None:
        line = record.json_line("thing", {"a": {"x": 1.5, "y": 2.0}})
        assert "\n" not in line
        assert json.loads(line)["figures"] == {"a": {"x": 1.5, "y": 2.0}}


class TestCommit:
    @pytest.fixture
    def repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def git(*arguments: str) -> None:
            identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
            subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

        git("init")
        (tmp_path / "file").write_text("1")
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "thing.csv").write_text("1")
        git("add", ".")
        git("commit", "-m", "first")
        monkeypatch.setattr(record, "HERE", tmp_path)
        return tmp_path

    def test_names_the_commit(self, repository: Path) -> None:
        assert len(record.conditions()["commit"]) == 12

    def test_says_when_the_tree_has_changes(self, repository: Path) -> None:
        (repository / "file").write_text("2")
        assert record.conditions()["commit"].endswith("+")

    def test_results_are_not_changes(self, repository: Path) -> None:
        (repository / "results" / "thing.csv").write_text("1\n2")
        assert not record.conditions()["commit"].endswith("+")

    def test_outside_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.setattr(record, "HERE", tmp_path)
        assert record.conditions()["commit"] == "unknown"
