"""The library with CUDA kernels inside: it links, and loads on a torch that has no CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ds_compress.ops import build
from ds_compress.ops.schemas import SCHEMAS
from tests.native.emulator import nvcc

pytestmark = pytest.mark.skipif(not nvcc.available(), reason="no nvcc: pip install 'ds_compress[cuda-build]'")

_LOAD = """
import sys, torch
import ds_compress.ops.schemas as schemas
torch.ops.load_library(sys.argv[1])
native = [n for n in schemas.SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(f"ds_compress::{n}", "CUDA")]
packed = torch.ops.ds_compress.mask_pack(torch.tensor([True, False, True]))
print(*native, packed.tolist())
"""
PLAIN_TORCH_ON_CUDA = {
    "attention",
    "block_sparse_int8_linear_pack",
    "block_sparse_int8_linear",
    "weight_only_linear_pack",
    "weight_only_linear",
    "mask_window",
    "mask_square_sums",
}
"""Kernels of the CPU, whose docs say so."""


@pytest.fixture(scope="module")
def library() -> Path:
    return build.ensure_built(build.Build.for_this_machine(with_cuda=True))


def test_every_other_op_has_a_cuda_kernel_and_the_cpu_ones_still_run(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *native, packed = done.stdout.splitlines()[-1].split()
    assert packed == "[5]"
    assert set(native) == set(SCHEMAS) - PLAIN_TORCH_ON_CUDA


def test_it_carries_machine_code_for_both_architectures_and_ptx_for_later_ones(library: Path) -> None:
    listed = {
        kind: subprocess.run(
            [nvcc.find("cuobjdump"), f"--list-{kind}", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in ("elf", "ptx")
    }
    assert "sm_80" in listed["elf"] and "sm_90" in listed["elf"]
    assert "sm_90" in listed["ptx"]


def test_it_needs_no_cuda_library_at_run_time(library: Path) -> None:
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed
