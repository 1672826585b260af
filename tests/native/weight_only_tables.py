"""The weight-only kernels of every instruction set, each callable in this process; as `linear_tables`."""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ds_compress.ops.build import cache_folder
from ds_compress.ops.reference.weight_only import EXCESS, STORAGES
from tests.native.linear_tables import ACTIVATIONS, CSRC, TYPES, available_tables, build, run

HERE = Path(__file__).resolve().parent
KERNELS = CSRC / "cpu" / "weight_only"
NUMBERS = {"scalar": 0, "avx2": 1, "avx512": 2, "amx": 3}
TABLES = [name for name in available_tables() if name in NUMBERS]
_EXCESS = EXCESS | {"e2m1": 12}


@dataclass(frozen=True)
class Weight:
    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    group_size: int
    storage: str


@cache
def has_amx() -> bool:
    weight = Weight(torch.zeros(1, 32, dtype=torch.int8), torch.ones(1, 1), None, 32, "int4")
    y, x = torch.empty(64), torch.zeros(1, 32, dtype=torch.bfloat16)
    return (
        library().dsc_test_weight_only(3, ctypes.byref(_arguments(x, y, weight, None, "none", (1, 1)))) == 0
    )


class Arguments(ctypes.Structure):
    """As in weight_only_tables.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "values", "scale", "offset", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "out_features", "columns", "groups", "group_size")),
        *(
            (name, ctypes.c_int32)
            for name in ("x_type", "y_type", "storage", "excess", "activation", "row_parts", "panel_parts")
        ),
    ]


def linear(
    table: str,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    parts: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """weight_only_linear of x (M, K), in `parts` of rows and columns."""
    guard = 16
    rows = weight.values.shape[0]
    y = x.new_full((x.shape[0] * rows + guard,), 77.0, dtype=out_dtype or x.dtype)
    arguments = _arguments(x, y, weight, bias, activation, parts)
    assert library().dsc_test_weight_only(NUMBERS[table], ctypes.byref(arguments)) == 0, "out of bounds"
    assert bool((y[-guard:] == 77.0).all()), "written behind the result"
    return y[:-guard].view(x.shape[0], rows)


def _arguments(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    activation: str,
    parts: tuple[int, int],
) -> Arguments:
    tensors = (x, y, weight.values, weight.scale, weight.offset, bias)
    return Arguments(
        *(t.data_ptr() if t is not None else None for t in tensors),
        x.shape[0], weight.values.shape[0], x.shape[1], weight.scale.shape[1], weight.group_size,
        TYPES[x.dtype], TYPES[y.dtype], STORAGES.index(weight.storage),
        0 if weight.offset is not None else _EXCESS[weight.storage], ACTIVATIONS.index(activation), *parts,
    )  # fmt: skip


def object_file(table: str) -> Path:
    """The kernels of one table, compiled as the builder does."""
    library()
    return _folder() / f"weight_only_{table}.o"


@cache
def _folder() -> Path:
    digest = hashlib.sha256(repr([build().name, os.environ.get("CXX")]).encode())
    digest.update((HERE / "weight_only_tables.cpp").read_bytes())
    return cache_folder() / "tests" / f"weight-only-{digest.hexdigest()[:16]}"


@cache
def library() -> ctypes.CDLL:
    """Compiled at the first call."""
    made = _folder()
    if not (made / "weight_only.so").is_file():
        made.mkdir(parents=True, exist_ok=True)
        names = [*(f"weight_only_{name}" for name in ("scalar", "avx2", "avx512")), "pack", "amx_avx512"]
        for name in names:
            run(build().command(KERNELS / f"{name}.cpp", made / f"{name}.o"))
        run(build().command(CSRC / "cpu" / "isa.cpp", made / "isa.o"))
        names.append("isa")
        tables = build().command(HERE / "weight_only_tables.cpp", made / "tables.o")
        run(tables)
        partial = made / f"{os.getpid()}.so"
        objects = [str(made / f"{name}.o") for name in (*names, "tables")]
        run([str(build().cxx), "-shared", "-o", str(partial), *objects])
        partial.rename(made / "weight_only.so")
    return ctypes.CDLL(str(made / "weight_only.so"))
