"""Batch, model and step from a folder that needs no package of ours, and what a step is held to before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

from benchmarks.peers.encoder_inputs import batches, stock_model
from benchmarks.peers.training import LAYERS, LEARNING_RATE, SHAPE

Step = Callable[[], float]
"""One optimizer step; the loss before it."""


def batch() -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [32, 40], labels [32]; the same in every process."""
    (inputs,) = batches()["32 x 40"]
    return inputs | {"labels": torch.arange(len(inputs["input_ids"])) % 2}


def model() -> Any:
    """In training mode, without dropout, with the same fp32 weights at every call."""
    return stock_model().train()


def is_quantized(module: torch.nn.Module, name: str) -> bool:
    """Whether peers that ask layer by layer quantize this one."""
    return isinstance(module, torch.nn.Linear) and LAYERS in name


def torch_step(trained: Any, autocast: bool = False) -> Step:
    """Of a model that torch trains; autocast: its forward in bf16."""
    given = batch()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = trained(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def allow_recompilation() -> None:
    """For several compiled models in a process: after a few versions of one function torch stops compiling it."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000


def require_quantized(name: str, trained: Any) -> None:
    """Raises RuntimeError where a model in training mode computes the logits of the fp32 model."""
    given = batch()
    with torch.no_grad():
        same = torch.equal(trained(**given).logits, model()(**given).logits)
    if same:
        raise RuntimeError(f"{name}: nothing is quantized in training mode")


def checked(name: str, step: Step) -> tuple[str, Step]:
    """(name of the run, its step), after two steps; raises RuntimeError where the loss does not fall."""
    losses = step(), step()
    if not (math.isfinite(losses[1]) and losses[1] < losses[0]):
        raise RuntimeError(f"{name}: the loss does not fall: {losses[0]}, then {losses[1]}")
    return f"{name}, {SHAPE}", step
