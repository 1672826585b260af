"""Peak memory and time of a distillation step of a language model, logits in chunks beside whole ones.

    python -m benchmarks.logits_distillation [--batch 8] [--rounds 5] [--quick] [--json]

Student and teacher have the shape of SmolLM2-135M (vocabulary 49,152, tied embeddings) and random weights, sequences of
512 tokens, bf16 under ZeRO-2, gradient checkpointing. `whole` is what a training script does by itself: logits of
both, KL of their softmaxes, added to the model's loss. `chunked` is the `distillation` block. Memory: the peak resident
size (VmHWM) over one forward and backward of a fresh process each, and of it what lies above the resident size between
steps. Time: CPU seconds of forward and backward, the two taking turns in one process on a smaller batch.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import ds_compress

from . import record
from .engines import start_single_process
from .memory import memory
from .timing import interleave

TOKENS, TEMPERATURE = 512, 2.0
WARM_UP = 2  # steps after which the factors of both losses are known
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
VARIANTS = ("whole", "chunked")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 sequences and 1 round")
    record.add_output_arguments(parser)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, rounds = (2, 1) if args.quick else (args.batch, args.rounds)
    if args.variant:
        print(json.dumps(peak(args.variant, batch)))
        return
    result: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        print(f"memory: {variant}", flush=True)
        command = [sys.executable, "-m", f"{__package__}.logits_distillation", "--variant", variant]
        done = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr[-3000:])
        result[variant] = json.loads(done.stdout.splitlines()[-1])
    start_single_process()
    timings = interleave({variant: step_of(variant, 2) for variant in VARIANTS}, rounds, WARM_UP)
    for variant in VARIANTS:
        result[variant]["CPU s"] = timings[variant].median_cpu
    whole, chunked = result["whole"], result["chunked"]
    ratios = [
        c / w for c, w in zip(timings["chunked"].cpu, timings["whole"].cpu, strict=True)
    ]  # each round by itself
    result["ratio"] = {key: chunked[key] / whole[key] for key in whole} | {"CPU s": statistics.median(ratios)}
    print_result(result)
    record.report("logits_distillation", result, args)


def peak(variant: str, batch: int) -> dict[str, float]:
    """MB of one forward and backward."""
    start_single_process()
    step = step_of(variant, batch)
    for _ in range(WARM_UP):
        step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = memory("VmRSS")
    loss = step()
    assert loss == loss
    highest = memory("VmHWM")
    return {"peak MB": highest / 1e6, "above what is resident between steps MB": (highest - before) / 1e6}


def step_of(
    variant: str, batch: int, device: str = "cpu", size: dict[str, Any] = SMOLLM2_135M, tokens: int = TOKENS
) -> Callable[[], float]:
    """One forward and backward; the weights stay as they are."""
    teacher = llama(1, size).bfloat16().eval().requires_grad_(False).to(device)
    student = llama(0, size)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 10**6,  # backward alone, no reduction
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    if variant == "chunked":
        losses = {"logits": {"temperature": TEMPERATURE}}
        block = {"enabled": True, "losses": losses, "task_loss_weight": 0.5, "teacher_zero_stage": 0}
        config["compression_training"] = {"distillation": block}
    engine, *_ = ds_compress.initialize(
        model=student,
        model_parameters=student.parameters(),
        config=config,
        teacher=teacher if variant == "chunked" else None,
    )
    engine.train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size["vocab_size"], (batch, tokens), generator=generator).to(device)

    def step() -> float:
        output = engine(input_ids=ids, labels=ids)
        loss = output.loss
        if variant == "whole":
            loss = 0.5 * loss + whole_logits_loss(output.logits, teacher, ids)
        engine.backward(loss)
        return float(loss)

    return step


def whole_logits_loss(logits: torch.Tensor, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        wanted = F.log_softmax(teacher(input_ids=ids).logits.float() / TEMPERATURE, dim=-1)
    predicted = F.log_softmax(logits.float() / TEMPERATURE, dim=-1)
    divergence = F.kl_div(
        predicted.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True
    )
    return divergence * TEMPERATURE**2


def llama(seed: int, size: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**size, use_cache=False))


def print_result(result: dict[str, dict[str, float]]) -> None:
    table = Table(title="distillation step, vocabulary 49,152, 512 tokens a sequence")
    for column in ("", *result["whole"]):
        table.add_column(column)
    for name, values in result.items():
        digits = 2 if name == "ratio" else 0
        cells = [f"{value:,.{2 if 'CPU' in figure else digits}f}" for figure, value in values.items()]
        table.add_row(name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
