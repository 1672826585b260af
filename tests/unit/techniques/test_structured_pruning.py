"""Structured pruning in one process: what finalize leaves, how layers are bypassed, what a shrink keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.engine.build import teacher_given
from ds_compress.select.unit_scores import UNIT_SCORES, MeanActivation
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train
from tests.multirank.structured import logits_of
from tests.single import init_single_process


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    init_single_process()


def shared(**keys: Any) -> dict[str, Any]:
    return {"shared_parameters": {"enabled": True, "schedule_offset": 1, "dense_ratio": 0.5, **keys}}


class TestFinalize:
    @pytest.mark.parametrize("stage", [0, 2, 3])
    def test_nothing_of_deepspeed_is_left(self, stage: int) -> None:
        with engine_of(tiny_bert(), ds_config(stage, {"row_pruning": shared()})) as engine:
            train(engine, batches(3))
            model = ds_compress.finalize(engine)
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        assert not any(hasattr(p, "ds_id") for p in model.parameters())
        assert all(type(m._parameters) is dict for m in model.modules())

    def test_flags_ties_and_dtypes_stay(self) -> None:
        model = tiny_bert(head="ForMaskedLM")
        frozen = model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        with engine_of(
            model, ds_config(2, {"row_pruning": shared()}, dtype="bf16"), model_parameters=trainable
        ) as engine:
            for batch in batches(3):
                engine.backward(engine(batch["input_ids"], labels=batch["input_ids"]).loss)
                engine.step()
            final: Any = ds_compress.finalize(engine)
        assert final.cls.predictions.decoder.weight is final.bert.embeddings.word_embeddings.weight
        assert final.bert.encoder.layer[0].intermediate.dense.out_features == 48
        assert {p.dtype for p in final.parameters()} == {torch.bfloat16}
        assert not final.bert.embeddings.position_embeddings.weight.requires_grad
        assert frozen.shape == final.bert.embeddings.position_embeddings.weight.shape

    def test_a_masked_model_from_elsewhere(self) -> None:
        block = {"row_pruning": shared(), "head_pruning": shared(method="l1")}
        with engine_of(tiny_bert(), ds_config(0, block)) as engine:
            train(engine, batches(4))
            engine.eval()
            masked = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
            expected = logits_of(engine)
        model = tiny_bert(seed=5).eval()
        model.load_state_dict(masked)
        final = ds_compress.redundancy_clean(model, {"compression_training": block})
        torch.testing.assert_close(logits_of(final), expected, rtol=1e-5, atol=1e-5)
        assert sum(p.numel() for p in final.parameters()) < sum(t.numel() for t in masked.values())

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="config"):
            ds_compress.finalize(tiny_bert())
        with (
            engine_of(tiny_bert(), ds_config(0)) as engine,
            pytest.raises(ValueError, match="no compression_training"),
        ):
            ds_compress.finalize(engine)


class TestDepth:
    def test_a_dropped_layer_hands_its_input_on(self) -> None:
        with engine_of(tiny_bert(layers=4), ds_config(0, {"depth_pruning": shared()})) as engine:
            train(engine, batches(2))
            stage = engine.compression.techniques["depth_pruning"]
            (kept,) = stage.kept.values()
            gone = sorted(set(range(4)) - set(kept.tolist()))
            hidden = torch.randn(1, 3, 32)
            output = engine.module.bert.encoder.layer[gone[0]](hidden)
            assert torch.equal(output[0] if isinstance(output, tuple) else output, hidden)

    def test_a_dropped_layer_gets_gradients_of_zero(self) -> None:
        """None at all, and ZeRO-3 would go on with the last ones."""
        with engine_of(tiny_bert(layers=4), ds_config(3, {"depth_pruning": shared()})) as engine:
            train(engine, batches(2))
            (kept,) = engine.compression.techniques["depth_pruning"].kept.values()
            seen: dict[int, bool] = {}

            def look(*_: Any) -> None:
                for index in range(4):
                    name = f"bert.encoder.layer.{index}.output.dense.weight"
                    seen[index] = bool(engine.compression.shards.fragments[name].gradient.any())

            engine.basic_optimizer.register_step_pre_hook(look)
            train(engine, batches(1))
        assert [index for index, has_gradient in seen.items() if has_gradient] == kept.tolist()

    def test_influence_prefers_the_layer_that_changes_most(self) -> None:
        model = tiny_bert(layers=4)
        with torch.no_grad():
            for index in (1, 3):  # weights of a fresh BERT are so small that its layers change nearly nothing
                layer = model.bert.encoder.layer[index]
                for dense in (layer.intermediate.dense, layer.output.dense):
                    dense.weight.mul_(50)
        with engine_of(model, ds_config(0, {"depth_pruning": shared()})) as engine:
            train(engine, batches(2))
            (kept,) = engine.compression.techniques["depth_pruning"].kept.values()
        assert kept.tolist() == [1, 3]

    def test_each_layer_goes_on_imitating_its_own(self) -> None:
        block = {
            "depth_pruning": shared(shrink_at_end_of_schedule=True),
            "distillation": {"enabled": True, "teacher_zero_stage": 0, "losses": {"hidden": {"weight": 1.0}}},
        }
        with teacher_given(tiny_bert(seed=1, layers=4)), engine_of(
            tiny_bert(layers=4), ds_config(2, block)
        ) as engine:  # fmt: skip
            engine.train()
            train(engine, batches(4))
            (kept,) = engine.compression.shrunk_units.values()
            distillation = engine.compression.techniques["distillation"]
            assert distillation._mapped == tuple(kept.tolist())
            assert distillation.metrics()["hidden"] > 0
            assert len(engine.module.bert.encoder.layer) == 2


class TestScores:
    STRUCTURE = PrunableGroup("s", GroupKind.ROW, ("s",), 4, ())

    def test_a_state_comes_back(self) -> None:
        for name, cls in UNIT_SCORES.items():
            first = cls([self.STRUCTURE], seed=3)
            first.accumulate("s", torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), {"lr": 0.1})
            first.reduce(lambda x: x, lambda x: x)
            second = cls([self.STRUCTURE], seed=3)
            second.load_state_dict(first.state_dict())
            for score in (first, second):
                score.accumulate("s", torch.ones(4, dtype=torch.float64), {"lr": 0.1})
                score.reduce(lambda x: x, lambda x: x)
            weights = torch.ones(4, dtype=torch.float64)
            assert torch.equal(first.scores_of("s", weights), second.scores_of("s", weights)), name

    def test_the_learned_score_goes_against_its_gradient(self) -> None:
        score = UNIT_SCORES["topk"]([self.STRUCTURE], seed=0)
        before = score.scores_of("s", torch.zeros(4)).clone()
        score.accumulate("s", torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64), {"lr": 0.1})
        score.reduce(lambda x: x, lambda x: x)
        change = score.scores_of("s", torch.zeros(4)) - before
        assert change[0] < 0 < change[1]

    def test_activations_count_every_sample_alike(self) -> None:
        score = MeanActivation([self.STRUCTURE], seed=0)
        score.observe("s", torch.tensor([4.0, 0.0, 0.0, 2.0]), 4)
        score.observe("s", torch.tensor([0.0, 2.0, 0.0, 0.0]), 1)
        score.reduce(lambda x: x, lambda x: 2 * x)
        assert score.scores_of("s", torch.zeros(4)).tolist() == [2.0, 4.0, 0.0, 1.0]


def test_nan_weights_keep_the_masks_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    block = {"row_pruning": shared(schedule_offset_end=5, schedule="linear")}
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        train(engine, batches(1))
        stage = engine.compression.techniques["row_pruning"]
        before = {name: units.clone() for name, units in stage.kept.items()}
        with torch.no_grad():
            engine.module.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = torch.nan
        stage.select_units(3)
        assert all(torch.equal(stage.kept[name], units) for name, units in before.items())
    assert "NaN or Inf" in caplog.text


def test_a_convolution_loses_channels() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.first(x)))
            return self.head(self.second(x).relu().mean((2, 3)))

    group = {"modules": ["first"], "related_modules": [["norm", "second"]]}
    block = {
        "channel_pruning": {
            "shared_parameters": {"enabled": True, "schedule_offset": 1},
            "different_groups": {"g": {"params": {"dense_ratio": 0.5}, **group}},
        }
    }
    with engine_of(Net(), ds_config(0, block)) as engine:
        for _ in range(3):
            engine.backward(engine(torch.randn(4, 3, 8, 8)).square().mean())
            engine.step()
        engine.eval()
        images = torch.randn(2, 3, 8, 8)
        masked = engine(images).detach()
        final: Any = ds_compress.finalize(engine)
    assert (final.first.out_channels, final.norm.num_features, final.second.in_channels) == (8, 8, 8)
    torch.testing.assert_close(final(images), masked, rtol=1e-5, atol=1e-6)
