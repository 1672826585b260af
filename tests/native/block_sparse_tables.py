"""The block-sparse kernels of every instruction set, each callable in this process; see `linear_tables`."""

from __future__ import annotations

import ctypes
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ds_compress.ops.build import cache_folder
from ds_compress.ops.reference.block_sparse import block_sparse_int8_linear_pack, count_blocks
from tests.native.linear_tables import ACTIVATIONS, HERE, KERNELS, TABLES, TYPES, build, run


@cache
def folder() -> Path:
    """Objects and library, compiled at the first call."""
    digest = hashlib.sha256(repr([build().name, os.environ.get("CXX")]).encode())
    for path in (HERE / "block_sparse_tables.cpp", HERE / "avx512_emulated.h", Path(__file__)):
        digest.update(path.read_bytes())
    made = cache_folder() / "tests" / f"block-sparse-{digest.hexdigest()[:16]}"
    if not (made / "kernels.so").is_file():
        made.mkdir(parents=True, exist_ok=True)
        _compile(made)
    return made


def _compile(made: Path) -> None:
    names = ("scalar", "avx2", "avx512")
    commands = {
        name: build().command(KERNELS / f"block_sparse_{name}.cpp", made / f"{name}.o") for name in names
    }
    baseline = [part for part in commands["scalar"] if part != "-O3"]

    def of_baseline(source: Path, target: str, *flags: str) -> list[str]:
        command = [str(source) if part.endswith("_scalar.cpp") else part for part in baseline]
        return [*command[:-1], str(made / target), "-O1", *flags]

    emulated = of_baseline(
        KERNELS / "block_sparse_avx512.cpp",
        "emulated.o",
        "-Wno-psabi",
        "-Dblock_sparse_avx512=block_sparse_avx512_emulated",
        "-include",
        str(HERE / "avx512_emulated.h"),
    )
    tables = of_baseline(HERE / "block_sparse_tables.cpp", "tables.o")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, [*commands.values(), emulated, tables]))
    objects = [str(made / f"{name}.o") for name in (*names, "emulated", "tables")]
    partial = made / f"{os.getpid()}.so"
    run([str(build().cxx), "-shared", "-o", str(partial), *objects])
    partial.rename(made / "kernels.so")


class Arguments(ctypes.Structure):
    """As in block_sparse_tables.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "packed", "weight_scale", "bias", "input_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "out_features", "columns", "blocks")),
        *(
            (name, ctypes.c_int32)
            for name in ("x_type", "y_type", "steps", "activation", "row_parts", "strip_parts")
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
    steps: int = 127,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    parts: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """block_sparse_int8_linear of x (M, K) and codes (N, K), in `parts` of rows and columns."""
    guard, blocks = 16, count_blocks(codes)
    packed = block_sparse_int8_linear_pack(codes, blocks)
    y = x.new_full((x.shape[0] * codes.shape[0] + guard,), 77.0, dtype=out_dtype or x.dtype)
    arguments = Arguments(
        *(t.data_ptr() if t is not None else None for t in (x, y, packed, weight_scale, bias, input_scale)),
        x.shape[0], codes.shape[0], x.shape[1], blocks,
        TYPES[x.dtype], TYPES[y.dtype], steps, ACTIVATIONS.index(activation), *parts,
    )  # fmt: skip
    assert library().dsc_test_block_sparse(TABLES[table], ctypes.byref(arguments)) == 0, "out of bounds"
    assert bool((y[-guard:] == 77.0).all()), "written behind the result"
    return y[:-guard].view(x.shape[0], codes.shape[0])


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(folder() / "kernels.so"))
