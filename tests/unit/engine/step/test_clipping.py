"""Gradients are clipped by the norm of what is applied: the update has the limit's length, masked or not."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import ds_compress  # noqa: F401 - registers the block
from tests.single import init_single_process

LIMIT = 0.01
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0": ({"stage": 0}, {}),
    "0-bf16": ({"stage": 0}, {"bf16": {"enabled": True}}),
    "0-autocast": ({"stage": 0}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "1-BF16_Optimizer": (
        {"stage": 1},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "1": ({"stage": 1}, {}),
    "2-bf16": ({"stage": 2}, {"bf16": {"enabled": True}}),
    "2-offload": ({"stage": 2, **OFFLOAD}, {}),
    "3": ({"stage": 3}, {}),
    "3-subgroups": ({"stage": 3, "sub_group_size": 2000}, {}),
    "3-offload": ({"stage": 3, **OFFLOAD}, {}),
}


def sparse(method: str, **shared: Any) -> dict[str, Any]:
    keys = {"enabled": True, "method": method, "dense_ratio": 0.05, "schedule_offset": 1, **shared}
    return {"sparse_pruning": {"shared_parameters": keys}}


ROWS = {
    "row_pruning": {
        "shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 1},
        "different_groups": {
            "g": {"params": {"dense_ratio": 0.25}, "modules": ["^0$"], "related_modules": [["^2$"]]}
        },
    }
}
BLOCKS: dict[str, dict[str, Any]] = {
    "l1": sparse("l1"),
    "movement": sparse("movement", schedule_offset_end=2),
    "movement, masks go on": sparse("movement", schedule_offset_end=50, schedule="constant"),
    "rows": ROWS,
    "rows and weights": {**ROWS, **sparse("l1")},
}


def engine_of(block: dict[str, Any] | None, name: str) -> Any:
    init_single_process()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    zero, more = ENGINES[name]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": LIMIT,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "compression_training": block or sparse("l1", dense_ratio=1.0),
        **more,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """What trains of each weight: its hidden value where it is masked and has one."""
    stages = engine.compression.techniques.values()
    return {
        name: next((s.latent[name] for s in stages if name in s.latent), f.values).clone().float()
        for name, f in engine.compression.shards.fragments.items()
    }


def step(engine: Any, at: int, factor: float = 1.0) -> None:
    dtype = next(engine.module.parameters()).dtype
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(at)).to(dtype)
    engine.backward(((engine(x) - x).float() ** 2).mean() * factor)
    engine.step()


def update_norm(engine: Any, at: int, factor: float = 1.0) -> float:
    before = masters(engine)
    step(engine, at, factor)
    return float(torch.cat([values - before[name] for name, values in masters(engine).items()]).norm())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_update_is_as_long_as_the_limit_says(block: str, name: str) -> None:
    engine = engine_of(BLOCKS[block], name)
    for at in range(5):
        step(engine, at)
    tolerance = 1e-3  # DeepSpeed adds 1e-6 to the norm, which is about 0.05 here
    assert update_norm(engine, 5) == pytest.approx(LIMIT, rel=tolerance)
    # Shorter than the limit: nothing is clipped, and the reported norm is that of the update.
    length = update_norm(engine, 6, 1e-3)
    assert length < LIMIT / 2
    norm = engine.get_global_grad_norm()
    assert (norm is None) == (name in ("0", "0-autocast"))  # where DeepSpeed keeps none
    if norm is not None:
        assert float(norm) == pytest.approx(length, rel=2e-2 if "bf16" in name.lower() else tolerance)
    assert engine.gradient_clipping() == LIMIT


@pytest.mark.parametrize("name", ["1", "3", "0"])
def test_hidden_weights_train_and_count(name: str) -> None:
    engine = engine_of(sparse("l1", regrowth=True, schedule_offset_end=50, schedule="constant"), name)
    for at in range(5):
        step(engine, at)
    assert engine.compression.techniques["sparse_pruning"].latent
    assert update_norm(engine, 5) == pytest.approx(LIMIT, rel=1e-3)


@pytest.mark.parametrize("name", ["0", "0-bf16", "1-BF16_Optimizer", "2-offload", "3"])
def test_a_nan_of_a_masked_weight_still_skips_the_step(name: str) -> None:
    engine = engine_of(sparse("l1"), name)
    for at in range(3):
        step(engine, at)
    weight = next(iter(engine.module.parameters()))
    before = masters(engine)
    flaw = torch.where(before["0.weight"].view(64, 64) != 0, 0.0, float("nan"))
    assert int(flaw.isnan().sum()) > 3000
    x = torch.randn(4, 64).to(weight.dtype)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            return w.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g + flaw.to(g.dtype)

    first = engine.module[0]
    first.forward = lambda x: torch.nn.functional.linear(x, Poison.apply(first.weight))
    engine.backward(((engine(x) - x).float() ** 2).mean())
    engine.step()
    assert engine.skipped_steps == 1 and engine.compression.applied_steps == 3
    after = masters(engine)
    assert all(torch.equal(values, after[n]) for n, values in before.items())
