"""Layers called by keyword, optimizers with keys of their own, sparse gradients, and taking everything off twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from ds_compress.quant import layers
from ds_compress.select.score_training import adamw_settings
from tests.unit.engine.engines import engine_of


def block_of(technique: str, params: dict[str, Any], **shared: Any) -> dict[str, Any]:
    keys = {"enabled": True, **shared}
    return {technique: {"shared_parameters": keys, "different_groups": {"g": {"params": params}}}}


QAT = {
    **block_of("weight_quantization", {"start_bits": 8, "target_bits": 8}, granularity="per_channel"),
    **block_of("activation_quantization", {"bits": 8}, range_calibration="dynamic"),
}


class TestKeywords:
    @pytest.mark.parametrize("base", [nn.Linear, nn.Conv2d, nn.Embedding])
    def test_swapped_layers_have_the_names_of_their_class(self, base: type[nn.Module]) -> None:
        assert list(inspect.signature(layers.qat_class(base).forward).parameters) == list(
            inspect.signature(base.forward).parameters
        )

    def test_so_has_transformers_conv1d(self) -> None:
        assert list(inspect.signature(layers.QATConv1D.forward).parameters) == ["self", "x"]

    def test_quantized_layers_give_the_same_by_position_and_by_name(self) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"linear": nn.Linear(8, 8), "conv": nn.Conv2d(3, 4, 3), "table": nn.Embedding(8, 8)}
        )
        block = block_of(
            "weight_quantization", {"start_bits": 4, "target_bits": 4}, granularity="per_channel"
        )
        block["weight_quantization"]["different_groups"]["g"]["modules"] = ["linear", "conv", "table"]
        engine_of(model, block)
        for name, x in (
            ("linear", torch.randn(2, 8)),
            ("conv", torch.randn(2, 3, 5, 5)),
            ("table", torch.tensor([[1, 2]])),
        ):
            assert isinstance(model[name], layers.QATModule)
            assert torch.equal(model[name](input=x), model[name](x))

    @pytest.mark.parametrize("method", ["activation", "l1"])
    def test_units_are_scored_by_what_layers_get_by_name(self, method: str) -> None:
        class Net(nn.Module):
            def __init__(self, by_name: bool) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.first, self.second, self.by_name = nn.Linear(8, 16), nn.Linear(16, 4), by_name

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = torch.relu(self.first(input=x) if self.by_name else self.first(x))
                out: torch.Tensor = self.second(input=hidden) if self.by_name else self.second(hidden)
                return out

        kept = []
        for by_name in (False, True):
            rows = block_of("row_pruning", {"dense_ratio": 0.25}, method=method, schedule_offset=2)
            rows["row_pruning"]["different_groups"]["g"] |= {
                "modules": ["first"],
                "related_modules": [["second"]],
            }
            engine = engine_of(Net(by_name), {**QAT, **rows})
            for at in range(3):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(at))
                engine.backward(engine(x).square().mean())
                engine.step()
            kept.append({name: units.tolist() for name, units in engine.compression.kept_units.items()})
        assert kept[0] == kept[1] and all(len(units) < 16 for units in kept[0].values())


class TestScoresOfForeignOptimizers:
    def test_keys_that_mean_something_else_are_left(self) -> None:
        default = {"betas": (0.9, 0.999), "eps": 1e-8}
        for group in (
            {"lr": 0.5, "eps": (1e-30, 1e-3), "weight_decay": 0.0},  # Adafactor
            {"lr": 0.5, "eps": 1e-10, "weight_decay": 0},  # Adagrad, RMSprop
            {"lr": 0.5, "betas": (0.95, 0.98), "weight_decay": 0.0},  # Lion
            {"lr": torch.tensor(0.5), "momentum": 0.9, "weight_decay": 0.0},  # SGD, Muon
        ):
            assert adamw_settings(group) == {**default, "lr": 0.5, "weight_decay": 0.0}
        assert adamw_settings({"lr": None, "eps": (1e-30, 1e-3)})["lr"] == 1e-3

    def test_an_adam_gives_all_of_its_own(self) -> None:
        group = {"lr": 0.5, "betas": (0.6, 0.7), "eps": 0.1, "weight_decay": 0.2, "amsgrad": False}
        assert adamw_settings(group) == {"lr": 0.5, "betas": (0.6, 0.7), "eps": 0.1, "weight_decay": 0.2}

    @pytest.mark.parametrize("technique", ["sparse_pruning", "row_pruning"])
    @pytest.mark.parametrize("stage", [0, 2])
    def test_topk_trains_beside_any_of_them(self, technique: str, stage: int) -> None:
        import transformers

        makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
            "relative": lambda p: transformers.Adafactor(p),
            "adafactor": lambda p: transformers.Adafactor(
                p, lr=1e-2, relative_step=False, scale_parameter=False
            ),
            "torch": lambda p: torch.optim.Adafactor(p, lr=1e-2),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
            "rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
        }
        for name, make in makers.items():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            block = block_of(
                technique, {"dense_ratio": 0.5}, method="topk", schedule_offset=1, schedule_offset_end=4
            )
            if technique == "row_pruning":
                block[technique]["different_groups"]["g"] |= {
                    "modules": ["^0$"],
                    "related_modules": [["^2$"]],
                }
            engine = engine_of(model, block, stage, make(model.parameters()))
            for at in range(5):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(at))
                engine.backward(engine(x).square().mean())
                engine.step()
            assert engine.compression.applied_steps == 5, name
            assert 0.3 <= float((model[0].weight == 0).float().mean()) <= 0.7, name


class _AdamWByHand:
    """AdamW on one score, straight from the paper (Loshchilov & Hutter 2019, algorithm 2), in float64."""

    def __init__(
        self, score: torch.Tensor, lr: float, betas: tuple[float, float], eps: float, decay: float
    ) -> None:
        self.score, self.lr, self.betas, self.eps, self.decay = score.double(), lr, betas, eps, decay
        self.m, self.v, self.t = torch.zeros_like(self.score), torch.zeros_like(self.score), 0

    def step(self, gradient: torch.Tensor) -> None:
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * gradient.double()
        self.v = b2 * self.v + (1 - b2) * gradient.double() ** 2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.score = self.score * (1 - self.lr * self.decay) - self.lr * m / (v.sqrt() + self.eps)


class TestLearnedScores:
    """Rate, betas, eps and decay of the group reach the scores: compared with AdamW written out."""

    SETTINGS: ClassVar[dict[str, Any]] = {"lr": 0.05, "betas": (0.5, 0.7), "eps": 0.01, "weight_decay": 0.8}

    def test_of_weights(self) -> None:
        schedule = {"schedule_offset": 1, "schedule_offset_end": 50}
        self._compare(block_of("sparse_pruning", {"dense_ratio": 0.5}, method="topk", **schedule))

    def test_of_units(self) -> None:
        block = block_of(
            "row_pruning", {"dense_ratio": 0.5}, method="topk", schedule_offset=1, schedule_offset_end=50
        )
        block["row_pruning"]["different_groups"]["g"] |= {"modules": ["^0$"], "related_modules": [["^2$"]]}
        self._compare(block)

    def _compare(self, block: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
        engine = engine_of(model, block, 0, torch.optim.AdamW(model.parameters(), **self.SETTINGS))
        (stage,) = engine.compression.techniques.values()
        units = "row_pruning" in block
        first = engine.compression.shards.fragments["0.weight"]
        key = next(iter(stage.structures)) if units else "0.weight"
        start = (stage.score.totals[key] if units else stage.score._score(first)).clone()
        lr, betas, eps, decay = self.SETTINGS.values()
        reference = _AdamWByHand(start, lr, betas, eps, decay)
        gradients: list[torch.Tensor] = []

        def look(optimizer: Any, args: Any, kwargs: Any) -> None:
            gradients.append(model[0].weight.grad.clone())

        # Before ours, which clear masked elements of the gradient.
        engine.optimizer._optimizer_step_pre_hooks = {-1: look, **engine.optimizer._optimizer_step_pre_hooks}
        for at in range(6):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(at))
            hidden = stage.latent.get("0.weight")
            weight = (model[0].weight.detach().flatten() if hidden is None else hidden).clone()
            engine.backward(engine(x).square().mean())
            engine.step()
            product = gradients[-1].flatten() * weight
            if units or at:  # the forward of step 0 is dense: it says nothing about a mask of weights
                reference.step(product.view(16, 8).sum(1) if units else product)
        got = stage.score.totals[key] if units else stage.score.tensors["0.weight"]
        torch.testing.assert_close(got.double(), reference.score, rtol=1e-4, atol=1e-6)


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(16, 8, sparse=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.table(x))
        return out


class TestSparseGradients:
    @pytest.mark.parametrize("method", ["l1", "topk", "movement", "taylor", "snip_momentum"])
    @pytest.mark.parametrize("where", ["head", "table"])
    def test_any_method_gives_what_it_gives_with_dense_ones(self, method: str, where: str) -> None:
        block = block_of("sparse_pruning", {"dense_ratio": 0.5}, method=method, schedule_offset_end=4)
        block["sparse_pruning"]["different_groups"]["g"]["modules"] = [where]
        results = []
        for sparse in (False, True):
            model = _Table()
            model.table.sparse = sparse
            engine = engine_of(model, block, 0, torch.optim.SGD(model.parameters(), lr=0.1))
            for at in range(6):
                x = torch.randint(0, 16, (4, 3), generator=torch.Generator().manual_seed(at))
                engine.backward(engine(x).square().mean())
                engine.step()
            results.append({name: p.detach().clone() for name, p in model.named_parameters()})
            assert (results[-1][f"{where}.weight"] == 0).float().mean() == 0.5
        for name, values in results[0].items():
            torch.testing.assert_close(results[1][name], values, rtol=1e-6, atol=1e-7)

    def test_a_nan_is_still_seen(self) -> None:
        model = _Table()
        engine = engine_of(model, block_of("sparse_pruning", {"dense_ratio": 0.5}, method="l1"), 0)
        before = model.head.weight.detach().clone()
        engine.backward(engine(torch.tensor([[1, 2]])).sum() * float("nan"))
        engine.step()
        assert engine.skipped_steps == 1 and torch.equal(model.head.weight, before)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_detach_twice_is_detach(stage: int) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    rows = block_of("row_pruning", {"dense_ratio": 0.5}, method="l1")
    rows["row_pruning"]["different_groups"]["g"] |= {"modules": ["^0$"], "related_modules": [["^2$"]]}
    block = {**QAT, **rows, **block_of("sparse_pruning", {"dense_ratio": 0.5}, method="l1")}
    block["weight_quantization"]["shared_parameters"]["learned_scale"] = True
    engine = engine_of(model, block, stage)
    session = engine.compression

    def step() -> None:
        engine.backward(engine(torch.ones(4, 8)).square().mean())
        engine.step()

    step()
    session.detach()
    session.detach()
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert not hasattr(engine, "compression") and session.applied_steps == 1
    step()
    session.detach()
    assert engine.global_steps == 2 and session.applied_steps == 1
