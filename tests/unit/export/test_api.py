"""`export` as a whole: formats and defaults, refusals that name the module, and nothing left behind by a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export import check
from ds_compress.export.inputs import run
from ds_compress.export.load import from_pretrained
from ds_compress.export.report import ExportReport
from ds_compress.manifest import FILE_NAME
from ds_compress.quant import layers
from ds_compress.structure.apply_pruning import apply_pruning
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

DYNAMIC = {"range_calibration": "dynamic"}


def bert() -> nn.Module:
    return ZOO["bert_classifier"]()


class TestFormats:
    def test_hf_is_the_default_of_a_float_model(self, tmp_path: Path) -> None:
        report = export(bert(), tmp_path / "out", shard_bytes=50_000)
        assert report.format == "hf" and report.check["max_difference"] == 0
        assert (tmp_path / "out" / "model.safetensors.index.json").exists()
        assert report.ratio == pytest.approx(1, abs=0.1)

    def test_compressed_tensors_is_the_default_of_a_quantized_one(self, tmp_path: Path) -> None:
        report = export(quantized(bert(), inputs=DYNAMIC, modules=("layer",)), tmp_path / "out")
        assert report.format == "compressed-tensors"
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["format"] == "int-quantized"
        assert config["ignore"] == ["bert.pooler.dense", "classifier"]
        assert config["config_groups"]["group_0"]["targets"] == ["Linear"]

    def test_mixed_schemes_are_config_groups(self, tmp_path: Path) -> None:
        model = quantized(bert(), 4, modules=("intermediate",))
        quantized(model, 8, inputs=DYNAMIC, modules=("attention",))
        export(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["format"] == "mixed-precision"
        assert sorted(group["format"] for group in config["config_groups"].values()) == [
            "int-quantized",
            "pack-quantized",
        ]

    def test_odd_bits_load_back_exactly(self, tmp_path: Path) -> None:
        requests, expected = [], []
        for bits in (1, 2, 3, 5, 6, 7, 8):
            model = quantized(bert(), bits, modules=("layer",))
            export(model, tmp_path / str(bits), check=False)
            requests.append(check.Request(tmp_path / str(bits), type(model).__name__, inputs_of(model)))
            expected.append(run(model, inputs_of(model)))
        for answer, logits in zip(check.reload(requests), expected, strict=True):
            assert not answer.error and torch.equal(answer.tensors["logits"], logits)

    def test_scales_are_those_of_training(self, tmp_path: Path) -> None:
        model = quantized(bert(), 4, modules=("layer",), learned_scale=True)
        name = "bert.encoder.layer.0.intermediate.dense"
        module = model.get_submodule(name)
        with torch.no_grad():
            module._parameters[layers.STEP_SIZE].mul_(1.3)  # type: ignore[union-attr]
        export(model, tmp_path / "out", check=False)
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(stored[f"{name}.weight_scale"][:, 0], module._parameters[layers.STEP_SIZE])
        loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path / "out")
        run(loaded, inputs_of(model))  # the first forward decompresses
        assert torch.equal(loaded.get_submodule(name).weight, layers.quantized_weight(module))

    def test_static_inputs(self, tmp_path: Path) -> None:
        model = bert()
        quantized(model, 8, {"range_calibration": "static"}, ("layer",), inputs_of(model))
        assert export(model, tmp_path / "ct").check["max_difference"] < 1e-5
        assert export(model, tmp_path / "torch", "torch", embeddings="float").check["max_difference"] < 1e-5

    def test_fp8(self, tmp_path: Path) -> None:
        report = export(ZOO["llama"](), tmp_path / "out", scheme="fp8")
        assert (
            report.format == "compressed-tensors"
            and report.check["max_difference_with_exact_activations"] < 1e-4
        )

    def test_quantized_embedding_becomes_floats_and_the_report_says_so(self, tmp_path: Path) -> None:
        report = export(quantized(bert(), 8, modules=("embeddings", "layer")), tmp_path / "out")
        assert any("embedding" in note for note in report.notes)

    def test_torch_embeddings_and_offsets(self, tmp_path: Path) -> None:
        model = quantized(bert(), 4, DYNAMIC, ("layer",), quantization_type="asymmetric")
        report = export(model, tmp_path / "out", "torch")
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert file.get_tensor("bert.embeddings.word_embeddings.weight_codes").dtype is torch.int8
        assert report.check["verdict"] and report.ratio > 2

    def test_conv1d_and_groups_of_columns_on_integer_kernels(self, tmp_path: Path) -> None:
        model = quantized(ZOO["gpt2"](), 4, DYNAMIC, ("mlp",), granularity="per_column_group", group_size=32)
        export(model, tmp_path / "out", "torch", embeddings="float")
        loaded = from_pretrained(tmp_path / "out")
        assert "Int4Linear" in {type(module).__name__ for module in loaded.modules()}

    def test_a_model_of_ones_own(self, tmp_path: Path) -> None:
        model = quantized(ZOO["cnn"](), 8, DYNAMIC)
        report = export(model, tmp_path / "out", "torch")
        loaded = from_pretrained(tmp_path / "out", model=ZOO["cnn"]())
        given = inputs_of(model)
        assert torch.allclose(run(loaded, given), run(model, given), atol=1e-4) and report.check["verdict"]

    def test_16_bit_floats(self, tmp_path: Path) -> None:
        report = export(bert(), tmp_path / "out", dtype=torch.bfloat16)
        assert report.ratio == pytest.approx(2, abs=0.2)

    def test_16_bit_embeddings_beside_exact_scales(self, tmp_path: Path) -> None:
        model = quantized(bert(), 8, DYNAMIC, ("layer",))
        export(model, tmp_path / "out", dtype=torch.float16)
        name = "bert.encoder.layer.0.intermediate.dense"
        loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path / "out")
        run(loaded, inputs_of(model))
        assert torch.equal(
            loaded.get_submodule(name).weight, layers.quantized_weight(model.get_submodule(name))
        )
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert stored["bert.embeddings.word_embeddings.weight"].dtype is torch.float16

    def test_tokenizer_is_copied(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
        export(bert(), tmp_path / "out", tokenizer=tmp_path / "tokenizer", check=False)
        assert (tmp_path / "out" / "tokenizer.json").exists()


class TestOnnx:
    def test_static_ranges_give_quantized_products(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        model = bert()
        quantized(model, 8, {"range_calibration": "static"}, ("layer",), inputs_of(model))
        report = export(model, tmp_path / "out", "onnx")
        operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
        assert operators.count("QuantizeLinear") == 24 and operators.count("DequantizeLinear") == 48
        assert report.check["loaded"].startswith("onnxruntime")

    @pytest.mark.parametrize("bits", [8, 4])
    def test_ranges_per_token_are_integers_too(self, tmp_path: Path, bits: int) -> None:
        """Weights and inputs of training in MatMulInteger: the logits are those of training."""
        onnx = pytest.importorskip("onnx")
        model = quantized(bert(), bits, DYNAMIC, ("layer",))
        report = export(model, tmp_path / "out", "onnx")
        operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
        assert operators.count("MatMulInteger") == 24 and operators.count("QuantizeLinear") == 16
        assert report.check["max_difference"] < 1e-5 < report.check["rms_of_activation_rounding"]

    def test_ranges_per_token_beside_groups_stay_floats_and_the_report_says_so(self, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        grid = {"granularity": "per_column_group", "group_size": 16}
        report = export(quantized(bert(), 4, DYNAMIC, ("layer",), **grid), tmp_path / "out", "onnx")
        assert any("per token" in note for note in report.notes) and report.check["max_difference"] < 1e-4

    def test_patterns_that_onnxruntime_fuses(self, tmp_path: Path) -> None:
        onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        model = bert()
        quantized(model, 8, {"range_calibration": "static"}, ("layer",), inputs_of(model))
        export(model, tmp_path / "out", "onnx", check=False)
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        runtime.InferenceSession(tmp_path / "out" / "model.onnx", options)
        operators = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
        assert operators.count("Attention") == 4 and operators.count("MatMulIntegerToFloat") == 24
        assert operators.count("SkipLayerNormalization") == 8 and operators.count("BiasGelu") == 4

    def test_tables_are_integers_by_default_and_the_report_says_what_it_costs(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        report = export(bert(), tmp_path / "out", "onnx")
        stored = {t.name: t.data_type for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
        assert stored["bert.embeddings.word_embeddings.weight_codes"] == onnx.TensorProto.INT8
        assert "model.bert.embeddings.word_embeddings.weight" not in stored
        assert any("changes logits by" in note for note in report.notes)
        whole = export(bert(), tmp_path / "whole", "onnx", embeddings="float")
        assert not whole.notes and whole.bytes > report.bytes

    def test_16_bit_floats(self, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        model = quantized(bert(), 8, None, ("layer",))
        whole = export(model, tmp_path / "whole", "onnx", check=False)
        report = export(model, tmp_path / "half", "onnx", dtype=torch.bfloat16)
        assert report.check["max_difference"] < 1e-4 and report.bytes < whole.bytes

    def test_generating_models_are_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        with pytest.raises(ExportError, match="generates"):
            export(ZOO["llama"](), tmp_path / "out", "onnx")


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "arguments", "words"),
        [
            ("gpt2", {}, ("transformer.h.0.attn.c_attn", "Conv1D", 'format="torch"')),
            ("vit", {}, ("patch_embeddings.projection", "Conv2d")),
            ("bert_classifier", {"quantization_type": "asymmetric"}, ("layer.0.attention", "asymmetric")),
            ("cnn", {}, ("ResidualCNN", "no config")),
        ],
    )
    def test_names_the_module_and_the_way_out(
        self, tmp_path: Path, name: str, arguments: dict[str, Any], words: tuple[str, ...]
    ) -> None:
        with pytest.raises(ExportError) as caught:
            export(quantized(ZOO[name](), 8, **arguments), tmp_path / "out", "compressed-tensors")
        assert all(word in str(caught.value) for word in words)
        assert not list(tmp_path.iterdir())

    def test_nothing_quantized(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match='format="hf"'):
            export(bert(), tmp_path / "out", "compressed-tensors")
        assert not list(tmp_path.iterdir())

    def test_unknown_format_and_source(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="format is one of"):
            export(bert(), tmp_path / "out", "gguf")
        with pytest.raises(ExportError, match="takes an engine"):
            export(3, tmp_path / "out")
        with pytest.raises(ExportError, match="is no checkpoint"):
            export(tmp_path, tmp_path / "out")

    def test_existing_folder(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("")
        with pytest.raises(ExportError, match="exists"):
            export(bert(), tmp_path / "out")
        with pytest.raises(ExportError, match="is no export of ds_compress, and is not replaced"):
            export(bert(), tmp_path / "out", overwrite=True, check=False)
        (tmp_path / "out" / "mine").unlink()
        for overwrite in (False, True):
            export(bert(), tmp_path / "out", overwrite=overwrite, check=False)
            (tmp_path / "out" / "old").touch()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        export(bert(), tmp_path / "out", overwrite=True, check=False)
        assert not (tmp_path / "out" / "old").exists()


class TestCheck:
    def test_a_wrong_scale_is_noticed_and_nothing_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(requests: Any) -> Any:
            file = requests[0].folder / "model.safetensors"
            from safetensors.torch import save_file

            tensors = load_file(file)
            name = next(name for name in tensors if name.endswith("weight_scale"))
            tensors[name] = tensors[name] * 1.05
            save_file(tensors, file, metadata={"format": "pt"})
            return reload(requests)

        reload = check.reload
        monkeypatch.setattr(check, "reload", broken)
        with pytest.raises(ExportError, match="loaded with other values"):
            export(quantized(bert(), 8, DYNAMIC, ("layer",)), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_the_model_is_as_before(self, tmp_path: Path) -> None:
        model = quantized(bert(), 8, DYNAMIC, ("layer",)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        export(model, tmp_path / "out", "torch")
        assert model.training and all(module.training for module in model.modules())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(m.input_quantizer.enabled for m in model.modules() if getattr(m, "input_quantizer", None))

    def test_cut_heads_are_for_our_loader_only(self, tmp_path: Path) -> None:
        from ds_compress.structure.find import find_groups
        from ds_compress.structure.prunable_group import GroupKind
        from ds_compress.structure.pruning_plan import PruningPlan

        model = bert()
        structures = find_groups(model, GroupKind.HEAD).groups
        apply_pruning(
            model,
            PruningPlan.of(structures, {s.name: torch.arange(2 + n % 2) for n, s in enumerate(structures)}),
        )
        with pytest.raises(ExportError, match="stock transformers would load another model"):
            export(model, tmp_path / "out", "hf")
        assert export(model, tmp_path / "out", "torch", embeddings="float").check["max_difference"] < 1e-5


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        export(
            quantized(bert(), 8, DYNAMIC, ("layer",)),
            tmp_path / "out",
            "torch",
            check=False,
            shard_bytes=20_000,
        )
        return tmp_path / "out"

    def test_missing_shard(self, folder: Path) -> None:
        next(folder.glob("model-00002*")).unlink()
        with pytest.raises(ExportError, match=r"model-00002.* is missing"):
            from_pretrained(folder)
        (folder / FILE_NAME).unlink()
        with pytest.raises(ExportError, match="lacks model-00002"):
            from_pretrained(folder)

    def test_missing_or_broken_report(self, folder: Path) -> None:
        (folder / "ds_compress.json").write_text("{")
        with pytest.raises(ExportError, match=r"ds_compress\.json has 1 bytes"):
            from_pretrained(folder)
        (folder / FILE_NAME).unlink()
        with pytest.raises(ExportError, match="damaged"):
            from_pretrained(folder)
        (folder / "ds_compress.json").unlink()
        with pytest.raises(ExportError, match="no such file"):
            ExportReport.read(folder)

    def test_another_format(self, tmp_path: Path) -> None:
        export(bert(), tmp_path / "hf", check=False)
        with pytest.raises(ExportError, match="load it with transformers"):
            from_pretrained(tmp_path / "hf")

    def test_a_kill_while_writing_leaves_no_folder(self, tmp_path: Path) -> None:
        program = (
            "import os, signal\n"
            "import ds_compress\n"
            "from ds_compress.export import shards\n"
            "from tests.zoo.models import ZOO\n"
            "shards.ShardWriter.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"ds_compress.export(ZOO['bert'](), {str(tmp_path / 'out')!r}, shard_bytes=1000)\n"
        )
        process = subprocess.run([sys.executable, "-c", program], capture_output=True, env=dict(os.environ))
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        export(bert(), tmp_path / "out", check=False)
        assert (tmp_path / "out" / "config.json").exists()
