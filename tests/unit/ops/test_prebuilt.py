"""The library that came with the package: when it serves, and what happens where it cannot be loaded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from ds_compress.cli.diagnosis import kernels
from ds_compress.cli.diagnosis.section import Section
from ds_compress.engine.op_builder import CompressOpsBuilder
from ds_compress.ops import build, library
from ds_compress.ops.library_file import write_checksum


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a process that has called no op, of a package whose folder of libraries is this empty one."""
    for name in ("_loaded", "_reason", "_refused"):
        monkeypatch.setattr(library, name, None)
    library._warn_of_cuda.cache_clear()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    for name in ("DS_COMPRESS_KERNELS", "DS_COMPRESS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def came_with_the_package(folder: Path, content: bytes | None = None) -> Path:
    """A library for the CPU in `folder`: that of this machine, or `content`."""
    path = folder / f"{build.stem_of(with_cuda=False)}-00000000.so"
    if content is None:
        shutil.copy(build.ensure_built(build.Build.for_this_machine(with_cuda=False)), path)
    else:
        path.write_bytes(content)
    write_checksum(path, path)
    return path


def no_compiler(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(cache))


def doctor() -> tuple[dict[str, object], list[str]]:
    section = Section("kernels")
    kernels.look(section)
    return section.data()["library"], [finding.what for finding in section.findings]


def test_it_serves_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = came_with_the_package(folder)
    no_compiler(monkeypatch, folder / "cache")
    assert CompressOpsBuilder().is_compatible()
    told, findings = doctor()
    assert told == {"state": "loaded", "path": str(path), "origin": "came with the package"}
    assert findings == [] and library.loaded_library() == path
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("insists", [False, True])
def test_a_torch_with_cuda_takes_it_where_no_cuda_kernels_can_be_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, insists: bool
) -> None:
    path = came_with_the_package(folder)
    no_compiler(monkeypatch, folder / "cache")
    monkeypatch.setattr(library.torch.version, "cuda", "13.0")
    if insists:
        monkeypatch.setenv("DS_COMPRESS_CUDA", "1")
    with caplog.at_level(logging.WARNING, logger="ds_compress"):
        assert library.load() is not insists
        library.prebuilt()
    assert library.loaded_library() == (None if insists else path)
    line = "CUDA tensors run on plain torch, CPU tensors on native kernels"
    assert caplog.text.count(line) == (0 if insists else 1)


def test_cuda_kernels_are_compiled_where_they_can_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came_with_the_package(folder)
    monkeypatch.setattr(library, "wants_cuda", lambda: True)
    monkeypatch.setattr(build.Build, "for_this_machine", classmethod(lambda cls, with_cuda: None))
    assert library.prebuilt() is None


def test_one_that_cannot_be_loaded_is_replaced_with_a_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = came_with_the_package(folder, b"of another machine" * 9)
    compiled = build.ensure_built(build.Build.for_this_machine(library.wants_cuda()))
    with caplog.at_level(logging.WARNING, logger="ds_compress"):
        assert library.load()
    assert library.loaded_library() == compiled
    assert f"the library of the package cannot be loaded: {path}" in caplog.text


def test_doctor_says_why_and_compiles_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came_with_the_package(folder, b"of another machine" * 9)
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(folder / "cache"))
    told, findings = doctor()
    assert told["state"] == "broken" and "invalid ELF header" in str(findings)
    assert not (folder / "cache").exists()
    assert library.failure() is None, "a later op may still compile"


def test_without_a_compiler_both_reasons_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came_with_the_package(folder, b"of another machine" * 9)
    no_compiler(monkeypatch, folder / "cache")
    assert not library.load()
    assert "no C++ compiler" in str(library.failure()) and "invalid ELF header" in str(library.failure())
