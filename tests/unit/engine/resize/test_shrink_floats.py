"""A model in NVFP4 that loses layers and neurons in mid-run: scales are those of the layers that are left."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.quant import layers
from tests.models import tiny_llama
from tests.multirank.common import ds_config, engine_of, train
from tests.single import init_single_process

SCHEDULE = {"enabled": True, "schedule_offset": 1, "schedule_offset_end": 2, "schedule_offset_stride": 1}
CUTS = {
    "depth_pruning": {"dense_ratio": 0.5},
    "row_pruning": {"dense_ratio": 0.5, "round_to": 16, "method": "l1"},
}


def block(cut: str, shrinks: bool) -> dict[str, Any]:
    shared = {**SCHEDULE, **CUTS[cut], "shrink_at_end_of_schedule": shrinks}
    return {"scheme": "NVFP4", cut: {"shared_parameters": shared}}


def model_of_four() -> torch.nn.Module:
    """Its first two layers change nothing, so they are the ones that go."""
    model = tiny_llama(hidden=64, intermediate=128, layers=4)
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    return model


def texts(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 128, (2, 8), generator=generator) for _ in range(steps)]
    return [{"input_ids": row, "labels": row} for row in rows]


def expected_scales(model: torch.nn.Module) -> dict[str, float]:
    """2688 / the largest magnitude of what servers fuse, by module."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if layers.fake_quant_of(module) is None:
            continue
        parent, _, own = name.rpartition(".")
        family = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
        members = next((names for names in family if own in names), [own])
        largest = max(
            float(model.get_submodule(f"{parent}.{m}").weight.detach().abs().max()) for m in members
        )
        found[name] = 448 * 6 / largest
    return found


def used_scales(model: torch.nn.Module) -> dict[str, float]:
    return {
        name: float(fake_quant.global_scale)
        for name, module in model.named_modules()
        if (fake_quant := layers.fake_quant_of(module)) is not None
    }


@pytest.mark.parametrize("cut", CUTS)
def test_global_scales_are_those_of_what_is_left(cut: str) -> None:
    init_single_process()
    model = model_of_four()
    with engine_of(model, ds_config(2, block(cut, shrinks=True))) as engine:
        for text in texts(6):  # after each step, the one that cut included
            (loss,) = train(engine, iter([text]))
            used = used_scales(engine.module)
            assert used == pytest.approx(expected_scales(engine.module), rel=1e-5)
            assert math.isfinite(loss)
        assert len(used) == (14 if cut == "depth_pruning" else 28)


def test_an_export_of_a_checkpoint_is_that_of_the_engine(tmp_path: Path) -> None:
    """Layers that go are renumbered, and the scales with them. (Columns of masked rows cannot go from their blocks.)"""
    cut = "depth_pruning"
    init_single_process()
    model = model_of_four()
    with engine_of(model, ds_config(2, block(cut, shrinks=False))) as engine:
        train(engine, iter(texts(4)))
        engine.save_checkpoint(tmp_path / "checkpoint")
        ds_compress.export(engine, tmp_path / "one", "torch", check=False)
    ds_compress.export(
        tmp_path / "checkpoint",
        tmp_path / "two",
        "torch",
        model=model_of_four(),
        check=False,
    )
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
