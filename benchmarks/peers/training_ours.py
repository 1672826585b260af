"""DeepSpeed without quantization, and ours: W8A8 in floats and with int8 products, and 4-bit weights in groups.

All is symmetric, and weights get the scales of each step. Dynamic ranges are per token, static ones the running mean of
a tensor's, observed in each step.
"""

from __future__ import annotations

from typing import Any

import deepspeed

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)
from benchmarks.engines import deepspeed_config, start_single_process, w4_block, w8a8_block
from benchmarks.peers import worker
from benchmarks.peers.training import GROUPS, LEARNING_RATE
from benchmarks.peers.training_inputs import Step, batch, checked, model, require_quantized


def engine_of(block: dict[str, Any] | None) -> Any:
    trained = model()
    config = deepspeed_config(0, 32, block)
    config["optimizer"]["params"] |= {"lr": LEARNING_RATE, "fused": True}
    engine, *_ = deepspeed.initialize(model=trained, model_parameters=trained.parameters(), config=config)
    return engine


def step_of(engine: Any) -> Step:
    given = batch()

    def step() -> float:
        loss = engine(**given).loss
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step


def engines() -> dict[str, Any]:
    """{the name of a run: its engine}"""
    blocks: dict[str, dict[str, Any] | None] = {"DeepSpeed fp32": None}
    blocks |= {
        f"ds_compress W8A8 {calibration}{name}": w8a8_block(calibration, kernel)
        for calibration in ("dynamic", "static")
        for name, kernel in (("", "float"), (", int8 kernel", "int8"))
    }
    blocks |= {f"ds_compress W4 groups of {size}": w4_block(size) for size in GROUPS}
    found = {name: engine_of(block) for name, block in blocks.items()}
    for name, block in blocks.items():
        if block is not None:
            require_quantized(name, found[name])
    return found


def main() -> None:
    start_single_process()
    runs = [checked(name, step_of(engine)) for name, engine in engines().items()]
    worker.serve(dict(runs), ["deepspeed", "torch", "transformers"])
