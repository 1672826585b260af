"""A Linear and its activation in one module, as BERT code in the wild has them: supported wherever a Linear is."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ds_compress
from ds_compress.compat import init_compression
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.modelinfo.linear_activation import computes_linear_activation
from ds_compress.quant import layers
from tests.multirank.common import ds_config, engine_of, full_weights

pytestmark = pytest.mark.usefixtures("single_process")


class LinearActivation(nn.Module):
    """weight, bias and `act` in one; with gelu, the bias is added inside the activation."""

    def __init__(self, inputs: int, outputs: int, act: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.act = inputs, outputs, act
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 10) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.act == "gelu" and self.bias is not None:
            return F.gelu(F.linear(input, self.weight, None) + self.bias)
        return {
            "gelu": F.gelu,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "softmax": lambda y: y.softmax(-1),
        }[self.act](F.linear(input, self.weight, self.bias))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.intermediate = nn.Linear(16, 16), LinearActivation(16, 48)
        self.output, self.pooler = nn.Linear(48, 16), LinearActivation(16, 16, "tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pooler(self.output(self.intermediate(self.query(x))))


def block_model(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def quantized(**shared: Any) -> dict[str, Any]:
    bits = {"g": {"params": {"start_bits": 4, "target_bits": 4}, "modules": ["intermediate", "pooler"]}}
    return {
        "weight_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantize_weight_in_forward": True,
                "granularity": "per_channel",
                **shared,
            },
            "different_groups": bits,
        },
        "activation_quantization": {
            "shared_parameters": {"enabled": True},
            "different_groups": {"g": {"params": {"bits": 8}, "modules": ["intermediate", "pooler"]}},
        },
    }


class TestRecognition:
    @pytest.mark.parametrize("act", ["gelu", "tanh"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_known_by_what_it_computes(self, act: str, bias: bool) -> None:
        assert kind_of(LinearActivation(7, 9, act, bias)) is ModuleKind.LINEAR_ACTIVATION

    def test_a_masked_output_must_be_zero(self) -> None:
        assert kind_of(LinearActivation(7, 9, "sigmoid")) is None

    def test_outputs_must_not_depend_on_each_other(self) -> None:
        assert kind_of(LinearActivation(7, 9, "softmax")) is None

    def test_a_weight_that_is_used_twice_is_none(self) -> None:
        class Twice(LinearActivation):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return F.linear(input, self.weight) * self.weight.norm()

        class Normed(LinearActivation):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return F.linear(F.layer_norm(input, input.shape[-1:]), self.weight)

        assert kind_of(Twice(5, 5)) is None and kind_of(Normed(5, 5)) is None

    def test_other_modules_with_a_matrix_are_none(self) -> None:
        for module in (nn.Bilinear(3, 3, 3), nn.LSTM(3, 3), nn.LayerNorm((3, 3)), nn.EmbeddingBag(3, 3)):
            assert not computes_linear_activation(module)
        assert not computes_linear_activation(nn.LayerNorm(5))


@pytest.mark.parametrize("act", ["gelu", "tanh"])
def test_quantized_forward_and_way_back(act: str) -> None:
    """As the same layer written with a Linear of its own, bit for bit, under the same quantizers."""
    torch.manual_seed(0)
    fused = LinearActivation(16, 8, act)
    plain = nn.Linear(16, 8)
    plain.load_state_dict(fused.state_dict())
    model = nn.ModuleDict({"fused": fused, "plain": plain})
    block = quantized()
    for key in block:
        block[key]["different_groups"]["g"]["modules"] = ["fused", "plain"]
    init_compression(model, block)
    assert isinstance(fused, layers.QATModule)
    x = torch.randn(4, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours = fused(input=inputs[0])
    activation = F.gelu if act == "gelu" else torch.tanh
    theirs = activation(plain(inputs[1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours, activation(F.linear(x, plain.weight, plain.bias)), atol=1e-4)
    ours.pow(2).sum().backward()
    theirs.pow(2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)


def test_a_module_that_multiplies_otherwise_later_is_an_error() -> None:
    class Moody(LinearActivation):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) if input.shape[-1] != 6 else torch.tanh(input @ self.weight.T)

    model = nn.ModuleDict({"intermediate": Moody(6, 6), "pooler": LinearActivation(6, 6)})
    init_compression(model, quantized())
    with pytest.raises(RuntimeError, match="multiplied 0 times"):
        model["intermediate"](torch.randn(2, 6))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_on_every_stage(stage: int, tmp_path: Path) -> None:
    pruning = {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "dense_ratio": 0.5},
            "different_groups": {"g": {"params": {}, "modules": ["intermediate"]}},
        }
    }
    with engine_of(block_model(), ds_config(stage, {**quantized(), **pruning})) as engine:
        for i in range(3):
            torch.manual_seed(i)
            engine.backward(engine(torch.randn(4, 16)).pow(2).mean())
            engine.step()
        weight = full_weights(engine.module)["intermediate.weight"]
        assert float((weight == 0).float().mean()) == 0.5
        engine.module.eval()
        x = torch.randn(3, 16)
        with torch.no_grad():
            expected = engine(x)
        report = ds_compress.export(engine, tmp_path / "out", format="torch", inputs={"x": x})
    assert report.check
    loaded = ds_compress.from_pretrained(tmp_path / "out", model=block_model(1)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)


def test_pickles_and_copies_stay_quantizing() -> None:
    model = init_compression(block_model(), quantized())
    x = torch.randn(2, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


LEGACY = {
    "weight_quantization": {
        "shared_parameters": {
            "enabled": True,
            "quantizer_kernel": False,
            "schedule_offset": 50,
            "quantize_groups": 1,
            "quantize_verbose": False,
            "quantization_type": "asymmetric",
            "rounding": "nearest",
        },
        "different_groups": {
            "wq1": {
                "params": {"start_bits": 12, "target_bits": 8, "quantization_period": 50},
                "modules": ["query", "intermediate"],
            },
            "wq2": {
                "params": {"start_bits": 12, "target_bits": 4, "quantization_period": 50},
                "modules": ["^output"],
            },
        },
    },
    "activation_quantization": {
        "shared_parameters": {"enabled": True, "quantization_type": "asymmetric", "range_calibration": "dynamic",
                              "schedule_offset": 50},
        "different_groups": {"aq1": {"params": {"bits": 8}, "modules": ["intermediate"]}},
    },
    "row_pruning": {
        "shared_parameters": {"enabled": True, "schedule_offset": 20, "method": "topk"},
        "different_groups": {
            "rp1": {"params": {"dense_ratio": 0.5}, "modules": ["intermediate"], "related_modules": [["^output"]]}
        },
    },
}  # fmt: skip


def test_a_legacy_config_of_all_blocks_is_prepared() -> None:
    model = init_compression(block_model(), {"compression_training": LEGACY})
    assert all(
        isinstance(layer, layers.QATModule) for layer in (model.query, model.intermediate, model.output)
    )


def test_rows_go() -> None:
    model = block_model()
    with torch.no_grad():
        for parameter in (model.intermediate.weight, model.intermediate.bias):
            parameter[24:] = 0
    x = torch.randn(3, 16)
    expected = model(x)
    block = {"row_pruning": {"shared_parameters": {"enabled": True, "method": "l1"},
                             "different_groups": LEGACY["row_pruning"]["different_groups"]}}  # fmt: skip
    smaller = ds_compress.finalize(model, block)
    assert smaller.intermediate.weight.shape == (24, 16) and smaller.output.weight.shape == (16, 24)
    torch.testing.assert_close(smaller(x), expected, rtol=1e-5, atol=1e-6)
