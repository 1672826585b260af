"""What the default `modules` leaves out of a model is said at start, with its share."""

from __future__ import annotations

import pytest
import torch

import ds_compress
from ds_compress.config.report.coverage import left_out
from tests.models import tiny_bert
from tests.multirank.common import ds_config, engine_of, full_weights, pruning_block

pytestmark = pytest.mark.usefixtures("single_process")

EVERYTHING = {"sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5}}}


def mixtral() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=256,
            num_local_experts=8,
        )
    )


class Slots(torch.nn.Module):
    """Most of its model, in a layout that nothing here understands."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = torch.nn.Parameter(torch.randn(7, 64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bth,sih->bti", x, self.slots) @ self.slots[0]


def with_slots() -> torch.nn.Module:
    model = mixtral()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp = Slots()
    return model


def test_a_layout_of_its_own_is_a_warning_with_its_share(caplog: pytest.LogCaptureFixture) -> None:
    model = with_slots()
    total = sum(p.numel() for p in model.parameters())
    slots = sum(p.numel() for name, p in model.named_parameters() if "slots" in name)
    with engine_of(model, ds_config(2, EVERYTHING)):
        pass
    (warning,) = [
        r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "left out" in r.getMessage()
    ]
    assert f"{100 * slots / total:.3g} % in Slots" in warning
    assert "model.layers.0.mlp.slots" in warning


def test_experts_are_reached_and_routers_no_surprise() -> None:
    model = mixtral()
    (missing,) = left_out(ds_compress.plan(model, EVERYTHING))
    assert missing.is_expected and list(missing.by_owner) == ["Embedding"]
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    assert missing.reached > experts > 0.9 * missing.total


def test_embeddings_are_an_information(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ds_compress"), engine_of(tiny_bert(), ds_config(1, EVERYTHING)):
        pass
    (record,) = [r for r in caplog.records if "left out" in r.getMessage()]
    assert record.levelname == "INFO"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_sparsity_of_the_model_is_a_metric(stage: int) -> None:
    model = mixtral()
    total = sum(p.numel() for p in model.parameters())
    ids = torch.randint(3, 61, (4, 12))
    with engine_of(model, ds_config(stage, EVERYTHING)) as engine:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        metrics = engine.compression.metrics()
        zeros = sum(int((weight == 0).sum()) for weight in full_weights(model).values())
    assert metrics["sparse_pruning/sparsity"] == 0.5
    assert metrics["sparse_pruning/model_sparsity"] == pytest.approx(zeros / total, rel=1e-3)


def test_shares_add_up() -> None:
    model = with_slots()
    (missing,) = left_out(ds_compress.plan(model, EVERYTHING))
    one_dimensional = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    elsewhere = sum(elements for elements, _ in missing.by_owner.values())
    assert (
        missing.reached + elsewhere + one_dimensional
        == missing.total
        == sum(p.numel() for p in model.parameters())
    )
    assert "Slots" in missing.by_owner


def test_who_names_modules_has_chosen() -> None:
    assert list(left_out(ds_compress.plan(mixtral(), pruning_block() | {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "dense_ratio": 0.5},
            "different_groups": {"a": {"params": {}, "modules": ["q_proj"]}},
        }
    }))) == []  # fmt: skip


def test_what_is_excluded_is_not_missed() -> None:
    block = {"sparse_pruning": {"shared_parameters": {
        "enabled": True, "dense_ratio": 0.5, "excluded_modules": ["experts", "mlp.gate", "embed"]}}}  # fmt: skip
    assert list(left_out(ds_compress.plan(mixtral(), block))) == []


def test_plan_shows_it_too() -> None:
    model = with_slots()
    text = str(ds_compress.plan(model, EVERYTHING))
    share = 100 * 2 * 7 * 64 * 32 / sum(p.numel() for p in model.parameters())
    assert f"{share:.3g} % in Slots" in " ".join(text.split())
