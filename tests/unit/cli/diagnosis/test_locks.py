"""Locks of torch's builder: stale ones are findings, those of a build that runs are not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ds_compress.cli.diagnosis import locks
from ds_compress.cli.diagnosis.section import Section


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def look() -> Section:
    section = Section("locks")
    locks.look(section)
    return section


def test_none(folder: Path) -> None:
    (folder / "fused_adam").mkdir()
    (folder / "fused_adam" / "lock.cpp").touch()
    section = look()
    assert section.findings == [] and section.facts["locks"] == ("none", [])


@pytest.mark.parametrize("place", ["cpu_adam", "py311_cpu/cpu_adam"])
def test_what_a_killed_build_leaves_is_a_finding(folder: Path, place: str) -> None:
    """By torch's own lock, in a process that dies with it."""
    (folder / place).mkdir(parents=True)
    lock = folder / place / "lock"
    program = (
        "import os, sys; from torch.utils.file_baton import FileBaton\n"
        "assert FileBaton(sys.argv[1]).try_acquire(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(lock)], check=False).returncode == 9
    three_days_ago = time.time() - 3 * 86400
    os.utime(lock, (three_days_ago, three_days_ago))
    (finding,) = look().findings
    assert "3 days old" in finding.what and "cpu_adam was killed" in finding.what
    assert "no process" in finding.what
    subprocess.run(["sh", "-c", finding.remedy], check=True)
    assert not lock.exists() and look().findings == []


def test_a_build_that_runs_is_none(folder: Path) -> None:
    (folder / "cpu_adam").mkdir()
    baton = FileBaton(str(folder / "cpu_adam" / "lock"))
    assert baton.try_acquire()
    try:
        section = look()
        assert section.findings == []
        words, (data,) = section.facts["locks"]
        assert f"held by process {os.getpid()}" in words and data["holder"] == os.getpid()
    finally:
        baton.release()


def test_a_young_lock_may_be_of_another_machine(folder: Path) -> None:
    (folder / "cpu_adam").mkdir()
    (folder / "cpu_adam" / "lock").touch()
    (finding,) = look().findings
    assert "unless another machine or container is compiling now" in finding.what


def test_the_folder_is_torchs_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert os.path.realpath(locks.extensions_folder()) == get_default_build_root()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert os.path.realpath(locks.extensions_folder()) == get_default_build_root()
