"""`ds_compress bench`: the list, what is passed to a benchmark, what of its output is the result, and failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ds_compress
from ds_compress.cli import app, bench
from ds_compress.cli.results import RESULTS

_FAKE = '''"""What this one measures."""
import json, os, sys
print("a table")
print(json.dumps({"benchmark": "mask_apply", "cpu": "x", "figures": {"words": sys.argv[1:]}}))
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
'''


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose benchmarks print what they were called with."""
    for name in ("ds_compress", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "benchmarks" / "record.py").touch()
    for name in bench.KernelName:
        (tmp_path / "benchmarks" / f"{name}.py").write_text(_FAKE)
    monkeypatch.setattr(ds_compress, "__file__", str(tmp_path / "ds_compress" / "__init__.py"))
    return tmp_path


def test_the_list() -> None:
    done = invoke()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [name.value for name in bench.KernelName]
    assert all(len(line.split()) > 5 for line in lines)
    found = json.loads(invoke("--json").stdout)
    assert set(found) == {"ok", *RESULTS["bench"]} and set(found["measures"]) == set(bench.KernelName)


def test_the_benchmark_gets_its_words_and_its_last_line_is_the_result(fake: Path) -> None:
    given = ("--quick", "--threads", "1,2", "--rounds", "3", "--device", "cpu")
    done = invoke("mask_apply", *given, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"ok", *RESULTS["bench"]} and found["benchmark"] == "mask_apply"
    assert found["conditions"] == {"cpu": "x"}
    assert sorted(found["figures"]["words"]) == sorted([*given, "--json"])


def test_without_json_it_prints_what_the_benchmark_prints(
    fake: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke("mask_apply", "--quick").exit_code == 0
    assert capfd.readouterr().out.startswith("a table\n")


def test_an_installed_package_goes_first(fake: Path) -> None:
    inside = fake / "ds_compress" / "benchmarks"
    inside.mkdir()
    (inside / "record.py").touch()
    assert bench._place() == ("ds_compress.benchmarks", inside, fake)


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_benchmark_that_fails(fake: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setenv("FAKE_STATUS", "3")
    done = invoke("mask_apply", *words)
    assert done.exit_code == 2 and "exit status 3" in done.stderr and not done.stdout


def test_an_install_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_compress, "__file__", str(tmp_path / "ds_compress" / "__init__.py"))
    done = invoke()
    assert done.exit_code == 2 and "no microbenchmarks" in done.stderr


@pytest.mark.parametrize("name", ["int8_linear", "mask_apply"])  # the others have the options of the latter
def test_the_real_ones_know_the_options(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    root = Path(__file__).resolve().parents[3]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert all(f"{word} " in shown or f"{word}]" in shown for word in
               ("--quick", "--json", "--threads", "--rounds", "--device"))  # fmt: skip
