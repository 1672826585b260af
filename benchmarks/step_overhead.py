"""What compression adds to a training step, beside plain DeepSpeed in the same run.

    python -m benchmarks.step_overhead [--quick] [--json] [--zero-stage N]

A BERT of MiniLM's size (22.7 M parameters, 10.6 M of them in the encoder's matrices), batch 32 x 40, fp32,
one process on one thread. Every variant has its own engine; the engines take turns, one step each per round.
Reported per variant: the ratio of CPU time per step to plain DeepSpeed's in the same round (median and
quartiles), what making a new mask costs, as a share of 100 plain steps, and the part of the step that
quantizes once more in backward instead of keeping copies (it is in the ratio already).

Pruning is measured in the middle of a schedule, at 50 % density, while its scores are still being kept.

`--quick` saves time on pruning alone: what it adds to a step does not depend on the batch, so its seconds are
measured on a batch of one short sentence and added to the plain step of the full batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)

from . import record
from .engines import (
    MINILM,
    bert,
    deepspeed_config,
    random_batch,
    sparse_block,
    start_single_process,
    w8a8_block,
)
from .timing import Timing, interleave, ratio

PLAIN = "plain DeepSpeed"
AUTOCAST = "plain DeepSpeed, bf16 autocast"
BATCH, TOKENS = 32, 40
STRIDE = 100
SCHEDULE_END = 2 * STRIDE
SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "MXFP6A8", "MXFP4", "NVFP4", "NVFP4A16", "W4A16")
METHODS = ("l1", "topk", "taylor", "movement", "snip_momentum", "random")


class Clock:
    """CPU seconds spent inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.running = True

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            if self.running:
                self.seconds.append(time.process_time() - start)
            return result

        return timed


class Variant:
    """One engine and the clocks on its inner parts."""

    def __init__(self, block: dict[str, Any] | None, zero_stage: int, autocast: bool = False) -> None:
        import deepspeed

        model = bert(MINILM)
        config = deepspeed_config(zero_stage, BATCH, block)
        if autocast:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        self.engine.train()
        self.batch = random_batch(BATCH, TOKENS)
        self.thresholds = Clock()
        self.recomputing: list[float] = []
        if block is not None and "sparse_pruning" in block:
            pruning = self.engine.compression.techniques["sparse_pruning"]
            pruning.update_masks = self.thresholds.wrap(pruning.update_masks)
            # Two steps before the middle of the schedule: methods that score by gradient must have seen one.
            self.engine.compression.load_state_dict({"applied_steps": STRIDE - 2, "stages": {}})

    def step(self) -> None:
        loss = self.engine(**self.batch).loss
        with time_in_backward() as clock:
            self.engine.backward(loss)
        self.recomputing.append(sum(clock.seconds))
        self.engine.step()


@contextmanager
def time_in_backward() -> Iterator[Clock]:
    """A clock on fake quantization, running for as long as the block does."""
    from ds_compress.quant import fake_quantized_linear as patched

    clock = Clock()
    names = ("fake_quantize_weight", "_input_backward")
    originals = {name: getattr(patched, name) for name in names}
    for name, original in originals.items():
        setattr(patched, name, clock.wrap(original))
    try:
        yield clock
    finally:
        for name, original in originals.items():
            setattr(patched, name, original)


def blocks() -> dict[str, dict[str, Any] | None]:
    """The `compression_training` block of every variant; about 50 % density at step 100 of 200."""

    def pruned(method: str, stride: int = STRIDE) -> dict[str, Any]:
        return sparse_block(method, stride, dense_ratio=0.01, end=SCHEDULE_END)

    variants: dict[str, dict[str, Any] | None] = {PLAIN: None, AUTOCAST: None}
    variants |= {f"{method}, stride {STRIDE}": pruned(method) for method in METHODS}
    variants |= {f"{method}, stride 1": pruned(method, 1) for method in ("l1", "topk", "movement")}
    calibrations = ("dynamic", "static")
    variants |= {f"W8A8 {calibration}": w8a8_block(calibration) for calibration in calibrations}
    variants |= {
        f"W8A8 {calibration}, int8 kernel": w8a8_block(calibration, "int8") for calibration in calibrations
    }
    variants |= {
        f"W8A8 {calibration}, int8 kernel, int8 backward": w8a8_block(calibration, "int8", "int8")
        for calibration in calibrations
    }
    variants |= {f"scheme {scheme}": {"scheme": {scheme: ["encoder.layer"]}} for scheme in SCHEMES}
    variants["l1 + W8A8 dynamic"] = pruned("l1") | w8a8_block("dynamic")
    return variants


def measure(variants: dict[str, Variant], rounds: int) -> dict[str, Timing]:
    """Times one step of each; two uncounted rounds bring pruning to the middle of its schedule."""
    with tqdm(total=(rounds + 2) * len(variants), unit="step", file=sys.stderr) as bar:

        def show(name: str) -> None:
            bar.set_description(f"{name:24}")
            bar.update()

        return interleave({name: v.step for name, v in variants.items()}, rounds, warm_up=2, progress=show)


def measure_quickly(variants: dict[str, Variant]) -> dict[str, Timing]:
    """As `measure`, but pruning's extra seconds come from a tiny batch."""
    quantized = {name: v for name, v in variants.items() if "W8A8" in name or "scheme" in name}
    plain = {name: v for name, v in variants.items() if name in (PLAIN, AUTOCAST)}
    pruned = {name: v for name, v in variants.items() if name not in plain and name not in quantized}
    full = measure(plain | quantized, rounds=3)
    for variant in (variants[PLAIN], *pruned.values()):
        variant.batch = random_batch(1, 8)
    tiny = measure({PLAIN: variants[PLAIN], **pruned}, rounds=6)
    for name in pruned:
        cpu = zip(tiny[name].cpu, tiny[PLAIN].cpu, strict=True)
        wall = zip(tiny[name].wall, tiny[PLAIN].wall, strict=True)
        full[name] = Timing(
            [full[PLAIN].median_cpu + mine - plain for mine, plain in cpu],
            [full[PLAIN].median_wall + mine - plain for mine, plain in wall],
        )
    return {name: full[name] for name in variants}


def figures(variants: dict[str, Variant], timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    plain = timings[PLAIN]
    result = {}
    for name, timing in timings.items():
        same_rounds = len(timing.cpu) == len(plain.cpu)
        base_cpu = plain.cpu if same_rounds else [plain.median_cpu] * len(timing.cpu)
        base_wall = plain.wall if same_rounds else [plain.median_wall] * len(timing.wall)
        cpu, wall = ratio(timing.cpu, base_cpu), ratio(timing.wall, base_wall)
        result[name] = {
            "step CPU s": timing.median_cpu,
            "step wall s": timing.median_wall,
            "ratio": cpu.median,
            "ratio, lower quartile": cpu.low,
            "ratio, upper quartile": cpu.high,
            "ratio of wall time": wall.median,
            **inner_costs(variants[name], plain.median_cpu),
        }
    return result


def inner_costs(variant: Variant, plain_step: float) -> dict[str, float]:
    values: dict[str, float] = {}
    if variant.thresholds.seconds:
        mask = statistics.median(variant.thresholds.seconds)
        values |= {"mask ms": 1e3 * mask, f"mask, share of {STRIDE} steps": mask / (STRIDE * plain_step)}
    if any(variant.recomputing):
        again = statistics.median(variant.recomputing)
        values |= {
            "recomputation ms": 1e3 * again,
            "recomputation, share of a plain step": again / plain_step,
        }
    return values


def table(result: dict[str, dict[str, float]], title: str) -> Table:
    made = Table(title=title)
    for column in (
        "",
        "CPU ms / step",
        "ratio to plain",
        "quartiles",
        f"mask / {STRIDE} steps",
        "recomputation",
    ):
        made.add_column(column, justify="left" if not column else "right")
    for name, values in result.items():
        share = values.get(f"mask, share of {STRIDE} steps")
        again = values.get("recomputation, share of a plain step")
        made.add_row(
            name,
            f"{1e3 * values['step CPU s']:.0f}",
            f"{values['ratio']:.3f}",
            f"{values['ratio, lower quartile']:.3f} - {values['ratio, upper quartile']:.3f}",
            "" if share is None else f"{100 * share:.2f} %",
            "" if again is None else f"{100 * again:.1f} %",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under 50 seconds")
    record.add_output_arguments(parser)
    parser.add_argument("--zero-stage", type=int, default=0, choices=(0, 1, 2, 3))
    parser.add_argument("--rounds", type=int, default=15, help="without --quick")
    parser.add_argument(
        "--only", default="", help="only variants whose name contains this, and the plain one"
    )
    args = parser.parse_args()

    start_single_process()
    chosen = {name: block for name, block in blocks().items() if name == PLAIN or args.only in name}
    if args.quick:
        chosen.pop(AUTOCAST, None)  # a step of many seconds where the CPU has no bf16 instructions
    variants = {name: Variant(block, args.zero_stage, name == AUTOCAST) for name, block in chosen.items()}
    timings = measure_quickly(variants) if args.quick else measure(variants, args.rounds)
    result = figures(variants, timings)
    title = f"step time, ZeRO-{args.zero_stage}, batch {BATCH} x {TOKENS}, fp32, one thread"
    Console(width=110).print(table(result, title))
    record.report("step_overhead", result, args)


if __name__ == "__main__":
    main()
