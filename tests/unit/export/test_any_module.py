"""Layers and models that transformers does not know: exported where what they compute is known, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export.inputs import run
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of
from tests.zoo.test_strangers import _model as stranger

DYNAMIC, STATIC = {"range_calibration": "dynamic"}, {"range_calibration": "static"}


class Transposing(nn.Linear):
    """Linear, written otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaling(nn.Linear):
    """Not Linear, unless its factor is 1."""

    factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class Gated(nn.Linear):
    """Not Linear: it takes two."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


class TestSubclassesOfLinear:
    def test_the_same_in_other_words(self) -> None:
        assert kind_of(Transposing(4, 6)) is ModuleKind.LINEAR
        assert kind_of(Transposing(4, 6, bias=False)) is ModuleKind.LINEAR

    def test_another_computation(self) -> None:
        assert kind_of(Scaling(4, 6)) is None and kind_of(Gated(4, 6)) is None
        one = Scaling(4, 6)
        one.factor = 1.0
        assert kind_of(one) is ModuleKind.LINEAR

    def test_quantized_forward_and_way_back(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(Transposing(8, 6), nn.ReLU(), Transposing(6, 4))
        plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        plain.load_state_dict(model.state_dict())
        x = torch.randn(5, 8)
        assert torch.equal(quantized(model, 4, DYNAMIC)(x), quantized(plain, 4, DYNAMIC)(x))
        module: Any = model[0]
        module.weight_quantizer = module.input_quantizer = None
        layers.detach(module)
        assert type(module) is Transposing

    def test_falcon(self, tmp_path: Path) -> None:
        model = quantized(stranger("falcon"), 8, DYNAMIC)
        assert "QATFalconLinear" in {type(module).__name__ for module in model.modules()}
        assert export(model, tmp_path / "out").check["max_difference_with_exact_activations"] < 1e-4


class Residual(nn.Module):
    """Two convolutions around a shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).relu()
        x = x + self.norm(self.body(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


IMAGE = {"image": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("format", ["torch", "onnx", "openvino"])
def test_any_module(tmp_path: Path, residual: nn.Module, format: str, bits: int | None) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    if format == "openvino":
        pytest.importorskip("openvino")
    model = residual if bits is None else quantized(residual, bits)
    report = export(model, tmp_path / "out", format, inputs=IMAGE)
    assert report.check["max_difference"] < 1e-4
    # A graph in XML is larger than these few weights.
    assert report.ratio > (0.05 if format == "openvino" else {None: 0.3, 8: 0.4, 4: 0.4}[bits])
    if format == "onnx":
        import onnx

        operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
        assert operators.count("DequantizeLinear") == {None: 0, 8: 2, 4: 3}[bits]


def test_other_batches_run_in_onnx(tmp_path: Path, residual: nn.Module) -> None:
    runtime = pytest.importorskip("onnxruntime")
    export(residual, tmp_path / "out", "onnx", inputs=IMAGE)
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    image = torch.randn(7, 3, 8, 8)
    (found,) = session.run(["logits"], {"image": image.numpy()})
    assert torch.allclose(torch.from_numpy(found), run(residual, {"image": image}), atol=1e-5)


class TestInputs:
    def test_a_module_that_says_nothing(self, tmp_path: Path, residual: nn.Module) -> None:
        with pytest.raises(ExportError, match=r"inputs=\{name: tensor\}.*takes image"):
            export(residual, tmp_path / "out", "torch")

    @pytest.mark.parametrize("name", ["siglip", "wav2vec2"])
    def test_models_that_take_other_things(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ExportError, match=r"inputs=\{name: tensor\}"):
            export(_other(name), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_names_that_it_does_not_take(self, tmp_path: Path, residual: nn.Module) -> None:
        with pytest.raises(ExportError, match="inputs= has pixels, and a Residual takes image"):
            export(residual, tmp_path / "out", "torch", inputs={"pixels": IMAGE["image"]})

    def test_tensors_that_it_does_not_take(self, tmp_path: Path) -> None:
        given = {**inputs_of(ZOO["bert_classifier"]()), "token_type_ids": torch.full((2, 12), 99)}
        with pytest.raises(ExportError, match="does not run on inputs="):
            export(ZOO["bert_classifier"](), tmp_path / "out", inputs=given)


def _other(name: str) -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    if name == "siglip":
        text = {**small, "vocab_size": 61, "max_position_embeddings": 16, "projection_size": 32}
        return hf.SiglipModel(
            hf.SiglipConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8})
        )
    convolutions = {
        "conv_dim": (16,),
        "conv_stride": (5,),
        "conv_kernel": (10,),
        "num_feat_extract_layers": 1,
    }
    groups = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(vocab_size=61, **small, **convolutions, **groups))


def test_an_empty_folder_is_a_fine_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(ZOO["bert"](), tmp_path / "out", check=False)
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ExportError, match="exists"):
        export(ZOO["bert"](), tmp_path / "out", check=False)
