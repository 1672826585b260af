"""The block-sparse linear layer: every instruction set against `int8_linear` of the same dense weight, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.ops.reference import block_sparse as reference
from ds_compress.ops.reference import linear as dense
from ds_compress.ops.sizes import HEADER_BYTES, BlockSparseLayout
from tests.native import block_sparse_tables
from tests.native.cases import with_zero_blocks
from tests.native.elementwise import native_ops, same
from tests.native.linear_tables import available_tables
from tests.native.test_linear import expected_int8, int8_arguments
from tests.native.test_linear_code import disassembled, innermost_loop, stack_moves

TABLES = available_tables()
ROWS = (0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 33, 70)
OUTPUTS = (0, 1, 3, 4, 5, 47, 48, 49, 100)
INPUTS = (0, 1, 15, 16, 17, 63, 100, 2047, 2049, 4200)
NAN, INF = float("nan"), float("inf")


def arguments(m: int, n: int, k: int, draw: random.Random) -> dict[str, Any]:
    a = int8_arguments(m, n, k, draw)
    a["codes"] = with_zero_blocks(a["codes"], draw.choice([0.0, 0.5, 0.8, 0.95, 1.0]))
    return a


def packed_by(ops: Any, codes: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = ops.block_sparse_int8_linear_pack(codes, reference.count_blocks(codes))
    return packed


@pytest.mark.parametrize("table", TABLES)
def test_it_has_the_bits_of_the_dense_reference(table: str) -> None:
    draw = random.Random(11)
    shapes = [(m, draw.choice(OUTPUTS), draw.choice(INPUTS)) for m in ROWS for _ in range(6)]
    shapes += [(draw.choice(ROWS), n, k) for n in OUTPUTS for k in INPUTS]
    for m, n, k in shapes:
        a = arguments(m, n, k, draw)
        parts = (draw.choice([1, 2]), draw.choice([1, 2]))
        assert same(block_sparse_tables.linear(table, **a, parts=parts), expected_int8(a)), (m, n, k, a)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("steps", (127, 128))
def test_extreme_codes_do_not_saturate(table: str, steps: int) -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).repeat(6, 40)
    codes = torch.tensor(
        [[127, 127], [127, -128], [-128, -128], [-128, 127], [0, -128]], dtype=torch.int8
    ).repeat(1, 40)
    a: dict[str, Any] = {"x": x, "codes": codes, "weight_scale": torch.ones(5) * 1e-3, "steps": steps}
    assert same(block_sparse_tables.linear(table, **a), expected_int8(a))


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(0, 40), n=st.integers(0, 110), k=st.integers(0, 150), seed=st.integers(0, 2**31),
    threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_the_op_has_the_bits_of_the_reference(m: int, n: int, k: int, seed: int, threads: int) -> None:
    a = arguments(m, n, k, random.Random(seed))
    expected, packed = expected_int8(a), packed_by(native_ops(), a.pop("codes"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(native_ops().block_sparse_int8_linear(packed=packed, **a), expected)
        assert same(reference.block_sparse_int8_linear(packed=packed, **a), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 2048, 512), (64, 768, 768), (200, 300, 4200)])
def test_threads_do_not_change_the_bits(m: int, n: int, k: int) -> None:
    a = arguments(m, n, k, random.Random(m))
    expected, packed = expected_int8(a), packed_by(native_ops(), a.pop("codes"))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same(native_ops().block_sparse_int8_linear(packed=packed, **a), expected), threads
    finally:
        torch.set_num_threads(before)


def test_a_bad_value_spoils_its_own_row_only() -> None:
    """Also where every weight that it meets is left out."""
    x = torch.randn(40, 64)
    x[1, 4], x[17, 0], x[4] = NAN, -INF, 0.0
    codes, scale, bias = torch.zeros(9, 64, dtype=torch.int8), torch.rand(9), torch.randn(9)
    codes[2, 40:] = 5
    y = native_ops().block_sparse_int8_linear(x, packed_by(native_ops(), codes), scale, bias)
    assert y.isnan().any(dim=1).nonzero().flatten().tolist() == [1, 17] and y[[1, 17]].isnan().all()
    assert torch.equal(y[4], bias)


@pytest.mark.parametrize(("n", "k"), [(0, 0), (1, 1), (50, 2100), (96, 4096), (5, 6000)])
def test_the_packed_weight_holds_every_value_in_its_promised_size(n: int, k: int) -> None:
    torch.manual_seed(n + k)
    codes = with_zero_blocks(torch.randint(-128, 128, (n, k), dtype=torch.int8), 0.6)
    packed = packed_by(reference, codes)
    assert packed.numel() == BlockSparseLayout.of(n, k, reference.count_blocks(codes)).total
    assert torch.equal(reference.unpacked(packed), codes)


def damaged(packed: torch.Tensor, what: str) -> torch.Tensor:
    """A packed weight of (60, 70) whose index leads out of it."""
    changed, blocks = packed.clone(), int(packed[32:40].view(torch.int64))
    layout = BlockSparseLayout.of(60, 70, blocks)
    if what == "input":
        changed[layout.inputs : layout.inputs + 2].view(torch.uint16).fill_(5)
    elif what == "order":
        changed[layout.ends : layout.ends + 4].view(torch.int32).fill_(blocks)
    else:
        last = layout.ends + 4 * (2 * 12 - 1)
        changed[last : last + 4].view(torch.int32).fill_(blocks + 1)
    return changed


@pytest.mark.parametrize("which", ("native", "reference"))
def test_wrong_arguments_are_named(which: str) -> None:
    ops = native_ops() if which == "native" else reference
    codes, x, scale = torch.ones(60, 70, dtype=torch.int8), torch.ones(2, 70), torch.ones(60)
    packed, other = packed_by(ops, codes), dense.int8_linear_pack(codes)
    multiply, pack = ops.block_sparse_int8_linear, ops.block_sparse_int8_linear_pack
    calls = [
        ("a quantized weight is int8", lambda: pack(codes.int(), 75)),
        ("this weight has 75 blocks of 4 x 16 with a value other than 0, got 74", lambda: pack(codes, 74)),
        ("blocks is how many", lambda: pack(codes, -1)),
        ("x is .*70", lambda: multiply(x[:, :69], packed, scale)),
        ("weight_scale is .*60", lambda: multiply(x, packed, scale[:5])),
        ("bias is .*60", lambda: multiply(x, packed, scale, scale[:5])),
        ("activation is one of none, relu", lambda: multiply(x, packed, scale, activation="selu")),
        ("no packed block-sparse weight", lambda: multiply(x, other, scale)),
        ("a packed weight is", lambda: multiply(x, packed[:50], scale)),
        ("with 75 blocks has .* bytes, got", lambda: multiply(x, packed[:-1].clone(), scale)),
        *(
            (
                "index of this packed weight is damaged",
                lambda what=what: multiply(x, damaged(packed, what), scale),
            )
            for what in ("input", "order", "end")
        ),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert packed[HEADER_BYTES:].any()


# --- machine code ---------------------------------------------------------------------------------------------

BUDGETS = {
    ("avx512", "block_sparse_group<16>"): {"vpdpbusd": 16, "vbroadcasti32x4": 16},
    ("avx512", "block_sparse_group<8>"): {"vpdpbusd": 8, "vbroadcasti32x4": 8},
    ("avx2", "block_sparse_group<2>"): {"vpmaddwd": 8, "vpmovsxbw": 4, "vpaddd": 8},
    ("avx2", "block_sparse_group<1>"): {"vpmaddwd": 4, "vpmovsxbw": 4, "vpaddd": 4},
}


@pytest.mark.skipif(not TABLES, reason="the kernels are for x86-64")
@pytest.mark.parametrize(("table", "function"), BUDGETS, ids=lambda value: str(value))
def test_the_inner_loop_keeps_its_sums_in_registers(table: str, function: str) -> None:
    code = disassembled(block_sparse_tables.folder() / f"{table}.o", function)
    loop = innermost_loop(code)
    assert not stack_moves(list(enumerate(loop)))
    for instruction, count in BUDGETS[table, function].items():
        found = sum(text.split()[0] == instruction for text in loop)
        assert found == count, f"{instruction}: {found}, planned {count}\n" + "\n".join(loop)
