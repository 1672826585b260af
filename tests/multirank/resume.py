"""Scenarios: a run that goes on from a checkpoint, in processes of its own, ends bit for bit as the unbroken one.

One launch trains every case on every stage and saves on the way; another one begins each of these runs anew, with other
weights, and goes on from each checkpoint. What is compared: the losses, all weights, all that the techniques keep.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_compress
from ds_compress.engine.comm import measure
from ds_compress.reduce.bandwidth import Comparison
from tests.grids import in_turn
from tests.models import tiny_bert
from tests.multirank import experts, floats, quantized_experts
from tests.multirank.common import (
    batches,
    ds_config,
    full_weights,
    pruning_block,
    structured_block,
    weight_quantization,
)
from tests.multirank.training import quantization_block
from tests.zoo.mixtures import tokens

STEPS = 9
BEFORE, IN, AFTER = 1, 5, 8
"""When it is saved: before the ramp (a mask, bits, a weight of a loss), on it, and after it (and after the cut)."""
RAMP = {"schedule_offset": 2, "schedule_offset_end": 7, "schedule_offset_stride": 2}
Data = Callable[[int], list[dict[str, torch.Tensor]]]


def classes(rank: int) -> list[dict[str, torch.Tensor]]:
    return list(batches(STEPS, rank=rank))


def texts(rank: int) -> list[dict[str, torch.Tensor]]:
    return floats.texts(STEPS, rank)


def routed(rank: int) -> list[dict[str, torch.Tensor]]:
    """Few tokens, so that experts go without."""
    return [{"input_ids": ids, "labels": ids} for n in range(STEPS) for ids in [tokens(1, 6, 10 * rank + n)]]


@dataclass(frozen=True)
class Case:
    """block: JSON of the compression. model: of a seed. config: more of DeepSpeed's. teacher: passed as an object.

    saves_again: the resumed run has to save where the other one did, because a save makes copies of weights exact;
    elsewhere a save must not be noticed.
    """

    block: dict[str, Any]
    model: Callable[[int], nn.Module] = tiny_bert
    data: Data = classes
    dtype: str = "fp32"
    config: dict[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = (0, 1, 2, 3)
    saves: tuple[int, ...] = (BEFORE, IN, AFTER)
    teacher: Callable[[], nn.Module] | None = None
    saves_again: bool = False
    resumed_seed: int = 7
    """Of the weights that the resumed run begins with; they matter where a teacher is made from them."""


def sparse(method: str, density: float = 0.3, **shared: Any) -> Case:
    return Case(pruning_block(method, density, **{"scope": "global", **RAMP, **shared}))


def wire(**keys: Any) -> dict[str, Any]:
    return {"enabled": True, "measure_link": False, "min_elements": 0, "piece_elements": 2048, **keys}


def compressed(robust: dict[str, Any] | None = None, **keys: Any) -> Case:
    blocks: dict[str, Any] = {"gradient_compression": wire(warmup_steps=2, **keys)} if keys else {}
    if robust is not None:
        blocks["robust_reduction"] = {"enabled": True, **robust}
    return Case(blocks)


def taught(losses: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "losses": losses, "task_loss_weight": 0.5, **keys}}


def ladder(**shared: Any) -> dict[str, Any]:
    block = weight_quantization(4, "encoder.layer", schedule_offset=2, **shared)
    params = {"start_bits": 6, "target_bits": 4, "quantization_period": 2}
    block["weight_quantization"]["different_groups"]["all"]["params"] = params
    return block


def ranges(**shared: Any) -> dict[str, Any]:
    keys = {"range_calibration": "static", "quantization_type": "asymmetric", "schedule_offset": 2, **shared}
    return {"activation_quantization": quantization_block(activations=keys)["activation_quantization"]}


def removed(*keys: str, shrinks: bool = True, **shared: Any) -> dict[str, Any]:
    settings = {**RAMP, "shrink_at_end_of_schedule": shrinks, **shared}
    return {key: structured_block(**settings) for key in keys}


def teacher_of_more() -> nn.Module:
    return tiny_bert(3, layers=3)


deep_bert = functools.partial(tiny_bert, layers=4)
experts_model = functools.partial(experts.mixture, "qwen3_moe")
EVERY_LOSS = {
    "logits": {"temperature": 2.0},
    "hidden": {"weight": 0.5, "final_weight": 0.0, "schedule_offset_end": 7},
    "attention": {"weight": 0.1},
    "contrastive": {"weight": 0.2, "dimension": 8, "queue": 6},
}
LLAMA: dict[str, Any] = {"model": floats.small_llama, "data": texts}
WIDE_EXPERTS: dict[str, Any] = {
    "model": functools.partial(quantized_experts.built, "qwen3_moe"),
    "data": routed,
}
EXPERTS: dict[str, Any] = {"model": experts_model, "data": routed}

CASES: dict[str, Case] = {
    "l1": sparse("l1"),
    "l1 regrowth": sparse("l1", regrowth=True, scope="group"),
    "topk": sparse("topk"),
    "movement": sparse("movement"),
    "taylor": sparse("taylor"),
    "snip_momentum 4x1": sparse("snip_momentum", pattern="4x1"),
    "random": sparse("random", seed=7),
    "rows": Case(removed("row_pruning", shrinks=False, method="topk")),
    "heads": Case(removed("head_pruning", shrinks=False, method="taylor")),
    "rows shrunk": Case(removed("row_pruning", method="activation")),
    "rows, heads, depth shrunk": Case(
        {**removed("row_pruning", "head_pruning"), **removed("depth_pruning", method="taylor")}, deep_bert
    ),
    "hidden shrunk": Case(removed("hidden_pruning"), **LLAMA),
    "rows shrunk, sparse, W8A8": Case(
        {
            **removed("row_pruning"),
            **pruning_block("movement", **RAMP),
            **weight_quantization(8, "encoder.layer", learned_scale=True),
            **ranges(),
        }
    ),
    "LSQ": Case(ladder(learned_scale=True)),
    "stochastic": Case(ladder(rounding="stochastic")),
    "blend": Case(ladder(fp16_mixed_quantize={"enabled": True, "quantize_change_ratio": 0.2})),
    "dynamic": Case(quantization_block()),
    "EMA ranges": Case({**ladder(), **ranges()}),
    "int8 kernel": Case(quantization_block({"kernel": "int8"}, {"narrow_range": True})),
    "int8 backward": Case(
        quantization_block({"kernel": "int8", "backward": "int8"}, {"narrow_range": True}), dtype="bf16"
    ),
    "nvfp4": Case({"scheme": "NVFP4"}, **LLAMA),
    "learned nvfp4, kv cache": Case({**floats.BLOCKS["learned"], "kv_cache": "fp8"}, **LLAMA),
    "fp8": Case({"scheme": "FP8"}, **LLAMA),
    "searched nvfp4": Case(floats.BLOCKS["searched"], **LLAMA),
    "pruned nvfp4": Case(floats.BLOCKS["pruned"], **LLAMA),
    "formats": Case(floats.BLOCKS["schedule"], **LLAMA),
    "distillation": Case(taught(EVERY_LOSS), teacher=teacher_of_more),
    "EMA teacher": Case(
        {**taught({"logits": {}, "hidden": {}}, self_teacher={"weights": "ema", "decay": 0.75}), **ladder()}
    ),
    "initial teacher": Case(
        {**taught({"logits": {}}, self_teacher={"weights": "initial"}), **pruning_block("l1", **RAMP)},
        resumed_seed=0,
    ),
    "layer reduction": Case(
        {
            "layer_reduction": {"enabled": True, "teacher_layer": [0, 2]},
            **taught({"logits": {}, "hidden": {}}),
            **pruning_block("topk", **RAMP),
        },
        functools.partial(tiny_bert, layers=3),
        teacher=teacher_of_more,
    ),
    "rows shrunk, distillation": Case(
        {**removed("row_pruning"), **taught(EVERY_LOSS)}, teacher=teacher_of_more
    ),
    "experts": Case(experts.block(**RAMP, shrink_at_end_of_schedule=True, merge=True), **EXPERTS),
    "experts masked": Case(experts.block("frequency", **RAMP), **EXPERTS),
    "quantized experts": Case(
        {**quantized_experts.BLOCKS["static inputs"], **experts.block("l2", **RAMP)}, **EXPERTS
    ),
    "learned scales of experts": Case(quantized_experts.BLOCKS["learned"], **EXPERTS),
    "learned nvfp4 of experts": Case(quantized_experts.BLOCKS["learned nvfp4"], **WIDE_EXPERTS),
    "error feedback": compressed(bits=4, error_feedback=True),
    "stochastic gradients": compressed(bits=4, rounding="stochastic"),
    "worker momentum": compressed({"rule": "mean", "max_malicious": 0, "worker_momentum": 0.5}),
    "quantized worker momentum": compressed(
        {"rule": "mean", "max_malicious": 0, "worker_momentum": 0.5, "on_outlier": "exclude"}, bits=8
    ),
    "measured link": Case(
        {
            "gradient_compression": wire(bits=4, error_feedback=True, measure_link=True),
            "parameter_compression": wire(measure_link=True),
        },
        stages=(1, 2, 3),
        saves_again=True,
    ),
    "parameter compression": Case(
        {"parameter_compression": wire(refresh_interval=4, warmup_steps=2)},
        dtype="bf16",
        stages=(1, 2),
        saves_again=True,
    ),
    "parameter compression of fetches": Case(
        {"parameter_compression": wire(warmup_steps=2)}, dtype="bf16", stages=(3,)
    ),
    "bf16": Case(
        {**pruning_block("topk", **RAMP), **ladder(learned_scale=True), **ranges(), **removed("row_pruning")},
        dtype="bf16",
    ),
    "bf16 with error feedback, accumulation, clipping": Case(
        {**pruning_block("movement", **RAMP), "gradient_compression": wire(error_feedback=True)},
        dtype="bf16",
        config={"gradient_accumulation_steps": 2, "gradient_clipping": 0.5},
    ),
}
RUNS = {
    name: {
        stage: in_turn(case.saves, number + turn)
        for turn, stage in enumerate(in_turn(case.stages, number + number // len(case.stages)))
    }
    for number, (name, case) in enumerate(CASES.items())
}
"""{case: {stage: when it is saved}}"""
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 12, "warmup_num_steps": 3, "warmup_max_lr": 2e-3, "warmup_type": "linear"},
}


def _link(is_slow: bool) -> None:
    """What a measurement finds from now on."""
    found = Comparison(2.0, 1.0, 0.5, 1, 5) if is_slow else Comparison(1.0, 2.0, 2.0, 1, 5)
    measure.compare_reductions = lambda engine, quantized: found
    measure.compare_all_gathers = lambda engine, codec: found


def _runs(names: tuple[str, ...]) -> Iterator[tuple[str, int, Case, tuple[int, ...]]]:
    for name in names:
        for stage, saves in RUNS[name].items():
            yield name, stage, CASES[name], saves


def _engine(case: Case, stage: int, seed: int) -> Any:
    config = ds_config(
        stage, copy.deepcopy(case.block), case.dtype, scheduler=copy.deepcopy(SCHEDULER), **case.config
    )
    model = case.model(seed).train()
    torch.manual_seed(seed)  # of what is learned beside the model
    teacher = case.teacher() if case.teacher is not None else None
    engine, *_ = ds_compress.initialize(
        model=model, model_parameters=model.parameters(), config=config, teacher=teacher
    )
    return engine


def _train(engine: Any, case: Case, begin: int, end: int) -> list[float]:
    """Steps [begin, end); what draws from torch's generators does so as a run whose script restores them."""
    losses = []
    for number, batch in enumerate(case.data(dist.get_rank())[begin:end], start=begin):
        for micro in range(engine.gradient_accumulation_steps()):
            torch.manual_seed(100 * number + micro)
            output = engine(**{key: value.roll(micro, 0) for key, value in batch.items()})
            engine.backward(output.loss)
            engine.step()
            losses.append(output.loss.item())
    return losses


def _found(engine: Any) -> dict[str, Any]:
    """Digests of all that has to agree, of this process."""
    run = engine.compression
    run.refresh_weights()
    kept = {name: t.fragment_state() for name, t in run.techniques.items()}
    return {
        "weights": {name: _digest(value) for name, value in full_weights(engine.module).items()},
        "masters": {name: _digest(f.values) for name, f in run.shards.fragments.items()},
        "kept": _flat(kept),
        "state": _flat(run.state_dict()),
        # Sharded by now, where it was whole at the start.
        "teacher": {"identity": str(None if run.teacher is None else run.teacher.identity())},
        "process": _flat({name: t.process_state() for name, t in run.techniques.items()}),
    }


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, torch.Tensor):
        return {path: _digest(value)}
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in _flat(item, f"{path}/{key}").items()}
    return {path: repr(value)}


def _digest(values: torch.Tensor) -> str:
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def unbroken(folder: str, names: tuple[str, ...] = tuple(CASES)) -> dict[Any, Any]:
    """{(case, stage): losses and what is there in the end}; saves on the way."""
    _link(is_slow=True)
    results: dict[Any, Any] = {}
    for name, stage, case, saves in _runs(names):
        engine = _engine(case, stage, seed=0)
        losses = _train_and_save(engine, case, saves, 0, f"{folder}/{name}-{stage}")
        results[name, stage] = {"losses": losses, **_found(engine)}
        engine.destroy()
    return results


def _train_and_save(engine: Any, case: Case, saves: tuple[int, ...], begin: int, folder: str) -> list[float]:
    losses = []
    for at in (*(at for at in saves if at > begin), STEPS):
        losses += _train(engine, case, begin, at)
        if at < STEPS:
            engine.save_checkpoint(folder, tag=str(at))
        begin = at
    return losses


def resumed(folder: str, names: tuple[str, ...] = tuple(CASES)) -> dict[Any, Any]:
    """{(case, stage, step of the checkpoint): the same}, each begun anew."""
    _link(is_slow=False)
    results: dict[Any, Any] = {}
    for name, stage, case, saves in _runs(names):
        for at in saves:
            engine = _engine(case, stage, case.resumed_seed)
            engine.load_checkpoint(f"{folder}/{name}-{stage}", tag=str(at))
            if case.saves_again:
                losses = _train_and_save(engine, case, saves, at, f"{folder}/again")
            else:
                losses = _train(engine, case, at, STEPS)
            results[name, stage, at] = {"losses": losses, **_found(engine)}
            engine.destroy()
    return results
