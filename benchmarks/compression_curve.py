"""Accuracy, bytes and latency of a real encoder, from light to extreme compression, each read from an exported folder.

    python -m benchmarks.compression_curve [--teacher DIR] [--only NAME] [--output DIR] [--measure-only] [--json]

all-MiniLM-L6-v2 fine-tuned on the movie sentences is the teacher; every point is one `deepspeed` run of
`ds_configs/small_zero2.json` with a few keys changed (two processes, ZeRO-2, distilled from the teacher, structures
removed at step 200 of 600) that exports what it trained. A fresh process then loads all folders: the teacher in
stock transformers, the others with `ds_compress.from_pretrained`, and lets them take turns on one thread, 32 sentences
of 40 tokens. Beside each stands its structural cut alone: the same layers with their weights read back to fp32.
Folders in the compressed-tensors format are loaded by a process that has never heard of ds_compress.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_compress.examples import assets
from ds_compress.examples.demo import prepare
from ds_compress.examples.launch import StepFailed, environment, load_json, train

from . import record
from .hard_compression import train_teacher

CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "small_zero2.json"
STOCK_CHECK = Path(__file__).resolve().parents[1] / "ds_compress" / "examples" / "stock_check.py"
ALL = (0, 1, 2, 3, 4, 5)
TEACHER, STOCK = "teacher", "compressed-tensors"


def point(
    layers: tuple[int, ...], heads: float, rows: float, bits: int = 8, words: int = 8, formats: str = "torch"
) -> dict[str, Any]:
    return {"layers": layers, "heads": heads, "rows": rows, "bits": bits, "words": words, "formats": formats}


POINTS = {
    "6 layers, W8A8": point(ALL, 1, 1),
    "4 layers, FFN 1/2, W8A8": point((0, 2, 4, 5), 1, 0.5, formats="torch compressed-tensors"),
    "4 layers, heads and FFN 1/2, W8A8": point((0, 2, 4, 5), 0.5, 0.5),
    "3 layers, heads and FFN 1/2, W8A8": point((0, 2, 5), 0.5, 0.5),
    "3 layers, heads 1/3, FFN 1/4, W8A8": point((0, 2, 5), 0.33, 0.25),
    "2 layers, heads and FFN 1/2, W8A8": point((1, 5), 0.5, 0.5),
    "4 layers, heads and FFN 1/2, W4A8, words 4 bits": point((0, 2, 4, 5), 0.5, 0.5, 4, 4),
    "2 layers, heads and FFN 1/4, W8A8, words 4 bits": point((1, 5), 0.25, 0.25, 8, 4),
    "1 layer, heads and FFN 1/2, W8A8, words 4 bits": point((5,), 0.5, 0.5, 8, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="a fine-tuned teacher, for example demo_result/teacher")
    parser.add_argument("--output", type=Path, default=Path("small_result"))
    parser.add_argument("--only", default="", help="points whose names contain this")
    parser.add_argument("--measure-only", action="store_true", help="measure what earlier runs have exported")
    record.add_output_arguments(parser)
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = {name: settings for name, settings in POINTS.items() if args.only in name}
    if args.measure_only:
        chosen = {name: s for name, s in chosen.items() if (folder_of(output, name) / "torch").exists()}
    try:
        sentences = prepare(output)[1]
        teacher = args.teacher.resolve() if args.teacher else output / TEACHER
        if not (teacher / "config.json").exists():
            train_teacher(teacher)
        for name, settings in chosen.items():
            if not args.measure_only:
                config = config_of(settings, teacher)
                formats = settings["formats"].split()
                accuracy = train(config, teacher, folder_of(output, name), 0, export=formats)["accuracy"]
                print(f"    {name}: {100 * accuracy:.2f} %", flush=True)
        result = figures(sentences, teacher, {name: folder_of(output, name) for name in chosen})
    except (StepFailed, assets.AssetError) as failure:
        sys.exit(str(failure))
    print_result(result)
    record.report("compression_curve", result, args)
    if len(chosen) > 1:
        try:
            print(f"drawn: {draw(result, (args.record or output) / 'compression_curve.png')}")
        except ImportError:
            print("not drawn: pip install 'ds_compress[benchmarks]'")


def folder_of(output: Path, name: str) -> Path:
    return output / name.replace(",", "").replace("/", "_").replace(" ", "_")


def config_of(settings: dict[str, Any], teacher: Path) -> dict[str, Any]:
    """`small_zero2.json` with the settings of one point."""
    config = load_json(CONFIG)
    block = config["compression_training"]
    layers = list(settings["layers"])
    block["layer_reduction"] = {"enabled": len(layers) < len(ALL), "teacher_layer": layers}
    for key, ratio in (("head_pruning", settings["heads"]), ("row_pruning", settings["rows"])):
        block[key]["shared_parameters"]["dense_ratio"] = ratio
        if ratio == 1:
            del block[key]
    weights = block["weight_quantization"]
    if settings["bits"] < 8:
        weights["shared_parameters"] |= {"granularity": "per_column_group", "group_size": 32}
    for group, bits in (("encoder", settings["bits"]), ("words", settings["words"])):
        weights["different_groups"][group]["params"] = {
            "start_bits": 8,
            "target_bits": bits,
            "quantization_period": 10 if bits < 8 else 1,
        }
    block["distillation"] |= {"teacher": str(teacher), "layer_map": layers}
    return config


def figures(sentences: Path, teacher: Path, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Of every point, measured in fresh processes."""
    exported = {name: folder / "torch" for name, folder in folders.items()}
    command = [sys.executable, "-m", "ds_compress.examples.exported_check", str(sentences), str(teacher)]
    done = subprocess.run([*command, *map(str, exported.values())], **_captured())
    if done.returncode != 0:
        raise StepFailed("the exported folders could not be measured")
    printed = done.stdout.splitlines()[-1]  # DeepSpeed talks first
    measured = dict(zip([TEACHER, *exported], json.loads(printed), strict=True))
    for name, folder in folders.items():
        if (folder / STOCK).exists():
            measured[name] |= stock_figures(sentences, folder)
    base = measured[TEACHER]
    for values in measured.values():
        values["times smaller"] = base["bytes"] / values["bytes"]
        values["times faster"] = base["latency ms"] / values["latency ms"]
        values["points lost"] = 100 * (base["accuracy"] - values["accuracy"])
        if "bytes, compressed-tensors" in values:
            values["times smaller, compressed-tensors"] = base["bytes"] / values["bytes, compressed-tensors"]
    return measured


def stock_figures(sentences: Path, folder: Path) -> dict[str, float]:
    """Accuracy and bytes of the compressed-tensors folder, where ds_compress is not imported."""
    target = folder / STOCK
    shutil.copyfile(folder / "logits.safetensors", target / "logits.safetensors")
    done = subprocess.run([sys.executable, str(STOCK_CHECK), str(sentences), str(target)], **_captured())
    if done.returncode != 0:
        raise StepFailed(f"stock transformers did not load {target}")
    found = json.loads(done.stdout)[str(target)]
    return {"accuracy, compressed-tensors": found["accuracy"], "bytes, compressed-tensors": found["bytes"]}


def _captured() -> dict[str, Any]:
    return {"stdout": subprocess.PIPE, "text": True, "env": environment()}


# --- what is shown ---------------------------------------------------------------------------------------------------


def print_result(result: dict[str, dict[str, float]]) -> None:
    table = Table(title="held-out accuracy, bytes on disk and latency of 32 x 40 tokens on one thread")
    for column in ("", "accuracy", "lost", "MB", "smaller", "ms", "faster", "cut alone, fp32", "in stock"):
        table.add_column(column, justify="right" if column else "left")
    for name, v in result.items():
        stock = ""
        if "bytes, compressed-tensors" in v:
            stock = f"{100 * v['accuracy, compressed-tensors']:.2f} %, {v['times smaller, compressed-tensors']:.2f}x"
        table.add_row(
            name,
            f"{100 * v['accuracy']:.2f} %",
            f"{v['points lost']:+.2f}",
            f"{v['bytes'] / 1e6:.2f}",
            f"{v['times smaller']:.2f}x",
            f"{v['latency ms']:.1f}",
            f"{v['times faster']:.2f}x",
            f"{v['latency ms of the cut alone, fp32']:.1f} ms",
            stock,
        )
    Console(width=150).print(table)


def draw(result: dict[str, dict[str, float]], path: Path) -> Path:
    """Accuracy over size and over latency, one number per point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    error = 100 * (result[TEACHER]["accuracy"] * (1 - result[TEACHER]["accuracy"]) / 2049) ** 0.5
    for axis, key, label in (
        (axes[0], "times smaller", "bytes on disk"),
        (axes[1], "times faster", "latency"),
    ):
        for number, (name, values) in enumerate(result.items()):
            axis.errorbar(
                values[key], 100 * values["accuracy"], error, fmt="o", capsize=3, label=f"{number}: {name}"
            )
            axis.annotate(
                str(number), (values[key], 100 * values["accuracy"]), (5, 4), textcoords="offset points"
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.set_xlabel(f"{label}: times less than the teacher's")
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, % (bars: one standard error)")
    axes[0].legend(fontsize=7, loc="lower left")
    figure.suptitle("all-MiniLM-L6-v2 on movie sentences, compressed while it trains; one CPU thread")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
