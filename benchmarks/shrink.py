"""Mid-training shrink: step time, memory and loss before and after, on two processes under ZeRO 1, 2 and 3.

    python -m benchmarks.shrink [--quick] [--json]

A BERT-base with random weights (109 M parameters; --quick: MiniLM's 23 M), batch 8 x 64, fp32, loses half of its FFN
neurons, half of its heads and a third of its layers at step 4. One run removes them there and then
(`shrink_at_end_of_schedule`), the other only masks them. Both see the same data, so their losses must agree to
the last digits of fp32, and the masked run's time is what the first would take without shrinking. Memory is that of
all tensors alive between two steps, the larger of the two processes: freed memory stays with the process here, so that
allocation costs no time, and its resident size says nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)
from ds_compress.examples.cpu import keep_freed_memory, skip_shared_memory_build
from ds_compress.examples.launch import PROCESSES, environment, free_port

from . import record
from .engines import BERT_BASE, MINILM, bert, deepspeed_config, quiet, random_batch

ZERO_STAGES = (1, 2, 3)
CUT_AT, STEPS = 4, 10
Report = dict[str, Any]


def block(shrinks: bool) -> dict[str, Any]:
    shared = {
        "enabled": True,
        "method": "l1",
        "schedule_offset": CUT_AT,
        "shrink_at_end_of_schedule": shrinks,
    }
    return {
        "row_pruning": {"shared_parameters": {**shared, "dense_ratio": 0.5}},
        "head_pruning": {"shared_parameters": {**shared, "dense_ratio": 0.5}},
        "depth_pruning": {"shared_parameters": {**shared, "dense_ratio": 0.6667}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, ZeRO-2 only: under 50 seconds")
    record.add_output_arguments(parser)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shrinks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        measure(args.stage, args.shrinks, args.folder, MINILM if args.quick else BERT_BASE)
        return
    result = {}
    for stage in (2,) if args.quick else ZERO_STAGES:
        print(f"ZeRO-{stage}: shrinking, then masking only", flush=True)
        result[f"ZeRO-{stage}"] = figures(*(launch(stage, shrinks, args.quick) for shrinks in (True, False)))
    print_result(result)
    record.report("shrink", result, args)


def launch(stage: int, shrinks: bool, quick: bool) -> list[Report]:
    """The reports of the processes of one fresh `deepspeed` run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(PROCESSES)]
        command += ["--master_port", str(free_port()), "--module", f"{__package__}.shrink"]
        command += ["--stage", str(stage), "--folder", folder, *["--shrinks"] * shrinks, *["--quick"] * quick]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        if done.returncode != 0 or len(reports) != PROCESSES:
            sys.exit(f"ZeRO-{stage} failed on {PROCESSES} processes:\n{done.stderr[-3000:]}")
    return reports


def measure(stage: int, shrinks: bool, folder: Path, size: dict[str, int]) -> None:
    """What one process of a run does; writes its report to `folder`."""
    import deepspeed
    import torch.distributed as dist

    quiet()
    keep_freed_memory()
    skip_shared_memory_build()
    deepspeed.init_distributed()
    model = bert(size)
    config = deepspeed_config(stage, batch=8, block=block(shrinks))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.train()
    report: Report = {"losses": [], "seconds": [], "tensors MB": [], "parameters": []}
    for step in range(STEPS):
        batch = random_batch(8, 64, seed=step * PROCESSES + dist.get_rank())
        start = time.perf_counter()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        report["seconds"].append(time.perf_counter() - start)
        report["losses"].append(loss.item())
        del loss
        report["tensors MB"].append(bytes_of_tensors() / 1e6)
        report["parameters"].append(sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def bytes_of_tensors() -> int:
    """Of every tensor that Python knows, each memory counted once."""
    gc.collect()
    storages = (item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def figures(shrunk: list[Report], masked: list[Report]) -> dict[str, float]:
    def seconds(reports: list[Report], steps: slice) -> float:
        return max(statistics.median(report["seconds"][steps]) for report in reports)

    def tensors(reports: list[Report], step: int) -> float:
        return max(report["tensors MB"][step] for report in reports)

    before, after = slice(1, CUT_AT - 1), slice(CUT_AT, STEPS)
    differences = [abs(a - b) for a, b in zip(shrunk[0]["losses"], masked[0]["losses"], strict=True)]
    return {
        "parameters before": float(shrunk[0]["parameters"][0]),
        "parameters after": float(shrunk[0]["parameters"][-1]),
        "seconds per step before": seconds(shrunk, before),
        "seconds per step after": seconds(shrunk, after),
        "seconds per step, masked only": seconds(masked, after),
        "step time to masked only": seconds(shrunk, after) / seconds(masked, after),
        "seconds of the shrink and its step": max(report["seconds"][CUT_AT - 1] for report in shrunk),
        "tensors MB before": tensors(shrunk, CUT_AT - 2),
        "tensors MB after": tensors(shrunk, STEPS - 1),
        "tensors MB, masked only": tensors(masked, STEPS - 1),
        "largest difference of a loss": max(differences),
        "loss before the cut": shrunk[0]["losses"][CUT_AT - 1],
        "loss after the cut": shrunk[0]["losses"][CUT_AT],
    }


def print_result(result: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"shrink at step {CUT_AT}, {PROCESSES} processes")
    table.add_column("")
    for name in result:
        table.add_column(name, justify="right")
    for figure in next(iter(result.values())):
        table.add_row(figure, *(f"{values[figure]:,.5g}" for values in result.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
