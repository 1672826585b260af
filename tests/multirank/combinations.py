"""Scenarios: compression beside the other features of a training run, each on several ZeRO stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

import ds_compress
from ds_compress.hf import merge_and_unload
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, ds_config, engine_of, full_weights, train
from tests.multirank.training import quantization_block

STAGES = (0, 2, 3)
STEPS = 4
ENCODER = "encoder.layer"


def block(modules: tuple[str, ...] = (ENCODER,), quantized: bool = True, **shared: Any) -> dict[str, Any]:
    """Half of the weights, in two steps, and 8 bits for weights and activations."""
    schedule = {"schedule_offset": 1, "schedule_offset_end": 3, "schedule_offset_stride": 1}
    result: dict[str, Any] = {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", **schedule, **shared},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": list(modules)}},
        }
    }
    if quantized:
        result |= quantization_block()
        for key in ("weight_quantization", "activation_quantization"):
            result[key]["different_groups"]["all"]["modules"] = list(modules)
    return result


def text(steps: int, seed: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches(steps, seed):
        yield {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}


def observed(engine: Any, losses: list[float]) -> dict[str, Any]:
    weights = full_weights(engine.module)
    targets = engine.compression.techniques["sparse_pruning"].targets
    result = {
        "losses": losses,
        "weights": {name.replace("_orig_mod.", ""): weights[name] for name in targets},
        "others": {name: weights[name] for name in weights if name not in targets},
    }
    if dist.get_rank() == 0:
        # No collective: one process may ask alone.
        result["metrics"] = engine.compression.metrics()
    return result


def features() -> dict[tuple[str, int], dict[str, Any]]:
    """{(feature, stage): losses, final weights, metrics}, "plain" being the run without any."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for stage in STAGES:
        for name, run in FEATURES.items():
            if stage in run.stages:
                results[name, stage] = run(stage)
    return results


class Feature:
    """A run of the tiny BERT with one thing different from the plain one."""

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        change: Callable[[Any], Any] = lambda model: model,
        micro: int = 1,
        compiled: Callable[[Any], Any] = lambda engine: None,
        stages: tuple[int, ...] = STAGES,
    ) -> None:
        self.config, self.change, self.micro, self.compiled = config or {}, change, micro, compiled
        self.stages = stages

    def __call__(self, stage: int) -> dict[str, Any]:
        model = self.change(tiny_bert())
        config = ds_config(stage, block(), **self.config)
        if self.micro > 1:
            config |= {
                "gradient_accumulation_steps": self.micro,
                "train_micro_batch_size_per_gpu": 4 // self.micro,
            }
        with engine_of(model, config) as engine:
            self.compiled(engine)
            engine.train()
            losses = train(engine, self._data())
            return observed(engine, losses) | {"applied": engine.compression.applied_steps}

    def _data(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches(STEPS):
            for part in range(self.micro):
                rows = slice(part * 4 // self.micro, (part + 1) * 4 // self.micro)
                yield {name: values[rows] for name, values in batch.items()}


def _checkpointing(reentrant: bool) -> Callable[[Any], Any]:
    def enable(model: Any) -> Any:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return model

    return enable


FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "accumulation": Feature(micro=2),
    "checkpointing": Feature(change=_checkpointing(False)),
    "checkpointing-reentrant": Feature(change=_checkpointing(True)),
    "torch_autocast": Feature({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "bf16": Feature({"dtype": "bf16"}),
    "offload_optimizer": Feature({"zero": {"offload_optimizer": {"device": "cpu"}}}, stages=(2, 3)),
    "offload_param": Feature(
        {"zero": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}, stages=(3,)
    ),
    "torch.compile": Feature(change=lambda model: torch.compile(model, backend="aot_eager"), stages=(0, 2)),
    "engine.compile": Feature(compiled=lambda engine: engine.compile(backend="aot_eager")),
}


def tied() -> dict[int, dict[str, Any]]:
    """The table that is embedding and head at once is pruned and quantized by its first name."""
    results = {}
    for stage in STAGES:
        model = tiny_llama()
        modules = ("embed_tokens", "mlp")
        config = ds_config(stage, block(modules) | {"activation_quantization": {}})
        del config["compression_training"]["activation_quantization"]
        with engine_of(model, config) as engine:
            results[stage] = observed(engine, train(engine, text(STEPS)))
            results[stage]["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
            exported = ds_compress.export_state_dict(engine)
            if exported:
                results[stage]["equal"] = torch.equal(
                    exported["lm_head.weight"], exported["model.embed_tokens.weight"]
                )
    return results


FROZEN = {
    "frozen": {},
    "frozen-bf16": {"dtype": "bf16"},
    "frozen-persistent": {"zero": {"stage3_param_persistence_threshold": 10**6}},
    "left-out": {},
}


def frozen_stages(name: str) -> tuple[int, ...]:
    return (0, 3) if name == "frozen-persistent" else STAGES


def frozen(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Half of the targets do not train; dense weights are loaded beside the saved masks in the end."""
    results = {}
    for name, options in FROZEN.items():
        for stage in frozen_stages(name):
            model = _frozen_bert(name)
            before = {key: value.detach().float().clone() for key, value in model.named_parameters()}
            config = ds_config(stage, block(quantized=False, scope="global"), **options)
            parameters = [
                p for key, p in model.named_parameters() if name != "left-out" or "layer.0" not in key
            ]
            with engine_of(model, config, model_parameters=parameters) as engine:
                result = observed(engine, train(engine, batches(STEPS)))
                result["forward"] = engine(**next(batches(1))).loss.item()
                result["mask_bytes"] = engine.compression.techniques["sparse_pruning"].mask_bytes()
                engine.save_checkpoint(f"{folder}/{name}-{stage}", exclude_frozen_parameters=True)
            result["before"] = {key: before[key] for key in result["weights"]}
            model = _frozen_bert(name)
            parameters = [
                p for key, p in model.named_parameters() if name != "left-out" or "layer.0" not in key
            ]
            with engine_of(model, config, model_parameters=parameters) as engine:
                engine.load_checkpoint(f"{folder}/{name}-{stage}", load_module_strict=False)
                result["loaded"] = observed(engine, [])["weights"]
                result["loaded_forward"] = engine(**next(batches(1))).loss.item()
            results[name, stage] = result
    return results


def _frozen_bert(name: str) -> torch.nn.Module:
    model = tiny_bert()
    if name != "left-out":
        model.bert.encoder.layer[0].requires_grad_(False)
    return model


def adapted_llama() -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    return get_peft_model(model, config)


def lora(folder: str) -> dict[int, dict[str, Any]]:
    """Base pruned and in 8 bits, adapters trained in full; then merged."""
    results = {}
    modules = ("q_proj", "k_proj", "down_proj")
    for stage in STAGES:
        model = adapted_llama()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        with engine_of(model, ds_config(stage, block(modules)), model_parameters=trained) as engine:
            losses = train(engine, text(STEPS))
            result = observed(engine, losses)
            result["before"] = before
            adapters = [name for name in before if "lora_" in name]
            result["adapters_moved"] = all(
                not torch.equal(before[name], result["others"][name]) for name in adapters
            )
            plan = engine.compression.plan.techniques
            result["claimed"] = {key: [t.module_name for t in plan[key].targets] for key in plan}
            merged = merge_and_unload(engine)
            result["merged"] = {name: p.detach().clone() for name, p in merged.named_parameters()}
            result["class"] = type(merged).__name__
            if dist.get_rank() == 0:
                ds_compress.export(
                    merged, f"{folder}/merged-{stage}", "torch", embeddings="float", check=False
                )
                loaded = ds_compress.from_pretrained(f"{folder}/merged-{stage}")
                batch = next(text(1))
                with torch.no_grad():
                    result["logits"] = (
                        merged.eval()(batch["input_ids"]).logits,
                        loaded(batch["input_ids"]).logits,
                    )
            results[stage] = result
    return results
