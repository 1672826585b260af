"""The linear kernels of every instruction set, each callable in this process: compiled with the builder's own flags
and with AVX-512 VNNI emulated as well. Needs x86-64; a library is kept by the hash of all that it is made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ds_compress.ops.build import Build, cache_folder
from ds_compress.ops.library import wanted_build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = CSRC / "cpu" / "linear"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("none", "relu", "gelu_erf", "gelu_tanh", "silu")
TABLES = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512 emulated": 3}
AMX_TABLES = {"amx": 4, "amx emulated": 5}
"""Of the int8 layer alone."""
_FLAGS_OF_TABLE = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"},
}


def available_tables(of_int8: bool = False) -> list[str]:
    """Those that this CPU can run; of_int8: of the int8 layer."""
    if platform.machine() != "x86_64":
        return []
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    tables = [*TABLES, *AMX_TABLES] if of_int8 else TABLES
    return [name for name in tables if _FLAGS_OF_TABLE.get(name, set()) <= flags]


@cache
def build() -> Build:
    return wanted_build()


@cache
def folder() -> Path:
    """Objects and library, compiled at the first call."""
    digest = hashlib.sha256(repr([build().name, os.environ.get("CXX")]).encode())
    for path in (
        HERE / "linear_tables.cpp",
        HERE / "avx512_emulated.h",
        HERE / "amx_emulated.h",
        Path(__file__),
    ):
        digest.update(path.read_bytes())
    made = cache_folder() / "tests" / f"linear-{digest.hexdigest()[:16]}"
    if not (made / "linear.so").is_file():
        made.mkdir(parents=True, exist_ok=True)
        _compile(made)
    return made


def _compile(made: Path) -> None:
    commands = {
        name: build().command(KERNELS / f"linear_{name}.cpp", made / f"{name}.o")
        for name in ("scalar", "avx2", "avx512")
    }
    commands["isa"] = build().command(CSRC / "cpu" / "isa.cpp", made / "isa.o")
    baseline = [part for part in commands["scalar"] if part != "-O3"]
    emulated = [
        str(KERNELS / "linear_avx512.cpp") if part.endswith("_scalar.cpp") else part for part in baseline
    ]
    emulated[-1] = str(made / "emulated.o")
    emulated += ["-O1", "-Wno-psabi"]
    for name in ("avx512", "amx"):
        emulated += [f"-Dlinear_{name}=linear_{name}_emulated", "-include", str(HERE / f"{name}_emulated.h")]
    tables = [str(HERE / "linear_tables.cpp") if part.endswith("_scalar.cpp") else part for part in baseline]
    tables[-1] = str(made / "tables.o")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, [*commands.values(), emulated, [*tables, "-O1"]]))
    objects = [str(made / f"{name}.o") for name in (*commands, "emulated", "tables")]
    partial = made / f"{os.getpid()}.so"
    run([str(build().cxx), "-shared", "-o", str(partial), *objects])
    partial.rename(made / "linear.so")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Arguments(ctypes.Structure):
    """As in linear_tables.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "weight_scale", "bias", "input_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "out_features", "columns", "groups", "group_size")),
        *(
            (name, ctypes.c_int32)
            for name in ("x_type", "y_type", "steps", "activation", "row_parts", "panel_parts")
        ),
    ]


def linear(
    table: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    group_size: int = 0,
    steps: int = 127,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    parts: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """int8_linear, or with a group size int4_linear, of x (M, K) and codes (N, K), in `parts` of rows and columns."""
    guard = 16
    y = x.new_full((x.shape[0] * codes.shape[0] + guard,), 77.0, dtype=out_dtype or x.dtype)
    arguments = Arguments(
        *(t.data_ptr() if t is not None else None for t in (x, y, codes, weight_scale, bias, input_scale)),
        x.shape[0], codes.shape[0], x.shape[1], weight_scale.shape[1] if group_size else 0, group_size,
        TYPES[x.dtype], TYPES[y.dtype], steps, ACTIVATIONS.index(activation), *parts,
    )  # fmt: skip
    which = (TABLES | AMX_TABLES)[table]
    assert table != "amx" or library().dsc_test_has_amx(), "the system lends no tiles"
    assert library().dsc_test_linear(which, ctypes.byref(arguments)) == 0, "out of bounds"
    assert bool((y[-guard:] == 77.0).all()), "written behind the result"
    return y[:-guard].view(x.shape[0], codes.shape[0])


def quantize_pack_equals(
    table: str, weight: torch.Tensor, scale: torch.Tensor, steps: int, codes: torch.Tensor
) -> bool:
    """Whether quantizing `weight` while packing gives the packed bytes of `codes`."""
    return bool(
        library().dsc_test_quantize_pack(
            TABLES[table], ctypes.c_void_p(weight.data_ptr()), TYPES[weight.dtype],
            ctypes.c_void_p(scale.data_ptr()), int(scale.numel() == weight.shape[0]), steps,
            ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(weight.shape[0]), ctypes.c_int64(weight.shape[1]),
        )
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(folder() / "linear.so"))
