"""Quantized experts in every format: what is written is what was computed, and stock tools read it right or it is
refused by name. Each export is loaded in a fresh process and compared, tensors and logits (`check`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ds_compress
from ds_compress.errors import ConfigError, ExportError
from ds_compress.export.serve_experts import STACKS, ServedExperts
from ds_compress.manifest import Manifest
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.quant import layers
from tests.multirank.common import ds_config, engine_of
from tests.zoo.mixtures import mixture, tokens

pytestmark = pytest.mark.usefixtures("single_process")

_WIDE = dict.fromkeys(
    ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 256
)
"""More than one square block, and groups of 128 that do not end with a matrix."""
_READ_RIGHT = ("FP8_DYNAMIC", "W4A16", "W4AFP8", "MXFP4A16", "MXFP4", "MXFP6A16", "W8A16", "W4A8")
_CASES = [("qwen3_moe", scheme) for scheme in _READ_RIGHT] + [
    ("mixtral", "FP8_DYNAMIC"),
    ("deepseek_v3", "MXFP4"),
    ("ernie_moe", "W4AFP8"),
    ("jamba", "W4A16"),
    ("phi_moe", "MXFP6A16"),
]


def wide(name: str) -> nn.Module:
    model = mixture(name, **_WIDE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


@pytest.mark.parametrize(("name", "scheme"), _CASES)
def test_stock_transformers_reads_it_right(name: str, scheme: str, tmp_path: Path) -> None:
    report = ds_compress.export(
        wide(name), tmp_path / "x", format="compressed-tensors", scheme=scheme, inputs=inputs()
    )
    assert report.check["max_difference_with_exact_activations"] < 1e-5 * report.check["largest_logit"]
    stored = load_file(tmp_path / "x" / "model.safetensors")
    single = [key for key in stored if ".experts.3." in key and key.endswith("weight_scale")]
    assert len(single) >= 3 and not [key for key in stored if "gate_up_proj" in key]
    entry = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in entry["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("W8A8", "8-bit integers"),
        ("MXFP8A16", "MXFP8"),
        ("NVFP4A16", "global scale"),
        ("FP8_BLOCK", "square blocks"),
    ],
)
def test_what_stock_transformers_misreads_is_refused(scheme: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason) as caught:
        ds_compress.export(wide("qwen3_moe"), tmp_path / "x", format="compressed-tensors", scheme=scheme)
    assert 'format="torch"' in str(caught.value) and "experts.gate_up_proj" in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "granite_moe"])
def test_experts_that_are_fused_on_the_hub_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fused on the hub"):
        ds_compress.export(wide(name), tmp_path / "x", format="compressed-tensors", scheme="W4A16")


def test_each_matrix_has_the_numbers_of_its_expert(tmp_path: Path) -> None:
    """Read with compressed-tensors' own unpacking, beside the rounding of each expert's rows alone."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    model = wide("qwen3_moe")
    fused = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach()
    ds_compress.export(model, tmp_path / "x", format="compressed-tensors", scheme="W4A16", check=False)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    for expert in range(4):
        for half, matrix in enumerate(("gate_proj", "up_proj")):
            name = f"model.layers.1.mlp.experts.{expert}.{matrix}"
            values = unpack_from_int32(stored[f"{name}.weight_packed"], 4, torch.Size((256, 256)))
            scale = stored[f"{name}.weight_scale"]
            found = (values.float().view(256, 2, 128) * scale.unsqueeze(2)).view(256, 256)
            own = fused[expert, 256 * half : 256 * (half + 1)].view(256, 2, 128)
            step = own.abs().amax(2, keepdim=True) / 7
            expected = ((own / step).round().clamp(-7, 7) * step).view(256, 256)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def quantization(format: str | None = None) -> dict[str, Any]:
    shared: dict[str, Any] = {"enabled": True, "quantize_weight_in_forward": True}
    given: dict[str, Any] = {"start_bits": 4, "target_bits": 4}
    if format is None:
        shared |= {"granularity": "per_column_group", "group_size": 8}
    else:
        given = {"format": format}
    groups = {"experts": {"params": given, "modules": ["experts"]}}
    return {"weight_quantization": {"shared_parameters": shared, "different_groups": groups}}


def trained(name: str, block: dict[str, Any], stage: int = 0) -> Any:
    model = mixture(name, **dict.fromkeys(_WIDE, 32))
    return engine_of(model, ds_config(stage, block))


def step(engine: Any) -> None:
    for seed in range(2):
        output = engine(input_ids=tokens(4, 8, seed=seed))
        loss = (output if isinstance(output, torch.Tensor) else output.logits).float().square().mean()
        engine.backward(loss)
        engine.step()


@pytest.mark.parametrize("stage", [0, 3])
def test_trained_experts_in_compressed_tensors(stage: int, tmp_path: Path) -> None:
    with trained("qwen3_moe", quantization(), stage) as engine:
        step(engine)
        report = ds_compress.export(engine, tmp_path / "x", format="compressed-tensors", inputs=inputs())
    assert report.check["max_difference"] < 1e-4 * report.check["largest_logit"]
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in stored
    assert "model.layers.0.self_attn.q_proj.weight" in stored


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "jamba", "granite_moe"])
def test_trained_experts_in_our_format(name: str, tmp_path: Path) -> None:
    """Every layout; loaded again, the experts have the values that training computed with."""
    with trained(name, quantization()) as engine:
        step(engine)
        model = engine.module
        report = ds_compress.export(engine, tmp_path / "x", format="torch", inputs=inputs())
        assert report.check["max_difference"] < 1e-4 * report.check["largest_logit"]
        loaded = ds_compress.from_pretrained(tmp_path / "x")
        for where, module in model.named_modules():
            layout = fused_experts(module)
            for matrix in () if layout is None else layout.matrices:
                values = layers.quantized_weight(module, matrix)
                torch.testing.assert_close(loaded.get_submodule(where).get_parameter(matrix), values)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    packed = [tensor for key, tensor in stored.items() if key.endswith("_proj_weight_packed")]
    assert len(packed) in (2, 4) and all(tensor.dtype is torch.int32 for tensor in packed)


def test_stock_transformers_does_not_load_our_format_by_mistake(tmp_path: Path) -> None:
    with trained("mixtral", quantization()) as engine:
        step(engine)
        ds_compress.export(engine, tmp_path / "x", format="torch", check=False)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].numel() == 0


def test_the_auto_class_loads_our_format(tmp_path: Path) -> None:
    import transformers

    with trained("mixtral", quantization()) as engine:
        step(engine)
        ds_compress.export(engine, tmp_path / "x", format="torch", check=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    ours = ds_compress.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, ours(tokens()).logits)


def test_trained_experts_as_floats_on_their_grid(tmp_path: Path) -> None:
    with trained("deepseek_v3", quantization()) as engine:
        step(engine)
        report = ds_compress.export(engine, tmp_path / "x", format="hf", inputs=inputs())
    assert report.check["max_difference"] < 1e-4 * report.check["largest_logit"]
    stored = load_file(tmp_path / "x" / "model.safetensors")
    row = stored["model.layers.1.mlp.experts.5.gate_proj.weight"][0, :8]
    assert len(row.unique()) <= 15


@pytest.mark.parametrize(
    ("name", "block", "reason"),
    [
        ("gpt_oss", quantization(), "fused on the hub"),
        ("qwen3_moe", quantization("mxfp8"), "MXFP8"),
        ("qwen3_moe", quantization("nvfp4"), "global scale"),
        ("qwen3_moe", {"scheme": {"FP8": ["experts"]}}, "static input scales"),
    ],
)
def test_refusals_come_at_start(name: str, block: dict[str, Any], reason: str) -> None:
    model = mixture(name, hidden_size=32, intermediate_size=32, moe_intermediate_size=32)
    with pytest.raises(ConfigError) as caught:
        ds_compress.plan(model, {**block, "export_to": "compressed-tensors"})
    assert any(reason in problem.got for problem in caught.value.problems)


def test_half_of_the_experts_quantized_is_refused_at_start() -> None:
    block = quantization()
    block["weight_quantization"]["different_groups"]["experts"]["modules"] = ["gate_up_proj"]
    with pytest.raises(ConfigError, match="not all matrices of experts"):
        ds_compress.plan(mixture("mixtral"), {**block, "export_to": "compressed-tensors"})


def cutting(block: str) -> dict[str, Any]:
    shared = {"enabled": True, "method": "l2", "dense_ratio": 0.5, "schedule_offset": 1}
    return {block: {"shared_parameters": shared}}


def quantized_inputs() -> dict[str, Any]:
    shared = {
        "enabled": True,
        "range_calibration": "dynamic",
        "quantization_type": "symmetric",
        "schedule_offset": 0,
    }
    groups = {"experts": {"params": {"bits": 8}, "modules": ["experts"]}}
    return {"activation_quantization": {"shared_parameters": shared, "different_groups": groups}}


@pytest.mark.parametrize(
    ("name", "more", "format"),
    [
        ("qwen3_moe", cutting("row_pruning"), "compressed-tensors"),
        ("mixtral", cutting("expert_pruning"), "torch"),
        ("mixtral", quantized_inputs(), "torch"),
        ("mixtral", {**cutting("expert_pruning"), **quantized_inputs()}, "torch"),
        ("qwen3_moe", {**cutting("row_pruning"), **quantized_inputs()}, "torch"),
    ],
)
def test_beside_other_blocks(name: str, more: dict[str, Any], format: str, tmp_path: Path) -> None:
    """Masked rows and experts leave the stored matrices; experts with quantized inputs are loaded on the kernels."""
    block = quantization()
    block["weight_quantization"]["shared_parameters"] |= {"granularity": "per_channel"}
    del block["weight_quantization"]["shared_parameters"]["group_size"]
    with trained(name, {**block, **more}, stage=2) as engine:
        step(engine)
        report = ds_compress.export(engine, tmp_path / "x", format=format, inputs=inputs())
    assert report.check["max_difference"] < 1e-5 * report.check["largest_logit"]
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    if "row_pruning" in more:
        assert config["moe_intermediate_size"] == 16
    if "expert_pruning" in more:
        assert config["num_local_experts"] == 2
    if "activation_quantization" in more:
        loaded = ds_compress.from_pretrained(tmp_path / "x")
        experts = [module for module in loaded.modules() if isinstance(module, ServedExperts)]
        stacks = [stack for module in experts for stack in vars(module)[STACKS].values()]
        assert {len(stack.packed) for stack in stacks} == {2 if "expert_pruning" in more else 4}


@pytest.mark.parametrize(
    ("name", "scheme"), [("qwen3_moe", "MXFP8"), ("qwen3_moe", "NVFP4A16"), ("gpt_oss", "W8A8")]
)
def test_our_format_has_what_stock_tools_misread(name: str, scheme: str, tmp_path: Path) -> None:
    report = ds_compress.export(wide(name), tmp_path / "x", format="torch", scheme=scheme, inputs=inputs())
    assert report.check["max_difference"] < 1e-3 * report.check["largest_logit"]


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    ds_compress.export(
        wide("mixtral"), tmp_path / "x", "torch", scheme="W8A8", check=False, shard_bytes=1 << 20
    )
    index = tmp_path / "x" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))
    (tmp_path / "x" / file).rename(tmp_path / file)
    content["weight_map"] = {n: f"../{f}" if f == file else f for n, f in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    Manifest.of(tmp_path / "x", {}).write(tmp_path / "x")
    with pytest.raises(ExportError, match="is no file inside of"):
        ds_compress.from_pretrained(tmp_path / "x")
