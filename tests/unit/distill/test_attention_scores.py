"""Attention scores that models pass on: what they are, and that the model stays the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.distill.activation_capture import ActivationCapture, CapturedActivations
from ds_compress.distill.attention_scores import expose_scores, hide_scores
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import ds_config
from tests.single import init_single_process

SMALL = {"vocab_size": 61, "max_position_embeddings": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(heads: int = 4) -> nn.Module:
    return tiny_bert(hidden=16, heads=heads, head="Model", intermediate_size=24, vocab_size=61)


def llama() -> nn.Module:
    return tiny_llama(hidden=16, intermediate=24, tied=False, head="Model", vocab_size=61)


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    # A cap that bends these small scores, and a window that is narrower than the text.
    return Gemma2Model(
        Gemma2Config(
            **SMALL,
            hidden_size=16,
            intermediate_size=24,
            num_key_value_heads=2,
            head_dim=4,
            attn_logit_softcapping=0.02,
            query_pre_attn_scalar=1,
            sliding_window=4,
            initializer_range=0.5,
        )
    )


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def layers_of(model: Any) -> Any:
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def recorded(model: nn.Module) -> CapturedActivations:
    layers = layers_of(model)
    recorder = ActivationCapture(list(layers), range(len(layers)), {"maps"})
    recorder.start()
    model(**tokens())
    record = recorder.finish()
    recorder.remove()
    return record


@pytest.mark.parametrize("make", [bert, llama])
def test_scores_are_those_behind_the_models_own_probabilities(make: Any) -> None:
    """Eager attention shows its probabilities: the softmax of our scores, masked."""
    model = make()
    model.set_attn_implementation("eager")
    probabilities = model(**tokens(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    expose_scores(model)
    record = recorded(model)
    assert len(record.maps) == len(probabilities) == 2
    allowed = tokens()["attention_mask"].bool()[:, None, None, :].expand(2, 1, 7, 7)
    for scores, expected in zip(record.maps, probabilities, strict=True):
        assert scores.is_causal == (make is llama)
        visible = allowed & torch.ones(7, 7, dtype=torch.bool).tril() if scores.is_causal else allowed
        got = scores.scores().masked_fill(~visible, -math.inf).softmax(-1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# SDPA has no soft caps, so Gemma 2 has only one kernel here.
@pytest.mark.parametrize(
    ("make", "kernel"),
    [(bert, "eager"), (bert, "sdpa"), (llama, "eager"), (llama, "sdpa"), (gemma2, "eager")],
)
def test_a_model_whose_scores_are_shown_says_what_it_said(make: Any, kernel: str) -> None:
    model = make()
    model.set_attn_implementation(kernel)
    expected = model(**tokens()).last_hidden_state
    expose_scores(model)
    expose_scores(model)
    real = tokens()["attention_mask"].bool()
    torch.testing.assert_close(model(**tokens()).last_hidden_state[real], expected[real])


def test_the_config_of_a_model_never_mentions_us(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)  # it puts the name of the class and the dtype into the config
    before = model.config.to_dict()
    kernel = model.config._attn_implementation
    expose_scores(model)
    model.save_pretrained(tmp_path)
    assert "ds_compress" not in (tmp_path / "config.json").read_text()
    hide_scores(model)
    assert model.config.to_dict() == before and model.config._attn_implementation == kernel
    model.save_pretrained(tmp_path)
    assert "ds_compress" not in (tmp_path / "config.json").read_text()


def test_detaching_gives_student_and_teacher_their_kernels_back() -> None:
    init_single_process()
    student, teacher = bert(), bert()
    block = {"distillation": {"enabled": True, "losses": {"attention": {"kind": "maps"}}}}
    engine, *_ = ds_compress.initialize(
        model=student, model_parameters=student.parameters(), config=ds_config(0, block), teacher=teacher
    )
    assert "ds_compress" in student.config._attn_implementation
    engine.compression.detach()
    for model in (student, teacher):
        assert model.config._attn_implementation == "sdpa"
    engine.destroy()


def test_unequal_heads_are_refused_with_what_to_do() -> None:
    init_single_process()
    student = bert()
    block = {"distillation": {"enabled": True, "losses": {"attention": {"kind": "maps"}}}}
    with pytest.raises(ds_compress.ConfigError, match='use "kind": "relation"') as caught:
        ds_compress.initialize(
            model=student,
            model_parameters=student.parameters(),
            config=ds_config(0, block),
            teacher=bert(heads=2),
        )
    (problem,) = caught.value.problems
    assert problem.path == "compression_training.distillation.losses.attention.kind"


def test_a_model_without_exchangeable_kernels_is_refused() -> None:
    with pytest.raises(ds_compress.ConfigError, match='"maps" with a Linear'):
        expose_scores(nn.Linear(2, 2))
