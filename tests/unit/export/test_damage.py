"""What an export has got wrong is noticed in every format and dtype; damage is planted between writing and loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export import check
from ds_compress.manifest import Manifest
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

DYNAMIC, STATIC = {"range_calibration": "dynamic"}, {"range_calibration": "static"}
Damage = Callable[[dict[str, torch.Tensor]], None]


def scaled(words: str, factor: float) -> Damage:
    """The first float tensor with all of these words in its name."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        floats = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
        name = next(name for name in floats if all(word in name for word in words.split()))
        before = tensors[name].float()
        # The biases of a fresh model are zero.
        tensors[name] = (before * factor if before.any() else before + 0.01).to(tensors[name].dtype)

    return damage


def one_row(word: str, row: int) -> Damage:
    """A row of a table that no input of the check looks up."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n, t in tensors.items() if word in n and t.is_floating_point() and len(t) > 1)
        tensors[name][row] *= 1.5

    return damage


DAMAGE: dict[str, Damage] = {
    "feed-forward output": scaled("layer.2.output.dense.weight", 0.0),
    "classifier": scaled("classifier.weight", 0.0),
    "classifier's bias": scaled("classifier.bias", 0.9),
    "a bias": scaled("layer.1.intermediate.dense.bias", 0.5),
    "a normalization": scaled("layer.0.output.LayerNorm.weight", 1.02),
    "a row of the words": one_row("word_embeddings", 1),
}
INPUTS = {"an input's scale": scaled("layer.1 query.input_scale", 1.2)}


def fresh_bert() -> nn.Module:
    """As a user's own: small weights, and logits that are smaller still."""
    import transformers

    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(ZOO["bert_classifier"]().config).eval()  # type: ignore[arg-type]


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], Any]] = {
    "hf fp32": ("hf", torch.float32, {}, None),
    "hf fresh bf16": ("hf", torch.bfloat16, {}, None),
    "hf bf16": ("hf", torch.bfloat16, {}, None),
    "hf fp16": ("hf", torch.float16, {}, None),
    "hf stored in bf16": ("hf", torch.float32, {"dtype": torch.bfloat16}, None),
    "hf quantized bf16": ("hf", torch.bfloat16, {}, (8, None)),
    "compressed-tensors bf16": ("compressed-tensors", torch.bfloat16, {}, (8, DYNAMIC)),
    "compressed-tensors 4 bits": ("compressed-tensors", torch.float16, {}, (4, None)),
    "compressed-tensors static": ("compressed-tensors", torch.float32, {"dtype": torch.float16}, (8, STATIC)),
    "fp8 bf16": ("compressed-tensors", torch.bfloat16, {"scheme": "fp8"}, None),
    "torch fresh bf16": ("torch", torch.bfloat16, {"embeddings": "float"}, (8, DYNAMIC)),
    "torch bf16": ("torch", torch.bfloat16, {"embeddings": "float"}, (8, DYNAMIC)),
    "torch rounded tables": ("torch", torch.bfloat16, {}, (3, None)),
    "torch static": ("torch", torch.float32, {}, (8, STATIC)),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    format, dtype, options, quantizing = CASES[case]
    model = (fresh_bert() if "fresh" in case else ZOO["bert_classifier"]()).to(dtype)
    if quantizing is not None:
        bits, inputs = quantizing
        quantized(model, bits, inputs, ("layer",), run=inputs_of(model) if inputs is STATIC else None)
    damages = {**DAMAGE, **(INPUTS if quantizing and quantizing[1] is STATIC and format != "torch" else {})}
    seen: dict[str, Any] = {}
    reload, verdict = check.reload, check.verdict

    def damaged(requests: Any) -> Any:
        folders = [requests[0].folder]
        for number, damage in enumerate(damages.values()):
            folders.append(_damaged(requests[0].folder, tmp_path / f"damage{number}", damage))
        asked = [
            check.Request(f, requests[0].model_class, requests[0].inputs, requests[0].loader) for f in folders
        ]
        answers = reload(asked)
        seen["answers"] = answers[1:]
        return answers[:1]

    def judged(expected: Any, answer: Any) -> Any:
        seen["expected"] = expected
        return verdict(expected, answer)

    monkeypatch.setattr(check, "reload", damaged)
    monkeypatch.setattr(check, "verdict", judged)
    report = export(model, tmp_path / "out", format, **options)
    assert report.check["tensors_compared"] > 60
    for name, answer in zip(damages, seen["answers"], strict=True):
        assert not answer.error, answer.error
        with pytest.raises(ExportError):
            pytest.fail(f"{name} was not noticed: {verdict(seen['expected'], answer)}")


@pytest.mark.parametrize("build", [ZOO["bert_classifier"], fresh_bert], ids=["random", "fresh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_not_used_shows_in_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, build: Any
) -> None:
    """Without the comparison of tensors: what the loaded model computes is enough."""
    model = build().to(dtype)
    monkeypatch.setattr(check, "same", lambda one, other: True)
    original = check.reload

    def damaged(requests: Any) -> Any:
        folder = _damaged(requests[0].folder, tmp_path / "damage", DAMAGE["feed-forward output"])
        return original(
            [check.Request(folder, requests[0].model_class, requests[0].inputs, requests[0].loader)]
        )

    monkeypatch.setattr(check, "reload", damaged)
    with pytest.raises(ExportError, match="logits differ"):
        export(model, tmp_path / "out")


def test_an_input_scale_in_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    model = ZOO["bert_classifier"]()
    quantized(model, 8, STATIC, ("layer",), run=inputs_of(model))
    damaged_names = [
        "layer.1.attention.self.query.input_scale",
        "layer.2.output.dense.weight_scale",
        "classifier.bias",
    ]
    verdict, original, seen = check.verdict, check.reload, {}

    def damaged(requests: Any) -> Any:
        folders = [requests[0].folder]
        for number, name in enumerate(damaged_names):
            folders.append(tmp_path / f"damage{number}")
            shutil.copytree(requests[0].folder, folders[-1])
            graph = onnx.load(folders[-1] / "model.onnx")
            tensor = next(i for i in graph.graph.initializer if i.name.endswith(name))
            value = onnx.numpy_helper.to_array(tensor) * 1.2
            tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype("float32"), tensor.name))
            onnx.save(graph, folders[-1] / "model.onnx")
        answers = original([check.Request(f, "", requests[0].inputs, "onnx") for f in folders])
        seen["answers"] = answers[1:]
        return answers[:1]

    def judged(expected: Any, answer: Any) -> Any:
        seen["expected"] = expected
        return verdict(expected, answer)

    monkeypatch.setattr(check, "reload", damaged)
    monkeypatch.setattr(check, "verdict", judged)
    export(model, tmp_path / "out", "onnx")
    for name, answer in zip(damaged_names, seen["answers"], strict=True):
        assert not answer.error, answer.error
        with pytest.raises(ExportError):
            pytest.fail(f"{name} was not noticed: {verdict(seen['expected'], answer)}")


def _damaged(folder: Path, copy: Path, damage: Damage) -> Path:
    """With a manifest to match: what is compared are values, not files."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    damage(tensors)
    assert any(not torch.equal(before[name].float(), tensors[name].float()) for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    Manifest.of(copy, {}).write(copy)
    return copy
