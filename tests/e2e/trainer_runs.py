"""Scenarios: the example scripts in the processes of one launch, each beside a plain engine on the same batches."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_compress
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import engine_of
from tests.multirank.training import quantization_block

STAGES = (0, 2, 3)
STEPS = 6
SAVE_AT = 3
LEARNING_RATE = 1e-3


def pruned_half(modules: str) -> dict[str, Any]:
    """Half of the weights in four steps (the checkpoint comes in between), and 8 bits."""
    schedule = {"schedule_offset": 1, "schedule_offset_end": 5, "schedule_offset_stride": 1}
    block = quantization_block()
    for key in block:
        block[key]["different_groups"]["all"]["modules"] = [modules]
    return block | {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", **schedule},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": [modules]}},
        }
    }


SCRIPTS: dict[str, dict[str, Any]] = {
    "run_glue": {
        "block": pruned_half("encoder.layer")
        | {"layer_reduction": {"enabled": True, "teacher_layer": [1, 3]}},
        "model": lambda: tiny_bert(seed=3, layers=4),
        # BERT ignores num_items_in_batch; the Trainer would multiply its loss by the number of processes.
        "arguments": ["--average_tokens_across_devices", "False"],
        "accumulate": 1,
    },
    "run_clm": {"block": pruned_half("mlp|self_attn"), "model": tiny_llama, "arguments": [], "accumulate": 2},
}


def json_of(script: str, stage: int, **zero: Any) -> dict[str, Any]:
    """What a user of the Trainer writes: everything that TrainingArguments knows is "auto"."""
    gather = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "zero_optimization": {"stage": stage, **gather, **zero},
        "compression_training": SCRIPTS[script]["block"],
    }


def command_line(script: str, model: str, output: str, config: str) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "output_dir": output,
        "deepspeed": config,
        "max_steps": STEPS,
        "save_steps": SAVE_AT,
        "save_total_limit": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": SCRIPTS[script]["accumulate"],
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    pairs = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return ["--do_train", "--do_eval", "--use_cpu", *pairs, *SCRIPTS[script]["arguments"]]


@contextmanager
def spied_batches() -> Iterator[list[dict[str, torch.Tensor]]]:
    """What the Trainer feeds to the model in this process."""
    from transformers import Trainer

    seen: list[dict[str, torch.Tensor]] = []
    original = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: values.clone() for name, values in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step
    try:
        yield seen
    finally:
        Trainer.training_step = original


def run_script(script: str, arguments: list[str]) -> list[dict[str, torch.Tensor]]:
    """The script's main() as a fresh process would run it; returns its batches."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before, sys.argv = sys.argv, [script, *arguments]
    try:
        with spied_batches() as seen:
            importlib.import_module(f"tests.e2e.{script}").main()
    finally:
        sys.argv = before
        AcceleratorState._reset_state()
        PartialState._reset_state()
        unset_hf_deepspeed_config()
    return seen


def plain_run(
    script: str, stage: int, model: Any, data: list[dict[str, torch.Tensor]], **extra: Any
) -> dict[str, Any]:
    """deepspeed.initialize and a loop; returns losses (means over processes) and the whole weights."""
    accumulate = SCRIPTS[script]["accumulate"]
    config = json_of(script, stage)
    config |= {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        **extra,
    }
    config["optimizer"]["params"] |= {"lr": LEARNING_RATE, "weight_decay": 0.0}
    losses = []
    with engine_of(model, config) as engine:
        engine.train()
        for batch in data:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        exported = weights_of(engine.module)
        metrics = engine.compression.metrics()
    return {"losses": _means(losses, accumulate), "weights": exported, "metrics": metrics}


def _means(losses: list[float], accumulate: int = 2) -> list[float]:
    """Of the micro-batches of each step, over all processes."""
    steps = torch.tensor(losses).view(-1, accumulate).mean(1)
    dist.all_reduce(steps)
    return (steps / dist.get_world_size()).tolist()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    result = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            result[name] = parameter.detach().clone()
    return result


def scripts(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    """{(script, stage): what the plain engine gives}; what the scripts themselves wrote lies in `folder`."""
    results = {}
    for script, settings in SCRIPTS.items():
        model_path = f"{folder}/{script}"
        if dist.get_rank() == 0:
            settings["model"]().save_pretrained(model_path)
        for stage in STAGES:
            output, config = f"{folder}/{script}-{stage}", f"{folder}/{script}-{stage}.json"
            if dist.get_rank() == 0:
                Path(config).write_text(json.dumps(json_of(script, stage)))
            dist.barrier()
            arguments = command_line(script, model_path, output, config)
            data = run_script(script, arguments)
            resumed = command_line(script, model_path, f"{output}-resumed", config)
            run_script(script, [*resumed, "--resume_from_checkpoint", f"{output}/checkpoint-{SAVE_AT}"])
            model = type(settings["model"]()).from_pretrained(model_path)
            results[script, stage] = plain_run(script, stage, model, data)
    ungathered(folder)
    return results


def ungathered(folder: str) -> None:
    """Stage 3 without stage3_gather_16bit_weights_on_model_save."""
    script, config = "run_clm", f"{folder}/ungathered.json"
    if dist.get_rank() == 0:
        keep = {"stage3_gather_16bit_weights_on_model_save": False}
        Path(config).write_text(json.dumps(json_of(script, 3, **keep)))
    dist.barrier()
    run_script(script, command_line(script, f"{folder}/{script}", f"{folder}/ungathered", config))
    if dist.get_rank() == 0:
        ds_compress.export(f"{folder}/ungathered", f"{folder}/exported", "hf", check=False)
    dist.barrier()


def weights_sent_rounded(folder: str) -> None:
    """Stage 2 with weights that travel in 4 bits and are never sent exactly before a save."""
    script, config = "run_clm", f"{folder}/rounded.json"
    if dist.get_rank() == 0:
        SCRIPTS[script]["model"]().save_pretrained(f"{folder}/rounded-start")
        rounded = {
            "enabled": True,
            "bits": 4,
            "refresh_interval": 1000,
            "min_elements": 0,
            "measure_link": False,
        }
        block = {"compression_training": {"parameter_compression": rounded}}
        Path(config).write_text(json.dumps(json_of(script, 2) | block))
    dist.barrier()
    run_script(script, command_line(script, f"{folder}/rounded-start", f"{folder}/rounded", config))


# -- accelerate ----------------------------------------------------------------------------------------


def accelerate_loop(folder: str) -> dict[int, dict[str, Any]]:
    """A loop of one's own on accelerate's DeepSpeedPlugin, resumed in the middle; and the plain engine."""
    if dist.get_rank() == 0:
        tiny_llama().save_pretrained(f"{folder}/model")
    dist.barrier()
    results = {}
    for stage in STAGES:
        config = f"{folder}/accelerate-{stage}.json"
        if dist.get_rank() == 0:
            unknown = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
            written = json_of("run_clm", stage) | {"scheduler": {"type": "WarmupLR", "params": unknown}}
            # The Trainer would fill them in; without it accelerate wants numbers.
            written |= {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
            written["optimizer"]["params"]["weight_decay"] = 0.0
            Path(config).write_text(json.dumps(written))
        dist.barrier()
        _, losses, data = _accelerated(folder, config, stage, save=True)
        resumed, more, _ = _accelerated(folder, config, stage, save=False)
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(f"{folder}/model")
        warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": LEARNING_RATE, "warmup_num_steps": 2}
        scheduler = {"type": "WarmupLR", "params": warmup}
        results[stage] = plain_run("run_clm", stage, model, data, scheduler=scheduler)
        results[stage] |= {"accelerated": _means(losses), "resumed": _means(more), "applied": resumed}
    return results


def _accelerated(
    folder: str, config: str, stage: int, save: bool
) -> tuple[int, list[float], list[dict[str, torch.Tensor]]]:
    """Saves its state after half of the batches, or starts from there; then saves the model."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
    from transformers import LlamaForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = LlamaForCausalLM.from_pretrained(f"{folder}/model")
    optimizer = DummyOptim(model.parameters(), lr=LEARNING_RATE)
    scheduler = DummyScheduler(optimizer, total_num_steps=STEPS, warmup_num_steps=2)
    # Without a GPU accelerate takes the processes of a DeepSpeed run for one each: it would not shard the data.
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 128, (4 * 2 * STEPS, 12), generator=generator)
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses, data = [], [{name: values.clone() for name, values in batch.items()} for batch in loader]
    middle = len(data) // 2
    if not save:
        accelerator.load_state(f"{folder}/state-{stage}")
    model.train()
    for batch in data if save else data[middle:]:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if save and len(losses) == middle:
            accelerator.save_state(f"{folder}/state-{stage}")
    state = accelerator.get_state_dict(model)
    if dist.get_rank() == 0:
        accelerator.unwrap_model(model).save_pretrained(
            f"{folder}/accelerated-{stage}-{'whole' if save else 'resumed'}", state_dict=state
        )
    dist.barrier()
    applied = model.compression.applied_steps
    model.destroy()
    AcceleratorState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    return applied, losses, data
