"""What the device itself reaches here and now: bytes per second of a copy, and the rates of large products in torch.

Everything else is told as a percentage of these, since a card's clocks and its memory are not those of its data sheet.
Inputs are random and rotate through more than the L2 cache holds; a figure is the median of calls between two events.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .record import Figures

TURNS = 3  # sets of inputs
COPY, BF16, INT8, FP8 = "copy", "bf16 product", "int8 product", "fp8 product"
RATE_OF = {"bf16": BF16, "int8": INT8, "int4": INT8, "_int_mm": INT8, "fp8": FP8, "_scaled_mm": FP8}


def measure(device: torch.device, quick: bool) -> Figures:
    """{ceiling: {"GB/s" or "TFLOP/s" (a multiplication and an addition are two)}}; fp8 only where torch has it."""
    size, calls = (256, 3) if quick else (8192, 12)
    found: dict[str, dict[str, float]] = {}
    for megabytes in (1,) if quick else (100, 400, 1600):
        found[f"{COPY}, {megabytes} MB"] = {"GB/s": copy_bandwidth(device, megabytes << 20, calls) / 1e9}
    for name, rate in {BF16: bf16_rate, INT8: int8_rate, FP8: fp8_rate}.items():
        try:
            found[name] = {"TFLOP/s": rate(device, size, calls) / 1e12}
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            print(f"no {name} here: {str(error).splitlines()[0]}")
    return found


def add_percentages(parts: Mapping[str, Any]) -> None:
    """Gives every figure in TOP/s of the products its percentage of this device's rate for that kind of product.

    `parts` as in the JSON of a check. The kind is the last word of a variant's name that names one; int4 weights are
    multiplied as int8.
    """
    ceilings = parts.get("ceilings", {}).get("figures", {})
    for variant, figures in parts.get("products", {}).get("figures", {}).items():
        kinds = [word for word in re.findall(r"[a-z_]+\d*", variant) if word in RATE_OF]
        rate = ceilings.get(RATE_OF[kinds[-1]], {}).get("TFLOP/s") if kinds else None
        if rate and "TOP/s" in figures:
            figures["percent of the device's rate"] = 100 * figures["TOP/s"] / rate


def copy_bandwidth(device: torch.device, size: int, calls: int = 12) -> float:
    """Bytes per second of copy_ on `size` bytes, those read and those written both counted."""
    turns = []
    for _ in range(TURNS):
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        turns.append(partial(torch.empty_like(source).copy_, source))
    return 2 * size / median_seconds(turns, device, calls)


def bf16_rate(device: torch.device, size: int, calls: int) -> float:
    """Operations per second of a product of two square bf16 matrices; likewise below."""
    return _rate(lambda a, b: a @ b.t(), torch.bfloat16, device, size, calls)


def int8_rate(device: torch.device, size: int, calls: int) -> float:
    return _rate(lambda a, b: torch._int_mm(a, b.t()), torch.int8, device, size, calls)


def fp8_rate(device: torch.device, size: int, calls: int) -> float:
    one = torch.ones((), device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _rate(product, torch.float8_e4m3fn, device, size, calls)


def _rate(
    product: Callable[[torch.Tensor, torch.Tensor], object],
    dtype: torch.dtype,
    device: torch.device,
    size: int,
    calls: int,
) -> float:
    turns = [partial(product, *_pair(device, size, dtype)) for _ in range(TURNS)]
    return 2 * size**3 / median_seconds(turns, device, calls)


def _pair(device: torch.device, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    def one() -> torch.Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, (size, size), dtype=dtype, device=device)
        return torch.randn(size, size, device=device).to(dtype)

    return one(), one()


def median_seconds(turns: Sequence[Callable[[], object]], device: torch.device, calls: int) -> float:
    """The median time of a call, over `calls` calls that take turns through `turns`, after one round of warming up.

    On CUDA between two events on the current stream, all calls queued before the first is waited for; on the CPU
    time that passes.
    """
    for call in turns:
        call()
    if device.type != "cuda":
        taken = []
        for index in range(calls):
            started = time.perf_counter()
            turns[index % len(turns)]()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
    for index in range(calls):
        events[2 * index].record()
        turns[index % len(turns)]()
        events[2 * index + 1].record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)) / 1e3
