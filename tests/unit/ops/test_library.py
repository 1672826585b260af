"""The choice between native and reference kernels, most cases in a fresh process: the default is the process's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ds_compress.ops import Preference, kernel_preference, kernels, library

TELL = """
import logging; logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
from ds_compress.ops import Preference, kernel_preference, kernels, library, prefer
{setup}
ops = kernels()
packed = ops.mask_pack(torch.tensor([True, False, True]))
print("packed", packed.tolist(), "native", ops is torch.ops.ds_compress, "loaded", library.loaded_library() is not None)
"""


def tell(setup: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {k: v for k, v in os.environ.items() if k not in ("DS_COMPRESS_KERNELS", "CXX")} | environment
    command = [sys.executable, "-c", TELL.format(setup=setup)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"PATH": "", "DS_COMPRESS_CACHE": str(tmp_path_factory.mktemp("empty"))}


def test_auto_takes_native_where_it_can_be_built() -> None:
    assert "packed [5] native True loaded True" in tell().stdout


def test_auto_falls_back_with_one_line(no_compiler: dict[str, str]) -> None:
    done = tell("kernels(); prefer(Preference.AUTO)", **no_compiler)
    assert "packed [5] native False loaded False" in done.stdout
    assert done.stderr.count("run on plain torch") == 1
    assert "no C++ compiler" in done.stderr


def test_asking_for_native_that_cannot_be_had_is_an_error(no_compiler: dict[str, str]) -> None:
    done = tell(DS_COMPRESS_KERNELS="native", **no_compiler)
    assert done.returncode != 0
    assert "KernelsUnavailableError" in done.stderr and "no C++ compiler" in done.stderr


@pytest.mark.parametrize("preference", ["auto", "native"])
def test_a_cache_that_others_can_write_is_an_error(tmp_path: Path, preference: str) -> None:
    tmp_path.chmod(0o777)
    done = tell(DS_COMPRESS_KERNELS=preference, DS_COMPRESS_CACHE=str(tmp_path))
    assert done.returncode != 0
    assert (
        f"UnsafeLibraryError: native ops are not loaded: {tmp_path} may be written by everybody"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []
    assert "loaded False" in tell(DS_COMPRESS_KERNELS="reference", DS_COMPRESS_CACHE=str(tmp_path)).stdout


def test_reference_loads_nothing() -> None:
    assert "packed [5] native False loaded False" in tell(DS_COMPRESS_KERNELS="reference").stdout


def test_the_environment_wins_over_the_json_and_says_so() -> None:
    done = tell("prefer(Preference.NATIVE)", DS_COMPRESS_KERNELS="reference")
    assert "native False" in done.stdout
    assert "DS_COMPRESS_KERNELS=reference overrides kernels: native" in done.stderr


def test_an_unknown_word_is_an_error() -> None:
    done = tell(DS_COMPRESS_KERNELS="fast")
    assert done.returncode != 0
    assert "allowed are auto, native, reference" in done.stderr


def test_native_can_be_left_for_reference_again() -> None:
    assert "native False loaded True" in tell("kernels(); prefer(Preference.REFERENCE)").stdout


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = tell(DS_COMPRESS_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "allowed are scalar, avx2 and avx512" in done.stderr


@pytest.fixture
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)


def is_native() -> bool:
    return kernels() is torch.ops.ds_compress


@pytest.mark.usefixtures("no_variable")
class TestPreferenceOfABlock:
    def test_the_innermost_block_holds_and_the_default_is_back_after_it(self) -> None:
        default = is_native()
        native, reference = kernel_preference(Preference.NATIVE), kernel_preference(Preference.REFERENCE)
        seen = []
        with native:
            seen.append(is_native())
            with reference, native, reference:
                seen.append(is_native())
            seen.append(is_native())
        assert seen == [True, False, True]
        assert is_native() == default

    def test_an_error_leaves_it_too(self) -> None:
        default = kernels()
        with pytest.raises(KeyError), kernel_preference(Preference.REFERENCE):
            raise KeyError
        assert kernels() is default

    def test_threads_of_a_backward_see_it(self) -> None:
        """torch computes the backward of CUDA tensors on threads of its own."""
        seen: list[object] = []
        with kernel_preference(Preference.REFERENCE) as ops:
            thread = threading.Thread(target=lambda: seen.append(kernels()))
            thread.start()
            thread.join()
        assert seen == [ops]

    def test_the_environment_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(library.VARIABLE, "reference")
        with kernel_preference(Preference.NATIVE):
            assert not is_native()
