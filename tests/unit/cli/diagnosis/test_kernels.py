"""The section on kernels: what is there, and that nothing is built for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_compress.cli.diagnosis import kernels
from ds_compress.cli.diagnosis.section import Section
from ds_compress.ops import build, library, schemas


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has called no op, without a library that came with the package."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_reason", None)
    monkeypatch.setattr(library, "_refused", None)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    for name in ("DS_COMPRESS_KERNELS", "CXX"):
        monkeypatch.delenv(name, raising=False)


def look() -> tuple[dict[str, Any], list[str]]:
    section = Section("kernels")
    kernels.look(section)
    return section.data(), [finding.what for finding in section.findings]


def test_every_op_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.load()
    facts, findings = look()
    assert findings == [] and facts["library"]["state"] == "loaded"
    ops = facts["ops on CPU"]
    assert sorted(ops["compiled"] + ops["plain_torch"]) == sorted(schemas.SCHEMAS)
    assert "int8_linear" in ops["compiled"]
    monkeypatch.setenv("DS_COMPRESS_KERNELS", "reference")
    assert look()[0]["ops on CPU"]["compiled"] == []


def test_nothing_is_built_or_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(cache))
    facts, findings = look()
    assert facts["library"]["state"] == "not built" and findings == []
    assert not cache.exists() and facts["ops on CPU"]["compiled"] == []
    cache.mkdir()
    assert look()[0]["library"]["state"] == "not built" and list(cache.iterdir()) == []


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(tmp_path))
    facts, findings = look()
    assert facts["library"]["state"] == "cannot be built" and findings == []
    assert facts["C++ compiler"].startswith("none: no C++ compiler")
    monkeypatch.setenv("DS_COMPRESS_KERNELS", "native")
    assert "native kernels are asked for" in look()[1][0]


def test_a_library_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(tmp_path))
    facts, findings = look()
    assert facts["library"]["state"] == "refused" and "may be written by everybody" in findings[0]


def test_a_wrong_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_COMPRESS_KERNELS", "fast")
    assert "DS_COMPRESS_KERNELS=fast" in look()[1][0]
