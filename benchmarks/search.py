"""A mix of formats against one format for all layers, at no more bytes, on a real encoder and a real language model.

    python -m benchmarks.search [--model encoder] [--teacher DIR] [--seeds 3] [--output DIR] [--record]
    python -m benchmarks.search --model lm [--output DIR] [--record]

The encoder is all-MiniLM-L6-v2, fine-tuned on the movie sentences (`--teacher`, else trained first); the language model
SmolLM2-135M-Instruct on the Python documentation (see `smollm2`: its weights lie on a 4-bit grid, which flatters 4
bits). A seed draws the calibration set: sentences of the training part, without their labels, or sequences. Sensitivity
and search are those of the commands; the goal is the effective bits of each uniform format. Models are rounded as at
the start of a training and not trained; bytes are those of exported weight files. The divergence from the model as it
is, accuracy and perplexity are measured on held-out text, which no seed has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ds_compress
from ds_compress.examples import assets, movie_reviews
from ds_compress.examples.demo import StepFailed
from ds_compress.sensitivity.calibration import Batch, Example, batches
from ds_compress.sensitivity.formats import formats_named
from ds_compress.sensitivity.goal import EffectiveBits
from ds_compress.sensitivity.groups import BLOCK, layer_groups
from ds_compress.sensitivity.increase import Metric, increase, reference
from ds_compress.sensitivity.measure import measure, rounded
from ds_compress.sensitivity.search import Searched, search
from ds_compress.sensitivity.table import Sensitivity

from . import record, smollm2
from .hard_compression import train_teacher

ENCODER, LM = "encoder", "lm"
FORMATS = {
    ENCODER: ["int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8"],
    LM: ["int2_g64", "int3_g64", "int4_g64"],
}
UNIFORM = {ENCODER: ["int3_g64", "int4_g64"], LM: ["int3_g64"]}
"""Not the smallest of `FORMATS`, whose bits leave no choice."""
CALIBRATION = {ENCODER: 128, LM: 1}
"""Sentences, or sequences of `LM_TOKENS`."""
LM_TOKENS, LM_HELD_OUT = 64, 4
BATCH = {ENCODER: 32, LM: 1}
Figures = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=(ENCODER, LM), default=ENCODER)
    parser.add_argument("--teacher", type=Path, help="a fine-tuned encoder, for example demo_result/teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("search_result"))
    record.add_output_arguments(parser)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        load = load_encoder if args.model == ENCODER else load_lm
        model, training, held_out = load(args.output, args.teacher)
    except (StepFailed, assets.AssetError) as failure:
        sys.exit(str(failure))
    figures = compare(args.model, model, training, held_out, args.seeds, args.output)
    print_result(args.model, figures)
    record.report("search", {f"{args.model}, {name}": values for name, values in figures.items()}, args)


def load_encoder(output: Path, teacher: Path | None) -> tuple[Any, list[Example], list[Batch]]:
    """(model, examples to draw from, held-out batches with labels)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = teacher or output / "teacher"
    if not (folder / "config.json").exists():
        train_teacher(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    training, held_out = movie_reviews.load(AutoTokenizer.from_pretrained(folder))
    held_out = held_out.every(2)
    rows = movie_reviews.evaluation_batches(held_out, 64)
    return model, [Example(ids) for ids in training.tokens], [held_out.batch(chosen) for chosen in rows]


def load_lm(output: Path, teacher: Path | None) -> tuple[Any, list[Example], list[Batch]]:
    """The same; labels are the text itself."""
    if not (output / "held_out.json").exists():
        smollm2.prepare(output)
    rows, held_out = smollm2.rows(output, "training"), smollm2.rows(output, "held_out")
    chosen = held_out[:: max(1, len(held_out) // LM_HELD_OUT)][:LM_HELD_OUT]
    one_by_one = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in chosen]
    return smollm2.original(output).eval(), [Example(row[:LM_TOKENS].tolist()) for row in rows], one_by_one


def compare(
    kind: str, model: Any, training: Sequence[Example], held_out: Sequence[Batch], seeds: int, output: Path
) -> Figures:
    judge = Judge(model, held_out, output)
    groups, found = layer_groups(model), {"as it is": judge.plain}
    for seed in range(seeds):
        drawn = random.Random(seed).sample(list(training), CALIBRATION[kind])
        started = time.perf_counter()
        table = measure(model, batches(drawn, BATCH[kind], 0), formats_named(FORMATS[kind]), groups)
        seconds = time.perf_counter() - started
        print(f"    seed {seed}: measured in {seconds:.0f} s", flush=True)
        uniform = search(model, {}, table, EffectiveBits(16)).uniform
        for name in UNIFORM[kind]:
            bits = uniform[name].effective_bits
            if not seed:
                found[f"all {name}"] = judge.figures(
                    search(model, {}, only(table, name), EffectiveBits(bits))
                )
            mix = search(model, {}, table, EffectiveBits(bits))
            values = judge.figures(mix) | {"seconds to measure": seconds}
            found[f"mix for the bits of {name}, seed {seed}"] = values
            print(f"    seed {seed}, {name}: {json.dumps(values)}", flush=True)
    return found


def only(table: Sensitivity, format: str) -> Sensitivity:
    """`table` with one format."""
    groups = {
        name: replace(group, increase={format: group.increase[format]})
        for name, group in table.groups.items()
    }
    return replace(table, formats=(format,), groups=groups)


class Judge:
    """What a choice of formats is worth on held-out text. plain: the figures of the model as it is."""

    def __init__(self, model: Any, held_out: Sequence[Batch], output: Path) -> None:
        self._model, self._held_out, self._output = model, held_out, output
        with torch.no_grad():
            outputs = [model(**_inputs(batch)) for batch in held_out]
        self._original = [reference(o, b, Metric.KL) for o, b in zip(outputs, held_out, strict=True)]
        self._losses = [reference(o, b, Metric.LOSS) for o, b in zip(outputs, held_out, strict=True)]
        self._is_classifier = "labels" in held_out[0]
        self.plain = self._of(outputs)

    @torch.no_grad()
    def figures(self, chosen: Searched) -> dict[str, float]:
        technique = ds_compress.plan(self._model, chosen.block).techniques[BLOCK]
        with rounded(self._model, technique.shared, technique.targets):
            values = self._of([self._model(**_inputs(batch)) for batch in self._held_out])
            folder = self._output / "exported"
            report = ds_compress.export(self._model, folder, check=False, overwrite=True)
        facts = {"bytes": float(report.bytes), "effective bits": chosen.predicted.effective_bits}
        return {**facts, "predicted divergence, nats": chosen.predicted.increase, **values}

    def _of(self, outputs: Sequence[Any]) -> dict[str, float]:
        count = sum(of.weight for of in self._original)
        pairs = list(zip(outputs, self._held_out, strict=True))
        grown = sum(increase(*pair, of) for pair, of in zip(pairs, self._original, strict=True))
        values = {"divergence, nats": grown / count}
        if self._is_classifier:
            right = sum(int((o.logits.argmax(-1) == b["labels"]).sum()) for o, b in pairs)
            return {**values, "accuracy": right / count}
        loss = sum(of.base + increase(*pair, of) for pair, of in zip(pairs, self._losses, strict=True))
        return {**values, "perplexity": math.exp(loss / sum(of.weight for of in self._losses))}


def _inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def print_result(kind: str, figures: Figures) -> None:
    last = "accuracy" if kind == ENCODER else "perplexity"
    columns = ("bytes", "effective bits", "predicted divergence, nats", "divergence, nats", last)
    table = Table(title=f"{kind}, held-out text")
    for heading in ("", *columns):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in figures.items():
        table.add_row(name, *(f"{values[c]:,.5g}" if c in values else "" for c in columns))
    Console(width=120).print(table)
    for name in UNIFORM[kind]:
        alone = figures[f"all {name}"]["divergence, nats"]
        mixes = [
            v["divergence, nats"] for n, v in figures.items() if n.startswith(f"mix for the bits of {name},")
        ]
        middle = statistics.median(mixes)
        print(
            f"{name}: divergence of the mix / of the uniform format: {middle / alone:.3f} (median of {len(mixes)})"
        )


if __name__ == "__main__":
    main()
