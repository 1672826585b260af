"""Scenarios: every recipe trains for a few steps on tiny models, on ZeRO 2 and 3."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_compress
from ds_compress.config.recipes import find
from ds_compress.config.recipes.deepspeed import whole_config
from tests.models import VOCABULARY, tiny_bert, tiny_llama
from tests.multirank.common import batches, engine_of, full_weights, train
from tests.zoo.mixtures import VOCABULARY as WORDS_OF_MIXTURES
from tests.zoo.mixtures import mixture

STAGES = (2, 3)
STEPS = 5
SHORTER: dict[str, dict[str, Any]] = {
    # 8 to 2 bits take 63 periods of a step.
    "ternary": {"weight_quantization": {"different_groups": {"layers": {"params": {"start_bits": 3}}}}},
    # A link inside one machine is too fast to gain.
    "slow_links": {
        "gradient_compression": {"measure_link": False, "min_elements": 0},
        "parameter_compression": {"measure_link": False, "min_elements": 0},
    },
}
"""What five steps, or two processes on one machine, make necessary."""
ENCODERS = (
    "w8a8",
    "sparse",
    "sparse_2_4",
    "ternary",
    "heads_ffn",
    "depth_kd",
    "all_in_one",
    "slow_links",
    "bad_workers",
)
BAD_WORKER = 2


def model_of(name: str) -> nn.Module:
    if name == "experts":
        return mixture("mixtral")
    if name in ENCODERS:
        return tiny_bert(layers=3, hidden=64)
    llama = tiny_llama(hidden=128, intermediate=256, heads=2, tied=False)
    if name != "lora":
        return llama
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))


def data_for(name: str) -> Iterator[dict[str, torch.Tensor]]:
    words = WORDS_OF_MIXTURES if name == "experts" else VOCABULARY
    for batch in batches(STEPS, rank=dist.get_rank()):
        ids = batch["input_ids"] % words
        yield batch if name in ENCODERS else {"input_ids": ids, "labels": ids}


def trained(names: Sequence[str], folder: str, exported: dict[str, str]) -> dict[Any, Any]:
    """{(recipe, stage): losses, metrics, the JSON's and the model's sizes, exported weights, seconds}.

    exported: {recipe: format} of those that are exported at stage 2, and checked by loading.
    """
    results: dict[Any, Any] = {}
    for name in names:
        for stage in STAGES:
            begin = time.process_time()
            config = whole_config(find(name), stage, steps=STEPS, overrides=SHORTER.get(name))
            if stage == 3:  # such small weights are whole everywhere otherwise
                config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            model = model_of(name).train()
            before = sum(parameter.numel() for parameter in model.parameters())
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with engine_of(model, config, model_parameters=trainable) as engine:
                if name == "bad_workers" and dist.get_rank() == BAD_WORKER:
                    engine.module.register_forward_hook(_magnify)
                result: dict[str, Any] = {"losses": train(engine, data_for(name))}
                result["metrics"] = engine.compression.metrics()
                result["grad_norm"] = float(engine.get_global_grad_norm())
                result["applied"] = engine.compression.applied_steps
                result["config"] = {
                    k: v for k, v in engine.module.config.to_dict().items() if isinstance(v, int)
                }
                result["weights"] = ds_compress.export_state_dict(engine)
                result["latent"] = full_weights(engine.module) if name == "lora" else {}
                result["sizes"] = before, sum(value.numel() for value in result["weights"].values())
                if stage == 2 and name in exported:
                    report = ds_compress.export(engine, Path(folder) / name, exported[name])
                    result["export"] = None if report is None else (report.format, report.check["verdict"])
            result["seconds"] = time.process_time() - begin
            results[name, stage] = result
    return results


def _magnify(module: Any, inputs: Any, output: Any) -> Any:
    """The loss of a worker whose gradients are a thousand times too long, and point elsewhere."""
    output.loss = -1000 * output.loss
    return output
