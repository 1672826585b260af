"""What the elementwise kernels do in a benchmark, beside plain copies and torch's own: one Run each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

CACHE_BYTES = 60e6
BLOCK, RANKS = {8: 512, 4: 128}, 2  # the blocks that a run has by default


@dataclass(frozen=True)
class Run:
    """`calls`: the same operation on different memory; `bytes`: what one of them has to move."""

    name: str
    bytes: float
    calls: list[Callable[[], object]]


def rotated(name: str, bytes_: float, make: Callable[[int], Callable[[], object]]) -> Run:
    """`make(i)` makes the i-th call on memory of its own."""
    return Run(name, bytes_, [make(i) for i in range(max(2, int(4 * CACHE_BYTES / bytes_) + 1))])


SYMMETRIC = {"quant_min": -127, "quant_max": 127, "steps": 127, "symmetric": True}


ASYMMETRIC = {"quant_min": 0, "quant_max": 255, "steps": 256, "symmetric": False}


# Floats in blocks: name, block (0: the whole row), arguments. NVFP4 needs a global scale, too.
FLOATS: list[tuple[str, int, dict[str, Any]]] = [
    ("MXFP4", 32, {"exponent_bits": 2, "mantissa_bits": 1, "largest": 6.0, "scale_kind": 1}),
    ("NVFP4", 16, {"exponent_bits": 2, "mantissa_bits": 1, "largest": 6.0, "scale_kind": 2}),
    ("FP8, blocks of 128", 128, {"exponent_bits": 4, "mantissa_bits": 3, "largest": 448.0, "scale_kind": 0}),
    ("FP8, rows of 4096", 0, {"exponent_bits": 4, "mantissa_bits": 3, "largest": 448.0, "scale_kind": 0}),
]


def peers(numel: int, device: torch.device) -> Iterator[Run]:
    """Copies, of all elements first and of fewer, and what torch itself offers for a mask."""

    def copy(count: int) -> Run:
        def make(i: int) -> Callable[[], object]:
            source, target = torch.randn(count, device=device), torch.empty(count, device=device)
            return lambda: target.copy_(source)

        return rotated("copy_" if count == numel else f"copy_ of {8e-6 * count:.0f} MB", 8 * count, make)

    def multiply(i: int) -> Callable[[], object]:
        weights, keep = torch.randn(numel, device=device), torch.rand(numel, device=device) < 0.5
        return lambda: weights.mul_(keep)

    for part in (1, 2, 4, 8, 16):
        yield copy(numel // part)
    yield rotated("torch: mul_ by a bool mask", 9 * numel, multiply)


def mask_runs(ops: Any, numel: int, device: torch.device) -> Iterator[Run]:
    for dtype in (torch.float32, torch.bfloat16):
        size, name = torch.empty(0, dtype=dtype).element_size(), str(dtype)[6:]
        moved = 2 * size * numel + numel / 8

        def new(i: int, dtype: torch.dtype = dtype) -> Callable[[], object]:
            weights = torch.randn(numel, device=device).to(dtype)
            packed = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, device=device)
            fills = [0.0, 1.0]  # each call changes every element that is not kept

            def call() -> None:
                fills.reverse()
                ops.mask_apply_(weights, packed, 0, fills[0])

            return call

        def again(i: int, dtype: torch.dtype = dtype) -> Callable[[], object]:
            weights = torch.randn(numel, device=device).to(dtype)
            packed = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, device=device)
            return lambda: ops.mask_apply_(weights, packed, 0, 0.0)

        yield rotated(f"mask_apply_ {name}, a new mask", moved, new)
        yield rotated(f"mask_apply_ {name}, applied before", size * numel + numel / 8, again)

    def shifted(i: int) -> Callable[[], object]:
        weights = torch.randn(numel + 8, device=device)
        packed = torch.randint(0, 256, (numel // 8 + 2,), dtype=torch.uint8, device=device)
        return lambda: ops.mask_apply_(weights[3 : 3 + numel], packed, 3, 0.0)

    yield rotated("mask_apply_, 3 elements and bits off, before", 4 * numel + numel / 8, shifted)

    def pack(i: int) -> Callable[[], object]:
        keep = torch.rand(numel, device=device) < 0.5
        return lambda: ops.mask_pack(keep)

    def unpack(i: int) -> Callable[[], object]:
        packed = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, device=device)
        return lambda: ops.mask_unpack(packed, numel)

    def choose(i: int) -> Callable[[], object]:
        scores = torch.randn(numel // 4096, 4096, device=device).abs_()
        return lambda: ops.mask_n_of_m(scores, 2, 4)

    yield rotated("mask_pack", numel * 9 / 8, pack)
    yield rotated("mask_unpack", numel * 9 / 8, unpack)
    yield rotated("mask_n_of_m 2:4", 4 * numel + numel / 8, choose)


def fake_quantize_runs(ops: Any, numel: int, device: torch.device) -> Iterator[Run]:
    cases: list[tuple[str, torch.dtype, int, dict[str, Any], bool, bool]] = [
        ("rows of 128", torch.float32, 128, SYMMETRIC, False, False),
        ("rows of 768", torch.float32, 768, SYMMETRIC, False, False),
        ("rows of 4096", torch.float32, 4096, SYMMETRIC, False, False),
        ("rows of 4096, asymmetric", torch.float32, 4096, ASYMMETRIC, False, False),
        ("rows of 4096, mask", torch.float32, 4096, SYMMETRIC, True, False),
        ("rows of 4096", torch.bfloat16, 4096, SYMMETRIC, False, False),
        ("rows of 16384", torch.bfloat16, 16384, SYMMETRIC, False, False),
        ("rows of 4096, ranges given", torch.float32, 4096, SYMMETRIC, False, True),
        ("one row", torch.float32, numel, SYMMETRIC, False, False),
        ("one row, range given, mask", torch.float32, numel, SYMMETRIC, True, True),
    ]
    for title, dtype, columns, grid, keep, given in cases:
        columns = min(columns, numel)
        size, rows = torch.empty(0, dtype=dtype).element_size(), numel // columns
        passes = 2 if given or columns <= 16384 else 3  # the range of a long row is known after it was read
        moved = passes * size * rows * columns + (rows * columns / 8 if keep else 0)

        def make(
            i: int,
            rows: int = rows,
            columns: int = columns,
            dtype: torch.dtype = dtype,
            grid: dict[str, Any] = grid,
            keep: bool = keep,
            given: bool = given,
        ) -> Callable[[], object]:
            x = torch.randn(rows, columns, device=device).to(dtype)
            scale = torch.full((rows,), 0.03, device=device) if given else None
            return lambda: ops.fake_quantize(x, scale, **grid, with_mask=keep)

        yield rotated(f"fake_quantize {str(dtype)[6:]}, {title}", moved, make)


def float_runs(ops: Any, numel: int, device: torch.device) -> Iterator[Run]:
    columns = min(4096, numel)
    rows = numel // columns
    for dtype in (torch.float32, torch.bfloat16):
        size, name = torch.empty(0, dtype=dtype).element_size(), str(dtype)[6:]
        cases = [(title, block, form, False) for title, block, form in FLOATS]
        for title, block, form, keep in (*cases, ("MXFP4, mask", 32, FLOATS[0][2], True)):
            scales = rows * columns // (block or columns)
            moved = 2 * size * rows * columns + 4 * scales + (rows * columns / 8 if keep else 0)

            def make(
                i: int,
                dtype: torch.dtype = dtype,
                block: int = block,
                form: dict[str, Any] = form,
                keep: bool = keep,
            ) -> Callable[[], object]:
                x = torch.randn(rows, columns, device=device).to(dtype)
                wanted = torch.full((1,), 500.0, device=device) if form["scale_kind"] == 2 else None
                return lambda: ops.fake_quantize_float(
                    x, None, wanted, **form, block=block or columns, with_mask=keep
                )

            yield rotated(f"fake_quantize_float {name}, {title}", moved, make)


def block_runs(ops: Any, payload_bytes: Any, numel: int, device: torch.device) -> Iterator[Run]:
    for bits, dtype in ((8, torch.float32), (4, torch.float32), (8, torch.bfloat16), (4, torch.bfloat16)):
        size, name = torch.empty(0, dtype=dtype).element_size(), f"int{bits} of {str(dtype)[6:]}"
        bytes_ = payload_bytes(numel, bits, BLOCK[bits])

        def tensors(
            bits: int = bits, dtype: torch.dtype = dtype, bytes_: int = bytes_
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(numel, device=device).to(dtype)
            payload = torch.zeros(1, bytes_, dtype=torch.uint8, device=device)
            ops.block_quantize(x, payload, None, numel, bits, BLOCK[bits])
            return x, payload

        def quantize(i: int, bits: int = bits, tensors: Any = tensors) -> Callable[[], object]:
            x, payload = tensors()
            return lambda: ops.block_quantize(x, payload, None, numel, bits, BLOCK[bits])

        def feedback(i: int, bits: int = bits, tensors: Any = tensors) -> Callable[[], object]:
            x, payload = tensors()
            residual = torch.zeros(numel, device=device)
            return lambda: ops.block_quantize(x, payload, residual, numel, bits, BLOCK[bits])

        def dequantize(i: int, bits: int = bits, tensors: Any = tensors) -> Callable[[], object]:
            out, payload = tensors()
            return lambda: ops.block_dequantize(payload, out, numel, bits, BLOCK[bits])

        yield rotated(f"block_quantize {name}", size * numel + bytes_, quantize)
        yield rotated(f"block_quantize {name}, feedback", (8 + size) * numel + bytes_, feedback)
        yield rotated(f"block_dequantize {name}", size * numel + bytes_, dequantize)
        if dtype is not torch.float32:
            continue

        def parts(bits: int = bits, bytes_: int = bytes_) -> torch.Tensor:
            payloads = torch.zeros(RANKS, bytes_, dtype=torch.uint8, device=device)
            ops.block_quantize(
                torch.randn(RANKS * numel, device=device), payloads, None, numel, bits, BLOCK[bits]
            )
            return payloads

        def reduce(i: int, bits: int = bits, parts: Any = parts) -> Callable[[], object]:
            payloads, out = parts(), torch.empty(numel, device=device)
            return lambda: ops.block_reduce(payloads, out, bits, BLOCK[bits], 0.5)

        def requantize(i: int, bits: int = bits, parts: Any = parts) -> Callable[[], object]:
            payloads = parts()
            payload = torch.empty_like(payloads[0])
            return lambda: ops.block_reduce_quantize(payloads, payload, None, numel, bits, BLOCK[bits], 0.5)

        yield rotated(f"block_reduce int{bits}, {RANKS} payloads", RANKS * bytes_ + 4 * numel, reduce)
        yield rotated(f"block_reduce_quantize int{bits}, {RANKS} payloads", (RANKS + 1) * bytes_, requantize)


def many_runs(ops: Any, device: torch.device) -> Iterator[Run]:
    """200 tensors as a small model has them: in one launch, and one each."""

    def tensors() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sizes = [768, 768 * 768, 768, 3072 * 768] * 50
        weights = [torch.randn(size // 8, device=device) for size in sizes]
        return weights, [
            torch.randint(0, 256, (-(-w.numel() // 8),), dtype=torch.uint8, device=device) for w in weights
        ]

    bytes_ = sum(w.numel() * 4 + p.numel() for w, p in zip(*tensors(), strict=True))

    def together(i: int) -> Callable[[], object]:
        weights, packed = tensors()
        return lambda: ops.mask_apply_many_(weights, packed, [0] * len(weights))

    def one_by_one(i: int) -> Callable[[], object]:
        weights, packed = tensors()

        def call() -> None:
            for w, p in zip(weights, packed, strict=True):
                ops.mask_apply_(w, p)

        return call

    yield rotated("200 small tensors, mask_apply_many_", bytes_, together)
    yield rotated("200 small tensors, mask_apply_ each", bytes_, one_by_one)
