"""Floats in every format of an export: the stored bits, what loads them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file
from torch import nn

from ds_compress.api import export
from ds_compress.config.schema.compression_training import parse_config
from ds_compress.engine.attach import attach_to_loop
from ds_compress.engine.build import prepare_model
from ds_compress.errors import ExportError
from ds_compress.export import check, write
from ds_compress.export.compressed_tensors import floats
from ds_compress.export.inputs import run
from ds_compress.export.load import from_pretrained
from ds_compress.export.quantized_matrix import quantize_matrix
from ds_compress.export.report import ExportReport
from ds_compress.export.serving_tensors import loaded_weight, stored_weight, weight_scheme
from ds_compress.modelinfo.decoder_attention import decoder_attentions
from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight
from ds_compress.quant.formats import FORMATS
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.quantizers import InputQuantizer, WeightQuantizer
from ds_compress.quant.schemes import SCHEMES
from ds_compress.techniques.kv_cache import KEYS, VALUES
from tests.floats import BODY, model_of, quantized_to, tokens, weight_grid

OF_FLOATS = [
    name for name, scheme in SCHEMES.items() if scheme.inputs is not None and scheme.inputs.format != "int"
]
OF_FLOATS += [name for name in ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")]
BY_WEIGHT = {SCHEMES[name].weights: name for name in OF_FLOATS if SCHEMES[name].weights.format != "int"}
GRIDS = [weight_grid(spec) for spec in BY_WEIGHT]
GRIDS += [
    WeightGrid(bits=8, format="fp8_e5m2", granularity=Granularity.PER_CHANNEL),
    WeightGrid(bits=8, format="fp8_e4m3", granularity=Granularity.PER_GROUP),
    WeightGrid(bits=6, format="mxfp6_e3m2", granularity=Granularity.PER_COLUMN_GROUP, group_size=32),
    WeightGrid(bits=4, format="nf4", granularity=Granularity.PER_COLUMN_GROUP, group_size=64),
]


def weight(rows: int = 192, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """With outliers, zeros, a row of zeros and magnitudes from 1e-9 to 1e4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= 10 ** torch.randint(-9, 5, (rows, 1), generator=generator)
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    x[3] = 0
    return x


def described(grid: WeightGrid) -> str:
    return grid.describe().replace(" ", "-")


class TestMatrix:
    @pytest.mark.parametrize("shape", [(192, 256), (64, 96), (130, 100)])
    @pytest.mark.parametrize("channel_axis", [0, 1])
    @pytest.mark.parametrize("grid", GRIDS, ids=described)
    def test_values_and_storage_are_those_of_training(
        self, grid: WeightGrid, channel_axis: int, shape: tuple[int, int]
    ) -> None:
        how = {"format": grid.format, "granularity": grid.granularity, "group_size": grid.group_size}
        fake_quant = FakeQuantConfig(WeightGrid(bits=grid.bits, channel_axis=channel_axis, **how))
        x = weight(*shape)
        trained = fake_quantize_weight(x, fake_quant).values
        quantized = quantize_matrix(x, fake_quant)
        assert torch.equal(quantized.dequantize(), trained)
        assert quantized.count_nonzero() == int(trained.count_nonzero())
        stored = stored_weight(quantized)
        again = loaded_weight(stored, json.loads(json.dumps(weight_scheme(quantized))))
        assert torch.equal(again.dequantize(), trained)
        if FORMATS[grid.format].scale_bits == 8:
            assert stored["weight_scale"].itemsize == 1
        if grid.bits < 8 and not quantized.values.shape[1] % 16:
            assert stored["weight_packed"].nbytes * 8 == x.numel() * grid.bits

    def test_a_given_global_scale_is_the_one_that_is_stored(self) -> None:
        fake_quant = FakeQuantConfig(
            weight_grid(SCHEMES["NVFP4A16"].weights), global_scale=torch.tensor([123.0])
        )
        quantized = quantize_matrix(weight(), fake_quant)
        assert float(quantized.global_scale) == 123.0

    def test_cut_by_whole_blocks_only(self) -> None:
        for format, size in (("mxfp4", 32), ("nvfp4", 16)):
            grid = WeightGrid(
                bits=4, format=format, granularity=Granularity.PER_COLUMN_GROUP, group_size=size
            )
            whole = quantize_matrix(weight(), FakeQuantConfig(grid))
            assert torch.equal(whole.cut(lambda t: t[::3, 64:]).dequantize(), whole.dequantize()[::3, 64:])
            with pytest.raises(ValueError, match=rf"columns are cut across groups of {size}.*finalize"):
                whole.cut(lambda t: t[:, 8:])

    def test_squares_are_cut_along_both_axes(self) -> None:
        grid = WeightGrid(bits=8, format="fp8_e4m3", granularity=Granularity.PER_BLOCK, group_size=128)
        whole = quantize_matrix(weight(300, 256), FakeQuantConfig(grid))
        assert whole.scale.shape == (3, 2)
        # The last block has 44 rows and stays whole.
        cut = whole.cut(lambda t: t[128:, :128])
        assert cut.scale.shape == (2, 1) and torch.equal(cut.dequantize(), whole.dequantize()[128:, :128])
        with pytest.raises(ValueError, match="rows are cut across groups of 128"):
            whole.cut(lambda t: t[1:])
        with pytest.raises(ValueError, match="columns are cut across groups of 128"):
            whole.cut(lambda t: t[:, :64])

    def test_a_scale_of_the_tensor_allows_any_cut(self) -> None:
        grid = WeightGrid(bits=8, format="fp8_e4m3", granularity=Granularity.PER_TENSOR)
        whole = quantize_matrix(weight(), FakeQuantConfig(grid))
        assert torch.equal(whole.cut(lambda t: t[5:, 7:]).dequantize(), whole.dequantize()[5:, 7:])


def by_their_tools(x: torch.Tensor, args: QuantizationArgs, format: str) -> dict[str, torch.Tensor]:
    """What compressed-tensors stores of a weight, scales chosen by its own formulas."""
    state = {"weight": x}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(x.min().view(1), x.max().view(1))
    blocks = x
    match args.strategy:
        case "tensor":
            blocks = x.view(1, -1)
        case "group" | "tensor_group":
            blocks = x.unflatten(1, (-1, args.group_size))
        case "block":
            rows, columns = args.block_structure
            padded = nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
            blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    scale, _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), args, global_scale=state.get("weight_global_scale")
    )
    state["weight_scale"] = scale.view(-1, 1) if args.strategy == "channel" else scale
    scheme = preset_name_to_scheme("FP8", ["Linear"]).model_copy(update={"weights": args})
    return BaseCompressor.get_value_from_registry(format).compress(state, scheme)


@pytest.mark.parametrize("name", BY_WEIGHT.values())
def test_stored_bits_are_those_of_their_compressor(name: str) -> None:
    preset = preset_name_to_scheme(name, ["Linear"])
    x = weight()
    quantized = quantize_matrix(x, FakeQuantConfig(weight_grid(SCHEMES[name].weights)))
    assert floats.weight_arguments(quantized) == without_observer(preset.weights)
    ours = floats.stored_floats(quantized)
    theirs = by_their_tools(x, preset.weights, floats.COMPRESSORS[quantized.format])
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype is theirs[key].dtype and tensor.shape == theirs[key].shape
        bits = tensor.view(torch.uint8), theirs[key].contiguous().view(torch.uint8)
        if quantized.bits == 4 and key == "weight_packed":  # what it rounds to zero loses its sign
            bits = without_negative_zeros(bits[0]), without_negative_zeros(bits[1])
        assert torch.equal(*bits), key


def without_negative_zeros(pairs: torch.Tensor) -> torch.Tensor:
    low, high = pairs & 15, pairs & 240
    return torch.where(low == 8, 0, low) + torch.where(high == 128, 0, high)


def without_observer(args: QuantizationArgs | None) -> dict[str, Any] | None:
    if args is None:
        return None
    return {key: value for key, value in args.model_dump(mode="json").items() if key != "observer"}


@dataclass
class Exported:
    """Folders to be loaded together in one fresh process."""

    folder: Path
    requests: list[check.Request] = field(default_factory=list)
    expected: list[check.Expected] = field(default_factory=list)

    def add(self, model: nn.Module, name: str, **options: Any) -> ExportReport:
        """Exports the model; what is loaded is compared with it when all tests have run."""

        def later(writing: Any, folder: Path, expected: check.Expected) -> None:
            unread = tuple(writing.format.cache_tensors())
            model_class, loader = writing.report.model_class, writing.format.loader
            request = check.Request(self.folder / name, model_class, expected.inputs, loader, unread)
            self.requests.append(request)
            self.expected.append(expected)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write._Export, "_reloaded", later)
            told = {"largest_logit": 1.0, "loaded": "later", "verdict": "later"}
            patch.setattr(check, "verdict", lambda expected, answer: told)
            return export(model, self.folder / name, **options)

    def differences(self) -> Iterator[str]:
        answers = check.reload(self.requests)
        for request, expected, answer in zip(self.requests, self.expected, answers, strict=True):
            name = request.folder.name
            try:
                result = check.verdict(expected, answer)
            except ExportError as error:
                yield f"{name}: {error}"
                continue
            # Its emulation of floats is that of training: only bfloat16 values of some weights are not exact.
            is_exact = result["max_difference"] <= 1e-5 * result["largest_logit"]
            if not (is_exact or name.startswith("rounded") or "NVFP4" in name):
                yield f"{name}: {result}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    together = Exported(tmp_path_factory.mktemp("exported"))
    yield together
    assert list(together.differences()) == []


def config_of(report: ExportReport) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(report.folder) / "config.json").read_text())
    return config


@pytest.mark.parametrize("model", ["llama", "qwen3", "bert"])
def test_vanilla_hf_loads_every_scheme(exported: Exported, model: str) -> None:
    for name in OF_FLOATS:
        report = exported.add(quantized_to(model_of(model), name), f"{model}-{name}")
        config, preset = config_of(report), preset_name_to_scheme(name, ["Linear"])
        in_blocks = SCHEMES[name].weights.format.startswith(("mx", "nv"))
        assert config["dtype"] == ("bfloat16" if in_blocks else "float32")
        group = config["quantization_config"]["config_groups"]["group_0"]
        assert group["input_activations"] == without_observer(preset.input_activations)
        if name != "W4AFP8":  # where a row has one group, it is a channel
            assert group["weights"] == without_observer(preset.weights)


class TestMixed:
    def test_several_formats_in_a_model(self, exported: Exported) -> None:
        model = quantized_to(model_of("llama"), "FP8_DYNAMIC", ("self_attn.",))
        report = exported.add(quantized_to(model, "NVFP4", ("mlp.",)), "rounded-fp8-beside-NVFP4")
        config = config_of(report)["quantization_config"]
        assert config["format"] == "mixed-precision" and config["ignore"] == ["lm_head"]
        assert {group["format"] for group in config["config_groups"].values()} == {
            "float-quantized",
            "nvfp4-pack-quantized",
        }
        assert any("scales in fp32 are stored exactly" in note for note in report.notes)
        model = quantized_to(model_of("qwen3"), "MXFP8", ("self_attn.",))
        exported.add(quantized_to(model, "MXFP4", ("mlp.",)), "qwen3-mxfp8-mxfp4")
        model = quantized_to(model_of("llama"), "W8A8", ("self_attn.",))
        exported.add(quantized_to(model, "MXFP6A16", ("mlp.",)), "rounded-int8-beside-mxfp6")

    def test_tied_heads(self, exported: Exported) -> None:
        for name in ("NVFP4", "FP8_DYNAMIC", "MXFP8"):
            report = exported.add(quantized_to(model_of("llama_tied"), name), f"tied-{name}")
            assert config_of(report)["tie_word_embeddings"] is True
            model = quantized_to(model_of("llama_tied"), name, (*BODY, "lm_head"))
            report = exported.add(model, f"rounded-untied-{name}")
            assert config_of(report)["tie_word_embeddings"] is False
            assert any("is untied" in note for note in report.notes)

    def test_attention_beside_experts_in_floats(self, exported: Exported) -> None:
        for name in ("FP8_DYNAMIC", "NVFP4", "MXFP4", "MXFP8"):
            exported.add(quantized_to(model_of("qwen3_moe"), name, ("self_attn.",)), f"moe-{name}")

    def test_trained_in_16_bits(self, exported: Exported) -> None:
        for name in ("NVFP4", "MXFP4", "FP8_BLOCK"):
            model = quantized_to(model_of("llama").to(torch.bfloat16), name)
            exported.add(model, f"bf16-{name}")

    def test_inputs_alone(self, exported: Exported) -> None:
        for name in ("FP8", "NVFP4"):
            model = quantized_to(model_of("llama"), name)
            for module in model.modules():
                if isinstance(module, layers.QATModule):
                    module.weight_quantizer = None
            exported.add(model, f"inputs-{name.lower()}")

    def test_a_combination_that_is_no_preset_is_noted(self, exported: Exported) -> None:
        model = quantized_to(model_of("llama"), "MXFP4")
        for module in model.modules():
            if isinstance(module, layers.QATModule):
                grid = ActivationGrid(8, format="fp8_e4m3", granularity=TokenGranularity.PER_TOKEN)
                module.input_quantizer = InputQuantizer(grid, enabled=True)
        report = exported.add(model, "llama-mxfp4-fp8-token")
        assert sum("no preset of compressed-tensors" in note for note in report.notes) == 1


def trained(model: nn.Module, block: dict[str, Any]) -> nn.Module:
    """Three steps under a block of the JSON."""
    run_of_training = prepare_model(model.train(), parse_config(block))
    attach_to_loop(run_of_training)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(**tokens(), labels=tokens()["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run_of_training.end_step()
    return model.eval()


class TestTrainedByConfig:
    def test_schemes_learned_scales_and_a_cache(self, exported: Exported) -> None:
        learned = {"shared_parameters": {"scales": "learned"}}
        searched = {"shared_parameters": {"scales": "searched"}}
        for name, block in {
            "NVFP4": {"scheme": "NVFP4", "kv_cache": "fp8"},
            "NVFP4-learned": {"scheme": "NVFP4", "weight_quantization": learned},
            "NVFP4-searched": {"scheme": "NVFP4A16", "weight_quantization": searched},
            "MXFP4-learned": {"scheme": "MXFP4", "weight_quantization": learned},
            "FP8_BLOCK-learned": {"scheme": "FP8_BLOCK", "weight_quantization": learned},
            "FP8": {"scheme": "FP8"},
            "rounded-mixed": {"scheme": {"FP8_DYNAMIC": ["self_attn"], "NVFP4": ["mlp"]}},
        }.items():
            report = exported.add(trained(model_of("llama"), block), f"{name}-by-config")
            assert not any("wrong for the others" in note for note in report.notes), name
            assert config_of(report)["quantization_config"]["ignore"] == ["lm_head"]


class TestAfterTraining:
    def test_every_scheme_without_calibration(self, exported: Exported) -> None:
        names = [name for name in OF_FLOATS if not (SCHEMES[name].inputs and SCHEMES[name].inputs.static)]
        for name in ("fp8", *names, "W4A16"):
            report = exported.add(model_of("llama"), f"after-{name}", scheme=name.lower())
            config = config_of(report)["quantization_config"]
            assert config["ignore"] == ["lm_head"]
            assert any("rounded after training" in note for note in report.notes)

    def test_layers_that_servers_join_get_one_global_scale(self, tmp_path: Path) -> None:
        report = export(model_of("qwen3"), tmp_path / "out", scheme="NVFP4A16", check=False)
        assert not any("wrong for the others" in note for note in report.notes)
        stored = load_file(tmp_path / "out" / "model.safetensors")
        scales = {n.split(".")[-2]: float(t) for n, t in stored.items() if n.endswith("weight_global_scale")}
        assert scales["q_proj"] == scales["k_proj"] == scales["v_proj"] != scales["o_proj"]

    def test_other_formats_take_it_too(self, tmp_path: Path) -> None:
        trained = quantized_to(model_of("llama"), "MXFP4A16")
        export(model_of("llama"), tmp_path / "hf", "hf", scheme="MXFP4A16", check=False)
        stored = load_file(tmp_path / "hf" / "model.safetensors")
        name = "model.layers.0.mlp.up_proj"
        assert torch.equal(stored[f"{name}.weight"], layers.quantized_weight(trained.get_submodule(name)))

    @pytest.mark.parametrize(
        ("scheme", "model", "reason"),
        [
            ("NVFP4", "llama", "needs observed ranges"),
            ("FP9", "llama", 'a scheme is one of "W8A8"'),
            ("FP8_DYNAMIC", "trained", "was trained quantized"),
        ],
    )
    def test_refusals(self, tmp_path: Path, scheme: str, model: str, reason: str) -> None:
        source = quantized_to(model_of("llama"), "FP8") if model == "trained" else model_of(model)
        with pytest.raises(ExportError, match=reason):
            export(source, tmp_path / "out", scheme=scheme)

    def test_a_layer_that_blocks_do_not_divide_stays_and_the_report_says_so(self, tmp_path: Path) -> None:
        from tests.zoo.models import ZOO

        report = export(ZOO["llama"](), tmp_path / "out", scheme="MXFP4A16", check=False)
        assert any("inputs are no multiple of the 32" in note for note in report.notes)


def one_layer(
    model: nn.Module, weights: WeightGrid | None, inputs: ActivationGrid | None = None
) -> nn.Module:
    layer = layers.attach(model.get_submodule("model.layers.1.mlp.down_proj"))
    layer.weight_quantizer = WeightQuantizer(None if weights is None else FakeQuantConfig(weights))
    if inputs is not None:
        layer.input_quantizer = InputQuantizer(inputs, enabled=True)
    return model


def in_groups(bits: int, format: str, size: int) -> WeightGrid:
    return WeightGrid(bits=bits, format=format, granularity=Granularity.PER_COLUMN_GROUP, group_size=size)


NVFP4_INPUTS = {"format": "nvfp4", "granularity": TokenGranularity.PER_TOKEN_GROUP, "group_size": 16}
REFUSED: dict[str, tuple[WeightGrid, ActivationGrid | None, str]] = {
    "e5m2": (WeightGrid(bits=8, format="fp8_e5m2", granularity=Granularity.PER_CHANNEL), None, "no fp8_e5m2"),
    "e3m2": (in_groups(6, "mxfp6_e3m2", 32), None, "no mxfp6_e3m2"),
    "nf4": (in_groups(4, "nf4", 64), None, "no nf4"),
    "size": (in_groups(4, "mxfp4", 64), None, "a scale for each 32 inputs"),
    "columns": (in_groups(8, "fp8_e4m3", 96), None, "256 columns are no multiple of the 96"),
    "channel": (
        WeightGrid(bits=4, format="nvfp4", granularity=Granularity.PER_CHANNEL),
        None,
        "a scale for each 16 inputs",
    ),
    "unseen": (in_groups(4, "nvfp4", 16), ActivationGrid(4, static=True, **NVFP4_INPUTS), "never observed"),
    "batch": (in_groups(4, "nvfp4", 16), ActivationGrid(4, **NVFP4_INPUTS), '"range_calibration": "static"'),
    "sample": (
        WeightGrid(bits=8, format="fp8_e4m3", granularity=Granularity.PER_CHANNEL),
        ActivationGrid(8, format="fp8_e4m3", granularity=TokenGranularity.PER_SAMPLE),
        "no word for",
    ),
    "e5m2 inputs": (
        WeightGrid(bits=8, format="fp8_e4m3", granularity=Granularity.PER_CHANNEL),
        ActivationGrid(8, format="fp8_e5m2"),
        "inputs are fp8_e5m2",
    ),
    "asymmetric": (
        WeightGrid(bits=4, symmetric=False, granularity=Granularity.PER_CHANNEL),
        ActivationGrid(8, format="fp8_e4m3"),
        "asymmetric",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_compressed_tensors_cannot_say_is_refused(tmp_path: Path, case: str) -> None:
    weights, inputs, reason = REFUSED[case]
    with pytest.raises(ExportError) as caught:
        export(one_layer(model_of("llama"), weights, inputs), tmp_path / "out")
    words = str(caught.value)
    assert reason in words and "model.layers.1.mlp.down_proj" in words
    assert case == "unseen" or 'format="torch"' in words
    assert not list(tmp_path.iterdir())


def test_a_class_that_does_not_load_packed_weights(tmp_path: Path) -> None:
    from tests.zoo.models import ZOO

    model = quantized_to(ZOO["t5"](), "MXFP4A16", ("SelfAttention.q",))
    with pytest.raises(ExportError, match="initialisation of this model class"):
        export(model, tmp_path / "out")
    with pytest.raises(ExportError, match="initialisation of this model class"):
        export(ZOO["t5"](), tmp_path / "out", scheme="MXFP4A16")


def test_layers_that_vllm_joins(tmp_path: Path) -> None:
    model = quantized_to(model_of("llama"), "NVFP4A16")
    report = export(model, tmp_path / "own", check=False)
    assert any("q_proj" in note and "wrong for the others" in note for note in report.notes)
    for name, module in model.named_modules():
        if isinstance(module, layers.QATModule) and "q_proj k_proj v_proj gate_proj up_proj".count(name[-6:]):
            config = FakeQuantConfig(
                module.weight_quantizer.fake_quant.grid, global_scale=torch.tensor([777.0])
            )
            module.weight_quantizer = WeightQuantizer(config)
    report = export(model, tmp_path / "shared", check=False)
    assert not any("wrong for the others" in note for note in report.notes)


def cached(model: nn.Module) -> nn.Module:
    """With the quantizers of a cache, as `techniques.kv_cache` leaves them: only to be seen by the export."""
    grid = ActivationGrid(8, format="fp8_e4m3", granularity=TokenGranularity.PER_TENSOR, static=True)
    for module in decoder_attentions(model).values():
        for kind, ends in ((KEYS, [-4.48, 1.0]), (VALUES, [-2.0, 8.96])):
            vars(module)[kind] = InputQuantizer(grid, enabled=True, input_range=torch.tensor(ends))
    return model


class TestCache:
    def test_scales_are_stored_as_servers_read_them(self, exported: Exported) -> None:
        for scheme in ("FP8_DYNAMIC", "NVFP4"):
            report = exported.add(cached(quantized_to(model_of("llama"), scheme)), f"cache-{scheme}")
            stored = load_file(Path(report.folder) / "model.safetensors")
            scales = [stored[f"model.layers.1.self_attn.{kind}_scale"] for kind in "kv"]
            assert torch.equal(scales[0], torch.tensor([4.48]) / 448)
            assert torch.equal(scales[1], torch.tensor([8.96]) / 448)
            used = config_of(report)["quantization_config"]["kv_cache_scheme"]
            wanted = {
                "num_bits": 8,
                "type": "float",
                "strategy": "tensor",
                "dynamic": False,
                "symmetric": True,
            }
            assert {key: used[key] for key in wanted} == wanted
            assert any("k_scale" in note for note in report.notes)
        report = exported.add(cached(model_of("llama")), "cache-only")
        assert report.format == "compressed-tensors"
        assert config_of(report)["quantization_config"]["config_groups"] == {}

    def test_other_formats_say_that_they_leave_them_out(self, tmp_path: Path) -> None:
        report = export(cached(model_of("llama")), tmp_path / "out", "hf", check=False)
        assert any("KV cache are not stored" in note for note in report.notes)

    def test_a_cache_that_was_never_observed(self, tmp_path: Path) -> None:
        model = cached(model_of("llama"))
        vars(model.get_submodule("model.layers.1.self_attn"))[VALUES].input_range = None
        with pytest.raises(ExportError, match=r"layers\.1\.self_attn: its keys and values.*never observed"):
            export(model, tmp_path / "out", "compressed-tensors")


class TestOurs:
    @pytest.mark.parametrize("scheme", ["NVFP4", "MXFP6A8", "FP8_BLOCK", "FP8"])
    def test_loads_back_exactly(self, tmp_path: Path, scheme: str) -> None:
        model = quantized_to(model_of("llama"), scheme)
        report = export(model, tmp_path / "out", "torch", embeddings="float", check=False)
        logits = run(model, tokens())
        assert torch.equal(run(from_pretrained(tmp_path / "out"), tokens()), logits)
        assert torch.equal(run(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens()), logits)
        assert any("no faster on the CPU" in note for note in report.notes)

    def test_what_no_stock_tool_reads(self, tmp_path: Path) -> None:
        model = model_of("llama")
        for grid in GRIDS[-4:]:
            export(one_layer(model, grid), tmp_path / grid.format, "torch", embeddings="float", check=False)
            assert torch.equal(run(from_pretrained(tmp_path / grid.format), tokens()), run(model, tokens()))

    def test_tables_of_floats(self, tmp_path: Path) -> None:
        model = quantized_to(model_of("llama_tied"), "MXFP8A16")
        table = layers.attach(model.get_submodule("model.embed_tokens"))
        table.weight_quantizer = WeightQuantizer(FakeQuantConfig(in_groups(4, "mxfp4", 32)))
        report = export(model, tmp_path / "out", "torch")
        assert report.check["max_difference"] == 0
        loaded = from_pretrained(tmp_path / "out")
        assert torch.equal(loaded.get_submodule("model.embed_tokens").weight, layers.quantized_weight(table))


class TestOtherFormats:
    def test_hf_is_exact_in_fp32(self, tmp_path: Path) -> None:
        model = quantized_to(model_of("llama"), "NVFP4A16")
        export(model, tmp_path / "out", "hf", check=False)
        stored = load_file(tmp_path / "out" / "model.safetensors")
        name = "model.layers.1.self_attn.o_proj"
        assert torch.equal(stored[f"{name}.weight"], layers.quantized_weight(model.get_submodule(name)))

    @pytest.mark.parametrize(
        ("scheme", "is_rounded"), [("MXFP4A16", False), ("NVFP4A16", True), ("FP8_DYNAMIC", True)]
    )
    def test_hf_says_whether_bfloat16_is_exact(self, tmp_path: Path, scheme: str, is_rounded: bool) -> None:
        model = quantized_to(model_of("llama"), scheme)
        report = export(model, tmp_path / "out", "hf", dtype=torch.bfloat16, check=False)
        assert any("leave their grid" in note for note in report.notes) == is_rounded

    def test_onnx_refuses_floats(self, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        with pytest.raises(ExportError, match=r'dense is quantized to mxfp4.*"compressed-tensors"|mxfp4'):
            export(quantized_to(model_of("bert"), "MXFP4A16"), tmp_path / "out", "onnx")
