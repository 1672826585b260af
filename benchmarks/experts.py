"""Half the experts of a mixture removed while training, and what distillation from the whole one gives back.

    python -m benchmarks.experts [--methods reap frequency random] [--seeds 0 1 2] [--steps 48] [--upcycling-steps 300]
                                 [--output DIR] [--measure-only] [--json] [--record]

The mixture is SmolLM2-135M with 8 experts of which a token sees 2 (see `upcycle`; made once, kept in DIR). Each run
scores the experts of every layer over 4 steps, removes half of them from the model and its optimizer, and heals:
forward KL to the whole mixture, no task loss, 4 sequences of 256 tokens of the Python documentation a step. Perplexity
of 24 held-out sequences. `random` is run with every seed, the others with the first. Each finished run is kept in
DIR/runs, its export beside it, and a run that is there is not done again. Latencies are of the exports, in interleaved
rounds. One process under ZeRO-2 on all cores, bf16 weights with fp32 masters; some 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ds_compress
from ds_compress.examples import assets

from . import kept_runs, record, smollm2, upcycle
from .float_formats_runs import QAD, measure

METHODS, SEEDS, STEPS = ("reap", "frequency", "random"), (0, 1, 2), 48
OBSERVED_STEPS, PEAK_LR = 4, 1e-4
WHOLE = "whole"


@dataclass(frozen=True)
class Run:
    """steps: all of them, those in which experts are scored included."""

    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.method}_seed{self.seed}_steps{self.steps}"

    def block(self) -> dict[str, Any]:
        """Its `compression_training`."""
        shared: dict[str, Any] = {
            "enabled": True,
            "method": self.method,
            "dense_ratio": 0.5,
            "schedule_offset": OBSERVED_STEPS,
            "shrink_at_end_of_schedule": True,
        }
        if self.method == "random":
            shared["seed"] = self.seed
        return {"expert_pruning": {"shared_parameters": shared}, "distillation": QAD}


Latencies = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of random")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--upcycling-steps", type=int, default=upcycle.STEPS)
    parser.add_argument("--output", type=Path, default=Path("experts_result"))
    parser.add_argument("--measure-only", action="store_true", help="report the finished runs, train none")
    record.add_output_arguments(parser)
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.output.resolve()
    if args.run:
        method, seed = args.run
        if method == WHOLE:
            upcycle.upcycle(folder, args.upcycling_steps)
        else:
            train(folder, Run(method, int(seed), args.steps))
        return
    runs = [
        Run(m, s, args.steps) for m in args.methods for s in (args.seeds if m == "random" else args.seeds[:1])
    ]
    if not args.measure_only:
        do(runs, folder, args.upcycling_steps)
    result = summary(folder, runs)
    done = {run.method: run.name for run in reversed(runs) if run.method in result}
    measured = latencies(folder, [WHOLE, *done.values()])
    for method, name in {WHOLE: WHOLE, **done}.items():
        result[method] |= measured[name]
    print_result(result)
    record.report("experts", result, args)


def do(runs: Sequence[Run], folder: Path, upcycling_steps: int) -> None:
    """Those that are not finished, and what they begin with."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    if not (folder / "held_out.json").exists():
        try:
            smollm2.prepare(folder)
        except assets.AssetError as error:
            sys.exit(str(error))
    if not (folder / "upcycled.json").exists():
        _launch(folder, WHOLE, 0, ["--upcycling-steps", str(upcycling_steps)])
    for run in runs:
        if kept_runs.finished(folder, run.name) is None:
            _launch(folder, run.method, run.seed, ["--steps", str(run.steps)])


def _launch(folder: Path, method: str, seed: int, options: list[str]) -> None:
    log = folder / "runs" / f"{method}_seed{seed}.log"
    print(f"{method}, seed {seed}; log: {log}", flush=True)
    smollm2.launch("experts", ["--output", str(folder), "--run", method, str(seed), *options], 1, log)


def whole(folder: Path) -> Any:
    """The mixture before pruning, bf16 as it trained."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "upcycled", dtype=torch.bfloat16)


def exported(folder: Path, name: str) -> Path:
    """Where the result of a run lies, as stock transformers reads it."""
    return folder / "runs" / f"{name}.model"


def train(folder: Path, run: Run) -> None:
    """In a process of its own: prunes, heals and measures; writes `folder/runs/<name>.json` when all is done."""
    import deepspeed

    from ds_compress.examples.train import progress_bar

    smollm2.start_process()
    torch.manual_seed(run.seed)
    training, held_out = smollm2.rows(folder, "training"), smollm2.rows(folder, "held_out")
    config = upcycle.config(run.steps, PEAK_LR) | {"compression_training": run.block()}
    model = whole(folder)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))
    engine.train()
    figures: dict[str, float] = {}
    rows = upcycle.ROWS
    for step in progress_bar(range(run.steps), run.steps, f"    {run.name}"):
        batch = training[order[(step * rows + torch.arange(rows)) % len(order)]]
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        if step == OBSERVED_STEPS:
            figures |= _numbers(engine.compression.metrics())
            figures["perplexity before healing"] = measure(engine.module, whole(folder), held_out)[
                "perplexity"
            ]
            engine.train()
    figures |= measure(engine.module, whole(folder), held_out)
    figures["healing tokens"] = float((run.steps - OBSERVED_STEPS) * rows * smollm2.TOKENS)
    figures |= {f"healed: {key}": value for key, value in _numbers(engine.compression.metrics()).items()}
    report = ds_compress.export(engine, exported(folder, run.name), "hf", overwrite=True)
    figures |= sizes(engine.module) | {"bytes": float(report.bytes)}
    kept_runs.keep(folder, run.name, figures)


def _numbers(metrics: dict[str, float]) -> dict[str, float]:
    """What is known of the load of the experts."""
    block = "expert_pruning/"
    return {key.removeprefix(block): float(value) for key, value in metrics.items() if key.startswith(block)}


def sizes(model: Any) -> dict[str, float]:
    """Parameters: all, and those that one token passes through."""
    resident = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = model.config.num_experts_per_tok / model.config.num_local_experts
    return {
        "resident parameters": float(resident),
        "active parameters": resident - experts + experts * share,
    }


def of_whole(folder: Path) -> dict[str, float]:
    """Of the mixture before pruning, measured once and kept beside the runs."""
    found = kept_runs.finished(folder, WHOLE)
    if found is None:
        model, held_out = whole(folder), smollm2.rows(folder, "held_out")
        found = {"perplexity": measure(model, model, held_out)["perplexity"], **sizes(model)}
        found["bytes"] = float(
            ds_compress.export(model, exported(folder, WHOLE), "hf", check=False, overwrite=True).bytes
        )
        known = json.loads((folder / "upcycled.json").read_text())
        found |= {"upcycling tokens": float(known["tokens"]), "cosine of two experts": known["similarity"]}
        kept_runs.keep(folder, WHOLE, found)
    return found


@torch.no_grad()
def latencies(
    folder: Path, names: Sequence[str], tokens: Sequence[int] = (256, 1), rounds: int = 7
) -> Latencies:
    """{run: {"milliseconds of N tokens": median}} of one forward of exports, the runs by turns."""
    from transformers import AutoModelForCausalLM

    models = {
        name: AutoModelForCausalLM.from_pretrained(exported(folder, name), dtype=torch.bfloat16).eval()
        for name in names
    }
    row = smollm2.rows(folder, "held_out")[:1]
    result: Latencies = {name: {} for name in names}
    for count in tokens:
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(input_ids=row[:, :count], use_cache=False)
                if turn:  # the first warms up
                    times[name].append(1e3 * (time.perf_counter() - start))
        for name, values in times.items():
            result[name][f"milliseconds of {count} token{'s' * (count > 1)}"] = statistics.median(values)
    return result


def summary(folder: Path, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """{method: figures}: means over the seeds that are finished, and the perplexity in percent of the whole one's."""
    result = {WHOLE: of_whole(folder)}
    for method in dict.fromkeys(run.method for run in runs):
        found = [
            f
            for run in runs
            if run.method == method and (f := kept_runs.finished(folder, run.name)) is not None
        ]
        if not found:
            continue
        means = {key: statistics.fmean(f[key] for f in found) for key in found[0]}
        ratio = 100 * means["perplexity"] / result[WHOLE]["perplexity"]
        result[method] = means | {"perplexity, percent of the whole": ratio, "seeds": float(len(found))}
        if len(found) > 1:
            spread = statistics.stdev(f["perplexity"] for f in found)
            result[method]["perplexity, standard deviation"] = spread
    return result


def print_result(result: dict[str, dict[str, float]]) -> None:
    keys = ["perplexity before healing", "perplexity", "perplexity, percent of the whole"]
    keys += [
        "resident parameters",
        "active parameters",
        "bytes",
        "milliseconds of 256 tokens",
        "tokens_of_removed",
    ]
    table = Table(title="SmolLM2-135M as a mixture of 8 experts, half of them removed")
    for column in ("", *keys):
        table.add_column(column, justify="right" if column else "left")
    for variant, figures in result.items():
        table.add_row(variant, *(f"{figures[key]:.4g}" if key in figures else "" for key in keys))
    Console(width=160).print(table)


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
