"""Format `openvino`: integers of training in the IR, int8 products in the runtime, and no PyTorch in the server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export import check
from ds_compress.export.fingerprint import fingerprint as fingerprint_of_torch
from ds_compress.export.inputs import run
from ds_compress.export.reload_openvino import dequantized, fingerprint, integers
from ds_compress.quant import layers
from tests.grids import in_turn
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

openvino = pytest.importorskip("openvino")

STATIC, DYNAMIC = {"range_calibration": "static"}, {"range_calibration": "dynamic"}
F32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
NAME = "bert.encoder.layer.1.intermediate.dense"


def bert() -> nn.Module:
    return ZOO["bert_classifier"]()


def albert() -> nn.Module:
    """Its layers are one module that is called again."""
    torch.manual_seed(0)
    config = hf.AlbertConfig(vocab_size=61, embedding_size=16, hidden_size=32, num_hidden_layers=3)
    config.num_attention_heads, config.intermediate_size, config.max_position_embeddings = 4, 64, 40
    return hf.AlbertForSequenceClassification(config).eval()


def gpt2_classifier() -> nn.Module:
    torch.manual_seed(0)
    config: Any = ZOO["gpt2"]().config
    config.num_labels, config.pad_token_id = 3, 0
    return hf.GPT2ForSequenceClassification(config).eval()


def static(model: nn.Module, bits: int = 8, modules: tuple[str, ...] = ("layer",)) -> nn.Module:
    return quantized(model, bits, STATIC, modules, run=inputs_of(model))


def read(folder: Path) -> Any:
    return openvino.Core().read_model(str(folder / "model.xml"))


def products(compiled: Any) -> Iterator[str]:
    """The precision of each product that runs."""
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: value.value for key, value in node.get_rt_info().items() if hasattr(value, "value")}
        if facts.get("layerType") == "FullyConnected":
            yield str(facts["runtimePrecision"])


@pytest.mark.parametrize("bits", [8, 4])
def test_static_ranges_run_as_int8_products(tmp_path: Path, bits: int) -> None:
    report = export(static(bert(), bits), tmp_path / "out", "openvino")
    graph = read(tmp_path / "out")
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("FakeQuantize") == 16  # query, key and value have one
    precisions = list(products(openvino.Core().compile_model(graph, "CPU", F32)))
    assert len(precisions) == 26 and sum(p in ("i8", "u8") for p in precisions) == 24
    # Weights, and scales of inputs, by their values.
    assert report.check["tensors_compared"] == 24 + 24 + 3
    assert report.check["loaded"].startswith("openvino 20")


GRIDS = ("channel", "groups", "asymmetric groups")
CELLS = [(grid, bits) for number, bits in enumerate((2, 3, 4, 5, 8)) for grid in in_turn(GRIDS, number)]


@pytest.mark.parametrize(("grid", "bits"), CELLS)
def test_the_integers_are_those_of_training(tmp_path: Path, bits: int, grid: str) -> None:
    if grid.startswith("asymmetric") and bits < 3:
        pytest.skip("no such grid")
    shared = {"granularity": "per_column_group", "group_size": 16} if "groups" in grid else {}
    if grid.startswith("asymmetric"):
        shared["quantization_type"] = "asymmetric"
    small: Any = bert()
    small.bert.encoder.layer = small.bert.encoder.layer[:2]
    small.config.num_hidden_layers = 2
    model = quantized(small, bits, None, ("layer",), **shared)
    report = export(model, tmp_path / "out", "openvino", check=bits == 3)
    assert bits != 3 or report.check["max_difference"] < 1e-5
    stored = {node.get_friendly_name(): node for node in read(tmp_path / "out").get_ops()}
    kind = stored[f"{NAME}.weight_codes"].get_output_element_type(0).get_type_name()
    assert kind == ("u" if grid.startswith("asymmetric") else "i") + ("4" if bits <= 4 else "8")
    weight = dequantized(stored[NAME].input_value(1).get_node())
    trained = layers.quantized_weight(model.get_submodule(NAME)).detach().numpy()
    assert np.allclose(weight, trained, rtol=0, atol=1e-6) and np.abs(trained).max() > 0.1
    assert len(np.unique(integers(stored[f"{NAME}.weight_codes"]))) <= 2**bits


def test_ranges_per_token_are_a_property_in_the_file(tmp_path: Path) -> None:
    model = quantized(bert(), 8, DYNAMIC, ("layer",))
    report = export(model, tmp_path / "out", "openvino")
    graph = read(tmp_path / "out")
    assert graph.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).value == "32"
    compiled = openvino.Core().compile_model(graph, "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 32
    assert any("one scale for 32 of their columns" in note for note in report.notes)
    assert report.check["rms_of_activation_rounding"] > 0


@pytest.mark.parametrize("inputs", [DYNAMIC | {"quantization_type": "asymmetric"}, None])
def test_what_the_runtime_would_round_is_said(tmp_path: Path, inputs: Any) -> None:
    model = quantized(bert(), 8, inputs, ("layer",))
    report = export(model, tmp_path / "out", "openvino")
    assert not read(tmp_path / "out").has_rt_info(["runtime_options"])
    assert any("DYNAMIC_QUANTIZATION_GROUP_SIZE is 0" in note for note in report.notes)
    assert any("stay floats" in note for note in report.notes) == (inputs is not None)
    assert report.check["max_difference"] < 1e-5


def test_static_and_ranges_per_token_in_one_model(tmp_path: Path) -> None:
    model = quantized(bert(), 8, DYNAMIC, ("intermediate",))
    static(model, 8, ("attention",))
    report = export(model, tmp_path / "out", "openvino")
    assert report.check["verdict"]
    assert read(tmp_path / "out").has_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


@pytest.mark.parametrize("build", [albert, gpt2_classifier, ZOO["cnn"], ZOO["vit"], ZOO["bert"]])
def test_other_architectures(tmp_path: Path, build: Any) -> None:
    """A module that is called again, Conv1D, convolutions and their normalizations, a tied table."""
    model = static(build(), modules=("*",))
    report = export(model, tmp_path / "out", "openvino", inputs=inputs_of(model))
    assert report.check["verdict"] and report.check["tensors_compared"] > 5


def test_other_shapes_than_the_traced_ones(tmp_path: Path) -> None:
    model = quantized(bert(), 8, None, ("layer",))
    export(model, tmp_path / "out", "openvino", embeddings="float", check=False)
    compiled = openvino.Core().compile_model(read(tmp_path / "out"), "CPU", F32)
    for batch, length in ((1, 3), (5, 31)):
        given = {"input_ids": torch.randint(0, 61, (batch, length))}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        found = compiled({name: value.numpy() for name, value in given.items()})["logits"]
        assert torch.allclose(torch.from_numpy(found), run(model, given), atol=1e-5)


def test_a_server_needs_no_torch(tmp_path: Path) -> None:
    export(static(bert()), tmp_path / "out", "openvino", check=False)
    program = (
        "import sys, numpy, openvino\n"
        f"compiled = openvino.Core().compile_model({str(tmp_path / 'out' / 'model.xml')!r}, 'CPU')\n"
        "ids = numpy.ones((2, 7), numpy.int64)\n"
        "logits = compiled({'input_ids': ids, 'attention_mask': ids})['logits']\n"
        "assert logits.shape == (2, 3) and numpy.isfinite(logits).all()\n"
        "print([name for name in ('torch', 'ds_compress', 'transformers', 'nncf') if name in sys.modules])\n"
    )
    here = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=here, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a scale, an integer, a range, and a bias that no fingerprint knows."""
    names = [f"{NAME}.weight_scale", "bert.embeddings.word_embeddings.weight_codes", "range", "bias"]
    original, verdict, seen = check.reload, check.verdict, {}

    def damaged(requests: Any) -> Any:
        folders = [requests[0].folder]
        for number, name in enumerate(names):
            folders.append(tmp_path / f"damage{number}")
            folders[-1].mkdir()
            graph = read(requests[0].folder)
            constant = next(node for node in graph.get_ordered_ops() if _is_damaged(node, name))
            values = np.array(constant.data)
            changed = (values * 1.2).astype(values.dtype)
            assert not np.array_equal(values, changed)
            other = openvino.opset13.constant(changed)
            other.set_friendly_name(constant.get_friendly_name())
            constant.output(0).replace(other.output(0))
            openvino.save_model(graph, folders[-1] / "model.xml", compress_to_fp16=False)
        answers = original([check.Request(f, "", requests[0].inputs, "openvino") for f in folders])
        seen["answers"] = answers[1:]
        return answers[:1]

    def judged(expected: Any, answer: Any) -> Any:
        seen["expected"] = expected
        return verdict(expected, answer)

    monkeypatch.setattr(check, "reload", damaged)
    monkeypatch.setattr(check, "verdict", judged)
    export(static(bert()), tmp_path / "out", "openvino")
    for name, answer in zip(names, seen["answers"], strict=True):
        assert not answer.error, answer.error
        with pytest.raises(ExportError):
            pytest.fail(f"{name} was not noticed: {verdict(seen['expected'], answer)}")


def _is_damaged(node: Any, name: str) -> bool:
    if node.get_type_name() != "Constant":
        return False
    readers = list(node.output(0).get_target_inputs())
    if name == "range":
        return any(r.get_node().get_type_name() == "FakeQuantize" and r.get_index() == 4 for r in readers)
    if name == "bias":
        return [*node.get_output_shape(0)] in ([1, 1, 64], [64]) and np.asarray(node.data).dtype == np.float32
    return bool(node.get_friendly_name() == name)


def test_16_bit_floats_are_stored_and_nothing_else_is_rounded(tmp_path: Path) -> None:
    model = quantized(bert(), 8, None, ("layer",))
    export(model, tmp_path / "whole", "openvino", check=False)
    report = export(model, tmp_path / "half", "openvino", dtype=torch.float16)
    assert report.check["max_difference"] < 1e-4
    half, whole = ((tmp_path / name / "model.bin").stat().st_size for name in ("half", "whole"))
    assert half < whole
    kinds = {
        node.get_friendly_name(): node.get_output_element_type(0)
        for node in read(tmp_path / "half").get_ops()
    }
    assert kinds[f"{NAME}.weight_scale"] == openvino.Type.f32
    assert openvino.Type.f16 in kinds.values()


@pytest.mark.parametrize("size", [1, 7, 2**20 + 3])
def test_fingerprints_are_those_of_torch(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert np.allclose(fingerprint(values.numpy()), fingerprint_of_torch(values), rtol=1e-9)


class TestRefusals:
    def test_generating_models(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match='format "openvino" is for encoders'):
            export(ZOO["llama"](), tmp_path / "out", "openvino")

    def test_floats(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match='format "openvino" stores integers only'):
            export(bert(), tmp_path / "out", "openvino", scheme="MXFP4A16")

    def test_words_that_mean_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match='embeddings is "int8" or "float"'):
            export(bert(), tmp_path / "out", "openvino", embeddings="int4")

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(ExportError, match=r"ds_compress\[openvino\]"):
            export(bert(), tmp_path / "out", "openvino")

    def test_another_weight_in_the_graph(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The trace is compared with what was trained before it is edited."""
        from ds_compress.export import openvino as module

        converted = module.converted

        def swapped(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
            graph, places = converted(model, inputs)
            query, key = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
            return graph, places | {query: places[key], key: places[query]}

        monkeypatch.setattr(module, "converted", swapped)
        with pytest.raises(ExportError, match="another weight at its place"):
            export(static(bert()), tmp_path / "out", "openvino", check=False)
        assert not list(tmp_path.iterdir())


def test_no_conversion_is_told_over_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As openvino.convert_model does, where its package for that is installed."""
    from openvino.tools.ovc import convert_impl

    def told(*_: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr(convert_impl, "init_ovc_telemetry", told)
    with pytest.raises(AssertionError, match="telemetry"):
        openvino.convert_model(nn.Linear(2, 2), example_input=torch.zeros(1, 2))
    export(quantized(bert(), 8, None, ("layer",)), tmp_path / "out", "openvino", check=False)
