"""How much accuracy is left when compression is hard, with and without the teacher, at equal steps.

    python -m benchmarks.hard_compression [--teacher DIR] [--seeds 3] [--steps N] [--output DIR]

2 layers of 6, 80 % of their weights zero, the rest ternary, 8-bit activations, all in one run on two
processes under ZeRO-2 (`ds_configs/hard_zero2.json`). Each seed is trained with and without distillation, one
after the other; reported are the accuracies on the 2,049 held-out sentences with weights and activations
quantized, their mean and spread over seeds, and the share of the teacher's accuracy. Without --teacher one is
trained first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_compress.examples import assets
from ds_compress.examples.launch import StepFailed, load_json, train

from . import record

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
WITH, WITHOUT = "with distillation", "without distillation"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="a fine-tuned teacher, for example demo_result/teacher")
    parser.add_argument("--config", type=Path, default=CONFIGS / "hard_zero2.json")
    parser.add_argument("--output", type=Path, default=Path("hard_result"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="default: what the JSON says")
    record.add_output_arguments(parser)
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        teacher = args.teacher.resolve() if args.teacher else train_teacher(args.output / "teacher")
        config = with_steps(load_json(args.config), args.steps)
        accuracies = compare(config, teacher, args.output, args.seeds)
    except (StepFailed, assets.AssetError) as failure:
        sys.exit(str(failure))
    result = figures(accuracies, load_json(teacher / "metrics.json")["accuracy"])
    print_result(result)
    record.report("hard_compression", result, args)


def train_teacher(folder: Path) -> Path:
    encoder = assets.fetch(assets.MINILM)
    train(load_json(CONFIGS / "teacher_zero2.json"), encoder, folder, seed=0, freeze_embeddings=True)
    return folder


def with_steps(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """`config` for another number of steps, its pruning schedule stretched with it."""
    if not steps:
        return config
    changed: dict[str, Any] = json.loads(json.dumps(config))
    schedule = changed["scheduler"]["params"]
    stretch = steps / schedule["total_num_steps"]
    schedule["total_num_steps"] = steps
    pruning = changed["compression_training"]["sparse_pruning"]["shared_parameters"]
    for key in ("schedule_offset", "schedule_offset_end"):
        pruning[key] = round(pruning[key] * stretch)
    return changed


def compare(config: dict[str, Any], teacher: Path, output: Path, seeds: int) -> dict[str, list[float]]:
    """Held-out accuracy of every seed, with and without distillation; equal in everything else."""
    guided: dict[str, Any] = json.loads(json.dumps(config))
    guided["compression_training"]["distillation"]["teacher"] = str(teacher)
    alone: dict[str, Any] = json.loads(json.dumps(config))
    del alone["compression_training"]["distillation"]
    accuracies: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    for seed in range(seeds):
        for name, chosen in ((WITHOUT, alone), (WITH, guided)):
            metrics = train(chosen, teacher, output / f"{name.replace(' ', '_')}_{seed}", seed)
            accuracies[name].append(metrics["accuracy"])
            print(f"    seed {seed}, {name}: {100 * metrics['accuracy']:.2f} %", flush=True)
    return accuracies


def figures(accuracies: dict[str, list[float]], teacher: float) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {"teacher": {"accuracy": teacher}}
    for name, values in accuracies.items():
        mean = statistics.mean(values)
        result[name] = {
            "mean accuracy": mean,
            "standard deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "share of teacher": mean / teacher,
            **{f"accuracy, seed {seed}": value for seed, value in enumerate(values)},
        }
    return result


def print_result(result: dict[str, dict[str, float]]) -> None:
    table = Table(title="2 of 6 layers, 80 % sparse, ternary weights, 8-bit activations; held-out accuracy")
    for column in ("", "mean", "spread (std)", "of the teacher", "each seed"):
        table.add_column(column)
    for name, values in result.items():
        each = [f"{100 * value:.2f}" for figure, value in values.items() if "seed" in figure]
        mean = values.get("mean accuracy", values.get("accuracy", 0.0))
        spread = f"{100 * values['standard deviation']:.2f}" if each else ""
        share = f"{100 * values['share of teacher']:.1f} %" if each else ""
        table.add_row(name, f"{100 * mean:.2f} %", spread, share, ", ".join(each))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
