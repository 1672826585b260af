"""After a shrink every surviving parameter has the settings, state, scale and schedule that were its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import ds_compress
from tests.models import tiny_bert
from tests.single import init_single_process

SHRINK_AT = 3


def bert(layers: int = 4) -> nn.Module:
    return tiny_bert(layers=layers, hidden=16, heads=2, intermediate_size=32, vocab_size=64)


def layerwise(model: nn.Module) -> list[dict[str, Any]]:
    """A group for what is no layer, then one for each of four layers, all different in everything."""
    named = dict(model.named_parameters())
    groups = []
    for at in (None, 0, 1, 2, 3):
        inside = f"encoder.layer.{at}." if at is not None else "encoder.layer."
        params = [p for name, p in named.items() if (inside in name) == (at is not None)]
        k = 0 if at is None else at + 1
        betas = (0.5 + 0.05 * k, 0.9 + 0.01 * k)
        groups.append({"params": params, "lr": 1e-3 * 2.0**-k, "weight_decay": 0.01 * k, "betas": betas})
    return groups


def group_of(name: str) -> int:
    return 1 + int(name.split(".layer.")[1].split(".")[0]) if "encoder.layer." in name else 0


DEPTH = {
    "depth_pruning": {
        "shared_parameters": {
            **{"enabled": True, "method": "l1", "schedule_offset": SHRINK_AT, "dense_ratio": 0.5},
            "shrink_at_end_of_schedule": True,
        }
    }
}


def engine_of(model: nn.Module, block: dict[str, Any], stage: int, **given: Any) -> Any:
    init_single_process()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "compression_training": block,
        **given.pop("config", {}),
    }
    return deepspeed.initialize(model=model, config=config, **given)[0]


def step(engine: Any, at: int) -> float:
    generator = torch.Generator().manual_seed(at)
    ids = torch.randint(0, 64, (4, 6), generator=generator)
    loss = engine(input_ids=ids, labels=ids[:, 0] % 2).loss
    engine.backward(loss)
    engine.step()
    return float(loss)


def stepped_settings(engine: Any, at: int) -> dict[str, dict[str, Any]]:
    """Takes a step; {parameter: the settings that the optimizer really used for it}."""
    inner = engine.optimizer if engine.optimizer is engine.basic_optimizer else engine.optimizer.optimizer
    seen: dict[int, dict[str, Any]] = {}

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            seen.update({id(p): {k: v for k, v in group.items() if k != "params"} for p in group["params"]})

    handle = inner.register_step_pre_hook(look)
    step(engine, at)
    handle.remove()
    fragments = engine.compression.shards.fragments
    return {name: seen[id(f.master)] for name, f in fragments.items() if f.has_optimizer}


def decay(at: int) -> float:
    return 0.5**at


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda o: None,
    "lambdas": lambda o: schedules.LambdaLR(
        o, [lambda s, k=k: 1 / (1 + s + k) for k in range(len(o.param_groups))]
    ),
    "one-cycle": lambda o: schedules.OneCycleLR(
        o, max_lr=[g["lr"] for g in o.param_groups], total_steps=20, cycle_momentum=False
    ),
    "cyclic": lambda o: schedules.CyclicLR(
        o, [g["lr"] / 9 for g in o.param_groups], [g["lr"] for g in o.param_groups], 4, cycle_momentum=False
    ),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 20),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o), schedules.LambdaLR(o, decay)], milestones=[4]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 2), schedules.LambdaLR(o, decay)]),
}


def expected_rates(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[list[float]]:
    """By step and group, without any shrink."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1e-3 * 2.0**-k} for k in range(5)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


CASES = [
    *(
        (name, stage, by)
        for name in SCHEDULERS
        for stage, by in ((0, "callable"), (1, "engine"), (0, "user"))
    ),
    *(("lambdas", stage, by) for stage, by in ((0, "engine"), (3, "engine"), (3, "user"))),
    ("none", 3, "engine"),
]


@pytest.mark.parametrize(("name", "stage", "held_by"), CASES)
def test_settings_and_schedules_follow_the_parameters(name: str, stage: int, held_by: str) -> None:
    """held_by user: who steps it itself, as accelerate does, and the engine never sees it."""
    model, make = bert(), SCHEDULERS[name]
    optimizer = torch.optim.AdamW(layerwise(model))
    scheduler = None if held_by == "callable" else make(optimizer)
    handed = {"engine": scheduler, "user": None, "callable": make}[held_by]
    engine = engine_of(model, DEPTH, stage, optimizer=optimizer, lr_scheduler=handed)
    rates = expected_rates(make, 7)
    for at in range(7):
        used = stepped_settings(engine, at) if at != SHRINK_AT - 1 else step(engine, at)
        if held_by == "user" and scheduler is not None:
            scheduler.step()
        if not isinstance(used, dict):
            continue
        kept = (
            [0, 1, 2, 3] if at < SHRINK_AT else engine.compression.shrunk_units["bert.encoder.layer"].tolist()
        )
        assert len(kept) == (4 if at < SHRINK_AT else 2)
        for parameter, settings in used.items():
            now = group_of(parameter)
            was = 0 if now == 0 else 1 + kept[now - 1]
            assert settings["lr"] == pytest.approx(rates[at][was], rel=1e-12), (at, parameter)
            assert settings["weight_decay"] == 0.01 * was
            assert settings["betas"] == (0.5 + 0.05 * was, 0.9 + 0.01 * was)
    last = (engine.lr_scheduler if held_by != "user" else scheduler) if name != "none" else None
    if last is not None:
        assert len(last.get_last_lr()) == 3


def test_rates_of_the_json_schedule_go_on() -> None:
    """A scheduler of DeepSpeed's and one of torch's by its JSON: the rates after the cut are those of no cut."""
    for stage, kind, params in (
        (1, "WarmupDecayLR", {"warmup_num_steps": 2, "total_num_steps": 9, "warmup_max_lr": 1e-2}),
        (0, "CosineAnnealingLR", {"T_max": 9}),
    ):
        rates = []
        for block in (DEPTH, {"depth_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 1.0}}}):
            model = bert()
            config = {
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "scheduler": {"type": kind, "params": params},
            }
            engine = engine_of(model, block, stage, model_parameters=layerwise(model), config=config)
            rates.append([])
            for at in range(7):
                step(engine, at)
                rates[-1].append(engine.get_lr()[0])
        assert rates[0] == pytest.approx(rates[1], rel=1e-12), kind


LSQ = {
    "weight_quantization": {
        "shared_parameters": {"enabled": True, "learned_scale": True, "granularity": "per_channel"},
        "different_groups": {"g": {"params": {"start_bits": 4, "target_bits": 4}, "modules": ["encoder"]}},
    },
    "row_pruning": {
        "shared_parameters": {
            **{"enabled": True, "method": "l1", "schedule_offset": SHRINK_AT, "dense_ratio": 0.5},
            "shrink_at_end_of_schedule": True,
        }
    },
}
SCALE = "bert.encoder.layer.{}.intermediate.dense.weight_step_size"
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "0-bf16": (0, {"bf16": {"enabled": True}}),
    "1-BF16_Optimizer": (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "2": (2, {}),
    "2-offload": (2, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "3": (3, {}),
    "3-bf16": (3, {"bf16": {"enabled": True}}),
}


def _scale_state(engine: Any, name: str) -> dict[str, torch.Tensor]:
    fragment = engine.compression.shards.fragments[name]
    inner = engine.optimizer if engine.optimizer is engine.basic_optimizer else engine.optimizer.optimizer
    state = inner.state[fragment.master]
    parts = {
        k: v.view(-1).narrow(0, fragment.offset, fragment.numel) if v.dim() else v
        for k, v in state.items()
        if isinstance(v, torch.Tensor)
    }
    parameter = dict(engine.module.named_parameters())[name]
    with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
        live = parameter.detach().flatten()
    parts |= {"master": fragment.values, "live": live}
    return {k: v.detach().float().clone() for k, v in parts.items()}


@pytest.mark.parametrize("name", ENGINES)
def test_learned_scales_keep_their_rows_moments_and_counters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds_compress.engine.resize import shrink

    stage, config = ENGINES[name]
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    model = bert(layers=2)
    common = {
        "gradient_accumulation_steps": 2,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
    }
    engine = engine_of(
        model, LSQ, stage, model_parameters=model.parameters(), config={**optimizer, **common, **config}
    )
    before: dict[str, Any] = {}
    original = shrink.shrink
    counters = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

    def look_and_shrink(engine: Any) -> None:
        before["scales"] = {SCALE.format(i): _scale_state(engine, SCALE.format(i)) for i in (0, 1)}
        before["counters"] = {c: getattr(engine, c) for c in counters} | {
            "norm": engine.get_global_grad_norm()
        }
        original(engine)

    monkeypatch.setattr(shrink, "shrink", look_and_shrink)
    for at in range(2 * SHRINK_AT):
        step(engine, at)
    after = {c: getattr(engine, c) for c in counters} | {"norm": engine.get_global_grad_norm()}
    assert (
        after == before["counters"]
        and after["global_steps"] == SHRINK_AT
        and after["micro_steps"] == 2 * SHRINK_AT
    )
    assert (after["norm"] is None) == (name == "0")  # DeepSpeed keeps none at stage 0 in fp32
    for i in (0, 1):
        kept = engine.compression.shrunk_units[f"bert.encoder.layer.{i}.intermediate.dense"]
        old, now = before["scales"][SCALE.format(i)], _scale_state(engine, SCALE.format(i))
        assert old.keys() == now.keys() >= {"exp_avg", "exp_avg_sq", "step", "master", "live"}
        for key, values in old.items():
            expected = values[kept] if values.dim() else values
            assert torch.equal(now[key], expected), key
        assert not torch.equal(now["exp_avg"], torch.zeros(16)) and len(set(now["master"].tolist())) > 8
    exported = ds_compress.export_state_dict(engine)
    live = dict(engine.module.named_parameters())
    assert exported.keys() == {n for n in live if not n.endswith("weight_step_size")}
    step(engine, 99)
    step(engine, 99)
    assert engine.global_steps == SHRINK_AT + 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_keeps_its_tags_and_momenta(stage: int) -> None:
    """Muon goes by tags on parameters: new ones need them, and learned scales are none of its matrices."""
    losses = []
    for shrinks in (False, True):
        rows = {**LSQ["row_pruning"]["shared_parameters"], "shrink_at_end_of_schedule": shrinks}
        block = {**LSQ, "row_pruning": {"shared_parameters": rows}}
        model = bert(layers=2)
        muon = {
            "optimizer": {"type": "Muon", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": stage, "reduce_scatter": False},
        }
        engine = engine_of(model, block, stage, model_parameters=model.parameters(), config=muon)
        losses.append([step(engine, at) for at in range(6)])
        assert {
            p.use_muon for n, p in engine.module.named_parameters() if n.endswith("weight_step_size")
        } == {False}
        assert engine.module.bert.encoder.layer[0].output.dense.weight.use_muon
    # Orthogonal updates of a smaller matrix are others, so only what comes before them is equal.
    assert losses[0][: SHRINK_AT + 1] == pytest.approx(losses[1][: SHRINK_AT + 1], rel=1e-5)
    assert all(loss < 2 for loss in losses[1])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_loss_scale_of_torch_autocast_goes_on(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_compress.engine.resize import shrink
    from ds_compress.engine.zero import internals

    model = bert()
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "torch_autocast": {"enabled": True, "dtype": "float16"},
    }
    engine = engine_of(model, DEPTH, stage, model_parameters=model.parameters(), config=config)
    scaler, before = internals.gradient_scaler(engine), {}
    scaler.set_growth_interval(2)
    original = shrink.shrink

    def look_and_shrink(engine: Any) -> None:
        before.update(internals.gradient_scaler(engine).state_dict())
        original(engine)

    monkeypatch.setattr(shrink, "shrink", look_and_shrink)
    for at in range(SHRINK_AT):
        step(engine, at)
    after = internals.gradient_scaler(engine)
    assert after is not scaler and after.state_dict() == before
    assert before["scale"] > 65536 and before["growth_interval"] == 2


@pytest.fixture
def trainer_state() -> Any:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    init_single_process()
    yield
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()


@pytest.mark.usefixtures("trainer_state")
@pytest.mark.parametrize("stage", [0, 2])
def test_a_trainer_with_its_own_optimizer_and_schedule_goes_through(stage: int, tmp_path: Any) -> None:
    """Without an optimizer in the JSON, accelerate steps a LambdaLR of torch that the engine never sees."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 64, (6,), generator=generator) for _ in range(24)]
    trainer = Trainer(
        model=bert(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            deepspeed={
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "compression_training": {**DEPTH, **LSQ, **DEPTH},
            },
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 6, "learning_rate": 1e-3},
            **{
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "weight_decay": 0.1,
                "save_strategy": "no",
            },
            lr_scheduler_type="linear",
        ),
        train_dataset=[{"input_ids": ids, "labels": ids[0] % 2} for ids in rows],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-3 * (6 - k) / 6 for k in range(6)])
    assert stage == 0 or all(entry["grad_norm"] > 0 for entry in logs)  # DeepSpeed keeps none at stage 0
    assert trainer.model.config.num_hidden_layers == 2
    used = {g["lr"] for g in trainer.model_wrapped.basic_optimizer.param_groups}
    assert used == {0.0}  # every group is at the end of the schedule, that of the scales, too


def test_momenta_that_a_shrink_would_lose_are_refused() -> None:
    model = bert(layers=2)
    zero = {"stage": 3, "reduce_scatter": False, "save_muon_momentum_buffer_in_memory": True}
    muon = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}, "zero_optimization": zero}
    with pytest.raises(ds_compress.ConfigError, match="save_muon_momentum_buffer_in_memory"):
        engine_of(model, LSQ, 3, model_parameters=model.parameters(), config=muon)
