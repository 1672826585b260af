"""The linear ops: every instruction set against the reference, bit for bit, and the activations against float64."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ds_compress.ops.instructions import has_avx512, has_int8_tiles
from ds_compress.ops.reference import linear as reference
from tests.native import linear_tables
from tests.native.elementwise import native_ops, same

TABLES = linear_tables.available_tables()
INT8_TABLES = linear_tables.available_tables(of_int8=True)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 15, 16, 17, 63, 65, 100, 129)
EXACT = ("none", "relu")
NAN, INF = float("nan"), float("inf")
TRUTH = {
    "gelu_erf": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}


def int8_arguments(
    m: int, n: int, k: int, draw: random.Random, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """x, codes, weight_scale and every option of a call, at random."""
    torch.manual_seed(draw.randrange(2**31))
    x = torch.randn(m, k) * 10 ** draw.uniform(-2, 2)
    if m and k and draw.random() < 0.3:
        x[draw.randrange(m), draw.randrange(k)] = draw.choice([NAN, INF, -INF, 3e38, -1e-38, 1e-44])
    if m and draw.random() < 0.2:
        x[draw.randrange(m)] = 0.0
    return {
        "x": x.to(dtype or draw.choice(FLOATS)),
        "codes": torch.randint(-128, 128, (n, k), dtype=torch.int8),
        "weight_scale": torch.rand(n) * 0.01,
        "bias": torch.randn(n) if draw.random() < 0.5 else None,
        "input_scale": torch.tensor([0.03]) if draw.random() < 0.3 else None,
        "steps": draw.choice([127, 128]),
        "activation": draw.choice(EXACT),
        "out_dtype": draw.choice([None, *FLOATS]),
    }


def expected_int8(a: dict[str, Any]) -> torch.Tensor:
    rest = {name: value for name, value in a.items() if name != "codes"}
    return reference.int8_linear(packed=reference.int8_linear_pack(a["codes"]), **rest)


def int4_arguments(m: int, n: int, k: int, group: int, draw: random.Random) -> dict[str, Any]:
    a = int8_arguments(m, n, k, draw)
    a["codes"] = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    a["weight_scale"] = torch.rand(n, -(-k // group)) * 0.1
    return a


def expected_int4(a: dict[str, Any], group: int) -> torch.Tensor:
    rest = {name: value for name, value in a.items() if name not in ("codes", "weight_scale")}
    packed = reference.int4_linear_pack(a["codes"], a["weight_scale"])
    return reference.int4_linear(packed=packed, out_features=a["codes"].shape[0], group_size=group, **rest)


# --- every instruction set ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", INT8_TABLES)
def test_int8_has_the_bits_of_the_reference(table: str) -> None:
    """All pairs of odd sizes for each of M, N and K, the third at random, and some long and empty ones."""
    draw = random.Random(1)
    shapes = [(a, b, draw.choice(SIZES)) for a, b in itertools.product(SIZES, SIZES)]
    shapes += [(b, c, a) for a, b, c in shapes] if "emulated" not in table else []
    shapes += [(0, 3, 5), (3, 0, 5), (3, 5, 0), (5, 17, 1000), (70, 300, 1100), (9, 50, 3000), (131, 20, 40)]
    for m, n, k in shapes:
        a = int8_arguments(m, n, k, draw)
        parts = (draw.choice([1, 2]), draw.choice([1, 2]))
        assert same(linear_tables.linear(table, **a, parts=parts), expected_int8(a)), (m, n, k, a)


@pytest.mark.skipif(not TABLES, reason="the kernels are for x86-64")
def test_python_knows_of_the_instructions_that_the_kernels_use() -> None:
    assert has_int8_tiles() == bool(linear_tables.library().dsc_test_has_amx())
    assert has_avx512() == ("avx512" in TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_int4_has_the_bits_of_the_reference(table: str) -> None:
    draw = random.Random(2)
    for group, m, k in itertools.product((32, 64, 96, 128), (1, 3, 4, 6, 66), (1, 31, 33, 100, 129, 320)):
        n = draw.choice(SIZES)
        a = int4_arguments(m, n, k, group, draw)
        parts = (draw.choice([1, 2]), draw.choice([1, 2]))
        mine = linear_tables.linear(table, **a, group_size=group, parts=parts)
        assert same(mine, expected_int4(a, group)), (m, n, k, group, a)


@pytest.mark.parametrize("table", INT8_TABLES)
@pytest.mark.parametrize("steps", (127, 128))
def test_extreme_codes_do_not_saturate(table: str, steps: int) -> None:
    """Rows of the largest codes of either sign against columns of such: where 16-bit sums would overflow."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    x = signs.repeat(6, 40)
    x[3:] *= 3e38
    codes = torch.tensor(
        [[127, 127], [127, -128], [-128, -128], [-128, 127], [0, -128]], dtype=torch.int8
    ).repeat(1, 40)
    a = {"x": x, "codes": codes, "weight_scale": torch.ones(5) * 1e-3, "steps": steps}
    assert same(linear_tables.linear(table, **a), expected_int8(a))
    nibbles = torch.tensor([[7, 7], [7, -8], [-8, -8]], dtype=torch.int8).repeat(1, 40)
    b = {"x": x, "codes": nibbles, "weight_scale": torch.full((3, 2), 1e-3), "steps": steps}
    assert same(linear_tables.linear(table, **b, group_size=64), expected_int4(b, 64))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantizing_while_packing_gives_the_codes_of_the_formula(table: str, dtype: torch.dtype) -> None:
    draw = random.Random(3)
    for n, k in itertools.product((1, 16, 17, 50), (1, 15, 33, 129)):
        torch.manual_seed(n * k)
        weight = torch.randn(n, k)
        weight[0, 0] = draw.choice([NAN, INF, -INF, 1e4])
        weight = weight.to(dtype)
        scale = torch.rand(n if draw.random() < 0.7 else 1) * 0.02 + 1e-3
        scale[-1] = NAN if draw.random() < 0.2 and n > 1 else scale[-1]
        steps = draw.choice([127, 128])
        codes = torch.div(weight.float(), scale.unsqueeze(1)).round().clamp(-steps, 127).nan_to_num(0.0)
        assert linear_tables.quantize_pack_equals(table, weight, scale, steps, codes.to(torch.int8)), (n, k)
        codes[0, 0] += 1 if codes[0, 0] < 127 else -1
        assert not linear_tables.quantize_pack_equals(table, weight, scale, steps, codes.to(torch.int8))


@pytest.mark.parametrize("table", TABLES)
def test_values_beside_a_tie_go_where_a_true_division_sends_them(table: str) -> None:
    """Half integers times scales of every size, and the floats just above and below: no estimate may decide them."""
    torch.manual_seed(4)
    sizes = torch.tensor([-130, -127, -101, -100, -99, -60, -7, 0, 3, 60, 99, 100, 101, 118])
    scale = torch.ldexp(1 + torch.rand(40, len(sizes)), sizes).flatten()
    scale[:3] = torch.tensor([0.5, 1.0, 2.0**-9])
    halves = torch.arange(-131, 131) + 0.5
    at = scale.unsqueeze(1) * halves
    above, below = at.nextafter(torch.tensor(INF)), at.nextafter(torch.tensor(-INF))
    far = torch.tensor([INF, -INF, 3e38, -3e38, 1e-45, -0.0]).expand(len(scale), -1)
    weight = torch.cat([at, above, below, above.nextafter(torch.tensor(INF)), far], 1)
    codes = (weight / scale.unsqueeze(1)).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    assert linear_tables.quantize_pack_equals(table, weight, scale, 127, codes)
    by_product = (weight * (1 / scale).unsqueeze(1)).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    assert not torch.equal(by_product, codes), "these values tell a product by the reciprocal from a division"


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("activation", TRUTH)
def test_activations_are_near_float64(table: str, activation: str) -> None:
    """With K = 0 the result is the activation of the bias; dense around 0 and out to where fp32 ends."""
    dense = torch.linspace(-12, 12, 200_001)
    far = torch.cat([torch.logspace(-44, 38, 5000), torch.tensor([3.4e38, INF])])
    bias = torch.cat([dense, far, -far, torch.tensor([NAN, 0.0, -0.0])])
    empty = torch.empty(bias.numel(), 0, dtype=torch.int8)
    mine = linear_tables.linear(
        table, torch.zeros(1, 0), empty, torch.ones(bias.numel()), bias, activation=activation
    )[0]
    truth = TRUTH[activation](bias.double())
    truth[bias == -INF] = 0.0
    error = (mine.double() - truth).abs()
    assert bool(mine[bias.isnan()].isnan().all()) and bool((mine[bias == INF] == INF).all())
    in_units = (error / (2e-6 * truth.abs() + 2e-7))[bias.abs() < INF]
    assert in_units.max() <= 1.0
    assert abs(mine[bias == -INF].item()) < 2e-7


# --- the ops ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(0, 40), n=st.integers(0, 70), k=st.integers(0, 150), seed=st.integers(0, 2**31),
    threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_the_int8_op_has_the_bits_of_the_reference(m: int, n: int, k: int, seed: int, threads: int) -> None:
    a = int8_arguments(m, n, k, random.Random(seed))
    expected = expected_int8(a)
    packed = native_ops().int8_linear_pack(a.pop("codes"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(native_ops().int8_linear(packed=packed, **a), expected)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(0, 20), n=st.integers(0, 70), k=st.integers(0, 300), group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_int4_op_has_the_bits_of_the_reference(m: int, n: int, k: int, group: int, seed: int) -> None:
    a = int4_arguments(m, n, k, group, random.Random(seed))
    expected = expected_int4(a, group)
    packed = native_ops().int4_linear_pack(a.pop("codes"), a.pop("weight_scale"))
    assert same(native_ops().int4_linear(packed=packed, out_features=n, group_size=group, **a), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 2048, 512), (16, 500, 700), (64, 768, 768), (200, 300, 1030)])
def test_threads_do_not_change_the_bits(m: int, n: int, k: int) -> None:
    a = int8_arguments(m, n, k, random.Random(m))
    expected = expected_int8(a)
    packed = native_ops().int8_linear_pack(a.pop("codes"))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert same(native_ops().int8_linear(packed=packed, **a), expected), threads
    finally:
        torch.set_num_threads(before)


def test_equal_weights_have_equal_bytes() -> None:
    """Padding included, whatever the memory held before."""
    codes, scale = torch.randint(-8, 8, (19, 70), dtype=torch.int8), torch.rand(19, 3)
    for pack in (
        lambda: native_ops().int8_linear_pack(codes),
        lambda: native_ops().int4_linear_pack(codes, scale),
        lambda: native_ops().int8_linear_quantize_pack(codes.float(), torch.ones(1), 127),
    ):
        kept = []
        for value in range(6):
            torch.full_like(pack(), value)  # freed, and likely the memory of the next
            kept.append(pack())
        assert all(torch.equal(kept[0], other) for other in kept)


def test_leading_dimensions_and_strides_of_x() -> None:
    x = torch.randn(3, 5, 40).transpose(0, 1)
    codes, scale = torch.randint(-127, 128, (7, 40), dtype=torch.int8), torch.rand(7)
    packed = native_ops().int8_linear_pack(codes.t().contiguous().t())
    mine = native_ops().int8_linear(x, packed, scale)
    flat = reference.int8_linear(x.reshape(15, 40), reference.int8_linear_pack(codes), scale)
    assert mine.shape == (5, 3, 7) and same(mine.view(15, 7), flat)
    assert native_ops().int8_linear(x[0, 0], packed, scale).shape == (7,)


def test_a_bad_value_spoils_its_own_row_only() -> None:
    x = torch.randn(6, 33)
    x[1, 4], x[3, 0], x[4] = NAN, -INF, 0.0
    codes, scale, bias = torch.randint(-127, 128, (9, 33), dtype=torch.int8), torch.rand(9), torch.randn(9)
    packed = native_ops().int8_linear_pack(codes)
    dynamic = native_ops().int8_linear(x, packed, scale, bias)
    assert dynamic.isnan().all(dim=1).tolist() == [False, True, False, True, False, False]
    assert torch.equal(dynamic[4], bias)
    static = native_ops().int8_linear(x, packed, scale, bias, torch.tensor([0.02]))
    assert static.isnan().all(dim=1).tolist() == [False, True, False, False, False, False]
    assert not static[3].isnan().any()


def test_sums_may_be_as_large_as_int32() -> None:
    k = 131072
    x = torch.ones(1, k)
    packed = native_ops().int8_linear_pack(torch.full((2, k), -128, dtype=torch.int8))
    y = native_ops().int8_linear(x, packed, torch.ones(2), input_scale=torch.ones(1) / 127)
    assert torch.equal(y, torch.full((1, 2), float(k * 127 * -128)) * (torch.ones(1) / 127))
    with pytest.raises(
        ValueError, match="131072 columns may overflow an int32 sum: at most 131071 with 128 steps"
    ):
        native_ops().int8_linear(x, packed, torch.ones(2), steps=128)


def wrong_calls(ops: Any) -> list[tuple[str, Any]]:
    codes, scale, x = torch.ones(6, 40, dtype=torch.int8), torch.ones(6), torch.ones(2, 40)
    packed, packed4 = ops.int8_linear_pack(codes), ops.int4_linear_pack(codes, torch.ones(6, 2))
    other = packed.clone()
    other[8] = 99
    return [
        ("a quantized weight is int8", lambda: ops.int8_linear_pack(codes.int())),
        ("a quantized weight is int8", lambda: ops.int8_linear_pack(codes[0])),
        ("x is .*40", lambda: ops.int8_linear(x[:, :39], packed, scale)),
        ("x is .*fp32, bf16 or fp16", lambda: ops.int8_linear(x.double(), packed, scale)),
        ("weight_scale is .*6", lambda: ops.int8_linear(x, packed, scale[:5])),
        ("bias is .*6", lambda: ops.int8_linear(x, packed, scale, scale[:5])),
        ("input_scale is ", lambda: ops.int8_linear(x, packed, scale, None, scale)),
        ("steps are 127 or 128, got 100", lambda: ops.int8_linear(x, packed, scale, steps=100)),
        ("activation is one of none, relu", lambda: ops.int8_linear(x, packed, scale, activation="selu")),
        ("out_dtype is fp32", lambda: ops.int8_linear(x, packed, scale, out_dtype=torch.float64)),
        ("this is no packed weight", lambda: ops.int8_linear(x, torch.zeros_like(packed), scale)),
        ("packed for other kernels .layout 99.", lambda: ops.int8_linear(x, other, scale)),
        ("a packed weight is", lambda: ops.int8_linear(x, packed[:50], scale)),
        ("bytes", lambda: ops.int8_linear(x, packed[:-1].clone(), scale)),
        ("pack it again", lambda: ops.int8_linear(x, packed4, scale)),
        ("pack it again", lambda: ops.int4_linear(x, packed, 6, 32)),
        ("6 out_features, got 7", lambda: ops.int4_linear(x, packed4, 7, 32)),
        ("group_size is a multiple of 32 that makes 2 groups", lambda: ops.int4_linear(x, packed4, 6, 64)),
        ("group_size is a multiple of 32", lambda: ops.int4_linear(x, packed4, 6, 20)),
        ("int4 values lie in", lambda: ops.int4_linear_pack(codes * 8, torch.ones(6, 2))),
        ("scale is .*groups", lambda: ops.int4_linear_pack(codes, torch.ones(6))),
        ("scale is .*6", lambda: ops.int8_linear_quantize_pack(codes.float(), torch.ones(5), 127)),
        ("weight ", lambda: ops.int8_linear_quantize_pack(codes.double(), scale, 127)),
        ("steps are 127 or 128, got 7", lambda: ops.int8_linear_quantize_pack(codes.float(), scale, 7)),
    ]


@pytest.mark.parametrize("which", ("native", "reference"))
def test_wrong_arguments_are_named(which: str) -> None:
    for message, call in wrong_calls(native_ops() if which == "native" else reference):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_reference_is_the_formula() -> None:
    """Against Python's own integers, with math that shares nothing with the reference."""
    torch.manual_seed(5)
    x, codes, scale = torch.randn(3, 10), torch.randint(-127, 128, (4, 10), dtype=torch.int8), torch.rand(4)
    y = reference.int8_linear(x, reference.int8_linear_pack(codes), scale, activation="relu")
    for m, n in itertools.product(range(3), range(4)):
        row_scale = (x[m].abs().max() / 127).item()
        total = sum(round(v / row_scale) * c for v, c in zip(x[m].tolist(), codes[n].tolist(), strict=True))
        assert math.isclose(y[m, n].item(), max(total * row_scale * scale[n].item(), 0.0), rel_tol=1e-6)
