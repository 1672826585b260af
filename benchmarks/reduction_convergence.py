"""Accuracy of the real encoder on the movie sentences when gradients and weights travel in few bits.

    python -m benchmarks.reduction_convergence [--quick] [--seeds 3] [--stages 2,3] [--steps 500] [--json]

The whole encoder is fine-tuned in bf16 on two processes, through the launcher, at each ZeRO stage: stock, int8, int4,
int4 with error feedback, int4 with stochastic rounding, int4 with int8 weights; the same batches for each. Reported:
accuracy on the 2,049 held-out sentences (standard error 0.8 points), its difference to stock of the same seed and
stage, in points, and the loss.
Runs whose results lie in --output already are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

from ds_compress.examples import assets
from ds_compress.examples.launch import StepFailed, load_json, train

from . import record
from .reduction_worker import traffic

CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "teacher_zero2.json"
STOCK = "stock bf16"
# The last losses, averaged: one batch says little.
LAST_LOSSES = 50


def variants() -> dict[str, dict[str, Any]]:
    feedback = copy.deepcopy(traffic(4)) or {}
    feedback["gradient_compression"]["error_feedback"] = True
    stochastic = copy.deepcopy(traffic(4)) or {}
    stochastic["gradient_compression"]["rounding"] = "stochastic"
    return {
        STOCK: {},
        "int8": traffic(8) or {},
        "int4": traffic(4) or {},
        "int4, error feedback": feedback,
        "int4, stochastic": stochastic,
        "int4, weights int8": traffic(4, 8) or {},
    }


def config_of(stage: int, steps: int, block: dict[str, Any]) -> dict[str, Any]:
    config = load_json(CONFIG)
    config.pop("torch_autocast", None)
    config["bf16"] = {"enabled": True}
    config["zero_optimization"] = {"stage": stage}
    config["scheduler"]["params"]["total_num_steps"] = steps
    config["scheduler"]["params"]["warmup_num_steps"] = min(
        steps // 10 or 1, config["scheduler"]["params"]["warmup_num_steps"]
    )
    return config | ({"compression_training": block} if block else {})


def compare(
    stages: list[int], seeds: int, steps: int, names: list[str], output: Path
) -> dict[str, dict[str, float]]:
    encoder = assets.fetch(assets.MINILM)
    blocks = variants()
    result: dict[str, dict[str, float]] = {}
    for stage in stages:
        accuracy: dict[str, list[float]] = {name: [] for name in names}
        loss: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(seeds):
            for name in names:
                folder = output / f"stage{stage}_{name.replace(', ', '_').replace(' ', '_')}_{steps}_{seed}"
                done = folder / "metrics.json"
                if done.is_file():
                    metrics = load_json(done)
                else:
                    metrics = train(config_of(stage, steps, blocks[name]), encoder, folder, seed)
                accuracy[name].append(metrics["accuracy"])
                loss[name].append(statistics.mean(metrics["losses"][-LAST_LOSSES:]))
                print(
                    f"    stage {stage}, seed {seed}, {name}: {100 * metrics['accuracy']:.2f} %", flush=True
                )
        for name in names:
            differences = [100 * (a - b) for a, b in zip(accuracy[name], accuracy[STOCK], strict=True)]
            result[f"stage {stage}, {name}"] = {
                "mean accuracy": statistics.mean(accuracy[name]),
                "mean difference, points": statistics.mean(differences),
                "spread of differences, points": statistics.stdev(differences) if seeds > 1 else 0.0,
                "mean last loss": statistics.mean(loss[name]),
                **{f"accuracy, seed {seed}": value for seed, value in enumerate(accuracy[name])},
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of two variants")
    record.add_output_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", default="2,3")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--variants", default=";".join(variants()), help="separated by semicolons")
    parser.add_argument("--output", type=Path, default=Path("reduction_convergence_result"))
    arguments = parser.parse_args()
    names = [STOCK, *(name for name in arguments.variants.split(";") if name != STOCK)]
    if arguments.quick:
        arguments.seeds, arguments.stages, arguments.steps, names = 1, "2", 4, [STOCK, "int4"]
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        stages = [int(stage) for stage in arguments.stages.split(",")]
        result = compare(stages, arguments.seeds, arguments.steps, names, output)
    except (StepFailed, assets.AssetError) as failure:
        sys.exit(str(failure))
    for name, values in result.items():
        print(
            f"{name:36s} {100 * values['mean accuracy']:6.2f} %  {values['mean difference, points']:+.2f} "
            f"+- {values['spread of differences, points']:.2f} points  loss {values['mean last loss']:.4f}"
        )
    record.report("reduction_convergence", result, arguments)


if __name__ == "__main__":
    main()
