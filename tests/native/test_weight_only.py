"""weight_only_linear: every instruction set against the reference, bit for bit; the reference against the formula."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch.nn import functional

from ds_compress.ops.reference import weight_only as reference
from ds_compress.ops.reference.weight_only import E2M1_IN_HALVES, STORAGES
from tests.native import weight_only_tables as tables
from tests.native.elementwise import native_ops, same
from tests.native.test_linear_code import disassembled, innermost_loop
from tests.native.weight_only_tables import Weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 5, 16, 17, 63, 65, 100, 129)
GROUPS = (1, 16, 24, 32, 64, 100, 128, 200, 256)
NAN, INF = float("nan"), float("inf")


def random_weight(n: int, k: int, group_size: int, storage: str, has_offset: bool) -> Weight:
    bits = {"int2": 2, "int4": 4, "int8": 8, "e2m1": 4}[storage]
    low = 0 if has_offset or storage == "e2m1" else -(2 ** (bits - 1))
    dtype = torch.uint8 if low == 0 else torch.int8
    values = torch.randint(low, low + 2**bits, (n, k)).to(dtype)
    groups = -(-k // group_size)
    offset = torch.randn(n, groups) * 0.05 if has_offset else None
    return Weight(values, torch.rand(n, groups) * 0.01, offset, group_size, storage)


def packed_by(ops: Any, weight: Weight) -> torch.Tensor:
    packed: torch.Tensor = ops.weight_only_linear_pack(
        weight.values, weight.scale, weight.offset, weight.group_size, weight.storage
    )
    return packed


def numbers_of(weight: Weight) -> torch.Tensor:
    """fp64 (N, K), by the formula."""
    values = weight.values.double()
    if weight.storage == "e2m1":
        values = torch.tensor(E2M1_IN_HALVES, dtype=torch.float64)[weight.values.long()]
    columns = values.shape[1]

    def spread(each: torch.Tensor) -> torch.Tensor:
        return each.double().repeat_interleave(weight.group_size, 1)[:, :columns]

    whole = values * spread(weight.scale)
    return whole if weight.offset is None else whole + spread(weight.offset)


def random_call(m: int, n: int, k: int, draw: random.Random) -> dict[str, Any]:
    torch.manual_seed(draw.randrange(2**31))
    storage = draw.choice(STORAGES)
    x = torch.randn(m, k) * 10 ** draw.uniform(-2, 2)
    if k > 1 and draw.random() < 0.4:
        x[:, draw.randrange(k)] *= 10 ** draw.uniform(1, 6)
    if m and k and draw.random() < 0.3:
        x[draw.randrange(m), draw.randrange(k)] = draw.choice([NAN, INF, -INF, 3e38, -1e-38, 1e-44, -NAN])
    if m and draw.random() < 0.2:
        x[draw.randrange(m)] = 0.0
    if m and draw.random() < 0.3:  # whose powers of two are at the ends of fp32
        x[draw.randrange(m)] *= draw.choice([1e-41, 1e-37, 1e-34, 1e35])
    return {
        "x": x.to(draw.choice(FLOATS)),
        "weight": random_weight(
            n, k, draw.choice(GROUPS), storage, storage != "e2m1" and draw.random() < 0.4
        ),
        "bias": torch.randn(n) if draw.random() < 0.5 else None,
        "activation": draw.choice(("none", "relu")),
        "out_dtype": draw.choice([None, *FLOATS]),
    }


def expected(call: dict[str, Any]) -> torch.Tensor:
    weight = call["weight"]
    return reference.weight_only_linear(
        call["x"], packed_by(reference, weight), len(weight.values), call["bias"],
        activation=call["activation"], out_dtype=call["out_dtype"],
    )  # fmt: skip


@pytest.mark.parametrize("table", tables.TABLES)
def test_it_has_the_bits_of_the_reference(table: str) -> None:
    """All pairs of odd sizes for each of M, N and K, the third at random, and long and empty ones."""
    draw = random.Random(1)
    shapes = [(a, b, draw.choice(SIZES)) for a, b in itertools.product(SIZES, SIZES)]
    shapes += [(b, c, a) for a, b, c in shapes]
    shapes += [(1, 70, 1111), (3, 5, 0), (0, 5, 7), (4, 0, 7), (7, 130, 520), (200, 65, 300)]
    for m, n, k in shapes:
        call = random_call(m, n, k, draw)
        parts = draw.choice([(1, 1), (1, 1), (3, 2)])
        assert same(tables.linear(table, **call, parts=parts), expected(call)), (m, n, k, call)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("storage", "has_offset"),
    [(s, False) for s in STORAGES] + [("int2", True), ("int4", True), ("int8", True)],
)
def test_the_reference_is_the_formula_within_its_bound(
    storage: str, has_offset: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    for group_size, k, loudness in ((32, 320, 1.0), (128, 640, 1e4), (600, 600, 1e3), (50, 130, 1.0)):
        weight = random_weight(40, k, group_size, storage, has_offset)
        x = torch.randn(9, k)
        x[:, ::37] *= loudness
        x = x.to(dtype)
        y = reference.weight_only_linear(
            x, packed_by(reference, weight), 40, out_dtype=torch.float32
        ).double()
        exact, dense = x.double(), numbers_of(weight)
        blocks = reference._blocks(k, group_size)
        step = 2.0**-22 if dtype is torch.float32 else 2.0**-14
        bound = (len(blocks) + 4) * 2.0**-23 * _magnitudes(exact, weight, dense)
        for begin, end, _ in blocks:
            loudest = exact[:, begin:end].abs().amax(1, keepdim=True)
            bound += (
                step * loudest * _magnitudes(torch.ones(1, k, dtype=torch.float64), weight, dense, begin, end)
            )
        assert bool(((y - exact @ dense.T).abs() <= bound).all())
        # The bound is no empty word: halving the input's bits breaks it.
        rough = x.to(torch.float8_e4m3fn).double() if loudness == 1.0 else None
        if rough is not None:
            assert bool(((rough @ dense.T - exact @ dense.T).abs() > bound).any())


def _magnitudes(
    x: torch.Tensor, weight: Weight, dense: torch.Tensor, begin: int = 0, end: int | None = None
) -> torch.Tensor:
    """sum |x w| from one input to another, where scale and offset count on their own."""
    parts = dense.abs()
    if weight.offset is not None:
        spread = weight.offset.double().repeat_interleave(weight.group_size, 1)[:, : dense.shape[1]]
        parts = (dense - spread).abs() + spread.abs()
    return x.abs()[:, begin:end] @ parts[:, begin:end].T


@pytest.mark.parametrize("table", tables.TABLES)
def test_bf16_inputs_that_are_near_are_exact(table: str) -> None:
    """Inputs that are at least 2^-7 of the loudest lose nothing: their products are summed as integers."""
    torch.manual_seed(0)
    x = ((torch.rand(3, 128) + 1) * torch.randn(3, 128).sign()).bfloat16()
    weight = random_weight(70, 128, 128, "int4", False)
    ones = Weight(weight.values, torch.ones(70, 1), None, 128, "int4")
    y = tables.linear(table, x, ones, out_dtype=torch.float32)
    assert torch.equal(y.double(), x.double() @ weight.values.double().T)


@pytest.mark.parametrize("table", tables.TABLES)
@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", "silu"])
def test_activations_are_near_those_of_float64(table: str, activation: str) -> None:
    torch.manual_seed(2)
    x, weight, bias = torch.randn(9, 96), random_weight(70, 96, 32, "int4", False), torch.randn(70)
    plain = tables.linear(table, x, weight, bias).double()
    truth = {
        "gelu_erf": functional.gelu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "silu": functional.silu,
    }[activation](plain)
    y = tables.linear(table, x, weight, bias, activation=activation).double()
    assert bool(((y - truth).abs() <= 2e-6 * truth.abs() + 2e-7).all())


@pytest.mark.skipif(not tables.TABLES or not tables.has_amx(), reason="this CPU has no AMX")
def test_many_rows_by_tiles_are_within_their_bound() -> None:
    """The weight is rounded to bf16; sums are fp32, in another order."""
    draw = random.Random(4)
    for m, n, k, group_size in (
        (20, 64, 32, 32),
        (33, 70, 320, 64),
        (100, 130, 1536, 1536),
        (300, 65, 1152, 128),
    ):
        storage = draw.choice(STORAGES)
        for has_offset in (False, storage != "e2m1"):
            weight = random_weight(n, k, group_size, storage, has_offset)
            x, bias = torch.randn(m, k).bfloat16(), torch.randn(n)
            rounded = numbers_of(weight).float().bfloat16().double()
            parts = draw.choice([(1, 1), (3, 2)])
            y = tables.linear("amx", x, weight, bias, out_dtype=torch.float32, parts=parts).double()
            exact = x.double() @ rounded.T
            magnitudes = x.double().abs() @ rounded.abs().T
            # One step more where the product with the scale and the sum with the offset are rounded before.
            bound = (k + 8) * 2.0**-24 * magnitudes + 2.0**-9 * 2.0**-14 * magnitudes + 1e-6
            assert bool(
                ((y - exact - bias).abs() <= bound + 2.0**-8 * magnitudes / k**0.5 * has_offset).all()
            )
            assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_a_row_with_nan_or_inf_is_nan_and_no_other(value: float) -> None:
    ops, weight = native_ops(), random_weight(33, 300, 128, "int4", False)
    x = torch.randn(5, 300)
    x[2, 299] = value
    for used in (ops, reference):
        y = used.weight_only_linear(x, packed_by(used, weight), 33)
        assert bool(y[2].isnan().all())
        assert bool(y[[0, 1, 3, 4]].isfinite().all())


def test_what_does_not_fit_is_refused_alike() -> None:
    weight, x = random_weight(9, 64, 32, "int4", False), torch.randn(2, 64)
    for ops in (native_ops(), reference):
        packed = packed_by(ops, weight)
        with pytest.raises(ValueError, match="out_features"):
            ops.weight_only_linear(x, packed, 8)
        with pytest.raises(ValueError, match="got"):
            ops.weight_only_linear(x[:, :63].contiguous(), packed, 9)
        with pytest.raises(ValueError, match="activation"):
            ops.weight_only_linear(x, packed, 9, activation="tanh")
        with pytest.raises(ValueError, match="bytes"):
            ops.weight_only_linear(x, packed[:-1].clone(), 9)
        with pytest.raises(ValueError, match="no packed weight"):
            ops.weight_only_linear(x, torch.zeros_like(packed), 9)
        with pytest.raises(ValueError, match=r"lie in \[-8, 7\]"):
            ops.weight_only_linear_pack(weight.values + 100, weight.scale, None, 32, "int4")
        with pytest.raises(ValueError, match=r"lie in \[0, 3\]"):
            unsigned = torch.full((9, 64), 4, dtype=torch.uint8)
            ops.weight_only_linear_pack(unsigned, weight.scale, weight.scale, 32, "int2")
        with pytest.raises(ValueError, match="scale is float32"):
            ops.weight_only_linear_pack(weight.values, weight.scale[:, :1], None, 32, "int4")
        with pytest.raises(ValueError, match="storage is one of"):
            ops.weight_only_linear_pack(weight.values, weight.scale, None, 32, "int3")
    with pytest.raises(ValueError, match="other kernels"):
        reference.weight_only_linear(x, packed_by(native_ops(), weight), 9)
    with pytest.raises(ValueError, match="other kernels"):
        native_ops().weight_only_linear(x, packed_by(reference, weight), 9)


def test_threads_and_views_change_no_bit() -> None:
    ops, weight = native_ops(), random_weight(400, 520, 128, "int4", True)
    packed, x = packed_by(ops, weight), torch.randn(4, 9, 520)
    y = ops.weight_only_linear(x, packed, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(ops.weight_only_linear(x, packed, 400), y)
    finally:
        torch.set_num_threads(before)
    wide = torch.randn(4, 9, 1040)
    wide[..., ::2] = x
    assert torch.equal(ops.weight_only_linear(wide[..., ::2], packed, 400), y)
    assert torch.equal(ops.weight_only_linear(x[3, 8], packed, 400), y[3, 8])


@pytest.mark.skipif("avx512" not in tables.TABLES, reason="this CPU has no AVX-512 VNNI")
@pytest.mark.parametrize(
    ("tile", "products"), [("1, 3, 1, 4", 24), ("1, 3, 4, 2", 48), ("1, 2, 4, 2", 32), ("2, 3, 1, 4", 12)]
)
def test_the_inner_loop_keeps_its_sums_in_registers(tile: str, products: int) -> None:
    """storage, bytes, rows, width"""
    storage, rest = tile.split(", ", 1)
    name = f"weight_only_tile<(ds_compress::cpu::Storage){storage}, {rest}>"
    code = disassembled(tables.object_file("avx512"), name)
    loop = innermost_loop(code)
    assert sum(text.startswith("vpdpbusd") for text in loop) == products
    assert not [text for text in loop if "zmm" in text and "(%rsp" in text]
