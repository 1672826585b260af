"""Compression follows the steps that masters really make: replaced optimizers, skipped steps, steps past our hooks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import ds_compress  # noqa: F401 - registers the block
from tests.unit.engine.engines import engine_of

STAGES = (0, 1, 2, 3)
LEARNED_SCALES = {
    "weight_quantization": {
        "shared_parameters": {"enabled": True, "learned_scale": True, "granularity": "per_channel"},
        "different_groups": {"g": {"params": {"start_bits": 4, "target_bits": 4}}},
    }
}


def sparse(**shared: Any) -> dict[str, Any]:
    keys = {"enabled": True, "method": "l1", "dense_ratio": 0.5, **shared}
    return {"sparse_pruning": {"shared_parameters": keys}}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def step(engine: Any, at: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(at)
    x = torch.randn(4, 16, generator=generator)
    engine.backward(engine(x).square().mean() * factor)
    engine.step()


def weights(engine: Any) -> dict[str, torch.Tensor]:
    whole = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            whole[name] = parameter.detach().clone()
    return whole


def zeros(engine: Any) -> float:
    matrices = [w for name, w in weights(engine).items() if w.dim() == 2]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


def adagrad(model: nn.Module) -> torch.optim.Optimizer:
    first, last = model[0].parameters(), model[2].parameters()  # type: ignore[index]
    return torch.optim.Adagrad([{"params": list(first)}, {"params": list(last), "lr": 0.5}], lr=0.01)


class TestReplacedOptimizer:
    @pytest.mark.parametrize("stage", STAGES)
    def test_from_json(self, stage: int) -> None:
        engine = engine_of(net(), sparse(), stage, optimizer={"type": "Adagrad", "params": {"lr": 0.01}})
        for at in range(3):
            step(engine, at)
        assert engine.compression.applied_steps == 3
        assert zeros(engine) == 0.5 == engine.compression.metrics()["sparse_pruning/sparsity"]

    def test_groups_scales_and_schedules_give_the_same_weights_on_every_stage(self) -> None:
        """ZeRO makes its Adagrad with one group and the default rate: ours has a group more, for scales."""
        results = []
        for stage in STAGES:
            model = net()
            given = adagrad(model)
            schedule = torch.optim.lr_scheduler.LambdaLR(given, lambda s: 1.0 if s < 2 else 0.0)
            engine = engine_of(model, {**sparse(), **LEARNED_SCALES}, stage, given)
            engine.lr_scheduler = schedule
            for at in range(2):
                step(engine, at)
            at_rest = weights(engine)
            step(engine, 2)  # the rate is 0 now
            after = weights(engine)
            assert all(torch.equal(after[name], at_rest[name]) for name in after)
            results.append(after)
        for other in results[1:]:
            for name, values in other.items():
                torch.testing.assert_close(values, results[0][name], msg=name)
        before = dict(net().named_parameters())
        moved = (results[0]["2.bias"] - before["2.bias"]).abs().max() / (
            results[0]["0.bias"] - before["0.bias"]
        ).abs().max()
        assert moved > 20  # 50 times the rate

    def test_checkpoint_continues(self, tmp_path: Any) -> None:
        config = {"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}}
        whole = engine_of(net(), sparse(schedule_offset_end=9), 2, **config)
        for at in range(4):
            step(whole, at)
            if at == 1:
                whole.save_checkpoint(str(tmp_path))
        again = engine_of(net(), sparse(schedule_offset_end=9), 2, **config)
        again.load_checkpoint(str(tmp_path))
        for at in range(2, 4):
            step(again, at)
        assert again.compression.applied_steps == 4
        for name, values in weights(whole).items():
            assert torch.equal(values, weights(again)[name])


class _Past(torch.optim.SGD):
    """Steps (some of) its groups past torch's hooks."""

    def __init__(self, groups: Any, hooked: int) -> None:
        super().__init__(groups, lr=0.1)
        hooked_step, self.hooked = self.step, hooked
        self.step = lambda closure=None: self._some(hooked_step)  # type: ignore[method-assign]

    def _some(self, hooked_step: Callable[[], Any]) -> None:
        groups = self.param_groups
        if self.hooked:
            self.param_groups = groups[: self.hooked]
            hooked_step()
            self.param_groups = groups
        for group in groups[self.hooked :]:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


class TestStepPastTheHooks:
    @pytest.mark.parametrize(("stage", "hooked"), [(0, 0), (0, 1), (1, 0), (3, 0)])
    def test_is_an_error_at_the_first_step(self, stage: int, hooked: int) -> None:
        model = net()
        groups = [{"params": list(model[i].parameters())} for i in (0, 2)]
        engine = engine_of(model, sparse(), stage, _Past(groups, hooked))
        with pytest.raises(RuntimeError, match=r"compression did not see, of (0\.weight|2\.weight).*_Past"):
            step(engine, 0)


class TestSkippedStep:
    """Each case: a mask (or range) is due in the step that is skipped; then the same batch again, without the flaw."""

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize(
        "block",
        [
            sparse(method="taylor", dense_ratio=0.25, schedule_offset=3),
            sparse(
                **{"method": "taylor", "dense_ratio": 0.25, "regrowth": True, "schedule": "constant"},
                **{"schedule_offset": 3, "schedule_offset_end": 9, "schedule_offset_stride": 3},
            ),
            sparse(method="movement", dense_ratio=0.25, schedule_offset=3, schedule_offset_end=9),
            sparse(method="topk", dense_ratio=0.25, schedule_offset=3, schedule_offset_end=9),
            sparse(method="snip_momentum", dense_ratio=0.25, schedule_offset=3),
        ],
        ids=["taylor", "taylor-regrowth", "movement", "topk", "snip"],
    )
    def test_leaves_no_mask(self, block: dict[str, Any], stage: int) -> None:
        assert_as_if_never_taken(block, stage)

    @pytest.mark.parametrize("method", ["taylor", "activation", "topk"])
    def test_leaves_no_units(self, method: str) -> None:
        shared = {"enabled": True, "method": method, "dense_ratio": 0.25, "schedule_offset": 3}
        if method == "topk":
            shared["schedule_offset_end"] = 9
        assert_as_if_never_taken({"row_pruning": {"shared_parameters": shared}}, 0)

    def test_leaves_no_range(self) -> None:
        block = {
            "activation_quantization": {
                "shared_parameters": {"enabled": True, "range_calibration": "static", "schedule_offset": 0},
                "different_groups": {"g": {"params": {"bits": 8}}},
            }
        }
        assert_as_if_never_taken(block, 0)

    def test_metrics_say_what_is_in_the_weights(self) -> None:
        engine = engine_of(net(), sparse(schedule_offset=3), 0)
        for at in range(2):
            step(engine, at)
        step(engine, 2, float("nan"))
        assert engine.compression.applied_steps == 2 and engine.global_steps == 3
        assert engine.compression.metrics()["sparse_pruning/sparsity"] == 0.0 == zeros(engine)
        step(engine, 2)
        assert engine.compression.metrics()["sparse_pruning/sparsity"] == 0.5 == zeros(engine)


def assert_as_if_never_taken(block: dict[str, Any], stage: int) -> None:
    plain, with_skip = engine_of(net(), block, stage), engine_of(net(), block, stage)
    for at in range(6):
        step(plain, at)
        if at == 2:
            # Another batch than the next one, and finite in the forward: its overflow shows in the gradient only.
            step(with_skip, 77, float("nan"))
        step(with_skip, at)
    assert with_skip.compression.applied_steps == 6 and with_skip.skipped_steps == 1
    expected, got = plain.compression.state_dict(), with_skip.compression.state_dict()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for name, values in weights(plain).items():
        assert torch.equal(values, weights(with_skip)[name]), name
    assert plain.compression.metrics() == with_skip.compression.metrics()


def test_static_inputs_have_no_bits_before_the_first_range() -> None:
    block = {
        "activation_quantization": {
            "shared_parameters": {"enabled": True, "range_calibration": "static", "schedule_offset": 0},
            "different_groups": {"g": {"params": {"bits": 8}}},
        }
    }
    engine = engine_of(net(), block, 0)
    assert engine.compression.metrics()["activation_quantization/mean_bits"] == 0.0
    step(engine, 0)
    assert engine.compression.metrics()["activation_quantization/mean_bits"] == 8.0


@pytest.mark.parametrize("method", ["l1", "taylor", "topk"])
def test_weights_that_come_without_our_state_begin_anew(method: str, tmp_path: Any) -> None:
    """A checkpoint of a run without the block: the masks of before are neither in the weights nor in the numbers."""
    schedule = {"schedule_offset": 3, "schedule_offset_end": 5}
    rows = {"enabled": True, "method": method, "dense_ratio": 0.5, **schedule}
    block = {**sparse(method=method, **schedule), "row_pruning": {"shared_parameters": rows}}
    engine = engine_of(net(), block, 2)
    engine.save_checkpoint(str(tmp_path))
    shutil.rmtree(next(tmp_path.glob("*/ds_compress")))
    next(tmp_path.glob("*/ds_compress_manifest.json")).unlink()
    first = [_loss_and_step(engine, at) for at in range(6)]
    engine.load_checkpoint(str(tmp_path))
    assert engine.compression.applied_steps == 0 == zeros(engine)
    metrics = engine.compression.metrics()
    assert (metrics["sparse_pruning/sparsity"], metrics["row_pruning/density"]) == (0.0, 1.0)
    assert [_loss_and_step(engine, at) for at in range(6)] == first


@pytest.mark.parametrize("method", ["l1", "taylor", "topk", "activation"])
def test_a_checkpoint_from_within_the_schedule_loads_after_its_end(method: str, tmp_path: Any) -> None:
    """As `load_best_model_at_end` does; scores were thrown away when the masks became final."""
    shared = {
        "enabled": True,
        "method": method,
        "dense_ratio": 0.5,
        "schedule_offset": 1,
        "schedule_offset_end": 5,
    }
    block: dict[str, Any] = {"row_pruning": {"shared_parameters": shared}}
    if method != "activation":
        block |= sparse(method=method, schedule_offset=1, schedule_offset_end=5)
    engine = engine_of(net(), block, 1)
    for at in range(3):
        _loss_and_step(engine, at)
    engine.save_checkpoint(str(tmp_path))
    first = [(_loss_and_step(engine, at), engine.compression.metrics()) for at in range(3, 8)]
    engine.load_checkpoint(str(tmp_path))
    assert engine.compression.applied_steps == 3
    assert [(_loss_and_step(engine, at), engine.compression.metrics()) for at in range(3, 8)] == first


def _loss_and_step(engine: Any, at: int) -> float:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(at))
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    return float(loss.detach())
