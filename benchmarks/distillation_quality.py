"""What each kind of distillation is worth, at equal steps, on a real encoder.

    python -m benchmarks.distillation_quality --teacher DIR [--setting half|few_labels] [--seeds 3] [--steps N]

The fine-tuned encoder loses layers and is trained on the movie sentences; everything but the `distillation` block
of the JSON stays the same. `half`: 6 -> 3 layers, all labels. `few_labels`: 6 -> 2 layers, labels of a tenth only;
runs with distillation also see the text of the others, 24 of 32 in every batch. Reported are accuracies on the 2,049
held-out sentences, mean and spread over seeds, and Welch's t of the difference to no distillation. One process;
several settings may run side by side.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ds_compress  # noqa: F401  (DeepSpeed learns the block)
from ds_compress.examples import movie_reviews
from ds_compress.examples.launch import load_json
from ds_compress.examples.train import accuracy, quiet

from . import hard_compression, record
from .engines import start_single_process

BATCH = 32
LABELLED_IN_BATCH = 8
KEPT_LAYERS = {"half": [0, 2, 5], "few_labels": [1, 5]}
SOFT = {"temperature": 2.0}
NONE = "no distillation"
VARIANTS: dict[str, dict[str, Any] | None] = {
    NONE: None,
    "logits": {"losses": {"logits": SOFT}},
    "logits + hidden": {"losses": {"logits": SOFT, "hidden": {"weight": 3.0}}},
    "logits + attention": {"losses": {"logits": SOFT, "attention": {}}},
    "contrastive": {"losses": {"contrastive": {}}},
    "self (moving average)": {
        "losses": {"logits": SOFT},
        "self_teacher": {"weights": "ema", "decay": 0.98},
    },
    "logits, label-free": {"losses": {"logits": SOFT}, "task_loss_weight": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="for example demo_result/teacher")
    parser.add_argument("--setting", choices=KEPT_LAYERS, default="half")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    record.add_output_arguments(parser)
    args = parser.parse_args()
    quiet()
    start_single_process()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    training, held_out = movie_reviews.load(tokenizer)
    accuracies: dict[str, list[float]] = {variant: [] for variant in args.variants}
    for seed in range(args.seeds):
        for variant in args.variants:
            chosen = VARIANTS[variant]
            engine = build(args.teacher, args.setting, chosen, args.steps, seed)
            sees_all = args.setting == "half" or chosen is not None
            batches = batches_of(training, sees_all, args.setting == "half", args.steps, seed)
            accuracies[variant].append(train_and_test(engine, batches, held_out))
            del engine
            gc.collect()  # it refers to itself, and holds a model and its moments
            print(f"seed {seed}, {variant}: {100 * accuracies[variant][-1]:.2f} %", flush=True)
    result = figures(accuracies, load_json(args.teacher / "metrics.json")["accuracy"])
    print_result(args.setting, result)
    record.report("distillation_quality", result, args)


def build(teacher: Path, setting: str, distillation: dict[str, Any] | None, steps: int, seed: int) -> Any:
    block: dict[str, Any] = {"layer_reduction": {"enabled": True, "teacher_layer": KEPT_LAYERS[setting]}}
    if distillation is not None:
        source = {} if "self_teacher" in distillation else {"teacher": str(teacher), "teacher_zero_stage": 0}
        by_layer = {"hidden", "attention"} & {*distillation.get("losses", {})}
        mapped = (
            {"layer_map": KEPT_LAYERS[setting]} if by_layer and "self_teacher" not in distillation else {}
        )
        shared = {"enabled": True, "task_loss_weight": 0.5}
        block["distillation"] = {**shared, **source, **mapped, **distillation}
    warmup = {
        "total_num_steps": steps,
        "warmup_num_steps": 20,
        "warmup_max_lr": 3e-4,
        "warmup_type": "linear",
    }
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-4, "weight_decay": 0.01, "torch_adam": True},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
        "zero_optimization": {"stage": 2},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**6,
        "compression_training": block,
    }
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def batches_of(
    training: movie_reviews.Sentences, all_text: bool, all_labels: bool, steps: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of 32 sentences, of all or a tenth; where only a tenth has labels, the others have -100."""
    if all_labels:
        rows = movie_reviews.training_batches(training, BATCH, steps, seed)
        yield from (training.batch(chosen) for chosen in rows)
        return
    # Every tenth: the file is in no random order.
    tenth = range(0, len(training), 10)
    labelled = movie_reviews.Sentences(
        [training.tokens[row] for row in tenth], [training.labels[row] for row in tenth], training.pad_id
    )
    if not all_text:
        rows = movie_reviews.training_batches(labelled, BATCH, steps, seed)
        yield from (labelled.batch(chosen) for chosen in rows)
        return
    with_label = movie_reviews.training_batches(labelled, LABELLED_IN_BATCH, steps, seed)
    every = movie_reviews.training_batches(training, BATCH - LABELLED_IN_BATCH, steps, seed)
    for some, others in zip(with_label, every, strict=True):
        batch = training.batch([tenth[row] for row in some] + others)
        batch["labels"][len(some) :] = -100
        yield batch


def train_and_test(
    engine: Any, batches: Iterator[dict[str, torch.Tensor]], held_out: movie_reviews.Sentences
) -> float:
    engine.train()
    for batch in batches:
        engine.backward(engine(**batch).loss)
        engine.step()
    engine.compression.detach()
    model = engine.module.eval()
    logits = torch.zeros(len(held_out), 2)
    with torch.no_grad():
        for rows in movie_reviews.evaluation_batches(held_out, 64):
            batch = held_out.batch(rows)
            logits[rows] = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits.float()
    engine.destroy()
    return accuracy(logits, held_out.labels)


def figures(accuracies: dict[str, list[float]], teacher: float) -> dict[str, dict[str, float]]:
    result = hard_compression.figures(accuracies, teacher)
    for variant, values in accuracies.items():
        if variant != NONE and NONE in accuracies and len(values) > 1:
            result[variant]["welch t to none"] = welch(values, accuracies[NONE])
    return result


def welch(ours: list[float], theirs: list[float]) -> float:
    """Welch's t of the difference of two means; infinite when neither scatters."""
    spread = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    difference = statistics.mean(ours) - statistics.mean(theirs)
    return difference / spread if spread else math.copysign(math.inf, difference)


def print_result(setting: str, result: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"{setting}: held-out accuracy")
    for column in ("", "mean", "spread (std)", "of the teacher", "t to none", "each seed"):
        table.add_column(column)
    for name, values in result.items():
        each = [f"{100 * value:.2f}" for figure, value in values.items() if "seed" in figure]
        mean = values.get("mean accuracy", values.get("accuracy", 0.0))
        spread = f"{100 * values['standard deviation']:.2f}" if each else ""
        share = f"{100 * values['share of teacher']:.1f} %" if each else ""
        t = f"{values['welch t to none']:.1f}" if "welch t to none" in values else ""
        table.add_row(name, f"{100 * mean:.2f} %", spread, share, t, ", ".join(each))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
