"""The CUDA kernels of the elementwise ops on the CPU, one fiber per CUDA thread, against the references.

Plainly under several schedules, under ASan with UBSan, and under TSan; and nvcc's own PTX of them. Buffers end where
the data ends, so ASan sees a read too far; outputs are full of garbage, so a byte that is not written is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ds_compress.ops.reference import block_quantize, fake_quantize, mask
from ds_compress.ops.sizes import payload_bytes
from tests.native.elementwise import FLOATS, random_bytes, random_values, same
from tests.native.emulator import harness, machine_code, nvcc
from tests.native.emulator.harness import Edit, Library
from tests.native.float_cases import float_cases
from tests.native.programs import DTYPE_NUMBER, INTEGER_OF_SIZE, Case, program, shifted
from tests.native.test_block_quantize import hard_values, random_payloads
from tests.native.test_cuda_machine_code import violations
from tests.native.test_fake_quantize import hard_rows

FOLDER = "csrc/cuda/elementwise"
RUNS = [("plain", 0), ("plain", -1), ("plain", 7), ("asan", 3), ("tsan", 4)]


@functools.cache
def library(name: str, mode: str) -> Library:
    return harness.build(f"{FOLDER}/{name}.cu", mode)


def check(built: Library, cases: list[Case], schedule: int) -> None:
    outcome = harness.run(built, [each for each, _ in cases], schedule)
    assert len(outcome.results) == len(cases) > 0
    for number, (result, (made, expected)) in enumerate(zip(outcome.results, cases, strict=True)):
        for name, wanted in expected.items():
            content = bytearray(result[name].tobytes())
            mine = torch.frombuffer(content, dtype=wanted.dtype) if content else wanted.clone()
            assert same(mine.view(wanted.shape), wanted), (number, name, made.calls)


# --- cases ----------------------------------------------------------------------------------------------------------


def mask_cases() -> Iterator[Case]:
    for number, (dtype, numel) in enumerate(
        (dtype, numel) for dtype in DTYPE_NUMBER for numel in (0, 1, 7, 9, 65, 1000, 2113)
    ):
        bit, size = (0, 3, 13)[number % 3], torch.empty(0, dtype=dtype).element_size()
        packed = random_bytes(-(-(numel + bit) // 8), number)
        weights = random_values(numel, dtype, number, specials=0.2)
        for fill in (0.0, -1.5):
            wanted = weights.clone()
            mask.mask_apply_(wanted, packed, bit, fill)
            pattern = int(torch.tensor(fill, dtype=dtype).view(INTEGER_OF_SIZE[size])) & (2 ** (8 * size) - 1)
            arguments = ("weights", size, numel, "packed", bit, pattern, None)
            yield program(
                {"weights": weights, "packed": packed}, [("dsc_mask_apply", arguments)], {"weights": wanted}
            )
        keep = mask.mask_unpack(packed, numel, bit)
        yield program(
            {"packed": packed},
            [("dsc_mask_unpack", ("packed", bit, numel, "keep", None))],
            {"keep": keep.view(torch.uint8)},
        )
        yield program(
            {"keep": keep.view(torch.uint8)},
            [("dsc_mask_pack", ("keep", numel, "packed", None))],
            {"packed": mask.mask_pack(keep)},
        )
    yield from misaligned_mask_cases()
    for count in (1, 4, 5, 70):
        yield many_masks(count)
    for rows, columns, n, m in (
        (0, 4, 2, 4),
        (3, 17, 2, 4),
        (9, 64, 1, 2),
        (5, 33, 4, 8),
        (2, 7, 3, 5),
        (4, 40, 0, 4),
        (3, 520, 1, 2),
        (5, 64, 3, 8),
        (5, 600, 2, 4),
    ):
        scores = random_values(rows * columns, torch.float32, columns, specials=0.3).view(rows, columns)
        scores = torch.where(scores.isfinite(), scores.round(), scores)
        yield program(
            {"scores": scores},
            [("dsc_mask_n_of_m", ("scores", rows, columns, n, m, "packed", None))],
            {"packed": mask.mask_n_of_m(scores, n, m)},
        )


def misaligned_mask_cases() -> Iterator[Case]:
    """More than a tile, from any element and any bit."""
    for number, (dtype, off) in enumerate((dtype, off) for dtype in DTYPE_NUMBER for off in (1, 3)):
        numel, bit, size = 9001, 5 * number, torch.empty(0, dtype=dtype).element_size()
        packed = random_bytes(-(-(numel + bit) // 8), number)
        weights = random_values(numel, dtype, number, specials=0.2)
        wanted = weights.clone()
        mask.mask_apply_(wanted, packed, bit)
        place = f"weights+{off * size}"
        yield program(
            {"weights": shifted(weights, off), "packed": packed},
            [("dsc_mask_apply", (place, size, numel, "packed", bit, 0, None))],
            {"weights": shifted(wanted, off)},
        )
        keep = mask.mask_unpack(packed, numel, bit)
        yield program(
            {"keep": shifted(keep, off).view(torch.uint8)},
            [("dsc_mask_pack", (f"keep+{off}", numel, "packed", None))],
            {"packed": mask.mask_pack(keep)},
        )


def many_masks(count: int) -> Case:
    """Tensors of very different size, empty ones too, each from an element and a bit of its own."""
    weights, masks, bits, offs = [], [], [], []
    for i in range(count):
        numel, bit, off = (i * i * 37) % 5000 if i % 5 else 4100 * (i % 2), i % 11, i % 4
        weights.append(random_values(numel, torch.float32, i, specials=0.2))
        masks.append(random_bytes(-(-(numel + bit) // 8), i))
        bits.append(bit)
        offs.append(off)
    wanted = [each.clone() for each in weights]
    mask.mask_apply_many_(wanted, masks, bits, 0.5)
    inputs = {f"w{i}": shifted(each, offs[i]) for i, each in enumerate(weights)}
    expected = {f"w{i}": shifted(each, offs[i]) for i, each in enumerate(wanted)}
    places = [f"w{i}+{4 * off}" for i, off in enumerate(offs)]
    arguments = (places, [f"m{i}" for i in range(count)], bits, [each.numel() for each in weights])
    pattern = int(torch.tensor(0.5).view(torch.int32))
    return program(
        inputs | {f"m{i}": each for i, each in enumerate(masks)},
        [("dsc_mask_apply_many", (*arguments, count, 4, pattern, None))],
        expected,
    )


def rows_with_zeros_of_both_signs() -> Case:
    """Their lowest value is far less than a step: the offset is a zero that has its sign."""
    x = torch.tensor([[0.0887, 1.1155, -1e-38, 3e38], [-0.0, 0.0, 2.0, 1e-40], [-1e-3, 1.0, 0.5, -0.0]])
    y, scale, offset, _ = fake_quantize.fake_quantize(
        x, quant_min=0, quant_max=255, steps=256, symmetric=False, with_mask=False
    )
    form = (0, 3, 4, 0, 3, "scale", "offset", 0, 255, 256, None, None)
    return program(
        {"x": x}, [("dsc_fake_quantize", ("x", "y", *form))], {"y": y, "scale": scale, "offset": offset}
    )


def fake_quantize_cases() -> Iterator[Case]:
    yield rows_with_zeros_of_both_signs()
    shapes = [
        (0, 8),
        (3, 0),
        (1, 1),
        (13, 51),
        (9, 64),
        (40, 8),
        (2, 1500),
        (3, 1024),
        (3, 96),
        (7, 400),
        (1, 1504),
        (2, 4096),
        (1, 9000),
        (1, 16500),
        (2, 17001),
        (2, 33000),
        (1, 16384),
    ]
    for number, (dtype, (rows, columns), symmetric) in enumerate(
        (dtype, shape, symmetric) for dtype in FLOATS for shape in shapes for symmetric in (True, False)
    ):
        x = hard_rows(rows, columns, dtype, number)
        arguments = (
            {"quant_min": -127, "quant_max": 127, "steps": 127, "symmetric": True}
            if symmetric
            else {"quant_min": 0, "quant_max": 255, "steps": 256, "symmetric": False}
        )
        numbers = (arguments["quant_min"], arguments["quant_max"], arguments["steps"])
        y, scale, offset, kept = fake_quantize.fake_quantize(x, **arguments, with_mask=True)
        names = ("scale", None if symmetric else "offset")
        ranges = {"scale": scale} if symmetric else {"scale": scale, "offset": offset}
        yield program(
            {"x": x},
            [
                (
                    "dsc_fake_quantize",
                    ("x", "y", DTYPE_NUMBER[dtype], rows, columns, 0, rows, *names, *numbers, "kept", None),
                )
            ],
            {"y": y, "kept": kept, **ranges},
        )
        for count in {1, rows} - {0}:
            given = random_values(count, torch.float32, number).abs() * 0.02 + 1e-3
            moved = None if symmetric else random_values(count, torch.float32, number + 1)
            y, *_, kept = fake_quantize.fake_quantize(x, given, moved, **arguments, with_mask=True)
            inputs = {"x": x, "scale": given} | ({} if moved is None else {"offset": moved})
            yield program(
                inputs,
                [
                    (
                        "dsc_fake_quantize",
                        (
                            "x",
                            "y",
                            DTYPE_NUMBER[dtype],
                            rows,
                            columns,
                            1,
                            count,
                            *names,
                            *numbers,
                            "kept",
                            None,
                        ),
                    )
                ],
                {"y": y, "kept": kept},
            )


def block_cases() -> Iterator[Case]:
    yield from misaligned_block_cases()
    for number, (dtype, numel, bits, block) in enumerate(
        (dtype, numel, bits, block)
        for dtype in FLOATS
        for numel in (0, 5, 130, 4160)
        for bits in (8, 4)
        for block in (32, 128, 160, 256, 512, 1024)
    ):
        parts = 1 + number % 3
        chunk = -(-numel // parts)
        size = payload_bytes(chunk, bits, block)
        x = hard_values(numel, dtype, number, specials=0.002)
        payloads = torch.empty(parts, size, dtype=torch.uint8)
        residual = random_values(numel, torch.float32, number + 1) * 1e-2 if number % 2 else None
        after = None if residual is None else residual.clone()
        block_quantize.block_quantize(x, payloads, after, chunk, bits, block)
        inputs = {"x": x} if residual is None else {"x": x, "residual": residual}
        expected = {"payloads": payloads} if after is None else {"payloads": payloads, "residual": after}
        name = None if residual is None else "residual"
        form = (parts, chunk, bits, block, None)
        yield program(
            inputs,
            [("dsc_block_quantize", ("x", DTYPE_NUMBER[dtype], numel, name, "payloads", *form))],
            expected,
        )
        out = torch.empty_like(x)
        block_quantize.block_dequantize(payloads, out, chunk, bits, block)
        yield program(
            {"payloads": payloads},
            [("dsc_block_dequantize", ("payloads", *form[:-1], "out", DTYPE_NUMBER[dtype], numel, None))],
            {"out": out},
        )
        if dtype is torch.float32:
            yield from sum_cases(numel, bits, block, number)


def misaligned_block_cases() -> Iterator[Case]:
    """Values, residuals and payloads from any byte on that they may begin at."""
    for number, (dtype, bits, block) in enumerate(
        (dtype, bits, block) for dtype in FLOATS for bits in (8, 4) for block in (128, 2048)
    ):
        numel, size = 4224, torch.empty(0, dtype=dtype).element_size()
        off, rest_off, payload_off = ((3, 0, 0), (0, 1, 0), (0, 0, 3), (0, 0, 2))[number % 4]
        x = hard_values(numel, dtype, number, specials=0.0002)
        payloads = torch.empty(1, payload_bytes(numel, bits, block), dtype=torch.uint8)
        residual = random_values(numel, torch.float32, number + 1) * 1e-2
        after = residual.clone()
        block_quantize.block_quantize(x, payloads, after, numel, bits, block)
        inputs = {"x": shifted(x, off), "residual": shifted(residual, rest_off)}
        inputs |= {"payloads": torch.full((payload_off + payloads.numel(),), 7, dtype=torch.uint8)}
        form = (1, numel, bits, block, None)
        places = (f"x+{off * size}", DTYPE_NUMBER[dtype], numel, f"residual+{4 * rest_off}")
        yield program(
            inputs,
            [("dsc_block_quantize", (*places, f"payloads+{payload_off}", *form))],
            {
                "payloads": shifted(payloads.view(-1), payload_off),
                "residual": shifted(after, rest_off),
            },
        )
        out = torch.empty_like(x)
        block_quantize.block_dequantize(payloads, out, numel, bits, block)
        places = (
            f"payloads+{payload_off}",
            *form[:-1],
            f"out+{off * size}",
            DTYPE_NUMBER[dtype],
            numel,
            None,
        )
        yield program(
            {"payloads": shifted(payloads.view(-1), payload_off), "out": shifted(torch.zeros_like(out), off)},
            [("dsc_block_dequantize", places)],
            {"out": shifted(out, off)},
        )


def sum_cases(numel: int, bits: int, block: int, seed: int) -> Iterator[Case]:
    count, multiplier = 1 + seed % 4, float(np.float32(1 / 3))
    payloads = random_payloads(count, numel, bits, block, seed, specials=0.05)
    form = (count, numel, bits, block, multiplier)
    out = torch.empty(numel)
    block_quantize.block_reduce(payloads, out, bits, block, multiplier)
    yield program(
        {"payloads": payloads}, [("dsc_block_reduce", ("payloads", *form, "out", None))], {"out": out}
    )
    for residual in (None, random_values(numel, torch.float32, seed) * 1e-2):
        after = None if residual is None else residual.clone()
        payload = torch.empty(payloads.shape[1], dtype=torch.uint8)
        block_quantize.block_reduce_quantize(payloads, payload, after, numel, bits, block, multiplier)
        inputs = {"payloads": payloads} if residual is None else {"payloads": payloads, "residual": residual}
        expected = {"payload": payload} if after is None else {"payload": payload, "residual": after}
        name = None if residual is None else "residual"
        yield program(
            inputs, [("dsc_block_reduce_quantize", ("payloads", *form, name, "payload", None))], expected
        )


CASES = {
    "mask": mask_cases,
    "fake_quantize": fake_quantize_cases,
    "fake_quantize_float": float_cases,
    "block_quantize": block_cases,
}


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", CASES)
@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_kernels_give_the_bits_of_the_reference(source: str, mode: str, schedule: int) -> None:
    check(library(source, mode), list(CASES[source]()), schedule)


@pytest.mark.skipif(not nvcc.available(), reason="nvcc is not installed")
@pytest.mark.parametrize("source", CASES)
def test_nvcc_s_ptx_gives_the_bits_of_the_reference(source: str) -> None:
    check(library(source, "ptx"), list(CASES[source]()), 0)


# --- planted bugs --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not nvcc.available(), reason="nvcc is not installed")
def test_accesses_of_four_bytes_are_seen() -> None:
    words = ", ".join(f"load_wide<uint32_t>(mask + 16 * i + {4 * word})" for word in range(4))
    edit = Edit(f"{FOLDER}/mask.cuh", "load_passing<uint4>(mask + 16 * i)", f"make_uint4({words})")
    kernels = machine_code.inspect(machine_code.cubin(f"{FOLDER}/mask.cu", "90", [edit]))
    found = [each for name, code in kernels.items() for each in violations(name, "90", code)]
    assert found == ["mask_pack_kernel for sm_90: 0 LDG.128, at least 2 are needed"]
