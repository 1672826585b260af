"""attention: the reference against the formula in fp64 and against torch's own; every instruction set against both."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional

from ds_compress.ops.reference.attention import attention as reference
from tests.native.elementwise import native_ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 40, 63, 65)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
NAN, INF = float("nan"), float("inf")
ODD_NAN = torch.tensor(0x7F8001FF, dtype=torch.int32).view(torch.float32)


def strided(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype, draw: random.Random) -> Any:
    """Heads beside each other as a linear layer gives them, or contiguous, or with gaps within a token."""
    layout = draw.randrange(3)
    if layout == 0:
        return torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    if layout == 1:
        return torch.randn(batch, heads, tokens, width).to(dtype)
    return torch.randn(batch, heads, tokens, 2 * width).to(dtype)[..., ::2]


def random_call(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, width = draw.choice(FLOATS), draw.choice(SIZES)
    groups, batch, queries, keys = draw.choice((1, 2, 3)), draw.choice((1, 2, 3)), *draw.choices(SIZES, k=2)
    heads = groups * draw.choice((1, 1, 2, 4))
    shape = (draw.choice((1, batch)), draw.choice((1, heads)), draw.choice((1, queries)), keys)
    mask = draw.choice([None, torch.rand(shape) < draw.choice((0.1, 0.8)), 3 * torch.randn(shape)])
    if mask is not None and mask.is_floating_point():
        mask[..., draw.randrange(keys)] = draw.choice([-INF, torch.finfo(torch.float32).min, 0.0])
    if mask is not None and draw.random() < 0.3:
        mask = mask.expand(batch, heads, queries, keys)  # strides of 0
    return {
        "query": strided(batch, heads, queries, width, dtype, draw),
        "key": strided(batch, groups, keys, width, dtype, draw),
        "value": strided(batch, groups, keys, draw.choice((width, draw.choice(SIZES))), dtype, draw),
        "mask": mask,
        "scale": draw.choice((1.0, width**-0.5, 5.0)),
        "is_causal": draw.random() < 0.3,
    }


def exact(call: dict[str, Any]) -> torch.Tensor:
    """fp64, one query at a time."""
    query, key, value = (call[name].double() for name in ("query", "key", "value"))
    batch, heads, queries, _ = query.shape
    mask, shared = call["mask"], heads // key.shape[1]
    if mask is not None:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    y = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                scores = call["scale"] * key[b, h // shared] @ query[b, h, q]
                if mask is not None and mask.dtype is torch.bool:
                    scores[~mask[b, h, q]] = -INF
                elif mask is not None:
                    scores += mask[b, h, q].double()
                if call["is_causal"]:
                    scores[q + 1 :] = -INF
                if scores.max() > -INF:
                    y[b, q, h] = scores.softmax(0) @ value[b, h // shared]
    return y


def check(y: torch.Tensor, call: dict[str, Any]) -> None:
    wanted, dtype = exact(call), call["query"].dtype
    assert y.dtype is dtype
    assert y.is_contiguous()
    assert y.shape == wanted.shape
    largest = call["value"].double().abs().max()
    scores = call["scale"] * call["query"].double().abs().max() * call["key"].double().abs().max()
    # What fp32 loses of a score is lost of its power; then the result is rounded to its dtype.
    bound = largest * (2e-6 + 2.0**-22 * scores * call["query"].shape[3]) + ROUNDING[dtype] * wanted.abs()
    assert bool(((y.double() - wanted).abs() <= bound).all()), call


@pytest.mark.parametrize("seed", range(60))
def test_both_are_the_formula(seed: int) -> None:
    call = random_call(seed)
    check(reference(**call), call)
    check(native_ops().attention(**call), call)


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_what_torch_computes(is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 40, 32) for _ in range(3))
    theirs = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)
    mine = native_ops().attention(q, k, v, scale=32**-0.5, is_causal=is_causal)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [reference, lambda *a, **k: native_ops().attention(*a, **k)])
@pytest.mark.parametrize("value", [NAN, ODD_NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value", "mask"])
def test_what_is_not_finite_makes_nan_of_what_it_reaches(attention: Any, where: str, value: Any) -> None:
    torch.manual_seed(1)
    given = {"query": torch.rand(1, 2, 9, 16) + 0.1, "key": torch.rand(1, 2, 20, 16) + 0.1}
    given |= {"value": torch.randn(1, 2, 20, 16), "mask": torch.zeros(1, 2, 9, 20)}
    given[where][0, 1, 3, 5] = value
    y = attention(**given, scale=1.0)
    clean = attention(**given | {where: torch.nan_to_num(given[where], 0.5, 0.5, 0.5)}, scale=1.0)
    reached = torch.zeros_like(y, dtype=torch.bool)
    if where == "value":
        reached[:, :, 1, 5] = True
        assert bool((y[reached].isnan() | y[reached].isinf()).all())
    elif where == "key" and value == -INF:  # a score of -Inf counts for nothing
        reached[:, :, 1] = True
        assert bool(y.isfinite().all())
    elif where == "mask" and value == -INF:
        reached[:, 3, 1] = True
        assert bool(y.isfinite().all())
    elif where == "query" and value == -INF:  # all scores are -Inf: no key counts
        reached[:, 3, 1] = True
        assert bool((y[reached] == 0).all())
    else:
        reached[:, :, 1] = where == "key"
        reached[:, 3, 1] = True
        assert bool(y[reached].isnan().all())
    assert torch.equal(y[~reached], clean[~reached])


@pytest.mark.parametrize("attention", [reference, lambda *a, **k: native_ops().attention(*a, **k)])
def test_a_query_without_keys_gives_zeros(attention: Any) -> None:
    q, k = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 6, 8)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1] = False
    y = attention(q, k, k, mask, scale=1.0)
    assert bool((y[1] == 0).all())
    assert bool((y[0] != 0).all())
    assert attention(q, k[:, :, :0], k[:, :, :0], scale=1.0).count_nonzero() == 0
    assert attention(q[:0], k[:0], k[:0], scale=1.0).shape == (0, 5, 1, 8)


def test_threads_and_strides_change_no_bit() -> None:
    torch.manual_seed(2)
    together = torch.randn(3, 70, 3 * 8 * 32)
    q, k, v = (part.view(3, 70, 8, 32).transpose(1, 2) for part in together.chunk(3, -1))
    ops, threads = native_ops(), torch.get_num_threads()
    y = ops.attention(q, k, v, scale=0.2)
    assert torch.equal(ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=0.2), y)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.attention(q, k, v, scale=0.2), y)
    finally:
        torch.set_num_threads(threads)


BAD = {
    "query is": {"query": torch.zeros(2, 4, 5)},
    "key is \\(": {"key": torch.zeros(2, 2, 6, 8, dtype=torch.bfloat16)},
    "value is \\(": {"value": torch.zeros(1, 2, 6, 8)},
    "as wide as query": {"key": torch.zeros(2, 2, 6, 7)},
    "heads and tokens of key": {"value": torch.zeros(2, 2, 5, 8)},
    "multiple of those of key": {"key": torch.zeros(2, 3, 6, 8), "value": torch.zeros(2, 3, 6, 8)},
    "mask is": {"mask": torch.zeros(2, 4, 5, 7)},
    "mask is bool": {"mask": torch.zeros(2, 4, 5, 6, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("attention", [reference, lambda *a, **k: native_ops().attention(*a, **k)])
def test_bad_arguments_are_named(attention: Any, message: str) -> None:
    good = {
        "query": torch.zeros(2, 4, 5, 8),
        "key": torch.zeros(2, 2, 6, 8),
        "value": torch.zeros(2, 2, 6, 8),
    }
    with pytest.raises(ValueError, match=message):
        attention(**good | BAD[message], scale=1.0)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_is_the_formula(isa: str) -> None:
    flags = {
        "scalar": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512_vnni"},
    }
    with open("/proc/cpuinfo") as file:
        known = set(file.read().split())
    if not flags[isa] <= known:
        pytest.skip(f"this CPU has no {isa}")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.native import test_attention as t; t.run_all()"],
        env=os.environ | {"DS_COMPRESS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == [str(len(range(100, 160))), "agree"]


def run_all() -> None:
    seeds = range(100, 160)
    for seed in seeds:
        call = random_call(seed)
        check(native_ops().attention(**call), call)
    assert math.isnan(native_ops().attention(*(torch.full((1, 1, 1, 1), NAN),) * 3, scale=1.0).item())
    print(len(seeds), "agree")
