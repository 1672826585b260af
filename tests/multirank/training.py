"""Scenarios: quantization-aware training, layer reduction with distillation, and everything at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import ds_compress
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, pruning_block, train

STAGES = (0, 1, 2, 3)


def quantization_block(
    weights: dict[str, Any] | None = None, activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    modules = ["encoder.layer"]
    return {
        "weight_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantize_weight_in_forward": True,
                "granularity": "per_channel",
                **(weights or {}),
            },
            "different_groups": {"all": {"params": {"start_bits": 8, "target_bits": 8}, "modules": modules}},
        },
        "activation_quantization": {
            "shared_parameters": {"enabled": True, **(activations or {})},
            "different_groups": {"all": {"params": {"bits": 8}, "modules": modules}},
        },
    }


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "dynamic": quantization_block(),
    "static": quantization_block(
        activations={"range_calibration": "static", "quantization_type": "asymmetric"}
    ),
    "stochastic": quantization_block(weights={"rounding": "stochastic"}),
    "learned": quantization_block(weights={"learned_scale": True}),
    "int8": quantization_block(weights={"kernel": "int8"}, activations={"narrow_range": True}),
}


def plain_and_quantized(steps: int = 6) -> dict[tuple[str, int], list[float]]:
    """Losses of plain DeepSpeed and of each quantization on each stage; every process has its own data."""
    results: dict[Any, Any] = {}
    for name, block in {"plain": None, **QUANTIZATIONS}.items():
        for stage in STAGES:
            model = tiny_bert()
            with engine_of(model, ds_config(stage, block)) as engine:
                results[name, stage] = train(engine, batches(steps, rank=dist.get_rank()))
                if name == "static":
                    ranges = engine.compression.techniques["activation_quantization"].state_dict()["ranges"]
                    results["ranges", stage] = {k: v.tolist() for k, v in ranges.items()}
    return results


def everything_block(teacher: str | None) -> dict[str, Any]:
    return {
        **pruning_block(density=0.5, schedule_offset=1),
        **quantization_block(),
        "layer_reduction": {"enabled": True, "teacher_layer": [1, 3]},
        "distillation": {
            "enabled": teacher is not None,
            "teacher": teacher,
            "task_loss_weight": 0.5,
            "losses": {
                "logits": {"temperature": 2.0},
                "hidden": {"weight": 0.5},
                "attention": {"weight": 0.1},
            },
        },
    }


def everything(folder: str, steps: int = 5) -> dict[Any, Any]:
    """Layer reduction, distillation, pruning and QAT in one run, from a path and from an object, and resumed."""
    if dist.get_rank() == 0:
        teacher: Any = tiny_bert(seed=3, layers=4)
        teacher.save_pretrained(f"{folder}/teacher")
    dist.barrier()
    results: dict[Any, Any] = {}
    for stage in STAGES:
        config = ds_config(stage, everything_block(f"{folder}/teacher"))
        data = list(batches(steps))
        model = _student(folder, stage)
        with engine_of(model, config) as engine:
            losses = train(engine, iter(data[:2]))
            engine.save_checkpoint(f"{folder}/everything-{stage}")
            losses += train(engine, iter(data[2:]))
            exported = ds_compress.export_state_dict(engine)
            results[stage] = {
                "losses": losses,
                "layers": model.config.num_hidden_layers,
                "metrics": engine.compression.metrics(),
                "exported": exported,
                "final": full_weights(model),
            }
        model = _student(folder, stage)
        with engine_of(model, config) as engine:
            engine.load_checkpoint(f"{folder}/everything-{stage}")
            train(engine, iter(data[2:]))
            got = full_weights(model)
            results[stage]["resumed_equal"] = all(
                torch.equal(got[k], v) for k, v in results[stage]["final"].items()
            )
    return results


def _student(folder: str, stage: int) -> Any:
    """At stage 3 as Hugging Face does it: loaded under zero.Init, partitioned before we see it."""
    if stage != 3:
        return tiny_bert(seed=3, layers=4)
    from transformers import BertForSequenceClassification
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(ds_config(3, everything_block(f"{folder}/teacher")))
    model = BertForSequenceClassification.from_pretrained(f"{folder}/teacher")
    assert all(hasattr(p, "ds_id") for p in model.parameters())
    del keep_alive
    return model


def teachers() -> dict[Any, Any]:
    """An object as the teacher, sharded or whole: what it costs, and what the student starts from."""
    results: dict[Any, Any] = {}
    for stage in (0, 2, 3):
        for teacher_stage in (0, 3):
            teacher = tiny_bert(seed=3, layers=4)
            block = everything_block(None)
            block["distillation"] |= {"enabled": True, "teacher_zero_stage": teacher_stage}
            student = tiny_bert(seed=9, layers=2)
            wanted = {k: v.clone() for k, v in teacher.state_dict().items()}
            engine, *_ = ds_compress.initialize(
                model=student,
                model_parameters=student.parameters(),
                config=ds_config(stage, block),
                teacher=teacher,
            )
            started = full_weights(student)
            losses = train(engine, batches(3))
            own = sum(
                p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in teacher.parameters()
            )
            results[stage, teacher_stage] = {
                "losses": losses,
                "kd": engine.compression.metrics(),
                "resident": own / sum(v.numel() for v in wanted.values()),
                "initialised": all(
                    torch.equal(
                        started[f"bert.encoder.layer.{i}.output.dense.weight"],
                        wanted[f"bert.encoder.layer.{t}.output.dense.weight"],
                    )
                    for i, t in enumerate((1, 3))
                )
                and torch.equal(
                    started["bert.embeddings.word_embeddings.weight"],
                    wanted["bert.embeddings.word_embeddings.weight"],
                ),
            }
            engine.destroy()
    return results
