"""Layers whose weights alone are quantized run on weights as they are stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from ds_compress.api import export
from ds_compress.export.inputs import run
from ds_compress.export.load import from_pretrained
from ds_compress.export.quantized_matrix import QuantizedMatrix, quantize_matrix
from ds_compress.export.serve import dequantized_because
from ds_compress.export.serve_weight_only import WeightOnlyLinear, weight_only_misfit
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import Granularity, WeightGrid
from tests.floats import model_of, quantized_to
from tests.floats import tokens as float_tokens
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

IN_GROUPS = Granularity.PER_COLUMN_GROUP
SERVED = [
    *(WeightGrid(bits=bits, granularity=IN_GROUPS, group_size=32) for bits in range(3, 9)),
    *(WeightGrid(bits=bits, symmetric=False, granularity=IN_GROUPS, group_size=64) for bits in (3, 4, 5, 8)),
    *(WeightGrid(bits=bits, granularity=Granularity.PER_CHANNEL) for bits in (3, 4, 8)),
    WeightGrid(bits=8, granularity=Granularity.PER_TENSOR),
    WeightGrid(bits=4, symmetric=False, granularity=Granularity.PER_CHANNEL),
    WeightGrid(bits=2, granularity=Granularity.PER_CHANNEL),
    WeightGrid(bits=1, granularity=Granularity.PER_CHANNEL),
    WeightGrid(bits=4, format="mxfp4", granularity=IN_GROUPS, group_size=32),
    WeightGrid(bits=4, format="nvfp4", granularity=IN_GROUPS, group_size=16),
    WeightGrid(bits=6, format="mxfp6_e2m3", granularity=IN_GROUPS, group_size=32),
]
DEQUANTIZED = [
    WeightGrid(bits=8, format="fp8_e4m3", granularity=Granularity.PER_CHANNEL),
    WeightGrid(bits=4, format="nf4", granularity=IN_GROUPS, group_size=64),
    WeightGrid(bits=6, format="mxfp6_e3m2", granularity=IN_GROUPS, group_size=32),
    WeightGrid(bits=4, granularity=IN_GROUPS, group_size=4),
]


def matrix_on(grid: WeightGrid, rows: int = 70, columns: int = 192, seed: int = 0) -> QuantizedMatrix:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_matrix(weight, FakeQuantConfig(grid))


def described(grid: WeightGrid) -> str:
    return grid.describe().replace(" ", "-")


def llama(**changed: Any) -> nn.Module:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **changed})).eval()


def served_llama(folder: Path, group_size: int, bits: int = 4, **shared: Any) -> tuple[nn.Module, nn.Module]:
    """(served, dequantized) of a Llama whose linear layers have weights in groups."""
    model = quantized(
        llama(), bits, modules=("proj",), granularity="per_column_group", group_size=group_size, **shared
    )
    export(model, folder, "torch", check=False)
    return loaded(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with int4 weights in groups of 64."""
    path = tmp_path_factory.mktemp("weight-only") / "llama"
    model = quantized(llama(), 4, modules=("proj",), granularity="per_column_group", group_size=64)
    export(model, path, "torch")
    return path


def loaded(folder: Path) -> tuple[nn.Module, nn.Module]:
    """(served, dequantized)"""
    return from_pretrained(folder), from_pretrained(folder, activations=False)


def tensors_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """By address, every tensor that a module holds."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, torch.Tensor) and value.numel():
                found[value.data_ptr()] = value
    return found


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", SERVED, ids=described)
def test_it_multiplies_by_the_weight_of_training(grid: WeightGrid, dtype: torch.dtype) -> None:
    matrix, bias = matrix_on(grid), torch.randn(70)
    layer, x = WeightOnlyLinear(matrix, bias), torch.randn(5, 192).to(dtype)
    expected = functional.linear(x.double(), matrix.dequantize().double(), bias.double())
    difference = (layer(x).double() - expected).abs().max() / expected.abs().max()
    assert layer(x).dtype is dtype
    assert difference < (1e-6 if dtype is torch.float32 else 5e-3)


@pytest.mark.parametrize("grid", SERVED, ids=described)
def test_it_holds_no_more_than_is_stored(grid: WeightGrid) -> None:
    """Packed bits as wide as the storage, fp32 scales, a header."""
    matrix = matrix_on(grid, rows=128, columns=256)
    layer = WeightOnlyLinear(matrix, None)
    width = next(width for width in (2, 4, 8) if grid.bits <= width)
    scales = 4 * 128 * matrix.groups * (1 if matrix.offset is None else 2)
    assert bytes_of(layer) == 64 + 128 * 256 * width // 8 + scales


@pytest.mark.parametrize("grid", DEQUANTIZED, ids=described)
def test_what_no_kernel_has_is_said_and_dequantized(grid: WeightGrid) -> None:
    matrix = matrix_on(grid)
    reason = weight_only_misfit(matrix)
    assert reason is not None and dequantized_because(ModuleKind.LINEAR, matrix, None) == reason
    with pytest.raises(ValueError, match=reason):
        WeightOnlyLinear(matrix, None)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_llama_says_the_same_as_dequantized(group_size: int, tmp_path: Path) -> None:
    served, dense = served_llama(tmp_path / "x", group_size)
    assert sum(isinstance(m, WeightOnlyLinear) for m in served.modules()) == 14
    assert not any(isinstance(m, WeightOnlyLinear) for m in dense.modules())
    given = torch.tensor([[5, 17], [3, 88]])
    for cache in ("static", None):
        said = [
            model.generate(given, max_new_tokens=16, do_sample=False, cache_implementation=cache)
            for model in (served, dense)
        ]
        assert torch.equal(*said)
        assert said[0].unique().numel() > 4, "it says one thing over and over"
    logits, expected = served(given).logits, dense(given).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_memory_is_that_of_the_packed_weights(folder: Path) -> None:
    served, dense = loaded(folder)
    served(torch.tensor([[1, 2]]))  # nothing is unpacked by use
    linear = [m for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n.endswith("proj")]
    products = sum(m.weight.numel() for m in linear)
    saved = bytes_of(dense) - bytes_of(served)
    assert saved > 4 * products - products * (4 + 0.5) / 8 - 16 * 1024


def test_a_model_in_bf16(folder: Path) -> None:
    served, dense = loaded(folder)
    given = torch.tensor([[5, 17, 9, 33]])
    logits, expected = served.bfloat16()(given).logits, dense(given).logits
    assert logits.dtype is torch.bfloat16
    assert (logits.float() - expected).square().mean().sqrt() < 3e-2 * expected.square().mean().sqrt()


def test_it_compiles_without_a_graph_break(folder: Path) -> None:
    served, _ = loaded(folder)
    given = torch.tensor([[5, 17, 9, 33]])
    expected = served(given).logits
    torch._dynamo.reset()
    compiled: Any = torch.compile(served, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(given).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_copy_says_the_same(folder: Path) -> None:
    served, _ = loaded(folder)
    given = torch.tensor([[5, 17, 9, 33]])
    assert torch.equal(copy.deepcopy(served)(given).logits, served(given).logits)


def test_activations_behind_a_layer_are_fused(folder: Path) -> None:
    served, _ = loaded(folder)
    mlp = served.get_submodule("model.layers.0.mlp")
    assert mlp.gate_proj.activation == "silu" and isinstance(mlp.act_fn, nn.Identity)
    unfused = from_pretrained(folder, fused=False)
    given = torch.tensor([[5, 17, 9, 33]])
    assert torch.allclose(served(given).logits, unfused(given).logits, atol=1e-5)


def test_conv1d_and_asymmetric_weights_are_served(tmp_path: Path) -> None:
    model = quantized(ZOO["gpt2"](), 4, modules=("mlp",), quantization_type="asymmetric")
    report = export(model, tmp_path / "x", "torch", embeddings="float")
    model_again = from_pretrained(tmp_path / "x")
    assert {type(m) for n, m in model_again.named_modules() if n.endswith("c_fc")} == {WeightOnlyLinear}
    given = inputs_of(model)
    assert torch.allclose(run(model_again, given), run(model, given), atol=1e-4)
    assert not any("dequantized" in note for note in report.notes)


@pytest.mark.parametrize(
    ("scheme", "is_served"), [("NVFP4A16", True), ("MXFP4A16", True), ("MXFP8A16", False)]
)
def test_floats_are_served_where_a_kernel_has_them(scheme: str, is_served: bool, tmp_path: Path) -> None:
    model = quantized_to(model_of("llama"), scheme)
    report = export(model, tmp_path / "x", "torch", embeddings="float", check=False)
    model_again = from_pretrained(tmp_path / "x")
    assert any(isinstance(m, WeightOnlyLinear) for m in model_again.modules()) is is_served
    assert any("no faster on the CPU: weights are mxfp8" in n for n in report.notes) is not is_served
    logits, expected = run(model_again, float_tokens()), run(model, float_tokens())
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_tied_head_takes_the_bias_that_is_tied_too(tmp_path: Path) -> None:
    """A masked language model: its decoder shares the weight of the words and the bias of its parent."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=100, **sizes)).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    export(quantized(model, 8), tmp_path / "model", "torch", check=False)
    served = from_pretrained(tmp_path / "model")
    dequantized = from_pretrained(tmp_path / "model", activations=False)
    assert isinstance(served.get_submodule("cls.predictions.decoder"), WeightOnlyLinear)
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(served(ids).logits, dequantized(ids).logits, rtol=1e-4, atol=1e-4)
