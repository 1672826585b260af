"""Scenarios: experts of mixtures are removed, or merged, alike on every ZeRO stage."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

import ds_compress
from tests.multirank.common import Wrapper, device, ds_config, engine_of
from tests.zoo.mixtures import StrangeBlock, mixture, tokens

STAGES = (0, 2, 3)


def block(method: str = "reap", **shared: Any) -> dict[str, Any]:
    keys = {"enabled": True, "method": method, "dense_ratio": 0.5, "schedule_offset": 2, **shared}
    return {"expert_pruning": {"shared_parameters": keys}}


class SelectiveBlock(StrangeBlock):
    """Calls only experts that a token of this process goes to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, chosen = self.chooser(flat).softmax(-1).topk(1, dim=-1)
        out = torch.zeros_like(flat)
        for index, part in enumerate(self.parts):
            rows = (chosen == index).any(-1).nonzero().flatten()
            if rows.numel():
                out = out.index_add(0, rows, shares[rows] * part(flat[rows]))
        return x + out.view_as(x)


def built(name: str) -> nn.Module:
    """`mixture`, and "selective", a list of experts of which each process calls its own."""
    if name != "selective":
        return mixture(name)
    model = mixture("stranger")
    for module in model.modules():
        if type(module) is StrangeBlock:
            module.__class__ = SelectiveBlock
    return model


def method_for(name: str, method: str = "reap") -> str:
    return "l2" if name in ("stranger", "selective") and method in ("reap", "frequency") else method


def train(engine: Any, steps: int, seed: int = 1, alike: bool = True) -> list[float]:
    """alike: the same tokens in every process, so that world sizes agree."""
    seed += 0 if alike else torch.distributed.get_rank()
    losses = []
    engine.train()
    for step in range(steps):
        loss = logits_of(engine, tokens(4, 8, seed=100 * seed + step)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=ids.to(device()))
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output
    return logits


def evaluated(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return logits_of(model, tokens(3, 10, seed=9)).float().clone()


def removed(
    names: tuple[str, ...],
    stages: tuple[int, ...] = STAGES,
    alike: bool = True,
    **shared: Any,
) -> dict[tuple[str, int], Any]:
    """{(architecture, stage): kept experts, losses, logits while masked and after finalize}."""
    results: dict[tuple[str, int], Any] = {}
    for name in names:
        keys = {**shared, "method": method_for(name, shared.get("method", "reap"))}
        for stage in stages:
            with engine_of(built(name), ds_config(stage, block(**keys))) as engine:
                losses = train(engine, 4, alike=alike)
                kept = {group: units.tolist() for group, units in engine.compression.kept_units.items()}
                masked = evaluated(engine)
                metrics = engine.compression.metrics()
                final = ds_compress.finalize(engine)
                results[name, stage] = {
                    "kept": kept,
                    "losses": losses,
                    "masked": masked,
                    "final": evaluated(final),
                    "metrics": metrics,
                }
    return results


def shrunk_and_masked(cases: list[tuple[str, str]], **shared: Any) -> dict[Any, Any]:
    """{(architecture, wrapper, whether it shrinks): losses and what is there in the end}."""
    results: dict[Any, Any] = {}
    for name, wrapper in cases:
        for shrinks in (True, False):
            keys = {"method": method_for(name), "shrink_at_end_of_schedule": shrinks, **shared}
            config = WRAPPERS[wrapper].config(block(**keys))
            net = built(name)
            with engine_of(net, config, model_parameters=WRAPPERS[wrapper].parameters(net)) as engine:
                losses = train(engine, 6)
                results[name, wrapper, shrinks] = {
                    "losses": losses,
                    "logits": evaluated(engine),
                    "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in net.parameters()),
                    "metrics": engine.compression.metrics(),
                }
    return results


def resumed(cases: list[tuple[str, int, bool]], saved_at: int, **shared: Any) -> dict[Any, Any]:
    """Losses of an unbroken run, and of one that was resumed from a checkpoint of step `saved_at`."""
    results: dict[Any, Any] = {}
    for name, stage, shrinks in cases:
        keys = {"method": method_for(name), "shrink_at_end_of_schedule": shrinks, **shared}
        config = ds_config(stage, block(**keys))
        paths: list[Any] = [tempfile.mkdtemp()]
        torch.distributed.broadcast_object_list(paths)
        with engine_of(built(name), config) as engine:
            train(engine, saved_at)
            engine.save_checkpoint(paths[0])
            unbroken = train(engine, 4, seed=2)
            metrics = engine.compression.metrics()
        with engine_of(built(name), config) as engine:
            engine.load_checkpoint(paths[0])
            again = train(engine, 4, seed=2)
            results[name, stage, shrinks] = {
                "unbroken": unbroken,
                "resumed": again,
                "metrics": (metrics, engine.compression.metrics()),
            }
    return results


WRAPPERS: dict[str, Wrapper] = {
    "fp32-0": Wrapper(0),
    "fp32-2": Wrapper(2),
    "fp32-3": Wrapper(3),
    "bf16-2-offload-groups": Wrapper(2, "bf16", {"offload_optimizer": {"device": "cpu"}}, groups=True),
    "bf16-3-sub-groups": Wrapper(3, "bf16", {"sub_group_size": 5000}),
}
