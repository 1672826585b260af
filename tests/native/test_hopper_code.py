"""Hopper's products as machine code: CUTLASS's main loop must be wgmma fed by TMA, with sums in registers.

They are read from the library with everything in it, since each compiles for half a minute. Their source runs on no
emulator (it is CUTLASS's, with clusters, TMA and wgmma): what checks their sums is the device itself, at first use
(csrc/bindings/verified.h) and in `pytest -m gpu`. An H200 has run them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ds_compress.ops import build, toolchain
from tests.native.emulator import machine_code, nvcc

pytestmark = pytest.mark.skipif(
    not nvcc.available() or toolchain.Cutlass.find() is None,
    reason="no nvcc or no CUTLASS: ds_compress[cuda-build]",
)

# Registers of a thread when the kernel starts; setmaxnreg gives the multiplying warps more. wgmma of a k-step.
MOST_REGISTERS = 168
INSTANCES = 5


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, machine_code.MachineCode]:
    """Those of sm_90a, by mangled name."""
    library = build.ensure_built(build.Build.for_this_machine(with_cuda=True))
    folder = tmp_path_factory.mktemp("cubins")
    extract = [nvcc.find("cuobjdump"), "-xelf", "sm_90a", str(library)]
    subprocess.run(extract, cwd=folder, check=True, capture_output=True)
    found: dict[str, machine_code.MachineCode] = {}
    for cubin in sorted(Path(folder).glob("*.cubin")):
        found |= machine_code.inspect_mangled(cubin)
    return found


def test_every_instance_is_there(kernels: dict[str, machine_code.MachineCode]) -> None:
    assert len(kernels) == INSTANCES


def test_they_multiply_by_wgmma_and_load_by_tma(kernels: dict[str, machine_code.MachineCode]) -> None:
    for name, code in kernels.items():
        tile = re.search(r"GMMA\d+MMA_(64x\d+)x32", name)
        assert tile is not None, name
        assert code.counts["IGMMA"] >= 4, (tile[1], code.counts)  # a stage of 128 columns, 32 at a time
        assert code.counts["UTMALDG"] >= 2 and code.counts["UTMASTG"] >= 1, (tile[1], code.counts)
        assert not code.counts["IMMA"] and not code.counts["HMMA"]


def test_sums_stay_in_registers(kernels: dict[str, machine_code.MachineCode]) -> None:
    for name, code in kernels.items():
        assert (code.local_bytes, code.stack_bytes, code.counts["LDL"], code.counts["STL"]) == (0, 0, 0, 0), (
            name
        )
        assert code.registers <= MOST_REGISTERS, name
