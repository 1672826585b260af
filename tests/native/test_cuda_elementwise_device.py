"""The elementwise kernels on a CUDA device at sizes that fill it, from any address, and captured in a CUDA graph.

What they are held against are the CPU kernels, which the other tests hold against the reference. The same cases as on
the CPU are in test_cuda_device.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ds_compress.ops import library
from ds_compress.ops.reference.float_formats import FloatFormat, ScaleKind
from ds_compress.ops.sizes import payload_bytes
from tests.native.cases import CASES, Case
from tests.native.elementwise import FLOATS, random_bytes, random_values, same
from tests.native.float_values import (
    FORMATS,
    KINDS,
    arguments_of,
    global_scale_for,
    hard_blocks,
)
from tests.native.test_contract import as_list, tensors

pytestmark = pytest.mark.gpu

NUMEL = 700_019


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_COMPRESS_CUDA", "1")
        yield library.native()


def on_cuda(value: Any) -> Any:
    """A copy there. What begins inside of its memory does so there too: addresses matter."""
    if isinstance(value, list):
        return [on_cuda(each) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.as_strided((value.storage_offset() + value.numel(),), (1,), 0).to("cuda")
    return whole[value.storage_offset() :].view(value.shape)


def check(call: Callable[..., Any], *arguments: Any, written: tuple[int, ...] = ()) -> None:
    """`call` on CPU tensors and on their copies: results and the arguments that it writes are equal in every bit."""
    there = [on_cuda(each) for each in arguments]
    theirs, mine = tensors(call(*arguments)), tensors(call(*there))
    for i in written:
        theirs += arguments[i] if isinstance(arguments[i], list) else [arguments[i]]
        mine += there[i] if isinstance(there[i], list) else [there[i]]
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert same(a.cpu(), b), f"result {number}"


@pytest.mark.parametrize("off", [0, 1, 3])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_masks(ops: Any, dtype: torch.dtype, off: int) -> None:
    bits = random_bytes(-(-(NUMEL + 5) // 8) + 1, 1)
    for bit in (0, 5):
        for packed in (bits, bits[1:]):
            weights = random_values(NUMEL, dtype, 2, specials=0.01, offset=off)
            check(ops.mask_apply_, weights.clone() if off == 0 else weights, packed, bit, 0.5, written=(0,))


@pytest.mark.parametrize("off", [0, 3])
def test_packing(ops: Any, off: int) -> None:
    packed = random_bytes(-(-NUMEL // 8) + 2, 1)
    keep = ops.mask_unpack(packed, NUMEL + off, 0)[off:]
    check(ops.mask_pack, keep)
    for bit in (0, 1, 9):
        check(ops.mask_unpack, packed[off:] if off else packed, NUMEL - 40, bit)
    for columns, n, m in ((4096, 2, 4), (4096, 1, 2), (1000, 3, 8), (1001, 2, 4), (640, 5, 16)):
        scores = random_values(800 * columns, torch.float32, columns, offset=off).view(800, columns)
        check(ops.mask_n_of_m, scores, n, m)


def test_many_tensors(ops: Any) -> None:
    """More than one launch takes, of mixed dtypes, empty ones among them."""
    weights, masks, bits = [], [], []
    for i in range(900):
        numel = (0, 7, 768, 4097, 33_000)[i % 5] + i
        weights.append(random_values(numel, (*FLOATS, torch.float64)[i % 4], i, offset=i % 3))
        bits.append(i % 13)
        masks.append(random_bytes(-(-(numel + bits[-1]) // 8), i))
    check(ops.mask_apply_many_, weights, masks, bits, -2.0, written=(0,))


SHAPES = [
    (4000, 32),
    (4000, 128),
    (1000, 768),
    (301, 2048),
    (300, 4096),
    (77, 8192),
    (40, 16384),
    (9, 40_000),
]
ODD_SHAPES = [(999, 51), (33, 20_001), (1, 1_000_003), (1, 1 << 20), (3, 1 << 18), (70_000, 4)]
GRIDS = {
    "int8": {"quant_min": -127, "quant_max": 127, "steps": 127, "symmetric": True},
    "full": {"quant_min": -128, "quant_max": 127, "steps": 128, "symmetric": True},
    "uint8": {"quant_min": 0, "quant_max": 255, "steps": 256, "symmetric": False},
    "uint4": {"quant_min": 0, "quant_max": 15, "steps": 15, "symmetric": False},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fake_quantization(ops: Any, dtype: torch.dtype, grid: str) -> None:
    for number, (rows, columns) in enumerate(SHAPES + ODD_SHAPES):
        # A row in some has a value that is not finite, or only tiny ones.
        x = random_values(rows * columns, dtype, number, specials=0.1 / columns, offset=3 * (number % 5 == 4))
        x = x.view(rows, columns)
        x[rows // 2] *= 1e-37
        for keep in (False, True):
            check(lambda x, keep=keep: ops.fake_quantize(x, **GRIDS[grid], with_mask=keep), x)
        for count in {1, rows}:
            scale = random_values(count, torch.float32, number).abs() * 0.02 + 1e-3
            offset = None if GRIDS[grid]["symmetric"] else random_values(count, torch.float32, number + 1)
            check(lambda x, s, o: ops.fake_quantize(x, s, o, **GRIDS[grid], with_mask=True), x, scale, offset)


# Blocks in vectors of neighbouring lanes, in registers of a warp or more, odd ones, and long ones.
BLOCKS = ((20_001, 16), (9_000, 32), (3_000, 128), (999, 256), (999, 8), (999, 96), (300, 768), (70, 4096))
ODD_BLOCKS = ((5_000, 17), (300, 1000), (7, 50_001), (1, 3_000_001))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", FORMATS, ids=lambda number: number.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fake_quantization_to_small_floats(
    ops: Any, dtype: torch.dtype, number: FloatFormat, kind: ScaleKind
) -> None:
    for seed, (blocks, block) in enumerate(BLOCKS + ODD_BLOCKS):
        x = hard_blocks(blocks, block, block, dtype, seed, specials=0.1 / block, offset=3 * (seed % 5 == 4))
        arguments = arguments_of(number, kind, block)
        wanted = global_scale_for(x, number, kind)
        for keep in (False, True):
            check(
                lambda x, g, arguments=arguments, keep=keep: ops.fake_quantize_float(
                    x, None, g, **arguments, with_mask=keep
                ),
                x,
                wanted,
            )
        for count in {1, blocks}:
            scale = random_values(count, torch.float32, seed, specials=0.1).view(-1, 1) * 0.02
            check(
                lambda x, s, arguments=arguments: ops.fake_quantize_float(x, s, **arguments, with_mask=True),
                x,
                scale,
            )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_payloads(ops: Any, dtype: torch.dtype, bits: int) -> None:
    for block in (32, 128, 256, 512, 1024, 8192):
        for parts, off, rest_off, payload_off in (
            (1, 0, 0, 0),
            (3, 0, 0, 0),
            (1, 3, 0, 0),
            (1, 0, 1, 0),
            (2, 0, 0, 3),
        ):
            chunk = -(-200_003 // parts)
            numel, size = chunk * parts - parts // 2, payload_bytes(chunk, bits, block)
            x = random_values(numel, dtype, block, specials=1e-5, offset=off)
            rest = random_values(numel, torch.float32, block + 1, offset=rest_off) * 1.0
            residual = torch.cat([torch.zeros(rest_off), rest])[rest_off:]
            payloads = torch.zeros(parts * size + payload_off, dtype=torch.uint8)[payload_off:].view(
                parts, size
            )
            form = (chunk, bits, block)
            check(ops.block_quantize, x, payloads.clone(), None, *form, written=(1,))
            check(ops.block_quantize, x, payloads, residual, *form, written=(1, 2))
            out = torch.empty(numel + off, dtype=dtype)[off:]
            check(ops.block_dequantize, payloads, out, *form, written=(1,))
            summands = payloads[:, :size]
            total = torch.empty(chunk + rest_off)[rest_off:]
            check(ops.block_reduce, summands, total, bits, block, 1 / 3, written=(1,))
            payload = torch.zeros(size, dtype=torch.uint8)
            for correction in (None, residual[:chunk]):
                arguments = (summands, payload.clone(), correction, chunk, bits, block, 1 / 3)
                check(ops.block_reduce_quantize, *arguments, written=(1,) if correction is None else (1, 2))


@pytest.mark.parametrize("bits", [8, 4])
def test_grids_that_go_round(ops: Any, bits: int) -> None:
    """More blocks than a grid begins at once."""
    numel, block = 20_000_003, {8: 512, 4: 128}[bits]
    x = random_values(numel, torch.float32, 1, specials=1e-6)
    payloads = torch.zeros(1, payload_bytes(numel, bits, block), dtype=torch.uint8)
    residual, out = torch.zeros(numel), torch.empty(numel)
    check(ops.block_quantize, x, payloads, residual, numel, bits, block, written=(1, 2))
    check(ops.block_dequantize, payloads, out, numel, bits, block, written=(1,))
    check(ops.block_reduce, payloads, out, bits, block, 0.5, written=(1,))
    check(
        ops.block_reduce_quantize, payloads, payloads[0].clone(), None, numel, bits, block, 0.5, written=(1,)
    )
    check(ops.mask_apply_, x, random_bytes(-(-numel // 8), 2), 0, written=(0,))


@pytest.mark.parametrize("case", [case for case in CASES if "linear" not in case.op], ids=str)
def test_a_captured_graph_does_what_the_call_does(case: Case, ops: Any) -> None:
    op = getattr(ops, case.op)
    args, kwargs = case.arguments("cuda")
    eager = copy.deepcopy(args)
    expected = tensors(op(*eager, **kwargs))
    captured = copy.deepcopy(args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        op(*copy.deepcopy(args), **kwargs)  # whatever is made once is made
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tensors(op(*captured, **kwargs))
    for _ in range(2):
        for index in case.mutated:
            for mine, fresh in zip(as_list(captured[index]), as_list(args[index]), strict=True):
                mine.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        for mine, theirs in zip(results, expected, strict=True):
            assert same(mine, theirs)
        for index in case.mutated:
            for mine, theirs in zip(as_list(captured[index]), as_list(eager[index]), strict=True):
                assert same(mine, theirs)
