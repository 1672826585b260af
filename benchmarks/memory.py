"""Peak memory of QAT and of pruning under ZeRO-3, beside plain ZeRO-3, on two processes.

    python -m benchmarks.memory [--rounds 3] [--model bert|mixture] [--json]

A BERT-base with random weights (109 M parameters), or a mixture of 64 experts of 64 rows in each of 8 layers (60 M),
batch 8 x 64, fp32, ZeRO-3 that keeps no more than one layer gathered. Every measurement is a fresh `deepspeed` run; the
variants take turns, round by round. Peak memory is the peak resident size of a process (VmHWM of /proc/self/status,
reset after the first steps), so it includes the interpreter and its libraries; the ratio of what lies above them is
reported too. For pruning the bytes of its masks are measured and compared with what `ds_compress.plan` predicts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)
from ds_compress.config.report import size_estimate
from ds_compress.examples.cpu import skip_shared_memory_build
from ds_compress.examples.launch import PROCESSES, environment, free_port

from . import expert_steps, record
from .engines import (
    BERT_BASE,
    bert,
    deepspeed_config,
    quiet,
    random_batch,
    sparse_block,
    w8a8_block,
)

PLAIN = "plain ZeRO-3"
MIXTURE = "64 experts, "
BLOCKS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "W8A8 dynamic": w8a8_block("dynamic"),
    "W8A8 static": w8a8_block("static"),
    "l1, half the weights": sparse_block("l1", stride=100, dense_ratio=0.5, end=2),
    MIXTURE + PLAIN: None,
    **{f"{MIXTURE}{name}": block for name, block in expert_steps.BLOCKS.items() if block is not None},
}
WARM_UP_STEPS, MEASURED_STEPS = 3, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=("bert", "mixture"), default="bert")
    record.add_output_arguments(parser)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        measure(args.variant, args.folder)
        return
    names = [name for name in BLOCKS if name.startswith(MIXTURE) == (args.model == "mixture")]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            print(f"round {number + 1} of {args.rounds}: {name}", flush=True)
            runs[name].append(launch(name))
    result = figures(runs)
    print_result(result)
    record.report("memory", result, args)


def launch(variant: str) -> dict[str, float]:
    """One fresh run; for each figure the larger of the two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(PROCESSES)]
        command += ["--master_port", str(free_port()), "--module", f"{__package__}.memory"]
        command += ["--variant", variant, "--folder", folder]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        if done.returncode != 0 or len(reports) != PROCESSES:
            sys.exit(f"{variant} failed on {PROCESSES} processes:\n{done.stderr[-3000:]}")
    return {key: max(report[key] for report in reports) for key in reports[0]}


def measure(variant: str, folder: Path) -> None:
    """What one process of a run does: trains a few steps and writes its figures to `folder`."""
    import deepspeed
    import torch.distributed as dist

    quiet()
    skip_shared_memory_build()
    deepspeed.init_distributed()
    before = memory("VmRSS")
    mixture = variant.startswith(MIXTURE)
    model = expert_steps.model("64 experts", layers=8) if mixture else bert(BERT_BASE)
    config = deepspeed_config(3, batch=8, block=BLOCKS[variant])
    # By default ZeRO-3 may keep a model of this size gathered as a whole, beside 2 GB of gradient buckets.
    config["zero_optimization"] |= {"stage3_max_live_parameters": 10_000_000, "stage3_max_reuse_distance": 0}
    config["zero_optimization"] |= {
        "reduce_bucket_size": 10_000_000,
        "stage3_prefetch_bucket_size": 10_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    report = {
        "parameters": float(sum(p.ds_numel for p in model.parameters())),
        "before model MB": before / 1e6,
    }
    train(engine, WARM_UP_STEPS, mixture)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    report["resident between steps MB"] = memory("VmRSS") / 1e6
    train(engine, MEASURED_STEPS, mixture)
    report["peak MB"] = memory("VmHWM") / 1e6
    if "sparse_pruning" in (BLOCKS[variant] or {}):
        report |= mask_bytes(engine)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def train(engine: Any, steps: int, mixture: bool) -> None:
    engine.train()
    for step in range(steps):
        batch = random_batch(8, 64, seed=step)
        if mixture:
            ids = batch["input_ids"] % expert_steps.VOCABULARY
            batch = {"input_ids": ids, "labels": ids}
        engine.backward(engine(**batch).loss)
        engine.step()


def mask_bytes(engine: Any) -> dict[str, float]:
    plan = engine.compression.plan
    plan.world_size = PROCESSES
    return {
        "mask bytes": float(engine.compression.techniques["sparse_pruning"].mask_bytes()),
        "mask bytes, predicted": float(size_estimate.training_state(plan).mask),
    }


def memory(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def figures(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    plain_name = next(iter(runs))
    for name, rounds in runs.items():
        values = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        peaks = [each["peak MB"] for each in rounds]
        plain = [each["peak MB"] for each in runs[plain_name]]
        values["peak MB, largest round"] = max(peaks)
        values["peak MB, smallest round"] = min(peaks)
        values["peak to plain"] = statistics.median(peaks) / statistics.median(plain)
        result[name] = values
    base = result[plain_name]
    for values in result.values():
        values["peak to plain, without the interpreter"] = (values["peak MB"] - values["before model MB"]) / (
            base["peak MB"] - base["before model MB"]
        )
    return result


def print_result(result: dict[str, dict[str, float]]) -> None:
    millions = next(iter(result.values()))["parameters"] / 1e6
    size = f"{millions:.0f} M parameters"
    table = Table(title=f"ZeRO-3, {PROCESSES} processes, {size}: the larger process, median of rounds")
    for column in ("", "peak MB", "to plain", "above the interpreter", "mask bytes", "predicted"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in result.items():
        masks = [values.get("mask bytes"), values.get("mask bytes, predicted")]
        table.add_row(
            name,
            f"{values['peak MB']:.0f}",
            f"{values['peak to plain']:.3f}",
            f"{values['peak to plain, without the interpreter']:.3f}",
            *("" if number is None else f"{number:,.0f}" for number in masks),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
