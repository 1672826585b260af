"""Building: once per content, by one process, whole or not at all, and never waiting on the dead."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from ds_compress.ops import build
from ds_compress.ops.library_file import UnsafeLibraryError, write_checksum
from ds_compress.ops.toolchain import Cuda, ToolchainError, Torch, find_cxx

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc of two files, a cache of its own, and a compiler that notes each call and waits while a file says so."""
    sources = tmp_path / "csrc"
    (sources / "bindings").mkdir(parents=True)
    (sources / "cpu").mkdir()
    (sources / "include").mkdir()
    (sources / "cpu" / "answer.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() '
                                                "{ return 42; }\n")  # fmt: skip
    (sources / "cpu" / "wide_avx2.cpp").write_text("#ifndef __AVX2__\n#error no -mavx2\n#endif\n")
    compiler = tmp_path / "cxx"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'case "$*" in *-c*) while [ -e {tmp_path}/wait ]; do sleep 0.05; done;; esac\nexec {find_cxx()} "$@"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "sources_folder", lambda: sources)
    return tmp_path


def compiles(folder: Path) -> int:
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return sum("-c " in call for call in calls)


def build_in_process(folder: Path) -> None:
    build.sources_folder = lambda: folder / "csrc"
    build.ensure_built(build.Build.for_this_machine(with_cuda=False))


def test_it_builds_once_and_the_result_loads(small: Path) -> None:
    said: list[str] = []
    wanted = build.Build.for_this_machine(with_cuda=False)
    library = build.ensure_built(wanted, said.append)
    assert ctypes.CDLL(str(library)).answer() == 42
    assert compiles(small) == 2
    assert "compiling native ops (2 files)" in said[0]
    assert said[1].endswith("1 of 2 files") and "built in" in said[-1]
    assert build.ensure_built(wanted, said.append) == library
    assert compiles(small) == 2
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".lock", ".sha256", ".so"]


@pytest.mark.parametrize("changed", ["cpu/answer.cpp", "include/shared.h", "cuda.cuh"])
def test_other_content_is_another_library(small: Path, changed: str) -> None:
    before = build.Build.for_this_machine(with_cuda=False).name
    with open(small / "csrc" / changed, "a") as file:
        file.write("// changed\n")
    assert build.Build.for_this_machine(with_cuda=False).name != before


def test_a_log_shows_that_it_begins_and_that_it_is_done(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build.ensure_built(build.Build.for_this_machine(with_cuda=False), build.to_stderr)
    first, last = capsys.readouterr().err.splitlines()
    assert "compiling native ops" in first and "built in" in last


def test_processes_that_start_together_build_once(small: Path) -> None:
    processes = [SPAWN.Process(target=build_in_process, args=(small,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert compiles(small) == 2


def test_a_killed_build_does_not_stop_the_next(small: Path) -> None:
    (small / "wait").touch()
    victim = SPAWN.Process(target=build_in_process, args=(small,))
    victim.start()
    deadline = time.monotonic() + 60
    while not compiles(small) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert victim.pid is not None and compiles(small)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    (small / "wait").unlink()
    library = build.ensure_built(build.Build.for_this_machine(with_cuda=False))
    assert ctypes.CDLL(str(library)).answer() == 42


def test_whoever_has_waited_too_long_builds_for_himself(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = build.Build.for_this_machine(with_cuda=False)
    build.cache_folder().mkdir()
    monkeypatch.setattr(build, "LONGEST_BUILD_S", 0.5)
    said: list[str] = []
    with build._turn((build.cache_folder() / wanted.name).with_suffix(".lock"), said.append):
        library = build.ensure_built(wanted, said.append)
    assert library.is_file()
    assert any("waiting" in line for line in said)


@pytest.mark.parametrize("damaged", ["", ".sha256"])
def test_a_damaged_library_is_built_anew_with_a_line(small: Path, damaged: str) -> None:
    wanted = build.Build.for_this_machine(with_cuda=False)
    library = build.ensure_built(wanted)
    hurt = library.with_name(library.name + damaged)
    hurt.write_bytes(hurt.read_bytes()[:-80])
    said: list[str] = []
    assert build.ensure_built(wanted, said.append) == library
    assert f"anew: {library} differs from its checksum" in said[0]
    assert compiles(small) == 4
    assert ctypes.CDLL(str(library)).answer() == 42
    assert build.ensure_built(wanted) == library
    assert compiles(small) == 4


def test_a_planted_library_is_an_error_and_nothing_is_touched(small: Path) -> None:
    wanted = build.Build.for_this_machine(with_cuda=False)
    library = build.ensure_built(wanted)
    library.write_bytes(b"planted")
    write_checksum(library, library)
    library.chmod(0o777)
    with pytest.raises(UnsafeLibraryError, match="may be written by everybody"):
        build.ensure_built(wanted)
    library.unlink()
    library.parent.chmod(0o777)
    with pytest.raises(UnsafeLibraryError, match="may be written by everybody"):
        build.ensure_built(wanted)
    assert compiles(small) == 2 and not library.exists()


def test_what_a_killed_build_left_goes_with_the_next(small: Path) -> None:
    build.cache_folder().mkdir(mode=0o755)
    old, young = build.cache_folder() / ".building-old", build.cache_folder() / ".building-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "0.o").touch()
    os.utime(old, (0, 0))
    build.ensure_built(build.Build.for_this_machine(with_cuda=False))
    assert not old.exists() and young.exists()


def test_a_compiler_error_is_shown_and_leaves_nothing_behind(small: Path) -> None:
    (small / "csrc" / "cpu" / "answer.cpp").write_text("int answer() { return nonsense; }\n")
    with pytest.raises(build.BuildError, match="nonsense"):
        build.ensure_built(build.Build.for_this_machine(with_cuda=False))
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".lock"]


def test_an_undefined_symbol_is_an_error_of_the_build(small: Path) -> None:
    (small / "csrc" / "cpu" / "answer.cpp").write_text(
        "int elsewhere(); int answer() { return elsewhere(); }\n"
    )
    with pytest.raises(build.BuildError, match="elsewhere"):
        build.ensure_built(build.Build.for_this_machine(with_cuda=False))


def test_a_library_built_ahead_is_found_first(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small / "prebuilt"
    folder.mkdir()
    monkeypatch.setattr(build, "PREBUILT", folder)
    assert build.find_prebuilt(with_cuda=False) is None
    by_another_compiler = folder / f"{build.stem_of(with_cuda=False)}-00000000.so"
    by_another_compiler.write_bytes(b"code")
    write_checksum(by_another_compiler, by_another_compiler)
    assert build.find_prebuilt(with_cuda=False) == by_another_compiler
    assert build.find_prebuilt(with_cuda=True) is None
    (small / "csrc" / "cpu" / "answer.cpp").write_text("// other sources\n")
    assert build.find_prebuilt(with_cuda=False) is None


def test_a_damaged_one_is_not_used_and_a_line_says_so(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PREBUILT", small)
    library = small / f"{build.stem_of(with_cuda=False)}-00000000.so"
    library.write_bytes(b"code")
    write_checksum(library, library)
    library.write_bytes(b"c0de")
    said: list[str] = []
    assert build.find_prebuilt(with_cuda=False, say=said.append) is None
    assert f"{library} differs from its checksum; reinstall" in said[0]


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match="install g"):
        build.Build.for_this_machine(with_cuda=False)


def test_torch_is_found_without_importing_it() -> None:
    import torch

    found = Torch.find()
    assert found.version == torch.__version__
    assert found.root == Path(torch.__file__).parent


def toolkit(root: Path) -> Path:
    for folder in ("bin", "include", "lib64"):
        (root / folder).mkdir(parents=True)
    (root / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n")
    (root / "bin" / "nvcc").chmod(0o755)
    (root / "include" / "cuda_runtime.h").touch()
    return root


def test_cuda_home_comes_before_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(root))
    found = Cuda.find()
    assert found is not None
    assert (found.nvcc, found.library) == (root / "bin" / "nvcc", root / "lib64")
    assert "13.0" in found.version


def test_the_wheels_are_found_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_compress.ops import toolchain

    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain, "_package_folders", lambda: [tmp_path])
    assert Cuda.find() is None
    with pytest.raises(ToolchainError, match="cuda-build"):
        monkeypatch.setenv("CXX", "/bin/true")
        build.Build.for_this_machine(with_cuda=True)
    root = toolkit(tmp_path / "nvidia" / "cu13")
    found = Cuda.find()
    assert found is not None and found.nvcc == root / "bin" / "nvcc"
