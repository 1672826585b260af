"""What the tests of the elementwise ops share: the native ops, hard values, exact comparison, other machine code.

The native ops are compared with the references bit for bit; a NaN need only be a NaN (its payload is nobody's).
`DSC_TEST_LIBRARY` names a library to test in place of the one that is built: `other_code` runs a test file again,
in a process of its own, on each instruction set of this CPU and on the portable code at other vector widths.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_compress.ops import schemas
from ds_compress.ops.library import native

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 1000, 12295, 100001)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIALS = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-38, 3e38, -3e38)
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def native_ops() -> Any:
    """The namespace of the native ops."""
    library = os.environ.get("DSC_TEST_LIBRARY")
    if library is None:
        return native()
    torch.ops.load_library(library)
    return getattr(torch.ops, schemas.NAMESPACE)


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit of what is not NaN."""
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    if not mine.is_floating_point():
        return torch.equal(mine, theirs)
    nan = mine.isnan()
    if not torch.equal(nan, theirs.isnan()):
        return False
    integer = _INTEGER_OF_SIZE[mine.element_size()]
    return torch.equal(mine.view(integer)[~nan], theirs.view(integer)[~nan])


def random_values(
    numel: int, dtype: torch.dtype, seed: int, specials: float = 0.0, offset: int = 0
) -> torch.Tensor:
    """(numel,) normal values, each replaced by a hard one with probability `specials`; the data begins `offset`
    elements into its allocation, so at any address."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel + offset, generator=generator)
    hard = torch.tensor(SPECIALS)[torch.randint(len(SPECIALS), values.shape, generator=generator)]
    chosen = torch.rand(values.shape, generator=generator) < specials
    return torch.where(chosen, hard, values).to(dtype)[offset:]


def random_bytes(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)


# --- other machine code ----------------------------------------------------------------------------------------

CODE = ("scalar", "avx2", "avx512", "portable, 8 lanes", "portable, 16 lanes")


def check_on_other_code(file: str, code: str, tmp_path: Path) -> None:
    """Runs the tests of `file` in a process whose kernels are `code`; skips what this CPU does not have."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if code.startswith("portable"):
        environment |= {
            "DS_COMPRESS_CPU_ISA": "scalar",
            "DSC_TEST_LIBRARY": str(_portable_library(int(code.split()[1]), tmp_path)),
        }
    else:
        environment["DS_COMPRESS_CPU_ISA"] = code
        if not has_instructions(code):
            pytest.skip(f"this CPU has no {code}")
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "not other_code", file]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-500:]


def has_instructions(isa: str) -> bool:
    """Asks the library itself, which refuses an instruction set that the CPU lacks."""
    script = (
        "import torch; from tests.native.elementwise import native_ops;"
        "native_ops().mask_pack(torch.ones(9, dtype=torch.bool))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_COMPRESS_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 or "does not have it" in done.stderr, done.stderr[-2000:]
    return done.returncode == 0


def _portable_library(lanes: int, folder: Path) -> Path:
    """The elementwise ops without intrinsics: what another processor runs, or 16 lanes on one without AVX-512."""
    from ds_compress.ops.build import Build
    from ds_compress.ops.library import wanted_build

    build: Build = wanted_build()
    csrc = ROOT / "csrc"
    names = ("mask", "fake_quantize", "block_quantize")
    sources = [
        *(csrc / "bindings" / f"{name}_cpu.cpp" for name in names),
        *sorted((csrc / "cpu" / "elementwise").glob("*.cpp")),
        csrc / "cpu" / "isa.cpp",
    ]
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", f"-DDSC_PORTABLE_LANES={lanes}", "-I", str(csrc / "include")]
    flags += ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
    flags += [part for path in build.torch.include for part in ("-isystem", str(path))]
    library = folder / f"portable_{lanes}.so"
    torch_folder = Path(torch.__file__).parent / "lib"
    linked = ["-L", str(torch_folder), "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}"]
    subprocess.run(
        [str(build.cxx), *flags, *map(str, sources), *linked, "-o", str(library)], check=True, timeout=300
    )
    return library
