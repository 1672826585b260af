"""The command in processes of its own: whole, and with broken packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SECTIONS = ("versions", "machine", "kernels", "locks", "deepspeed_internals")


def doctor(*options: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {k: v for k, v in os.environ.items() if k != "DS_COMPRESS_KERNELS"} | environment
    if path is not None:
        settings["PYTHONPATH"] = os.pathsep.join(
            [str(path), *settings.get("PYTHONPATH", "").split(os.pathsep)]
        )
    command = [sys.executable, "-m", "ds_compress", "doctor", *options]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


def result(*options: str, **settings: Any) -> tuple[int, dict[str, Any]]:
    done = doctor("--json", *options, **settings)
    return done.returncode, json.loads(done.stdout)


def test_the_page_and_its_json_tell_the_same(tmp_path: Path) -> None:
    done = doctor(TORCH_EXTENSIONS_DIR=str(tmp_path), DS_COMPRESS_CACHE=str(tmp_path / "cache"))
    code, data = result(TORCH_EXTENSIONS_DIR=str(tmp_path), DS_COMPRESS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == code == 0, done.stdout
    assert list(data) == ["ok", "findings", *SECTIONS] and data["ok"] is True and data["findings"] == []
    assert done.stdout.endswith("verdict: all well\n")
    for section in SECTIONS:
        assert section.replace("_", " ") in done.stdout.splitlines()
        assert all(name in done.stdout for name in data[section])
    assert data["deepspeed_internals"]["internals"]["problems"] == []
    assert list(tmp_path.iterdir()) == [], "doctor has written something"


def test_a_stale_lock_is_status_1_and_names_no_home(tmp_path: Path) -> None:
    lock = tmp_path / ".cache" / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "TORCH_EXTENSIONS_DIR": ""}
    done = doctor(**environment)
    assert done.returncode == 1 and lock.exists()
    assert "remedy: rm ~/.cache/torch_extensions/py311_cpu/fused_adam/lock" in done.stdout
    assert str(tmp_path) not in done.stdout


@pytest.mark.parametrize("package", ["torch", "deepspeed", "transformers"])
def test_a_broken_package_is_a_line(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libbroken.so: cannot open')")
    code, data = result(path=tmp_path)
    assert code == 1 and list(data) == ["ok", "findings", *SECTIONS]
    assert "libbroken.so" in data["versions"][package]["import_error"]
    found = [f for f in data["findings"] if f["what"].startswith(f"{package} ")]
    assert len(found) == 1 and "pip install" in found[0]["remedy"]
    if package == "torch":
        assert data["kernels"] == {"unknown": "torch cannot be imported"} and len(data["findings"]) == 1


def test_help_imports_no_torch() -> None:
    for arguments in (["--help"], ["doctor", "--help"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "ds_compress", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
        assert "typer" in imported and not imported & {"torch", "deepspeed", "transformers", "pydantic"}
