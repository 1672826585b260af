"""The page and its JSON, and processes whose packages are broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ds_compress.cli import app

SECTIONS = ("versions", "machine", "kernels", "locks", "deepspeed_internals")


def doctor(*options: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *options])


@pytest.fixture(autouse=True)
def no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("DS_COMPRESS_KERNELS", raising=False)


def test_the_page_and_its_json_tell_the_same(tmp_path: Path) -> None:
    page, as_json = doctor(), doctor("--json")
    data = json.loads(as_json.stdout)
    assert page.exit_code == as_json.exit_code == 0, page.stdout
    assert list(data) == ["ok", "findings", *SECTIONS] and data["ok"] is True and data["findings"] == []
    assert page.stdout.endswith("verdict: all well\n")
    for section in SECTIONS:
        assert section.replace("_", " ") in page.stdout.splitlines()
        assert all(name in page.stdout for name in data[section])
    assert data["deepspeed_internals"]["internals"]["problems"] == []
    assert list(tmp_path.iterdir()) == [], "doctor has written something"


def test_a_stale_lock_is_status_1_and_names_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".cache" / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    page = doctor()
    assert page.exit_code == 1 and lock.exists()
    assert "remedy: rm ~/.cache/torch_extensions/py311_cpu/fused_adam/lock" in page.stdout
    assert str(tmp_path) not in page.stdout


@pytest.mark.parametrize("package", ["torch", "deepspeed"])
def test_a_broken_package_is_a_line(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libbroken.so: cannot open')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "ds_compress", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    data = json.loads(done.stdout)
    assert done.returncode == 1 and list(data) == ["ok", "findings", *SECTIONS]
    assert "libbroken.so" in data["versions"][package]["import_error"]
    (found,) = (finding for finding in data["findings"] if finding["what"].startswith(f"{package} "))
    assert "pip install" in found["remedy"]
    if package == "torch":
        assert data["kernels"] == {"unknown": "torch cannot be imported"} and len(data["findings"]) == 1


def test_help_and_schema_import_no_torch() -> None:
    for arguments in (["--help"], ["doctor", "--help"]):
        command = [sys.executable, "-X", "importtime", "-m", "ds_compress", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "rich.console" in imported
        assert not imported & {"torch", "deepspeed", "transformers"}
