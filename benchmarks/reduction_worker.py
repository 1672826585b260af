"""One process of `benchmarks.reduction`: prints a line of JSON, {variant: seconds of every round}.

python -m benchmarks.reduction_worker collective --elements 25165824
deepspeed ... --module benchmarks.reduction_worker step --model minilm --stage 2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.examples.cpu import keep_freed_memory, skip_shared_memory_build

from .engines import BERT_BASE, MINILM, bert, quiet, random_batch

RESULT = "RESULT "
MODELS = {"tiny": {**MINILM, "num_hidden_layers": 1}, "minilm": MINILM, "bert-base": BERT_BASE}
"""22.7 and 109.5 million parameters, but for the one that only tries whether all this works."""
ROWS, TOKENS = 4, 40


def traffic(gradients: int | None = None, weights: int | None = None) -> dict[str, Any] | None:
    """A `compression_training` block; None is stock DeepSpeed."""
    always = {"enabled": True, "measure_link": False, "min_elements": 0}
    block: dict[str, Any] = {}
    if gradients:
        block["gradient_compression"] = {**always, "bits": gradients}
    if weights:
        block["parameter_compression"] = {**always, "bits": weights}
    return block or None


STEP_VARIANTS = {
    "stock bf16": traffic(),
    "int8": traffic(8),
    "int4": traffic(4),
    "int4, weights int8": traffic(4, 8),
    "auto": {"gradient_compression": {"enabled": True}, "parameter_compression": {"enabled": True}},
}


def collectives(elements: int) -> Mapping[str, Callable[[], object]]:
    """The bare collectives on random gradients."""
    from ds_compress.reduce.codec import BlockCodec
    from ds_compress.reduce.exchange import QuantizedSum
    from ds_compress.reduce.slices import Segment

    world = dist.get_world_size()
    gradients = torch.randn(elements)
    half = gradients.bfloat16()
    own = half.new_empty(elements // world)
    runs: dict[str, Callable[[], object]] = {
        "all-reduce bf16": lambda: dist.all_reduce(half),
        "all-reduce fp32": lambda: dist.all_reduce(gradients),
        "reduce-scatter bf16": lambda: dist.reduce_scatter_tensor(own, half[: own.numel() * world]),
    }
    for name, bits, block in (("int8", 8, 512), ("int4", 4, 128), ("int4 block 512", 4, 512)):
        quantized = QuantizedSum(None, BlockCodec(bits, block))
        slices = [Segment(part, owner) for owner, part in enumerate(half.tensor_split(world))]
        whole = [Segment(half, 0)]
        runs[f"all-reduce {name}"] = lambda q=quantized, s=whole: q.all_reduce(s, 1 / world)  # type: ignore[misc]
        runs[f"reduce-scatter {name}"] = lambda q=quantized, s=slices: q.reduce_scatter(  # type: ignore[misc]
            s, lambda part, values: None, 1 / world
        )
    return runs


def steps(
    model: str, stage: int, accumulation: int, variants: list[str]
) -> Mapping[str, Callable[[], object]]:
    """Whole training steps of one engine per variant."""
    import deepspeed

    batch = random_batch(ROWS, TOKENS, seed=dist.get_rank())
    runs: dict[str, Callable[[], object]] = {}
    for name in variants:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "steps_per_print": 10**9,
        }
        if STEP_VARIANTS[name] is not None:
            config["compression_training"] = STEP_VARIANTS[name]
        network = bert(MODELS[model])
        engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)

        def step(engine: Any = engine) -> None:
            for _ in range(accumulation):
                engine.backward(engine(**batch).loss)
                engine.step()

        runs[name] = step
    return runs


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest process, every run once per round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            begin = time.perf_counter()
            runs[name]()
            taken = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number >= 0:
                times[name].append(float(taken))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["collective", "step"])
    parser.add_argument("--elements", type=int, default=25_165_824)
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--variants", default=",".join(STEP_VARIANTS).replace(", ", "; "))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    import deepspeed

    import ds_compress

    assert ds_compress.__version__
    torch.set_num_threads(1)
    logging.getLogger("ds_compress").setLevel(logging.INFO)
    logging.basicConfig()
    keep_freed_memory()
    quiet()
    skip_shared_memory_build()
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        deepspeed.init_distributed("gloo")
        if arguments.kind == "collective":
            runs = collectives(arguments.elements)
        else:
            variants = [name.strip().replace(";", ",") for name in arguments.variants.split(",")]
            runs = steps(arguments.model, arguments.stage, arguments.accumulation, variants)
        times = timed(runs, arguments.rounds)
    if dist.get_rank() == 0:
        print(RESULT + json.dumps(times), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
