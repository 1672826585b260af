"""Linear layers whose weights alone are quantized, beside what torch and onnxruntime have for them.

    python -m benchmarks.weight_only_linear [--quick] [--json] [--record [FOLDER]] [--threads 1] [--rounds 7]

Layers of a Llama of 1B parameters. Every call takes the next of so many copies of its weight that they fill 96 MB, as
the layers of a model do: a weight never waits in a cache. Ours with rows of fp32 and of bf16, without bias;
`F.linear` in both; aten's int4 kernel (scales in bf16, rows in bf16; its fp32 version has no fast code); MatMulNBits
of onnxruntime with accuracy_level 1 (fp32) and 4 (rows rounded to int8). Weights are normal random numbers on a
symmetric grid. "times slower" is the median over the rounds against ours with rows of the same type: above 1, ours is
faster.

At one row a product is bound by reading: "percent of roofline" is the time of reading the same packed bytes in the
same rounds, without doing anything with them, over the time of the product.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from ds_compress.ops.library import native

from . import record
from .bandwidth import keep_freed_memory
from .peaks import _library
from .timing import in_turns, ratio, seconds

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
"""(outputs, inputs)"""
FORMATS = ((4, 32), (4, 64), (4, 128), (8, 128))
"""(bits, group size)"""
ROWS = (1, 2, 4, 16, 64, 256)
QUICK_SHAPES, QUICK_FORMATS, QUICK_ROWS = SHAPES[2:], ((4, 32), (4, 128)), (1, 4, 64)
FILLED_BYTES = 96 << 20
OURS, OURS_BF16, READING = "ours, fp32 rows", "ours, bf16 rows", "reading the packed bytes"
SLOW_PEERS_UP_TO = 16  # rows
PEER_OF = {
    "F.linear fp32": OURS,
    "F.linear bf16": OURS_BF16,
    "aten int4pack, bf16 rows": OURS_BF16,
    "MatMulNBits, accuracy_level 1": OURS,
    "MatMulNBits, accuracy_level 4": OURS,
}

Call = Callable[[torch.Tensor, Any], object]


@dataclass(frozen=True)
class Layer:
    """One way to multiply. call(x, weight) with each of `weights` in turn; x: of what dtype."""

    call: Call
    weights: list[Any]
    dtype: torch.dtype = torch.float32


def copies(weight: torch.Tensor) -> list[torch.Tensor]:
    return [weight.clone() for _ in range(max(2, FILLED_BYTES // weight.nbytes))]


def quantized(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (N, K), fp32 scales (N, groups))"""
    rows, columns = weight.shape
    most = 2 ** (bits - 1) - 1
    in_groups = weight.view(rows, columns // group, group)
    scale = in_groups.abs().amax(2) / most
    return (in_groups / scale.unsqueeze(2)).round().to(torch.int8).view(rows, columns), scale


def layers_of(weight: torch.Tensor, bits: int, group: int) -> dict[str, Layer]:
    """{name: layer}"""
    values, scale = quantized(weight, bits, group)
    packed = copies_of_ours(values, scale, bits, group)
    rows = len(values)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.weight_only_linear(x, weight, rows)

    ops = native()
    library = _library()
    found = {
        OURS: Layer(ours, packed),
        OURS_BF16: Layer(ours, packed, torch.bfloat16),
        "F.linear fp32": Layer(functional.linear, copies(weight)),
        "F.linear bf16": Layer(functional.linear, copies(weight.bfloat16()), torch.bfloat16),
    }
    if library is not None:
        found[READING] = Layer(
            lambda x, w: library.dsc_peak_read(
                1, ctypes.c_void_p(w.data_ptr()), ctypes.c_int64(w.numel() // 512 * 512)
            ),
            packed,
        )
    if bits == 4:
        found |= {"aten int4pack, bf16 rows": aten_int4pack(values, scale, group)}
        for level in (1, 4):
            layer = mat_mul_nbits(values, scale, group, level)
            found |= {f"MatMulNBits, accuracy_level {level}": layer} if layer is not None else {}
    return found


def copies_of_ours(values: torch.Tensor, scale: torch.Tensor, bits: int, group: int) -> list[torch.Tensor]:
    """Packed one by one: a clone would lie in small pages."""
    first = native().weight_only_linear_pack(values, scale, None, group, f"int{bits}")
    count = max(2, FILLED_BYTES // first.nbytes) - 1
    return [
        first,
        *(native().weight_only_linear_pack(values, scale, None, group, f"int{bits}") for _ in range(count)),
    ]


def aten_int4pack(values: torch.Tensor, scale: torch.Tensor, group: int) -> Layer:
    codes = (values + 8).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous().bfloat16()
    return Layer(
        lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group, scales),
        copies(packed),
        torch.bfloat16,
    )


def mat_mul_nbits(values: torch.Tensor, scale: torch.Tensor, group: int, level: int) -> Layer | None:
    """None where onnxruntime is not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    rows, columns = values.shape
    codes = (values + 8).to(torch.uint8).view(rows, columns // group, group // 2, 2)
    blob = (codes[..., 0] | codes[..., 1] << 4).numpy()
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=group, accuracy_level=level,
    )  # fmt: skip
    constants = [
        onnx.numpy_helper.from_array(blob, "w"),
        onnx.numpy_helper.from_array(scale.flatten().numpy(), "s"),
    ]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", float32, ["m", columns])],
        [helper.make_tensor_value_info("y", float32, ["m", rows])], constants,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def session() -> Any:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    count = max(2, FILLED_BYTES // (blob.nbytes + scale.nbytes))
    return Layer(lambda x, s: s.run(None, {"x": x.numpy()}), [session() for _ in range(count)])


def measure(layers: dict[str, Layer], x: torch.Tensor, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of a call, one for each round: a pass over all copies, at least 8."""
    inputs = {name: x.to(layer.dtype) for name, layer in layers.items()}

    def spent(name: str) -> float:
        layer, given = layers[name], inputs[name]
        count = max(8, len(layer.weights)) if len(x) <= SLOW_PEERS_UP_TO else 2
        weights = list(itertools.islice(itertools.cycle(layer.weights), count))
        return seconds(lambda: [layer.call(given, w) for w in weights], x.device, threads) / count

    return in_turns(layers, spent, rounds)


def figures_of(taken: dict[str, list[float]], operations: float, rows: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, times in taken.items():
        median = statistics.median(times)
        found[name] = {"ms": 1e3 * median, "GOPS": operations / median / 1e9}
        if name in PEER_OF:
            slower = ratio(times, taken[PEER_OF[name]])
            found[name] |= {"times slower": slower.median, "lower quartile": slower.low}
        if rows == 1 and name in (OURS, OURS_BF16) and READING in taken:
            found[name]["percent of roofline"] = 100 * ratio(taken[READING], times).median
    if READING in found:
        del found[READING]["GOPS"]
    return found


def table(found: dict[str, dict[str, float]], title: str) -> Table:
    made = Table(title=title)
    made.add_column("")
    columns = ("ms", "GOPS", "percent of roofline", "times slower", "lower quartile")
    for column in columns:
        made.add_column(column, justify="right")
    for name, figures in found.items():
        made.add_row(name, *(f"{figures[c]:.2f}" if c in figures else "" for c in columns))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    record.add_output_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="without --quick")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    everything: dict[str, dict[str, float]] = {}
    for outputs, inputs in QUICK_SHAPES if args.quick else SHAPES:
        for bits, group in QUICK_FORMATS if args.quick else FORMATS:
            torch.manual_seed(outputs)
            layers = layers_of(torch.randn(outputs, inputs), bits, group)
            for rows in QUICK_ROWS if args.quick else ROWS:
                title = f"{outputs} x {inputs}, int{bits} in groups of {group}, {rows} rows"
                taken = measure(
                    layers, torch.randn(rows, inputs), 3 if args.quick else args.rounds, args.threads
                )
                found = figures_of(taken, 2.0 * rows * outputs * inputs, rows)
                Console(width=120).print(table(found, title))
                everything |= {f"{title}: {name}": figures for name, figures in found.items()}
    record.report("weight_only_linear", everything, args)


if __name__ == "__main__":
    main()
