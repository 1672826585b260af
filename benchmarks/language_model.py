"""A Llama of 135 M parameters loses half of its FFN and a third of its layers while it learns from what it was.

    python -m benchmarks.language_model [--steps 200] [--reference] [--output DIR] [--json]

SmolLM2-135M-Instruct reads the sources of the Python documentation (see `smollm2`), two processes under ZeRO-2, 4
sequences of 256 tokens a step.
Within the first quarter of the steps `row_pruning` halves the FFN (taylor) and `depth_pruning` takes 10 layers (block
influence); then the engine shrinks, and the rest is trained on the smaller model, with the original as the teacher.
Perplexity is measured on 24 held-out sequences: of the original, right after the shrink, and in the end, there in a
process that knows only transformers. With --reference the same steps are run without cutting anything, which shows
what the text itself teaches.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ds_compress
from ds_compress.examples import assets
from ds_compress.examples.launch import PROCESSES, environment

from . import record, smollm2

BATCH = 4
STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.tensor(json.load(open(sys.argv[2])))
with torch.inference_mode():
    losses = [model(row[None], labels=row[None]).loss.item() for row in tokens]
assert "ds_compress" not in sys.modules and "deepspeed" not in sys.modules
print(json.dumps({"loss": sum(losses) / len(losses), "layers": model.config.num_hidden_layers,
                  "ffn": model.config.intermediate_size, "parameters": model.num_parameters()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--reference", action="store_true", help="also train the model that is not cut")
    parser.add_argument("--output", type=Path, default=Path("language_model_result"))
    record.add_output_arguments(parser)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.output.resolve()
    if args.variant:
        train(folder, args.variant, args.steps)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        smollm2.prepare(folder)
    except assets.AssetError as error:
        sys.exit(str(error))
    result = {name: launch(folder, name, args.steps) for name in ("cut", *["not cut"] * args.reference)}
    result["cut"] |= stock_figures(folder / "cut", folder / "held_out.json")
    print_result(result)
    record.report("language_model", result, args)


def config_of(folder: Path, variant: str, steps: int) -> dict[str, Any]:
    config = smollm2.deepspeed_config(BATCH, lr=5e-4) | {
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": 10,
                "warmup_max_lr": 5e-4,
                "warmup_type": "linear",
            },
        },
    }
    schedule = {
        "enabled": True,
        "schedule": "linear",
        "schedule_offset": 4,
        "schedule_offset_end": steps // 4,
        "schedule_offset_stride": max(1, steps // 32),
        "shrink_at_end_of_schedule": True,
    }
    block: dict[str, Any] = {
        "distillation": {
            "enabled": True,
            "teacher": str(folder / "original"),
            "teacher_dtype": "bf16",
            "teacher_zero_stage": 0,
            "task_loss_weight": 0.5,
            "losses": {"logits": {"weight": 0.5, "temperature": 1.0}},
        }
    }
    if variant == "cut":
        block["row_pruning"] = {
            "shared_parameters": {**schedule, "method": "taylor", "dense_ratio": 0.5, "round_to": 64}
        }
        block["depth_pruning"] = {"shared_parameters": {**schedule, "dense_ratio": 0.6667}}
    return {**config, "compression_training": block}


def launch(folder: Path, variant: str, steps: int) -> dict[str, float]:
    options = ["--variant", variant, "--output", str(folder), "--steps", str(steps)]
    log = folder / f"{variant.replace(' ', '_')}.log"
    print(f"{variant}: {steps} steps on {PROCESSES} processes; log: {log}", flush=True)
    smollm2.launch("language_model", options, PROCESSES, log)
    figures: dict[str, float] = json.loads((folder / f"{variant}.json").read_text())
    return figures


def train(folder: Path, variant: str, steps: int) -> None:
    """What each process does."""
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from ds_compress.examples.train import progress_bar

    smollm2.start_process()
    rank = dist.get_rank()
    model = smollm2.original(folder)
    original = sum(p.numel() for p in model.parameters())
    training, held_out = smollm2.rows(folder, "training"), smollm2.rows(folder, "held_out")
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config_of(folder, variant, steps)
    )
    figures = {"parameters before": float(original), "perplexity before": perplexity(engine, held_out)}
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    engine.train()
    seconds: list[float] = []
    size = original
    for step in progress_bar(range(steps), steps, f"    {variant}"):
        start = time.perf_counter()
        rows = order[(step * BATCH + torch.arange(BATCH)) % len(order)][rank::PROCESSES]
        batch = training[rows]
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - start)
        if (now := sum(p.numel() for p in engine.module.parameters())) != size:
            size = now
            figures["step of the shrink"] = float(step + 1)
            figures["seconds per step, masked"] = sum(seconds[1:-1]) / max(1, len(seconds) - 2)
            figures["perplexity after cutting"] = perplexity(engine, held_out)
            seconds = []
    figures["seconds per step, at the end"] = sum(seconds[1:]) / max(1, len(seconds) - 1)
    figures["parameters after"] = float(size)
    figures["perplexity after training"] = perplexity(engine, held_out)
    final: Any = ds_compress.finalize(engine)
    if rank == 0:
        final.save_pretrained(folder / variant.replace(" ", "_"))
        AutoTokenizer.from_pretrained(folder / "original").save_pretrained(folder / variant.replace(" ", "_"))
        (folder / f"{variant}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def perplexity(engine: Any, rows: torch.Tensor) -> float:
    """exp of the mean loss of a token, in bf16 as in training; each process reads its share."""
    import torch.distributed as dist

    module = engine.module
    was_training = module.training
    module.eval()
    total = torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16):
        for row in rows[dist.get_rank() :: PROCESSES]:
            total += module(input_ids=row[None], labels=row[None], use_cache=False).loss.float()
    dist.all_reduce(total)
    module.train(was_training)
    return math.exp(total.item() / len(rows))


def stock_figures(folder: Path, held_out: Path) -> dict[str, float]:
    """The same of the saved model, fp32, in a process that imports torch and transformers only."""
    command = [sys.executable, "-c", STOCK, str(folder), str(held_out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"stock transformers did not load {folder}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {
        "perplexity in stock transformers, fp32": math.exp(found["loss"]),
        "layers in stock transformers": float(found["layers"]),
        "FFN in stock transformers": float(found["ffn"]),
    }


def print_result(result: dict[str, dict[str, float]]) -> None:
    table = Table(title="SmolLM2-135M on the Python documentation")
    table.add_column("")
    for name in result:
        table.add_column(name, justify="right")
    for figure in dict.fromkeys(figure for values in result.values() for figure in values):
        cells = [f"{values[figure]:,.5g}" if figure in values else "" for values in result.values()]
        table.add_row(figure, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
