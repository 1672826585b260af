"""Linear layers of int8 and int4 values on a GPU, beside what torch has: bf16, `torch._int_mm` and eager quantization.

    python -m benchmarks.products_cuda [--quick] [--json] [--record [FOLDER]] [--device cpu]

The layers are those of BERT-base and of Llamas with 1B and 8B parameters, for 1 to 8192 rows. What is timed is a CUDA
graph of many calls, so that Python and launches cost nothing; weights rotate through more memory than the L2 cache
holds. "product" is the op less the quantization of x, which a layer without outputs and with the same x tells. On the
CPU (`--device cpu`, for a check of this file) plain calls are timed and what torch lacks there is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from ds_compress.ops.library import native

from . import record
from .record import Figures

LAYERS = {
    "bert 768x768": (768, 768),
    "bert 3072x768": (3072, 768),
    "bert 768x3072": (768, 3072),
    "1B 2048x2048": (2048, 2048),
    "1B 8192x2048": (8192, 2048),
    "1B 2048x8192": (2048, 8192),
    "8B 4096x4096": (4096, 4096),
    "8B 14336x4096": (14336, 4096),
    "8B 4096x14336": (4096, 14336),
}
"""{name: (out_features, in_features)}"""
ROWS = (1, 16, 64, 256, 2048, 8192, 4, 32, 128, 512, 1024, 4096)  # what says most first, should time run out
CACHE_BYTES = 160 << 20  # the weights of one rotation; an H200's L2 holds 60 MB
GROUP = 128

Call = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """One layer's weights in every form, `copies` of them."""

    int8: list[torch.Tensor]
    quantized: list[torch.Tensor]
    int4: list[torch.Tensor]
    full: list[torch.Tensor]
    scale: torch.Tensor
    bias: torch.Tensor


def make_layer(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Layer:
    ops = native()
    size = outputs * inputs
    copies = max(2, min(24, CACHE_BYTES // size + 1)) if device.type == "cuda" else 2
    quantized = [_quantized(outputs, inputs, 127, device) for _ in range(copies)]
    group_scale = torch.rand(outputs, -(-inputs // GROUP), device=device) * 0.02
    return Layer(
        [ops.int8_linear_pack(c) for c in quantized],
        quantized,
        [ops.int4_linear_pack(_quantized(outputs, inputs, 7, device), group_scale) for _ in range(copies)],
        [torch.randn(outputs, inputs, device=device, dtype=dtype) for _ in range(copies)],
        torch.rand(outputs, device=device) * 0.01,
        torch.randn(outputs, device=device),
    )


def _quantized(outputs: int, inputs: int, largest: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, (outputs, inputs), device=device, dtype=torch.int8)


def separate(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The layer with GELU from torch's own parts: quantize, `_int_mm`, dequantize, bias, activation."""
    row_scale = x.abs().amax(1, keepdim=True).float().div_(127).clamp_min_(2.0**-126)
    quantized = x.div(row_scale).round_().clamp_(-127, 127).to(torch.int8)
    y = torch._int_mm(quantized, weight.t()).float().mul_(row_scale * scale).add_(bias)
    return functional.gelu(y.to(x.dtype))


def calls_of(
    layer: Layer, rows: int, inputs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, list[Call]]:
    """{name: the same call on each copy of the weights}"""
    ops = native()
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    bias = layer.bias.to(dtype)
    nothing = ops.int8_linear_pack(torch.empty(0, inputs, device=device, dtype=torch.int8))
    none = torch.empty(0, device=device)
    group = partial(ops.int4_linear, out_features=layer.scale.numel(), group_size=GROUP, bias=layer.bias)
    calls: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w, bias) for w in layer.full],
        "int8": [partial(ops.int8_linear, x, w, layer.scale, layer.bias) for w in layer.int8],
        "int8, gelu": [
            partial(ops.int8_linear, x, w, layer.scale, layer.bias, activation="gelu_erf") for w in layer.int8
        ],
        "int4": [partial(group, x, w) for w in layer.int4],
    }
    if rows > 32:
        calls["quantization"] = [partial(ops.int8_linear, x, nothing, none)] * 2
    if device.type == "cuda" and rows > 16:
        quantized = _quantized(rows, inputs, 127, device)
        calls["_int_mm"] = [partial(torch._int_mm, quantized, w.t()) for w in layer.quantized]
        calls["separate"] = [partial(separate, x, w, layer.scale, layer.bias) for w in layer.quantized]
    return calls


def microseconds(calls: list[Call], device: torch.device, quick: bool) -> float:
    """Of one call: the median of replays of a graph of all of them."""
    count = 2 if quick else max(len(calls), 10)
    chosen = [calls[i % len(calls)] for i in range(count)]
    if device.type != "cuda":
        begin = time.perf_counter()
        for call in chosen:
            call()
        return 1e6 * (time.perf_counter() - begin) / count
    for call in calls[:2]:
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in chosen:
            call()
    graph.replay()
    taken = []
    for _ in range(3 if quick else 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(1e3 * start.elapsed_time(end) / count)
    return statistics.median(taken)


def warm_up(device: torch.device, quick: bool) -> None:
    """A card that was idle takes a while to reach its clocks."""
    square = torch.randn(256 if quick else 4096, 256 if quick else 4096, device=device)
    end = time.monotonic() + (0.0 if quick else 1.0)
    while time.monotonic() < end:
        square @ square
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def copy_rate(device: torch.device, quick: bool) -> float:
    """Bytes a microsecond, those read and those written, of a large copy."""
    size = 1 << (16 if quick else 27)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / microseconds([partial(target.copy_, source)], device, quick)


def figures_of(
    taken: dict[str, float], rows: int, outputs: int, inputs: int, rate: float
) -> dict[str, dict[str, float]]:
    """{kind: {figure: value}} of one layer and number of rows. Ratios: times faster than the other."""
    operations = 2 * rows * outputs * inputs
    found = {name: {"us": us} for name, us in taken.items()}
    for name, us in taken.items():
        if name in ("bf16", "int8", "int4", "_int_mm"):
            found[name]["TOP/s"] = operations / us / 1e6
    if "quantization" in taken and "_int_mm" in taken:
        found["int8"]["product us"] = taken["int8"] - taken["quantization"]
        found["int8"]["ratio to _int_mm"] = taken["_int_mm"] / found["int8"]["product us"]
    if "separate" in taken:
        found["int8, gelu"]["ratio to separate"] = taken["separate"] / taken["int8, gelu"]
    found["int8"]["bf16 / int8"] = taken["bf16"] / taken["int8"]
    found["int4"]["ratio to bf16" if rows <= 64 else "bf16 / int4"] = taken["bf16"] / taken["int4"]
    if rows == 1:
        moved = {
            "int8": outputs * inputs,
            "int4": outputs * (inputs // 2 + 4 * -(-inputs // GROUP)),
            "bf16": 2 * outputs * inputs,
        }
        for name, size in moved.items():
            found[name]["roofline us"] = size / rate
            found[name]["percent of bandwidth" if name != "bf16" else "bf16, of bandwidth"] = (
                100 * size / rate / taken[name]
            )
    return found


def cases(quick: bool) -> Iterator[tuple[str, int, int, int]]:
    """(name, outputs, inputs, rows)"""
    if quick:
        yield from (("quick 64x128", 64, 128, rows) for rows in (1, 4, 40))
        return
    for rows in ROWS:
        for name, (outputs, inputs) in LAYERS.items():
            yield name, outputs, inputs, rows


def measure(device: torch.device, quick: bool, report: Callable[[Figures], None] | None = None) -> Figures:
    """{"<layer>, <rows> rows, <kind>": {figure: value}}"""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, dict[str, float]] = {}
    warm_up(device, quick)
    rate = copy_rate(device, quick)
    layers: dict[str, Layer] = {}
    for name, outputs, inputs, rows in cases(quick):
        if name not in layers:
            layers.clear() if device.type != "cuda" else None
            layers[name] = make_layer(outputs, inputs, device, dtype)
        calls = calls_of(layers[name], rows, inputs, device, dtype)
        taken = {kind: microseconds(each, device, quick) for kind, each in calls.items()}
        for kind, found in figures_of(taken, rows, outputs, inputs, rate).items():
            result[f"{name}, {rows} rows, {kind}"] = found
        if report is not None:
            report(result)
    return result


def table(result: Figures) -> Table:
    made = Table(title="linear layers; microseconds of a call")
    for column in ("layer", "us", "other figures"):
        made.add_column(column, justify="right" if column == "us" else "left")
    for variant, found in result.items():
        rest = ", ".join(f"{figure} {value:.3g}" for figure, value in found.items() if figure != "us")
        made.add_row(variant, f"{found['us']:.2f}", rest)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    record.add_output_arguments(parser)
    args = parser.parse_args()
    everything = measure(torch.device(args.device), args.quick)
    Console(width=150).print(table(everything))
    record.report("products_cuda", everything, args)
