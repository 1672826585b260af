"""Gradient traffic over slow links: bare collectives and whole training steps, against stock DeepSpeed in bf16.

    python -m benchmarks.reduction [--quick] [--json] [--rates 1gbit,200mbit,none] [--worlds 2,4] [--picture]

Each node is a network namespace of its own (`benchmarks.netlab`: needs root) with a full-duplex link of the given
rate; "none" is as fast as this machine copies. Collectives are of 25.2 million elements, in one process per node.
Steps run through the real `deepspeed` launcher, one per node, on encoders of 23 and 110 million parameters. All
variants take turns in one job; a figure is the median over rounds of the slowest process, a ratio the median of ratios.

With --picture: step time against link speed, measured points and the line of the model
(step without network + bytes of theory / speed), for stock bf16, int8 and int4, to benchmarks/results/reduction.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import record
from .netlab import Lab, unavailable
from .reduction_worker import RESULT, STEP_VARIANTS
from .timing import ratio

PICTURE = Path(__file__).parent / "results" / "reduction.png"
STOCK = "stock bf16"
# Bytes that a process sends per parameter and step of ZeRO-2 in two processes, gradients and weights.
BYTES_OF_TWO = {STOCK: 3.0, "int8": 1.504, "int4": 1.266, "int4, weights int8": 0.770}
PARAMETERS = {"tiny": 13.8e6, "minilm": 22.7e6, "bert-base": 109.5e6}
RATES = {"1gbit": 1e9, "500mbit": 5e8, "200mbit": 2e8, "100mbit": 1e8}

Times = Mapping[str, list[float]]


def measured(nodes: int, rate: str, kind: str, arguments: list[str], timeout_s: float) -> Times:
    """{variant: seconds per round} of one job in a lab of its own."""
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Lab(nodes) as lab:
        lab.limit(None if rate == "none" else rate)
        module = f"{__package__}.reduction_worker"
        if kind == "step":
            output = lab.launch(["--module", module, kind, *arguments], timeout_s, environment)
        else:
            output = lab.run_all([sys.executable, "-m", module, kind, *arguments], timeout_s, environment)
    lines = [line[line.index(RESULT) :] for line in output.splitlines() if RESULT in line]
    if len(lines) != 1:
        raise RuntimeError(f"no result:\n{output[-3000:]}")
    found: Times = json.loads(lines[0].removeprefix(RESULT))
    return found


def base_of(variant: str) -> str:
    """A collective is compared with the same one of gloo in bf16, a step with DeepSpeed's own."""
    collective = variant.partition(" ")[0]
    return f"{collective} bf16" if collective in ("all-reduce", "reduce-scatter") else STOCK


def figures_of(times: Times) -> dict[str, dict[str, float]]:
    """Median milliseconds, and how much faster than the base of the same rounds (with quartiles)."""
    figures = {}
    for name, seconds in times.items():
        faster = ratio(times[base_of(name)], seconds)
        figures[name] = {
            "median_ms": statistics.median(seconds) * 1e3,
            "faster_x": faster.median,
            "faster_low_x": faster.low,
            "faster_high_x": faster.high,
        }
    return figures


def draw(
    points: Mapping[str, Mapping[str, float]], compute: Mapping[str, float], model: str, path: Path
) -> None:
    """points: {variant: {rate: seconds}}; compute: {variant: seconds of a step without a limit}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    speeds = [10 ** (7.7 + 0.05 * i) for i in range(34)]
    for name, by_rate in points.items():
        sent = BYTES_OF_TWO[name] * PARAMETERS[model] * 8
        (line,) = axes.plot(
            [speed / 1e6 for speed in speeds], [compute[name] + sent / speed for speed in speeds], lw=1
        )
        axes.plot(
            [RATES[rate] / 1e6 for rate in by_rate],
            list(by_rate.values()),
            "o",
            color=line.get_color(),
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel="seconds per step")
    axes.set_title(f"ZeRO-2, {model}, 2 nodes: measured, and compute + bytes / speed", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small case of each kind; nothing is recorded"
    )
    record.add_output_arguments(parser)
    parser.add_argument("--rates", default="1gbit,200mbit,none")
    parser.add_argument("--worlds", default="2,4")
    parser.add_argument("--models", default="minilm,bert-base")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", default="collective,step")
    parser.add_argument(
        "--variants", default=";".join(STEP_VARIANTS), help="of steps, separated by semicolons"
    )
    parser.add_argument("--picture", action="store_true")
    arguments = parser.parse_args()
    reason = unavailable()
    if reason is None and arguments.picture and importlib.util.find_spec("matplotlib") is None:
        reason = "a picture needs matplotlib: pip install 'ds_compress[benchmarks]'"
    if reason is not None:
        parser.error(reason)
    if STOCK not in arguments.variants.split(";"):
        parser.error(f'--variants needs "{STOCK}", which the others are compared with')
    if arguments.quick:
        arguments.worlds, arguments.models, arguments.rates, arguments.rounds = "2", "tiny", "1gbit", 2
    if arguments.picture:
        picture(arguments)
        return
    figures: dict[str, dict[str, float]] = {}
    for nodes in map(int, arguments.worlds.split(",")):
        for rate in arguments.rates.split(","):
            for kind, name, options in jobs(arguments):
                job = [*options, "--rounds", str(arguments.rounds)]
                found = figures_of(measured(nodes, rate, kind, job, timeout_s=3000))
                figures |= {f"{name}, {nodes} nodes, {rate}: {variant}": v for variant, v in found.items()}
                if not arguments.json:
                    print(f"{name}, {nodes} nodes, {rate}")
                    for variant, v in found.items():
                        print(
                            f"  {variant:32s} {v['median_ms']:10.1f} ms  {v['faster_x']:5.2f}x "
                            f"({v['faster_low_x']:.2f} to {v['faster_high_x']:.2f})",
                            flush=True,
                        )
    record.report("reduction", figures, arguments)


def jobs(arguments: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """(kind, name, options of the worker)."""
    found = []
    if "collective" in arguments.kinds:
        elements = "1048576" if arguments.quick else "25165824"
        found.append(("collective", f"collective of {int(elements):,}", ["--elements", elements]))
    if "step" in arguments.kinds:
        for model in arguments.models.split(","):
            for stage in arguments.stages.split(","):
                options = [
                    "--model",
                    model,
                    "--stage",
                    stage,
                    "--variants",
                    listed(arguments.variants.split(";")),
                ]
                found.append(("step", f"step of {model}, stage {stage}", options))
    return found


def listed(variants: Iterable[str]) -> str:
    """Names as the worker takes them: their own commas become semicolons."""
    return ",".join(name.strip().replace(",", ";") for name in variants)


def picture(arguments: argparse.Namespace) -> None:
    model = arguments.models.split(",")[0]
    variants = list(BYTES_OF_TWO)
    job = ["--model", model, "--rounds", str(arguments.rounds)]
    job += ["--variants", listed(variants)]
    rates = ["none", *(["1gbit"] if arguments.quick else RATES)]
    times = {rate: measured(2, rate, "step", job, timeout_s=3000) for rate in rates}
    medians = {rate: {name: statistics.median(times[rate][name]) for name in variants} for rate in rates}
    points = {name: {rate: medians[rate][name] for rate in rates if rate != "none"} for name in variants}
    path = PICTURE.with_name("reduction_quick.png") if arguments.quick else PICTURE
    if not arguments.quick:
        figures = {
            f"picture {model}, {rate}: {name}": {"median_ms": medians[rate][name] * 1e3}
            for rate in rates
            for name in variants
        }
        record.report("reduction", figures, arguments)
    draw(points, medians["none"], model, path)
    print(path)


if __name__ == "__main__":
    main()
