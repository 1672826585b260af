"""What differs from a model built anew and does not matter is exported; logits tell. What matters is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export.inputs import run
from tests.zoo.models import ZOO, inputs_of


def checkpointing() -> Any:
    model: Any = ZOO["llama"]()
    model.gradient_checkpointing_enable()
    return model


def more_tokens(name: str) -> Callable[[], Any]:
    def build() -> Any:
        model: Any = ZOO[name]()
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    return build


def other_dropout() -> Any:
    model: Any = ZOO["bert_classifier"]()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Dropout(0.4) if name == "dropout" else nn.Identity())
    model.bert.embeddings.dropout = nn.Identity()
    return model


def parametrized_convolution() -> Any:
    torch.manual_seed(0)
    config = hf.Wav2Vec2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        num_feat_extract_layers=2,
    )
    return hf.Wav2Vec2ForCTC(config).eval()


def other_labels() -> Any:
    model: Any = ZOO["bert_classifier"]()
    model.classifier = nn.Linear(32, 5)
    model.config.id2label = dict(enumerate("abcde"))
    return model


FINE: dict[str, Callable[[], Any]] = {
    "gradient checkpointing": checkpointing,
    "more tokens": more_tokens("llama"),
    "more tokens for both stacks": more_tokens("t5"),
    "other dropout": other_dropout,
    "a parametrized convolution": parametrized_convolution,
    "another head": other_labels,
}


@pytest.mark.parametrize("name", FINE)
def test_what_stock_loads_is_exported(tmp_path: Path, name: str) -> None:
    model = FINE[name]()
    is_speech = "convolution" in name
    inputs = {"input_values": torch.randn(2, 400)} if is_speech else inputs_of(model)
    report = export(model, tmp_path / "out", inputs=inputs)
    assert report.check["max_difference"] < 1e-5
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.allclose(run(loaded, inputs), run(model, inputs), atol=1e-5)


def test_what_is_open_is_said_in_the_report(tmp_path: Path) -> None:
    report = export(more_tokens("llama")(), tmp_path / "out")
    assert any("vocab_size is 61, and 70" in note and "logits are the same" in note for note in report.notes)


def scaled_attention() -> Any:
    model: Any = ZOO["llama"]()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    return model


def other_activation() -> Any:
    model: Any = ZOO["bert_classifier"]()
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    return model


@pytest.mark.parametrize(
    ("build", "words"), [(scaled_attention, "scaling is"), (other_activation, "is a ReLU")]
)
def test_what_matters_is_refused(tmp_path: Path, build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ExportError, match=f"another model.*{words}.*logits differ"):
        export(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_a_check_nothing_is_open(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"another model.*vocab_size"):
        export(more_tokens("llama")(), tmp_path / "out", check=False)
    export(checkpointing(), tmp_path / "out", check=False)
