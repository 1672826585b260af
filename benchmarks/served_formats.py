"""An encoder served from each format of an export, beside its own floats and OpenVINO's quantizer NNCF.

    python -m benchmarks.served_formats [--rounds 9] [--quick] [--json] [--record]

BERT of MiniLM's size with random weights (6 layers of 384, feed-forward 1536, 30522 words) on one thread, at 32 and at
1 sequences of 40 tokens. All linear layers but the classifier are quantized: W8A8 with static ranges, W8A8 per token,
and W4A16 in groups of 64. Each is served by `ds_compress.from_pretrained`, by onnxruntime and by OpenVINO. Beside them
run torch in fp32 and bf16, OpenVINO in fp32 and bf16, and what `nncf.quantize` makes of the fp32 model by its defaults
for transformers. All compute in fp32 where a name does not say bf16; "rounds inputs" is what a runtime does with W4A16
unless it is told not to. Figures: milliseconds of CPU time, median and quartiles over interleaved rounds; times the
fastest unquantized one and times NNCF of the same round, below 1: faster; megabytes on disk, of torch in memory. What
is not installed is named with the reason and left out.

    pip install "ds_compress[onnx,openvino]" nncf
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ds_compress
from ds_compress.techniques import TECHNIQUES

from . import record
from .bandwidth import keep_freed_memory
from .timing import in_turns, ratio, seconds

TOKENS, BATCHES = 40, (32, 1)
WEIGHTS = r"layer\.\d|pooler"
SCHEMES: Mapping[str, tuple[int, str | None, Mapping[str, Any]]] = {
    "W8A8 static": (8, "static", {"granularity": "per_channel"}),
    "W8A8 per token": (8, "dynamic", {"granularity": "per_channel"}),
    "W4A16": (4, None, {"granularity": "per_column_group", "group_size": 64}),
}
FLOATS = ("torch fp32", "torch bf16", "OpenVINO fp32", "OpenVINO bf16")
NNCF = "NNCF int8, OpenVINO"

Inputs = dict[str, torch.Tensor]
Serve = Callable[[Inputs], object]


def encoder(quick: bool) -> nn.Module:
    """The same weights at each call."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12)
    config.intermediate_size, config.num_labels = 1536, 2
    if quick:
        config.num_hidden_layers, config.vocab_size = 1, 500
    return transformers.BertForSequenceClassification(config).eval()


def inputs_of(model: Any, batch: int) -> Inputs:
    """Random words, none masked."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, model.config.vocab_size, (batch, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def quantized(model: nn.Module, scheme: str) -> nn.Module:
    """In place, as at the end of a training; static ranges are those of one batch."""
    bits, ranges, shared = SCHEMES[scheme]
    always = {"enabled": True, "schedule_offset": 0}
    block: dict[str, Any] = {
        "weight_quantization": {
            "shared_parameters": {**always, "quantize_weight_in_forward": True, **shared},
            "different_groups": {
                "all": {"params": {"start_bits": bits, "target_bits": bits}, "modules": [WEIGHTS]}
            },
        }
    }
    if ranges is not None:
        block["activation_quantization"] = {
            "shared_parameters": {**always, "range_calibration": ranges},
            "different_groups": {"all": {"params": {"bits": 8}, "modules": [WEIGHTS]}},
        }
    techniques: Any = TECHNIQUES
    for name, technique in ds_compress.plan(model, block).techniques.items():
        techniques[name](technique, 0).prepare(model)
    if ranges == "static":
        model.train()(**inputs_of(model, 8))
        model.eval()
        for module in model.modules():
            quantizer: Any = getattr(module, "input_quantizer", None)
            if quantizer is not None and quantizer.observed is not None:
                quantizer.input_range = quantizer.observed * torch.tensor([-1.0, 1.0])
    return model


def of_torch(model: nn.Module) -> Serve:
    def serve(inputs: Inputs) -> object:
        with torch.inference_mode():
            return model(**inputs)

    return serve


def of_onnxruntime(folder: Path, rounds_inputs: bool) -> Serve:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4" if rounds_inputs else "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return lambda inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})


def of_openvino(graph: Any, precision: str = "f32", rounds_inputs: bool = True) -> Serve:
    import openvino

    given: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    if not rounds_inputs:
        given["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    compiled = openvino.Core().compile_model(graph, "CPU", given)
    return lambda inputs: compiled({name: value.numpy() for name, value in inputs.items()})


def of_nncf(graph_file: Path, out: Path, model: nn.Module) -> Serve:
    import nncf
    import openvino

    graph = openvino.Core().read_model(graph_file)
    data = [{name: value.numpy() for name, value in inputs_of(model, 8).items()} for _ in range(4)]
    made = nncf.quantize(graph, nncf.Dataset(data), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(made, out / "model.xml", compress_to_fp16=False)
    return of_openvino(made)


def served(folder: Path, quick: bool) -> tuple[dict[str, Serve], dict[str, float]]:
    """Everything that can be had here, and megabytes of what was written, by variant."""
    found: dict[str, Serve] = {}
    sizes: dict[str, float] = {}

    def add(name: str, where: Path, make: Callable[[], Serve]) -> None:
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: not measured, {error}")
            return
        parts = [p for suffix in ("safetensors", "onnx", "xml", "bin") for p in where.glob(f"*.{suffix}")]
        sizes[name] = sum(part.stat().st_size for part in parts) / 1e6
        if name in FLOATS[:2]:
            sizes[name] = sum(p.numel() * (2 if "bf16" in name else 4) for p in model.parameters()) / 1e6

    model = encoder(quick)
    plain = folder / "floats"
    ds_compress.export(model, plain, "openvino", embeddings="float", check=False)
    add("torch fp32", folder, lambda: of_torch(model))
    add("torch bf16", folder, lambda: of_torch(copy.deepcopy(model).bfloat16()))
    add("OpenVINO fp32", plain, lambda: of_openvino(plain / "model.xml"))
    add("OpenVINO bf16", plain, lambda: of_openvino(plain / "model.xml", "bf16"))
    of_peer = folder / "nncf"
    of_peer.mkdir()
    add(NNCF, of_peer, lambda: of_nncf(plain / "model.xml", of_peer, model))
    for scheme in SCHEMES:
        trained = quantized(encoder(quick), scheme)
        places = {
            format: folder / f"{scheme} {format}".replace(" ", "_")
            for format in ("torch", "onnx", "openvino")
        }
        for format, place in places.items():
            ds_compress.export(trained, place, format, check=False)
        ours = of_torch(ds_compress.from_pretrained(places["torch"]))
        add(f"{scheme}, our loader", places["torch"], lambda ours=ours: ours)  # type: ignore[misc]
        if scheme != "W4A16":
            graph = torch.compile(ds_compress.from_pretrained(places["torch"]), dynamic=False)
            add(f"{scheme}, our loader, torch.compile", places["torch"], lambda graph=graph: of_torch(graph))  # type: ignore[misc]
        for rounds in (False, True) if scheme == "W4A16" else (True,):
            words = ", rounds inputs" if scheme == "W4A16" and rounds else ""
            onnx, ir = places["onnx"], places["openvino"]
            add(
                f"{scheme}, onnxruntime{words}",
                onnx,
                lambda onnx=onnx, rounds=rounds: of_onnxruntime(onnx, rounds),  # type: ignore[misc]
            )
            add(
                f"{scheme}, OpenVINO{words}",
                ir,
                lambda ir=ir, rounds=rounds: of_openvino(ir / "model.xml", "f32", rounds),  # type: ignore[misc]
            )
    return found, sizes


def figures(times: Mapping[str, list[float]], sizes: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Of one batch, by variant."""
    plain = min((name for name in FLOATS if name in times), key=lambda name: statistics.median(times[name]))
    rows: dict[str, dict[str, float]] = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles([1e3 * each for each in taken], n=4, method="inclusive")
        rows[name] = {"ms": median, "lower quartile ms": low, "upper quartile ms": high, "MB": sizes[name]}
        rows[name]["times the fastest floats"] = ratio(taken, times[plain]).median
        if NNCF in times:
            rows[name]["times NNCF"] = ratio(taken, times[NNCF]).median
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--quick", action="store_true", help="one layer and few words, to see that all of it runs"
    )
    record.add_output_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    everything: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        found, sizes = served(Path(name), args.quick)
        for batch in BATCHES:
            given = inputs_of(encoder(args.quick), batch)
            repeat = max(1, 16 // batch)

            def measure(variant: str, given: Inputs = given, repeat: int = repeat) -> float:
                return seconds(lambda: found[variant](given), torch.device("cpu"), 1, repeat)

            rows = figures(in_turns(found, measure, args.rounds), sizes)
            for variant, row in sorted(rows.items(), key=lambda pair: pair[1]["ms"]):
                shown = ", ".join(
                    f"{figure} {np.format_float_positional(value, 3, fractional=False)}"
                    for figure, value in row.items()
                )
                print(f"{batch} x {TOKENS}, {variant}: {shown}")
                everything[f"{batch} x {TOKENS}, {variant}"] = row
    record.report("served_formats", everything, args)


if __name__ == "__main__":
    main()
