"""`load_verified` gives the model that was exported, from any format, encrypted or not; nothing that was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress import ExportError, secure
from tests.models import tiny_bert, tiny_llama
from tests.secure_folders import encrypted_folder, keys, signed_folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(1, 9).view(1, 8)).logits
    return found


def encrypted(folder: Path) -> Path:
    secure.sign(folder, keys().signing.private)
    out = folder.with_name(folder.name + "-encrypted")
    return secure.encrypt(folder, out, [keys().reading.public], keys().signing.private)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("hf", {}),
        ("hf", {"shard_bytes": 20_000}),
        ("torch", {}),
        ("compressed-tensors", {"scheme": "FP8_DYNAMIC"}),
    ],
    ids=["hf", "hf in shards", "torch", "compressed-tensors"],
)
def test_every_format(tmp_path: Path, format: str, options: dict[str, Any]) -> None:
    model = tiny_llama().eval()
    ds_compress.export(model, tmp_path / "export", format, check=False, **options)
    usual = (
        ds_compress.from_pretrained(tmp_path / "export")
        if format == "torch"
        else type(model).from_pretrained(tmp_path / "export")
    )
    loaded = ds_compress.load_verified(
        encrypted(tmp_path / "export"), keys().signing.public, keys().reading.private
    )
    assert type(loaded) is type(usual) and not loaded.training
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in usual.named_parameters()
    }
    assert torch.equal(logits(loaded), logits(usual))
    # Signed and not encrypted: the same.
    assert torch.equal(
        logits(ds_compress.load_verified(tmp_path / "export", keys().signing.public)), logits(usual)
    )


def test_in_half_precision(tmp_path: Path) -> None:
    model = tiny_bert().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    secure.sign(tmp_path / "model", keys().signing.private)
    loaded = ds_compress.load_verified(tmp_path / "model", keys().signing.public)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_an_instance_of_a_class_that_transformers_has_not(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors")
    secure.sign(tmp_path / "model", keys().signing.private)
    empty = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    loaded = ds_compress.load_verified(tmp_path / "model", keys().signing.public, model=empty)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(ExportError, match="is of another model"):
        ds_compress.load_verified(
            tmp_path / "model", keys().signing.public, model=torch.nn.Sequential(torch.nn.Linear(4, 4))
        )
    with pytest.raises(ExportError, match="names no class of transformers"):
        ds_compress.load_verified(tmp_path / "model", keys().signing.public)


def test_a_signed_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = signed_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "query.weight" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    secure.sign(folder, keys().signing.private)
    with pytest.raises(ExportError, match=r"lacks .*query\.weight"):
        ds_compress.load_verified(folder, keys().signing.public)


def test_names_in_the_index_lead_nowhere(tmp_path: Path) -> None:
    import json

    folder = signed_folder(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "../model/model.safetensors"}})
    )
    secure.sign(folder, keys().signing.private)
    with pytest.raises(ExportError, match=r"has no \.\./model"):
        ds_compress.load_verified(folder, keys().signing.public)


def test_nothing_of_a_changed_folder_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    folder = encrypted_folder(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(safetensors.torch, "load", lambda *_: pytest.fail("parsed what nobody signed"))
    with pytest.raises(secure.TamperedError, match=r"changed: config\.json"):
        ds_compress.load_verified(folder, keys().signing.public, keys().reading.private)


def test_versions_and_names(tmp_path: Path) -> None:
    folder = encrypted_folder(tmp_path / "model", version=3)
    opened = (folder, keys().signing.public, keys().reading.private)
    ds_compress.load_verified(*opened, name="bert", min_version=3)
    with pytest.raises(secure.TamperedError, match="a rollback"):
        ds_compress.load_verified(*opened, min_version=4)


def test_openvino_is_for_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    ds_compress.export(tiny_bert().eval(), tmp_path / "export", "openvino", check=False)
    folder = encrypted(tmp_path / "export")
    with pytest.raises(ExportError, match="OpenVINO model"):
        ds_compress.load_verified(folder, keys().signing.public, keys().reading.private)
    opened = secure.VerifiedFolder(folder, keys().signing.public, keys().reading.private)
    assert openvino.Core().read_model(opened.read("model.xml"), opened.read("model.bin")).inputs


def test_onnx_is_for_onnxruntime(tmp_path: Path) -> None:
    import onnxruntime

    ds_compress.export(tiny_bert().eval(), tmp_path / "export", "onnx", check=False)
    folder = encrypted(tmp_path / "export")
    with pytest.raises(ExportError, match="onnxruntime"):
        ds_compress.load_verified(folder, keys().signing.public, keys().reading.private)
    opened = secure.VerifiedFolder(folder, keys().signing.public, keys().reading.private)
    assert onnxruntime.InferenceSession(opened.read("model.onnx"), providers=["CPUExecutionProvider"])
