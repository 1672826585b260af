"""What a 135 M language model loses to each number format, and what training with it gives back.

    python -m benchmarks.float_formats [--formats NVFP4 MXFP4 ...] [--methods ptq qat qad] [--seeds 0 1 2]
                                       [--steps 48] [--output DIR] [--measure-only] [--picture] [--json] [--record]

SmolLM2-135M-Instruct reads the Python documentation (see `smollm2`), one process under ZeRO-2, 4 sequences of 256
tokens a step. Every Linear but the head, which is tied to the embeddings, is quantized: rounded (PTQ), trained on the
text (QAT) or towards its unquantized self (QAD), at equal steps and tokens. Perplexity of 24 held-out sequences, and KL
to the unquantized model. The text itself teaches under QAT: "unquantized, qat" is the model that learns from it without
any format.

"half the FFN" prunes it in the first third of the steps (row_pruning, taylor) and removes it, with or without NVFP4.
NVFP4 is trained with every seed, the others with the first. Each finished run is kept in DIR/runs, and a run that is
there is not done again: the command goes on where it was cut off, and reports all that is finished. --measure-only
trains nothing and reports.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ds_compress.examples import assets

from . import record, smollm2
from .float_formats_picture import draw
from .float_formats_runs import FP8, FP8_SLOWLY, METHODS, PLAIN, PRUNED, SCHEMES, Run, train
from .kept_runs import finished

STEPS, SEEDS = 48, (0, 1, 2)
PICTURE = record.RESULTS / "float_formats.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of NVFP4")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=Path("float_formats_result"))
    parser.add_argument("--measure-only", action="store_true", help="report the finished runs, train none")
    parser.add_argument("--picture", action="store_true", help=f"draw {PICTURE.name} (needs matplotlib)")
    record.add_output_arguments(parser)
    parser.add_argument("--run", nargs=3, metavar=("SCHEME", "METHOD", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.output.resolve()
    if args.run:
        scheme, method, seed = args.run
        train(folder, Run(scheme, method, int(seed), args.steps))
        return
    runs = all_runs(args.seeds, args.steps)
    if not args.measure_only:
        do([r for r in runs if r.scheme in args.formats and r.method in args.methods], folder)
    result = summary(folder, runs)
    print_result(result)
    if args.picture:
        print(f"drawn: {draw(result, PICTURE)}")
    record.report("float_formats", result, args)


def all_runs(seeds: Sequence[int], steps: int) -> list[Run]:
    """In the order of their worth: what a shorter session leaves out stands at the end."""
    first, *others = seeds
    runs = [Run(PLAIN, "ptq", first, steps)]
    for scheme in SCHEMES:
        if scheme not in (PLAIN, FP8_SLOWLY, *PRUNED):
            runs += [Run(scheme, method, first, steps) for method in ("ptq", "qad", "qat")]
    runs += [Run(PLAIN, "qat", first, steps), Run(PRUNED[0], "qad", first, steps)]
    runs += [Run(FP8_SLOWLY, "qad", first, steps)]
    runs += [Run("NVFP4", method, seed, steps) for seed in others for method in ("qad", "qat")]
    return [*runs, Run(PRUNED[1], "qad", first, steps)]


def do(runs: Sequence[Run], folder: Path) -> None:
    """Those that are not finished."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if finished(folder, run.name) is None]
    if missing and not (folder / "held_out.json").exists():
        try:
            smollm2.prepare(folder)
        except assets.AssetError as error:
            sys.exit(str(error))
    for run in missing:
        log = folder / "runs" / f"{run.name}.log"
        print(f"{run.name}; log: {log}", flush=True)
        options = ["--output", str(folder), "--steps", str(run.steps)]
        options += ["--run", run.scheme, run.method, str(run.seed)]
        smollm2.launch("float_formats", options, 1, log)


Result = dict[str, dict[str, float]]


def summary(folder: Path, runs: Sequence[Run]) -> Result:
    """{"<scheme>, <method>": figures}: means over the seeds that are finished, and what of PTQ's loss is recovered."""
    result: Result = {}
    for scheme, method in dict.fromkeys((run.scheme, run.method) for run in runs):
        same = [run for run in runs if (run.scheme, run.method) == (scheme, method)]
        found = [figures for run in same if (figures := finished(folder, run.name)) is not None]
        if found:
            means = {key: statistics.fmean(f[key] for f in found) for key in found[0]}
            spread = {
                f"{key}, standard deviation": statistics.stdev(f[key] for f in found)
                for key in ("perplexity", "KL to the unquantized model")
                if len(found) > 1
            }
            result[f"{scheme}, {method}"] = means | spread | {"seeds": float(len(found))}
    for variant, figures in result.items():
        figures |= dict(recovered(variant, result))
    return result


def recovered(variant: str, result: Result) -> Iterator[tuple[str, float]]:
    """Percent of the perplexity that PTQ lost, and of the KL that it made, which QAD has back.

    Not of QAT, whose perplexity falls for another reason, too.
    """
    scheme, _, method = variant.rpartition(", ")
    rounded = FP8 if scheme == FP8_SLOWLY else scheme
    base, ptq = (result.get(f"{name}, ptq") for name in (PLAIN, rounded))
    if method != "qad" or base is None or ptq is None:
        return
    for key, least in (("perplexity", base["perplexity"]), ("KL to the unquantized model", 0.0)):
        now = result[variant][key]
        yield f"{key}, percent recovered", 100 * (ptq[key] - now) / (ptq[key] - least)


def print_result(result: Result) -> None:
    table = Table(title="SmolLM2-135M on held-out Python documentation")
    for column in ("", "perplexity", "recovered", "KL", "KL recovered", "CPU s a step", "seeds"):
        table.add_column(column, justify="right" if column else "left")
    keys = [
        "perplexity",
        "perplexity, percent recovered",
        "KL to the unquantized model",
        "KL to the unquantized model, percent recovered",
        "CPU seconds per step",
        "seeds",
    ]
    for variant, figures in result.items():
        table.add_row(variant, *(f"{figures[key]:.4g}" if key in figures else "" for key in keys))
    Console(width=130).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
