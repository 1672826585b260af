"""Folders of format torch with many zeros: smaller, the same to the last bit wherever they are read, served sparse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import ds_compress
from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export import int8_product, sparse_container
from ds_compress.export.fuse import FusedPart
from ds_compress.export.int8_product import Int8Product, blocks_worth_leaving_out
from ds_compress.export.load import from_pretrained
from ds_compress.export.report import ExportReport
from ds_compress.export.serve import Int8Linear
from ds_compress.export.whole import seal
from ds_compress.modelinfo.experts import fused_experts
from tests.models import tiny_bert
from tests.quantized import quantized
from tests.zoo.mixtures import mixture
from tests.zoo.models import ZOO, inputs_of

DYNAMIC = {"range_calibration": "dynamic"}


def pruned(model: nn.Module, zeros: float = 0.8, block: tuple[int, int] = (1, 1)) -> nn.Module:
    """With so many blocks of each matrix set to zero, at random."""
    torch.manual_seed(3)
    rows, columns = block
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() < 2:
                continue
            matrix = weight.view(-1, weight.shape[-1])
            kept = torch.rand(-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)) >= zeros
            kept = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            matrix.masked_fill_(~kept[: matrix.shape[0], : matrix.shape[1]], 0.0)
    return model


def bert(**changed: Any) -> nn.Module:
    return tiny_bert(hidden=64, **changed)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp32": (lambda: pruned(bert()), {"embeddings": "float"}),
    "bf16": (lambda: pruned(bert()).to(torch.bfloat16), {"embeddings": "float"}),
    "int8 and tables": (lambda: quantized(pruned(bert()), 8, DYNAMIC, ("layer",)), {}),
    "int8 of blocks": (lambda: quantized(pruned(bert(), 0.9, (4, 16)), 8, DYNAMIC, ("layer",)), {}),
    "int8 static": (
        lambda: quantized(pruned(bert()), 8, {"range_calibration": "static"}, ("layer",), inputs_of(bert())),
        {},
    ),
    "int4": (lambda: quantized(pruned(bert(), 0.9), 4, DYNAMIC, ("layer",)), {}),
    "ternary": (lambda: quantized(pruned(bert(), 0.9), 2, DYNAMIC, ("layer",)), {}),
    "asymmetric": (
        lambda: quantized(
            pruned(bert(), 0.9),
            8,
            DYNAMIC,
            ("layer",),
            quantization_type="asymmetric",
            granularity="per_tensor",
        ),
        {},
    ),
    "fp8": (lambda: pruned(bert(), 0.9), {"scheme": "fp8"}),
    "conv1d": (lambda: quantized(pruned(ZOO["gpt2"]()), 8, DYNAMIC, ("mlp",)), {}),
}


def containers_of(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    return [
        name
        for file in files
        for name, tensor in load_file(file).items()
        if sparse_container.dense_name(name, tensor)
    ]


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def dense_twin(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(sparse_container, "LEAST_ZEROS", 2.0)
        export(model, folder, "torch", check=False, **options)
    assert not containers_of(folder)
    return folder


def outputs(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**given).logits
    return result


@pytest.mark.parametrize("case", CASES)
def test_it_is_smaller_and_the_same_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    build, options = CASES[case]
    model = build()
    report = export(model, tmp_path / "sparse", "torch", check=False, **options)
    assert containers_of(tmp_path / "sparse")
    dense = dense_twin(model, tmp_path / "dense", monkeypatch, **options)
    assert weight_bytes(tmp_path / "sparse") < 0.9 * weight_bytes(dense)
    given = inputs_of(model)
    ways: tuple[dict[str, Any], ...] = ({}, {"fused": False}, {"activations": False})
    for rest in ways:
        mine, theirs = from_pretrained(tmp_path / "sparse", **rest), from_pretrained(dense, **rest)
        assert torch.equal(outputs(mine, given), outputs(theirs, given)), rest
        for (name, one), (_, other) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(one, other), name
    auto = getattr(hf, report.model_class).from_pretrained(tmp_path / "sparse")
    assert torch.equal(outputs(auto, given), outputs(from_pretrained(dense), given))


def test_shards_hold_containers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(pruned(bert()), 8, DYNAMIC, ("layer",))
    export(model, tmp_path / "out", "torch", shard_bytes=8000, check=False)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    dense = dense_twin(model, tmp_path / "dense", monkeypatch)
    given = inputs_of(model)
    assert torch.equal(
        outputs(from_pretrained(tmp_path / "out"), given), outputs(from_pretrained(dense), given)
    )


@pytest.mark.parametrize("quantize", [True, False], ids=["int8", "float"])
def test_stacks_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: bool) -> None:
    model = pruned(mixture("mixtral", hidden_size=64, intermediate_size=64))
    if quantize:
        quantized(model, 8, DYNAMIC, ("experts",))
    report = export(model, tmp_path / "out", "torch", check=False, embeddings="float")
    stacks = [name for name, module in model.named_modules() if fused_experts(module)]
    stored = containers_of(tmp_path / "out")
    assert stacks and all(any(name.startswith(stack) for name in stored) for stack in stacks)
    dense = dense_twin(model, tmp_path / "dense", monkeypatch, embeddings="float")
    given = inputs_of(model)
    expected = outputs(from_pretrained(dense), given)
    assert torch.equal(outputs(from_pretrained(tmp_path / "out"), given), expected)
    auto = getattr(hf, report.model_class).from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(auto, given), expected)


def test_a_signed_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyrage")
    from ds_compress import secure
    from tests.secure_folders import keys

    model = quantized(pruned(bert()), 8, DYNAMIC, ("layer",))
    export(model, tmp_path / "out", "torch", check=False)
    secure.sign(tmp_path / "out", keys().signing.private, name="bert", version=1)
    loaded = ds_compress.load_verified(tmp_path / "out", keys().signing.public)
    given = inputs_of(model)
    assert torch.equal(outputs(loaded, given), outputs(from_pretrained(tmp_path / "out"), given))


def test_the_report_says_so_and_older_versions_refuse_it(tmp_path: Path) -> None:
    report = export(quantized(pruned(bert()), 8, DYNAMIC, ("layer",)), tmp_path / "out", "torch", check=False)
    written = json.loads((tmp_path / "out" / "ds_compress.json").read_text())
    assert written["format_version"] == 2 and ExportReport.read(tmp_path / "out").bytes == report.bytes
    layer = report.modules["bert.encoder.layer.0.intermediate.dense"]
    assert layer["containers"] == 1 and layer["bytes"] < 0.5 * layer["parameters"]
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(report)
    assert "int8, inputs int8 dynamic, without its zeros" in captured.get()
    assert not any("zeros are stored" in note for note in report.notes)
    export(quantized(bert(), 8, DYNAMIC, ("layer",)), tmp_path / "dense", "torch", check=False)
    assert json.loads((tmp_path / "dense" / "ds_compress.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("cut", [1, 40])
def test_a_damaged_container_names_the_tensor_and_the_file(tmp_path: Path, cut: int) -> None:
    """Behind a manifest that fits: one that somebody wrote anew."""
    export(quantized(pruned(bert()), 8, DYNAMIC, ("layer",)), tmp_path / "out", "torch", check=False)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "bert.encoder.layer.1.output.dense.weight_codes_sparse"
    tensors[name] = tensors[name][:-cut].clone()
    save_file(tensors, file, {"format": "pt"})
    for manifest in (tmp_path / "out").glob("ds_compress_manifest*"):
        manifest.unlink()
    seal(tmp_path / "out")
    for load in (from_pretrained, hf.BertForSequenceClassification.from_pretrained):
        with pytest.raises(
            ExportError, match=r"model.safetensors: bert.*1.output.dense.weight_codes_sparse is dam"
        ):
            load(tmp_path / "out")


def test_codes_of_another_shape_are_an_error(tmp_path: Path) -> None:
    export(quantized(pruned(bert()), 8, DYNAMIC, ("layer",)), tmp_path / "out", "torch", check=False)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    layer = "bert.encoder.layer.{}.output.dense.weight_codes_sparse"
    other = "bert.encoder.layer.0.intermediate.dense.weight_codes_sparse"
    tensors[layer.format(1)] = tensors[other]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    (tmp_path / "out" / "ds_compress_manifest.json").unlink()
    with pytest.raises(
        ExportError, match=r"layer.1.output.dense: weight_codes is .192, 64., and .64, 192. is exp"
    ):
        from_pretrained(tmp_path / "out")


# --- the kernel that leaves out blocks ------------------------------------------------------------------------


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AMX, whichever this one is."""
    monkeypatch.setattr(int8_product, "has_int8_tiles", lambda: False)


def products_of(model: nn.Module) -> dict[str, Int8Product]:
    """Of every layer that has run, fused ones by their first part."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedPart):
            found[name] = module._together.product
        elif isinstance(module, Int8Linear) and module._product is not None:
            found[name] = module._product
    return found


@pytest.mark.usefixtures("no_tiles")
def test_blocks_of_zeros_run_on_the_sparse_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(pruned(bert(), 0.85, (4, 16)), 8, DYNAMIC, ("layer",))
    export(model, tmp_path / "out", "torch", check=False)
    given = inputs_of(model)
    served = from_pretrained(tmp_path / "out")
    mine = outputs(served, given)
    products = products_of(served)
    assert any("query" in name for name in products) and len(products) == 12
    assert sum(product.is_block_sparse for product in products.values()) >= 10
    monkeypatch.setattr(int8_product, "LEAST_ZERO_BLOCKS", 1.1)
    dense = from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(dense, given), mine)
    assert not any(product.is_block_sparse for product in products_of(dense).values())


@pytest.mark.parametrize(
    ("tiles", "zeros", "block", "expected"),
    [
        (False, 0.7, (4, 16), True),
        (False, 0.6, (4, 16), False),
        (False, 0.8, (1, 16), False),
        (True, 0.9, (4, 16), True),
        (True, 0.85, (4, 16), False),
    ],
)
def test_only_where_it_pays(
    tiles: bool, zeros: float, block: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_product, "has_int8_tiles", lambda: tiles)
    rows, columns = 400, 640
    blocks = torch.ones(rows // block[0], columns // block[1])
    torch.manual_seed(0)
    blocks.view(-1)[torch.randperm(blocks.numel())[: round(zeros * blocks.numel())]] = 0
    values = torch.randint(1, 100, (rows, columns), dtype=torch.int8)
    values *= blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1).to(torch.int8)
    product = Int8Product.of(values, blocks_worth_leaving_out(values))
    assert product.is_block_sparse == expected
    x, scale = torch.randn(3, columns), torch.rand(rows)
    assert torch.equal(
        product(x, scale, None, None, 127),
        ds_compress.ops.functional.int8_linear(x, ds_compress.ops.functional.int8_linear_pack(values), scale),
    )


@pytest.mark.usefixtures("no_tiles")
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_a_layer_compiles_before_it_has_run(tmp_path: Path, zeros: float) -> None:
    """Packed within the graph, at the first call."""
    model = quantized(pruned(bert(), zeros, (4, 16)), 8, DYNAMIC, ("layer",))
    export(model, tmp_path / "out", "torch", check=False)
    name, x = "bert.encoder.layer.0.output.dense", torch.randn(3, 192)
    layer, other = (from_pretrained(tmp_path / "out").get_submodule(name) for _ in range(2))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), other(x))
    assert isinstance(other, Int8Linear) and other._product is not None
    assert other._product.is_block_sparse == bool(zeros)
