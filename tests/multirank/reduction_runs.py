"""Robust rules, weights between processes and nodes, on every wrapper; and what two and four processes run of all."""

from __future__ import annotations

import copy
import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_compress
from ds_compress.engine.zero.shards import shards_of
from ds_compress.reduce.nodes import NODE_VARIABLE
from ds_compress.reduce.outliers import OutlierAbortError
from tests.multirank.common import batches, device, full_weights, pruning_block, train
from tests.multirank.reduction import (
    LAYOUTS,
    checkpoints,
    engine_for,
    final_gradients,
    gradients,
    joined,
    loss_scales,
    masks,
    muon,
    relative,
    special_steps,
    wire,
)


def robust_engines(folder: str) -> dict[str, Any]:
    """One bad worker of three or more: who is named, and whether its gradient got through."""
    found: dict[str, Any] = {}
    bad = dist.get_world_size() - 1
    for stage in (0, 1, 2, 3):
        for attack in ("none", "large", "nan") if stage != 1 else ("none", "large"):
            block = {"robust_reduction": {"enabled": True, "rule": "trimmed_mean", "max_malicious": 1}}
            if stage == 2:
                block |= wire()
            with engine_for({"stage": stage}, block) as engine:
                if dist.get_rank() == bad and attack != "none":
                    poison(engine, attack)
                gradients = final_gradients(engine, steps=2)
                metrics = engine.compression.metrics()
                flag_counts = engine.compression.techniques["gradient_reduction"].flag_counts
                found[f"{stage} {attack}"] = {
                    "norm": float(torch.cat(list(gradients.values())).norm()),
                    "named": dict(flag_counts.counts),
                    "steps": flag_counts.steps,
                    "norms": [metrics[f"gradient_reduction/worker_{w}_norm"] for w in range(bad + 1)],
                    "weights": [w.numpy().tobytes() for w in full_weights(engine.module).values()],
                    "skipped": engine.skipped_steps,
                }
    block = {"robust_reduction": {"enabled": True, "rule": "mean", "on_outlier": "abort"}}
    with engine_for({"stage": 2}, block) as engine:
        if dist.get_rank() == bad:
            poison(engine, "large")
        try:
            train(engine, batches(1, rank=dist.get_rank()))
            found["abort"] = "went on"
        except OutlierAbortError as error:
            found["abort"] = str(error)
    block = {"robust_reduction": {"enabled": True, "rule": "mean", "on_outlier": "exclude"}}
    norms = {}
    for stage in (0, 2, 3):
        with engine_for({"stage": stage}, block) as engine:
            if dist.get_rank() == bad:
                poison(engine, "tenfold")
            norms[stage] = [float(joined(final_gradients(engine)).norm()) for _ in range(3)]
            engine.save_checkpoint(f"{folder}/suspects-{stage}")
        with engine_for({"stage": stage}, block) as engine:
            engine.load_checkpoint(f"{folder}/suspects-{stage}")
            if dist.get_rank() == bad:
                poison(engine, "tenfold")
            norms[stage] += [float(joined(final_gradients(engine)).norm())]
    found["exclude"] = norms
    try:
        with engine_for({"stage": 1}, {"robust_reduction": {"enabled": True, "max_malicious": bad}}):
            found["too many"] = "went on"
    except ds_compress.ConfigError as error:
        found["too many"] = str(error)
    return found


def momenta(folder: str) -> dict[str, Any]:
    """Worker momentum under the mean: the running mean of stock gradients; and resumed from a checkpoint."""
    found: dict[str, Any] = {}
    rank, beta = dist.get_rank(), 0.5
    robust = {"enabled": True, "rule": "mean", "max_malicious": 0, "worker_momentum": beta}
    block = {"robust_reduction": robust}
    still = {"optimizer": {"type": "SGD", "params": {"lr": 0.0}}, "zero_allow_untested_optimizer": True}
    for stage in (0, 1, 2, 3):
        stock = []
        for steps in (1, 2, 3):
            with engine_for({"stage": stage}, None, **still) as engine:
                stock.append(final_gradients(engine, steps))
        with engine_for({"stage": stage}, block, **still) as engine:
            ours = final_gradients(engine, 3)
        expected = {
            k: beta * (beta * stock[0][k] + (1 - beta) * stock[1][k]) + (1 - beta) * stock[2][k] for k in ours
        }
        ends = []
        for resumed in (False, True):
            with engine_for({"stage": stage}, block) as engine:
                if resumed:
                    engine.load_checkpoint(f"{folder}/momentum-{stage}")
                else:
                    train(engine, batches(2, rank=rank))
                    engine.save_checkpoint(f"{folder}/momentum-{stage}")
                train(engine, batches(2, seed=2, rank=rank))
                ends.append(full_weights(engine.module))
        micro = []
        for steps in (1, 2, 3, 4):
            with engine_for({"stage": stage}, None, **still) as engine:
                micro.append(joined(final_gradients(engine, steps)))
        with engine_for({"stage": stage}, block, gradient_accumulation_steps=2, **still) as engine:
            accumulated = joined(final_gradients(engine, 2))
        found[str(stage)] = {
            "accumulated": relative(accumulated, mean_of_momenta(micro, beta, every=1 if stage > 1 else 2)),
            "error": relative(joined(ours), joined(expected)),
            "to stock": relative(joined(ours), joined(stock[2])),
            "resumed": all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0]),
        }
    return found


def mean_of_momenta(micro: list[torch.Tensor], beta: float, every: int) -> torch.Tensor:
    """What the second step gets, of gradients of four micro-steps, when every one or every second is reduced."""
    gradients = [torch.stack(micro[at : at + every]).mean(0) for at in range(0, 4, every)]
    beta **= every / 2
    momenta = gradients[:1]
    for gradient in gradients[1:]:
        momenta.append(beta * momenta[-1] + (1 - beta) * gradient)
    return torch.stack(momenta[len(momenta) // 2 :]).mean(0)


def poison(engine: Any, attack: str) -> None:
    """This worker's gradients are `attack` from now on."""
    factor = {"large": 100.0, "tenfold": 10.0, "nan": float("nan")}[attack]
    for parameter in engine.module.parameters():
        parameter.register_hook(lambda gradient: gradient * factor)


def weights_on_the_wire(folder: str) -> dict[str, Any]:
    """parameter_compression: how far weights are from stock, whether copies are equal, exact when they have to be."""
    found: dict[str, Any] = {}
    layouts = {
        "1 bf16": {"stage": 1, "dtype": "bf16"},
        "1 bf16, fp32 accumulation": LAYOUTS["1 bf16, fp32 accumulation"],
        "2 fp32": {"stage": 2},
        "3 bf16": {"stage": 3, "dtype": "bf16"},
    }
    wish = {
        "enabled": True,
        "min_elements": 0,
        "measure_link": False,
        "piece_elements": 1024,
        "block_size": 64,
    }
    sparse = copy.deepcopy(pruning_block(density=0.4, schedule_offset=3))
    sparse["sparse_pruning"]["different_groups"] = {
        "all": {"params": {"dense_ratio": 0.4}, "modules": ["first", "second"]}
    }
    rank = dist.get_rank()
    for name, layout in layouts.items():
        # At stage 3 every weight is sent anew in each forward: there is nothing to refresh.
        block = {
            "parameter_compression": {**wish, **({} if layout["stage"] == 3 else {"refresh_interval": 4})}
        }
        with engine_for(layout, None) as engine:
            train(engine, batches(7, rank=rank))
            stock = full_weights(engine.module)
        with engine_for(layout, block) as engine:
            train(engine, batches(7, rank=rank))
            metrics = engine.compression.metrics()
            copies = full_weights(engine.module)
            engine.compression.refresh_weights()
            exact = full_weights(engine.module)
            masters = master_weights(engine)
            half = engine.module.first.weight.dtype
        case = {
            "to stock": max(relative(exact[k], stock[k]) for k in stock),
            "to exact": max(float((copies[k] - exact[k]).abs().max()) for k in exact),
            "refreshed": all(torch.equal(exact[k].to(half), masters[k].to(half)) for k in exact),
            "copies": [w.numpy().tobytes() for w in copies.values()],
            "metrics": metrics,
        }
        with engine_for(layout, {**sparse, **block}) as engine:
            zeros = []
            for batch in batches(6, rank=rank):
                train(engine, iter([batch]))
                weight = full_weights(engine.module)["first.weight"]
                zeros.append(int((weight == 0).sum()))
            case["zeros"] = zeros
        with engine_for(layout, block) as engine:
            train(engine, batches(2, rank=rank))
            case["saved as stepped"] = layout["stage"] == 3 or _saves_masters(
                engine, f"{folder}/{name}-16bit"
            )
            engine.save_checkpoint(f"{folder}/{name}")
            train(engine, batches(2, seed=2, rank=rank))
            unbroken = full_weights(engine.module)
        with engine_for(layout, block) as engine:
            engine.load_checkpoint(f"{folder}/{name}")
            train(engine, batches(2, seed=2, rank=rank))
            resumed = full_weights(engine.module)
            engine.compression.detach()
            before = engine.module.first.weight
            train(engine, batches(1, rank=rank))
            case["detached"] = before is engine.module.first.weight
        case["resumed"] = all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)
        found[name] = case
    return found


def _saves_masters(engine: Any, folder: str) -> bool:
    """Whether `save_16bit_model` writes the rounded masters; asked in the process that writes, true in the others."""
    engine.save_16bit_model(folder)
    masters = master_weights(engine)
    if dist.get_rank() != 0:
        return True
    saved = torch.load(f"{folder}/pytorch_model.bin")
    return all(torch.equal(saved[name].cpu(), masters[name].to(saved[name].dtype)) for name in masters)


def master_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 masters, whole, in every process."""
    result = {}
    fragments = shards_of(engine).fragments
    for name, parameter in engine.module.named_parameters():
        whole = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=device())
        if name in fragments:
            fragment = fragments[name]
            whole[fragment.start : fragment.start + fragment.numel] = fragment.values
        dist.all_reduce(whole)
        result[name] = whole.view(getattr(parameter, "ds_shape", parameter.shape)).cpu()
    return result


def hierarchies() -> dict[str, Any]:
    """`hierarchical` with two hosts of two, one host of four, and hosts of unequal size."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    block = wire(8, hierarchical=True)
    for stage in (0, 2, 3):
        with engine_for({"stage": stage}, None) as engine:
            stock = final_gradients(engine)
        os.environ[NODE_VARIABLE] = f"host{rank // 2}"
        with engine_for({"stage": stage}, block) as engine:
            ours = final_gradients(engine)
            found[f"two hosts, {stage}"] = {
                "largest": max(float((ours[k] - stock[k]).abs().max()) for k in stock)
                / max(float(stock[k].abs().max()) for k in stock),
                "quantized": engine.compression.metrics()["gradient_reduction/quantized_elements"],
                "weights": [w.numpy().tobytes() for w in full_weights(engine.module).values()],
            }
    os.environ[NODE_VARIABLE] = "the only one"
    with engine_for({"stage": 2}, block) as engine:
        train(engine, batches(1))
        found["one host"] = engine.compression.metrics()["gradient_reduction/quantized_elements"]
    os.environ[NODE_VARIABLE] = f"host{rank // 3}"
    try:
        with engine_for({"stage": 2}, block):
            found["uneven"] = "went on"
    except ds_compress.ConfigError as error:
        found["uneven"] = str(error)
    del os.environ[NODE_VARIABLE]
    return found


def run_two(folder: str) -> dict[str, Any]:
    deepspeed.utils.logger.setLevel("ERROR")
    return {
        "gradients": gradients(list(LAYOUTS)),
        "masks": masks(),
        "muon": muon(),
        "special": special_steps(),
        "loss scales": loss_scales(),
        "checkpoints": checkpoints(folder),
        "weights": weights_on_the_wire(folder),
        "momenta": momenta(folder),
    }


def run_four(folder: str) -> dict[str, Any]:
    deepspeed.utils.logger.setLevel("ERROR")
    return {
        "gradients": gradients(["0 fp32", "2 small buckets", "3 small buckets"]),
        "robust": robust_engines(folder),
        "hosts": hierarchies(),
    }
