"""QAT is in force in every mode, also where a module reads the weights of its children itself, or is refused."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ds_compress
from tests.multirank.common import ds_config
from tests.zoo.mixtures import mixture

pytestmark = pytest.mark.usefixtures("single_process")


def block(modules: list[str], weights: bool = True, inputs: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if weights:
        params = {"start_bits": 3, "target_bits": 3, "quantization_period": 0}
        made["weight_quantization"] = {
            "shared_parameters": {"enabled": True},
            "different_groups": {"all": {"params": params, "modules": modules}},
        }
    if inputs:
        made["activation_quantization"] = {
            "shared_parameters": {"enabled": True, "range_calibration": "dynamic"},
            "different_groups": {"all": {"params": {"bits": 4}, "modules": modules}},
        }
    return made


def engine_on(model: nn.Module, stage: int, compression: dict[str, Any] | None) -> Any:
    config = ds_config(stage, compression)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation=kind)
    return nn.Sequential(nn.TransformerEncoder(layer, 2))


class Padded(nn.Module):
    """An encoder that gets a padding mask, which its fast path turns into nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder("relu")[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[1:, 3:] = True
        hidden: torch.Tensor = self.encoder(x, src_key_padding_mask=mask)
        return hidden[:, :3]


@pytest.mark.parametrize("weights_and_inputs", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", ["relu", "gelu", "padded"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_transformer_encoder_is_quantized_in_eval_mode(
    stage: int, kind: str, weights_and_inputs: tuple[bool, bool]
) -> None:
    model = Padded() if kind == "padded" else encoder(kind)
    plain = Padded() if kind == "padded" else encoder(kind)
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    engine = engine_on(model, stage, block(["linear1", "linear2"], *weights_and_inputs))
    with torch.no_grad():
        engine.train()
        trained = engine(x)
        engine.eval()
        evaluated = engine(x)
        torch.testing.assert_close(evaluated, trained)
        torch.testing.assert_close(engine.module(x), trained)
        assert float((evaluated - plain.eval()(x)).abs().max()) > 0.01, "the control: there is a difference"
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    kernels = [layer.activation_relu_or_gelu for layer in layers]
    engine.compression.detach()
    assert kernels == [0, 0] and all(layer.activation_relu_or_gelu for layer in layers)
    assert all(m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder))
    engine.destroy()


def test_a_layer_that_is_not_quantized_keeps_its_fast_path() -> None:
    model = encoder("relu")
    engine = engine_on(model, 0, block(["0.layers.0.linear1"]))
    first, second = model[0].layers
    assert (first.activation_relu_or_gelu, second.activation_relu_or_gelu) == (0, 1)
    engine.destroy()


class Reader(nn.Module):
    """Multiplies with the weight of a child that it does not call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)
        self.table = nn.Embedding(20, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.inner.weight
        if self.how == "in eval mode only" and self.training:
            return self.outer(self.inner(x))
        if self.how == "head of a table":
            return F.linear(self.outer(self.inner(x)), self.table.weight)
        hidden = {
            "linear": lambda: F.linear(x, weight, self.inner.bias),
            "in eval mode only": lambda: F.linear(x, weight, self.inner.bias),
            "transposed": lambda: x @ weight.T,
            "cast": lambda: x @ weight.to(torch.float64).to(torch.float32).t(),
            "einsum": lambda: torch.einsum("bi,oi->bo", x, weight),
            "addmm": lambda: torch.addmm(self.inner.bias, x, weight.t()),
            "metadata": lambda: self.inner(x.to(weight.dtype).to(weight.device)) * weight.shape[0],
            "penalty": lambda: self.inner(x) + weight.square().mean(),
        }[self.how]()
        return self.outer(hidden)


READS = ["linear", "transposed", "cast", "einsum", "addmm", "head of a table"]


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_weight_that_is_read_past_its_layer_is_refused(stage: int, how: str) -> None:
    engine = engine_on(Reader(how), stage, block(["inner", "outer", "table"]))
    with pytest.raises(ds_compress.ConfigError, match="reads itself") as error:
        engine(torch.randn(2, 16))
    (problem,) = error.value.problems
    assert ("table" if how == "head of a table" else "inner") in problem.got
    assert "Reader.forward" in problem.got
    engine.destroy()


def test_it_is_noticed_in_eval_mode_too() -> None:
    engine = engine_on(Reader("in eval mode only"), 0, block(["inner", "outer"]))
    x = torch.randn(2, 16)
    engine.backward(engine(x).square().mean())
    engine.step()
    engine.eval()
    with pytest.raises(ds_compress.ConfigError, match="reads itself"), torch.no_grad():
        engine(x)
    engine.destroy()


@pytest.mark.parametrize("how", ["metadata", "penalty", "linear"])
def test_what_computes_nothing_past_a_layer_is_no_problem(how: str) -> None:
    modules = ["outer"] if how == "linear" else ["inner", "outer"]
    engine = engine_on(Reader(how), 0, block(modules, inputs=True))
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 16)).square().mean())
        engine.step()
    engine.eval()
    with torch.no_grad():
        engine(torch.randn(2, 16))
    assert "forward" in vars(engine)
    engine.compression.detach()
    assert "forward" not in vars(engine)
    engine.destroy()


class _ReadsExperts(nn.Module):
    """A block that multiplies by a matrix of its experts itself, and calls them, too."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        mixed: Any = mixture("qwen3_moe")
        self.reads = reads
        self.experts = mixed.model.layers[0].mlp.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.zeros(len(x), 1, dtype=torch.int64)
        y: torch.Tensor = self.experts(x, index, torch.ones(len(x), 1))
        return y + (x @ self.experts.gate_up_proj[0].t()[:, :16] if self.reads else 0)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("stage", [0, 3])
def test_matrices_of_experts_that_others_read(stage: int, reads: bool) -> None:
    engine = engine_on(_ReadsExperts(reads), stage, block(["experts"]))
    x = torch.randn(4, 16)
    if not reads:
        assert engine(x).shape == x.shape
    else:
        with pytest.raises(ds_compress.ConfigError, match="experts"):
            engine(x)
    engine.destroy()
