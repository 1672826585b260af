"""What every structured block shares, in one process: what finalize leaves, and how units are scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.select.unit_scores import UNIT_SCORES, MeanActivation
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, structured_block, train
from tests.multirank.structured import logits_of

pytestmark = pytest.mark.usefixtures("single_process")


class TestFinalize:
    @pytest.mark.parametrize("stage", [0, 2, 3])
    def test_nothing_of_deepspeed_is_left(self, stage: int) -> None:
        with engine_of(tiny_bert(), ds_config(stage, {"row_pruning": structured_block()})) as engine:
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
            model, ds_config(2, {"row_pruning": structured_block()}, dtype="bf16"), model_parameters=trainable
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
        block = {"row_pruning": structured_block(), "head_pruning": structured_block(method="l1")}
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
    block = {"row_pruning": structured_block(schedule_offset_end=5, schedule="linear")}
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        train(engine, batches(1))
        stage = engine.compression.techniques["row_pruning"]
        before = {name: units.clone() for name, units in stage.kept.items()}
        with torch.no_grad():
            engine.module.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = torch.nan
        stage.select_units(3)
        assert all(torch.equal(stage.kept[name], units) for name, units in before.items())
    assert "NaN or Inf" in caplog.text
