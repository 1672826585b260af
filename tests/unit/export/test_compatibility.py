"""`export_to`: what model, blocks and format decide by themselves is refused at start; what is not refused exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import transformers as hf
from torch import nn

import ds_compress
from ds_compress import ConfigError
from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export import compatibility
from tests.quantized import quantized
from tests.single import init_single_process
from tests.zoo.models import ZOO, inputs_of
from tests.zoo.test_strangers import _model as stranger

BITS4 = {"start_bits": 4, "target_bits": 4}


def weights(modules: list[str], params: dict[str, int] = BITS4, **shared: Any) -> dict[str, Any]:
    shared = {"enabled": True, "granularity": "per_channel", "quantize_weight_in_forward": True, **shared}
    groups = {"g": {"params": params, "modules": modules}}
    return {"weight_quantization": {"shared_parameters": shared, "different_groups": groups}}


def floats(format: str, modules: list[str], **params: Any) -> dict[str, Any]:
    groups = {"g": {"params": {"format": format, **params}, "modules": modules}}
    return {"weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": groups}}


def half(block: str, **shared: Any) -> dict[str, Any]:
    return {block: {"shared_parameters": {"enabled": True, "dense_ratio": 0.5, "method": "l1", **shared}}}


def gpt_neox() -> nn.Module:
    arguments = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=61, hidden_size=32, **arguments))


def mpt() -> nn.Module:
    return hf.MptForCausalLM(hf.MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=2, max_seq_len=64))


def small_convolutions() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return model


REFUSED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "heads of BERT": (ZOO["bert_classifier"], half("head_pruning"), "hf", "another model"),
    "heads of GPT-NeoX": (gpt_neox, half("head_pruning"), "hf", "another model"),
    "rows of MPT": (mpt, half("row_pruning"), "hf", "another model"),
    "rows of Bloom": (lambda: stranger("bloom"), half("row_pruning"), "hf", "another model"),
    "rows of DINOv2": (lambda: stranger("dinov2"), half("row_pruning", round_to=3), "hf", "another model"),
    "rows of other numbers": (ZOO["llama"], half("row_pruning", scope="global"), "hf", "another model"),
    "Conv1D": (ZOO["gpt2"], weights(["mlp"]), "compressed-tensors", "transformer.h.0.mlp.c_fc is a Conv1D"),
    "Conv2d": (ZOO["vit"], weights(["*"]), "compressed-tensors", "is a Conv2d"),
    "asymmetric": (
        ZOO["bert_classifier"],
        weights(["layer"], quantization_type="asymmetric"),
        "compressed-tensors",
        "asymmetric",
    ),
    "columns": (
        ZOO["llama"],
        weights(["mlp"], granularity="per_column_group", group_size=32),
        "torch",
        "its 48 columns are no multiple of group_size 32",
    ),
    "groups across rows": (
        ZOO["bert_classifier"],
        weights(["^classifier"], granularity="per_group", quantize_groups=2),
        "compressed-tensors",
        "cuts across its rows",
    ),
    "columns that share a scale": (
        ZOO["bert_classifier"],
        {**weights(["layer"], granularity="per_column_group", group_size=16), **half("row_pruning")},
        "torch",
        "columns that share a scale are removed",
    ),
    "no transformers": (small_convolutions, weights(["*"]), "hf", "no model of transformers"),
    "a decoder in ONNX": (ZOO["llama"], weights(["mlp"]), "onnx", "generates"),
    "a decoder in OpenVINO": (ZOO["llama"], weights(["mlp"]), "openvino", "generates"),
    "nf4": (
        ZOO["bert_classifier"],
        floats("nf4", [r"layer\.\d\.output"]),
        "compressed-tensors",
        "nf4, which stock tools",
    ),
    "E3M2": (
        ZOO["llama"],
        floats("mxfp6_e3m2", ["self_attn"]),
        "compressed-tensors",
        "mxfp6_e3m2, which stock",
    ),
    "E5M2 inputs": (
        ZOO["llama"],
        {
            "activation_quantization": {
                "shared_parameters": {"enabled": True},
                "different_groups": {"g": {"params": {"format": "fp8_e5m2"}, "modules": ["mlp"]}},
            }
        },
        "compressed-tensors",
        "fp8_e5m2, which it cannot say",
    ),
    "squares": (
        ZOO["llama"],
        floats("fp8_e4m3", ["mlp"], granularity="per_block"),
        "compressed-tensors",
        "32 columns are no multiple of 128",
    ),
    "squares that are cut": (
        ZOO["bert_classifier"],
        {**floats("fp8_e4m3", ["layer"], granularity="per_block"), **half("row_pruning")},
        "torch",
        "blocks that share a scale are cut",
    ),
    "packed floats of T5": (
        ZOO["t5"],
        floats("mxfp4", ["SelfAttention.q"]),
        "compressed-tensors",
        "does not load packed weights",
    ),
    "floats in ONNX": (
        ZOO["bert_classifier"],
        floats("mxfp4", ["intermediate"]),
        "onnx",
        "stores integers only",
    ),
    "floats in OpenVINO": (
        ZOO["bert_classifier"],
        floats("mxfp4", ["intermediate"]),
        "openvino",
        "stores integers only",
    ),
    "nothing quantized": (ZOO["llama"], half("row_pruning"), "compressed-tensors", "nothing is quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_plan(case: str) -> None:
    build, block, format, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        ds_compress.plan(build(), {**block, "export_to": format})
    problem = caught.value.problems[0]
    assert (
        problem.path == "compression_training.export_to"
        and words in problem.got
        and f'"{format}"' in problem.got
    )


def engine_of(model: nn.Module, block: dict[str, Any]) -> Any:
    init_single_process()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "compression_training": block,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def test_refused_by_initialize() -> None:
    with pytest.raises(ConfigError, match="export_to"):
        engine_of(ZOO["bert_classifier"](), {**half("head_pruning"), "export_to": "hf"})


def test_the_plan_says_what_can_be_written() -> None:
    text = str(ds_compress.plan(ZOO["bert_classifier"](), half("head_pruning")))
    assert (
        'exports as "torch", "onnx" or "openvino"' in text
        and "not as hf: stock transformers would load another model" in text
    )


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2", "vit", "t5", "resnet"])
@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "torch", "onnx", "openvino"])
def test_what_it_says_is_what_an_export_does(tmp_path: Path, name: str, format: str) -> None:
    if format == "openvino":
        pytest.importorskip("openvino")
    model = ZOO[name]()
    reasons = compatibility.misfits(ds_compress.plan(model, weights(["*"])), model, format)
    model = quantized(model, 4)
    if reasons:
        with pytest.raises(ExportError):
            export(model, tmp_path / "out", format, check=False)
    else:
        export(model, tmp_path / "out", format, check=False)


@pytest.mark.parametrize(("name", "bits"), [("t5", 8), ("t5", 4), ("t5_gated", 3), ("modernbert", 4)])
def test_classes_whose_initialisation_reads_weights(tmp_path: Path, name: str, bits: int) -> None:
    model = quantized(ZOO[name](), bits)
    report = export(model, tmp_path / "out", "compressed-tensors", inputs=inputs_of(model))
    assert report.check["max_difference"] < 1e-5 and report.ratio > 2
    assert any("take a byte each" in note for note in report.notes) == (bits < 8)


def test_an_export_uses_it(tmp_path: Path) -> None:
    engine = engine_of(ZOO["bert_classifier"](), {**weights(["layer"]), "export_to": "torch"})
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    assert export(engine, tmp_path / "out", check=False).format == "torch"
    assert export(tmp_path / "checkpoint", tmp_path / "from_checkpoint", check=False).format == "torch"
    assert export(engine, tmp_path / "hf", "hf", check=False).format == "hf"
    engine.destroy()
