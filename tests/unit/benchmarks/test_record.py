from __future__ import annotations

import argparse
import csv
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import record


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=record.HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.mark.skipif(
    git("rev-parse", "--is-shallow-repository") != "false", reason="needs the whole history of the repository"
)
def test_every_figure_names_a_commit_that_can_be_checked_out() -> None:
    history = git("rev-list", "HEAD").split()
    named = {row["commit"] for path in record.RESULTS.glob("**/*.csv") for row in rows(path)}
    for path in record.RESULTS.glob("**/*.json"):
        content = json.loads(path.read_text())
        named |= {str(content["commit"])} if isinstance(content, dict) and "commit" in content else set()
    known = {commit[:length] for commit in history for length in {len(n.removesuffix("+")) for n in named}}
    missing = {commit.removesuffix("+") for commit in named} - known
    assert missing == record.GONE & missing, "measured on a commit that is not in the history"
    assert missing == record.GONE, "measured again: take it out of GONE"


class TestWrite:
    def test_one_line_per_figure_with_its_conditions(self, tmp_path: Path) -> None:
        path = record.write("thing", "--quick", {"plain": {"ratio": 1.0}, "l1": {"ratio": 1.25}}, tmp_path)
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

    def test_a_figure_that_is_measured_again_takes_its_old_place(self, tmp_path: Path) -> None:
        record.write("thing", "--rounds 3", {"a": {"x": 1.0}, "b": {"x": 2.0}}, tmp_path)
        path = record.write("thing", "--json --rounds 9", {"a": {"x": 3.0}}, tmp_path)
        assert [(row["variant"], row["value"]) for row in rows(path)] == [("a", "3"), ("b", "2")]
        assert path.read_text().count("variant") == 1

    @pytest.mark.parametrize("changed", [{"cpu": "other"}, {"cores": "64"}, {"arguments": "--steps 9"}])
    def test_another_machine_or_setting_is_another_figure(
        self, changed: dict[str, str], tmp_path: Path
    ) -> None:
        (row,) = rows(record.write("thing", "--steps 8", {"a": {"x": 1.0}}, tmp_path))
        assert record.thinned([row, row]) == [row]
        assert record.thinned([row, row | changed]) == [row, row | changed]

    def test_another_commit_is_not(self, tmp_path: Path) -> None:
        (row,) = rows(record.write("thing", "", {"a": {"x": 1.0}}, tmp_path))
        later = row | {"commit": "later", "time": "2100", "value": "2"}
        assert record.thinned([row, later]) == [later]

    def test_the_committed_files_repeat_nothing(self) -> None:
        for path in record.RESULTS.glob("*.csv"):
            assert len(record.thinned(rows(path))) == len(rows(path)), path.name

    def test_no_row_names_a_folder_of_a_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = [
            "x",
            "--llama-cpp",
            "/a/python",
            "--teacher",
            "/b",
            "--record",
            str(tmp_path),
            "--rounds",
            "3",
        ]
        monkeypatch.setattr("sys.argv", given)
        args = argparse.Namespace(record=tmp_path, json=False)
        record.report("thing", {"a": {"x": 1.0}}, args)
        assert rows(tmp_path / "thing.csv")[0]["arguments"] == "--llama-cpp PYTHON --rounds 3"
        for path in record.RESULTS.glob("*.csv"):
            assert not any(" /" in f" {row['arguments']}" for row in rows(path)), path.name

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
