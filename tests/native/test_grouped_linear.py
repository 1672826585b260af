"""The linear ops of many experts: the bits of a loop over experts, whatever the cut of the work, and of the formula."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.ops.reference import grouped_linear, linear
from tests.native.elementwise import native_ops, same

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def counts_of(experts: int, rows: int, draw: random.Random) -> list[int]:
    """How many rows each expert has: many have none."""
    popular = [draw.randrange(experts) for _ in range(max(1, experts // 2))]
    chosen = [draw.choice(popular) for _ in range(rows)]
    return [chosen.count(expert) for expert in range(experts)]


def arguments(counts: list[int], n: int, k: int, draw: random.Random, tail: int = 0) -> dict[str, Any]:
    """x, codes (experts, N, K), offsets and every option of a call; `tail` rows belong to no expert."""
    torch.manual_seed(draw.randrange(2**31))
    experts, rows = len(counts), sum(counts) + tail
    x = torch.randn(rows, k) * 10 ** draw.uniform(-2, 2)
    if rows and k and draw.random() < 0.5:
        x[draw.randrange(rows), draw.randrange(k)] = draw.choice([NAN, INF, -INF, 3e38, 1e-44])
    if rows and draw.random() < 0.3:
        x[draw.randrange(rows)] = 0.0
    return {
        "x": x.to(draw.choice(FLOATS)),
        "codes": torch.randint(-128, 128, (experts, n, k), dtype=torch.int8),
        "weight_scale": torch.rand(experts, n) * 0.01,
        "offsets": torch.tensor(counts).cumsum(0).to(draw.choice([torch.int32, torch.int64])),
        "bias": torch.randn(experts, n) if draw.random() < 0.5 else None,
        "input_scale": torch.rand(experts) + 0.01 if draw.random() < 0.4 else None,
        "steps": draw.choice([127, 128]),
        "out_dtype": draw.choice([None, *FLOATS]),
    }


def int4_arguments(
    counts: list[int], n: int, k: int, group: int, draw: random.Random, tail: int = 0
) -> dict[str, Any]:
    a = arguments(counts, n, k, draw, tail)
    a["codes"] = torch.randint(-8, 8, a["codes"].shape, dtype=torch.int8)
    a["weight_scale"] = torch.rand(len(counts), n, -(-k // group)) * 0.1
    return a


def pack(ops: Any, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    if scale is None:
        return torch.stack([ops.int8_linear_pack(each) for each in codes])
    return torch.stack([ops.int4_linear_pack(each, own) for each, own in zip(codes, scale, strict=True)])


def grouped_int8(ops: Any, a: dict[str, Any]) -> torch.Tensor:
    rest = {name: value for name, value in a.items() if name != "codes"}
    y: torch.Tensor = ops.int8_grouped_linear(packed=pack(ops, a["codes"]), **rest)
    return y


def grouped_int4(ops: Any, a: dict[str, Any], group: int) -> torch.Tensor:
    rest = {name: value for name, value in a.items() if name not in ("codes", "weight_scale")}
    packed = pack(ops, a["codes"], a["weight_scale"])
    n = a["codes"].shape[1]
    y: torch.Tensor = ops.int4_grouped_linear(packed=packed, out_features=n, group_size=group, **rest)
    return y


def looped(ops: Any, a: dict[str, Any], group: int = 0) -> torch.Tensor:
    """One call of the op of a single layer for each expert."""
    x, parts, start = a["x"], [], 0
    options = {"steps": a["steps"], "out_dtype": a["out_dtype"]}
    for expert, end in enumerate(a["offsets"].tolist()):
        bias = None if a["bias"] is None else a["bias"][expert]
        given = None if a["input_scale"] is None else a["input_scale"][expert : expert + 1]
        codes, scale = a["codes"][expert], a["weight_scale"][expert]
        rows = x[start:end]
        if group:
            packed = ops.int4_linear_pack(codes, scale)
            parts.append(ops.int4_linear(rows, packed, codes.shape[0], group, bias, given, **options))
        else:
            parts.append(ops.int8_linear(rows, ops.int8_linear_pack(codes), scale, bias, given, **options))
        start = end
    y = torch.cat(parts)
    return torch.cat([y, y.new_zeros(x.shape[0] - start, y.shape[1])])


def with_threads(threads: int, call: Any) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result: torch.Tensor = call()
        return result
    finally:
        torch.set_num_threads(before)


@settings(max_examples=150, deadline=None)
@given(
    experts=st.integers(1, 9), rows=st.integers(0, 60), n=st.integers(0, 70), k=st.integers(0, 150),
    tail=st.sampled_from([0, 0, 3]), seed=st.integers(0, 2**31), threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_int8_has_the_bits_of_a_loop_over_experts(
    experts: int, rows: int, n: int, k: int, tail: int, seed: int, threads: int
) -> None:
    draw = random.Random(seed)
    a = arguments(counts_of(experts, rows, draw), n, k, draw, tail)
    mine = with_threads(threads, lambda: grouped_int8(native_ops(), a))
    assert same(mine, looped(native_ops(), a))
    assert same(mine, looped(linear, a))
    assert same(grouped_int8(grouped_and_single(), a), mine)


@settings(max_examples=100, deadline=None)
@given(
    experts=st.integers(1, 6), rows=st.integers(0, 40), n=st.integers(0, 70), k=st.integers(0, 300),
    group=st.sampled_from([32, 64, 128]), tail=st.sampled_from([0, 0, 3]), seed=st.integers(0, 2**31),
    threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_int4_has_the_bits_of_a_loop_over_experts(
    experts: int, rows: int, n: int, k: int, group: int, tail: int, seed: int, threads: int
) -> None:
    draw = random.Random(seed)
    a = int4_arguments(counts_of(experts, rows, draw), n, k, group, draw, tail)
    mine = with_threads(threads, lambda: grouped_int4(native_ops(), a, group))
    assert same(mine, looped(native_ops(), a, group))
    assert same(mine, looped(linear, a, group))
    assert same(grouped_int4(grouped_and_single(), a, group), mine)


@pytest.mark.parametrize(
    "counts",
    [[300], [0, 0, 1, 0], [1] * 64, [200, 0, 1, 40, 0, 0, 3], [5, 150, 5], [0] * 8],
    ids=lambda counts: "-".join(map(str, counts[:8])),
)
def test_threads_do_not_change_the_bits(counts: list[int]) -> None:
    """Work enough for several threads, in every kind of imbalance: experts are cut in the middle of their panels."""
    draw = random.Random(len(counts))
    a = arguments(counts, 300, 700, draw)
    b = int4_arguments(counts, 130, 320, 64, draw)
    wanted, wanted4 = looped(native_ops(), a), looped(native_ops(), b, 64)
    for threads in (1, 2, 3, 4, 7):
        assert same(with_threads(threads, lambda: grouped_int8(native_ops(), a)), wanted), threads
        assert same(with_threads(threads, lambda: grouped_int4(native_ops(), b, 64)), wanted4), threads


def test_a_bad_row_spoils_itself_only_and_experts_without_rows_are_not_read() -> None:
    a = arguments([2, 0, 3, 0], 33, 70, random.Random(5))
    a |= {"x": torch.randn(5, 70), "input_scale": None, "bias": None, "out_dtype": None}
    a["x"][1, 3], a["x"][4, 0] = NAN, INF
    a["weight_scale"][1], a["weight_scale"][3] = NAN, NAN
    packed = pack(native_ops(), a["codes"])
    packed[1].fill_(77)  # no packed weight any more
    y = native_ops().int8_grouped_linear(a["x"], packed, a["weight_scale"], a["offsets"])
    assert y.isnan().all(dim=1).tolist() == [False, True, False, False, True]
    assert not y[[0, 2, 3]].isnan().any()


def test_strides_of_x_and_of_offsets() -> None:
    a = arguments([3, 4], 20, 40, random.Random(1))
    wanted = grouped_int8(native_ops(), a)
    a["x"], a["offsets"] = a["x"].t().contiguous().t(), a["offsets"].repeat_interleave(2)[::2]
    assert same(grouped_int8(native_ops(), a), wanted)


def wrong_calls(ops: Any) -> list[tuple[str, Any]]:
    codes, x, ends = torch.ones(2, 6, 40, dtype=torch.int8), torch.ones(5, 40), torch.tensor([2, 5])
    scale, groups = torch.ones(2, 6), torch.ones(2, 6, 2)
    packed, packed4 = pack(ops, codes), pack(ops, codes, groups)
    foreign, mixed = packed.clone(), packed.clone()
    foreign[:, 8] = 99
    mixed[1, 16] = 7  # the rows of the second header

    def int8(**changed: Any) -> Any:
        given = {"x": x, "packed": packed, "weight_scale": scale, "offsets": ends} | changed
        return lambda: ops.int8_grouped_linear(**given)

    def int4(**changed: Any) -> Any:
        given = {"x": x, "packed": packed4, "out_features": 6, "group_size": 32, "offsets": ends} | changed
        return lambda: ops.int4_grouped_linear(**given)

    return [
        ("x is .rows", int8(x=x[0])),
        ("x is .*40", int8(x=x[:, :39])),
        ("x is .*fp32, bf16 or fp16", int8(x=x.double())),
        ("packed weights of experts are contiguous uint8", int8(packed=packed[0])),
        ("packed weights of experts are contiguous uint8", int8(packed=packed.t())),
        ("packed weights of experts are contiguous uint8", int8(packed=packed[:0], offsets=ends[:0])),
        ("weight_scale is .*2, ", int8(weight_scale=scale[0])),
        ("weight_scale is .*2, 6", int8(weight_scale=scale[:1])),
        ("6", int8(weight_scale=scale[:, :5].contiguous())),
        ("weight_scale is contiguous", int8(weight_scale=torch.ones(6, 2).t())),
        ("bias is contiguous float32 .2, 6.", int8(bias=scale[0])),
        ("input_scale is ", int8(input_scale=torch.ones(1))),
        ("offsets are int32 or int64 .2,.", int8(offsets=ends.float())),
        ("offsets are int32 or int64 .2,.", int8(offsets=ends[:1])),
        ("offsets never decrease .* 5 rows of x, got 6 for expert 1 behind 3", int8(offsets=ends + 1)),
        ("offsets never decrease .* got 2 for expert 1 behind 3", int8(offsets=torch.tensor([3, 2]))),
        ("offsets never decrease .* got -1 for expert 0", int8(offsets=torch.tensor([-1, 2]))),
        ("steps are 127 or 128, got 100", int8(steps=100)),
        ("out_dtype is fp32", int8(out_dtype=torch.float64)),
        ("this is no packed weight", int8(packed=torch.zeros_like(packed))),
        ("packed for other kernels .layout 99.", int8(packed=foreign)),
        ("7", int8(packed=mixed)),
        ("pack it again", int8(packed=packed4)),
        ("pack it again", int4(packed=packed)),
        ("6 out_features, got 7", int4(out_features=7)),
        ("group_size is a multiple of 32", int4(group_size=64)),
        ("bias is contiguous float32 .2, 6.", int4(bias=torch.ones(2, 5))),
    ]


@pytest.mark.parametrize("which", ("native", "reference"))
def test_wrong_arguments_are_named(which: str) -> None:
    for message, call in wrong_calls(native_ops() if which == "native" else grouped_and_single()):
        with pytest.raises(ValueError, match=message):
            call()


def test_sums_that_int32_may_not_hold_are_refused() -> None:
    x, scale, ends = torch.ones(1, 131072), torch.ones(1, 1), torch.tensor([1])
    packed = pack(native_ops(), torch.ones(1, 1, 131072, dtype=torch.int8))
    with pytest.raises(ValueError, match="131072 columns may overflow an int32 sum"):
        native_ops().int8_grouped_linear(x, packed, scale, ends, steps=128)


def grouped_and_single() -> Any:
    """The references under one name."""

    class References:
        def __getattr__(self, name: str) -> Any:
            return getattr(grouped_linear, name) if "grouped" in name else getattr(linear, name)

    return References()
