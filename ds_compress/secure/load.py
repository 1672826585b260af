"""`load_verified`: a signed model, encrypted or not, loaded without a byte of plaintext on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export import load
from ds_compress.export.report import FILE_NAME, ExportReport
from ds_compress.secure import required
from ds_compress.secure.contents import VerifiedFolder

_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"


def load_verified(
    folder: str | os.PathLike[str],
    public_key: str | os.PathLike[str],
    identity: str | os.PathLike[str] | None = None,
    *,
    password: bytes | None = None,
    name: str | None = None,
    min_version: int | None = None,
    seen: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """The model of a signed folder, in eval mode, on the CPU. Every file is read once and is what was signed.

    Encrypted weights are decrypted to memory, one file at a time: about twice the largest file beside the model.

    Args:
        folder: of transformers (`save_pretrained`), or of `ds_compress.export` in any format but "onnx" and "openvino".
        public_key: path or `env:NAME` of the signer's key.
        identity: path or `env:NAME` of the age identity, for an encrypted folder.
        password: of the identity.
        name, min_version, seen: which release it has to be; see `secure.verify`.
        model: a new instance to load into, for models that transformers cannot build from `config.json`.

    Raises:
        TamperedError: the folder is not what was signed.
        KeyUnavailableError: a key is missing or locked.
        ExportError: the folder is what was signed, and holds no model that can be loaded so.
    """
    opened = VerifiedFolder(
        folder, public_key, identity, password=password, name=name, min_version=min_version, seen=seen
    )
    report = None
    if FILE_NAME in opened.names:
        report = ExportReport.parse(opened.read(FILE_NAME).decode(), opened.signed.folder / FILE_NAME)
    if report is not None and report.format == "onnx":
        raise ExportError(
            f"{opened.signed.folder} is an ONNX model: run onnxruntime on secure.VerifiedFolder(...).read('model.onnx')"
        )
    if report is not None and report.format == "openvino":
        raise ExportError(
            f"{opened.signed.folder} is an OpenVINO model: give openvino.Core().read_model what "
            "secure.VerifiedFolder(...).read('model.xml') and read('model.bin') return"
        )
    tensors = _tensors(opened)
    if report is not None and report.format == "torch":
        built = model if model is not None else _skeleton(opened, report.model_class)
        loaded = load.of_report(report, built, load.Stored.of_tensors(tensors))
    elif model is not None:
        loaded = _filled(model, tensors)
    else:
        loaded = _of_transformers(opened, tensors)
    required.mark(loaded, opened.signed)
    return loaded.eval()


def _tensors(opened: VerifiedFolder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load as parse

    if _INDEX in opened.names:
        files = list(dict.fromkeys(opened.json(_INDEX)["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file not in opened.names:
            raise ExportError(
                f"{opened.signed.folder} has no {file}: there is no model in it that could be loaded"
            )
        found |= parse(opened.read(file))
    return found


def _skeleton(opened: VerifiedFolder, model_class: str) -> nn.Module:
    return load.empty_model(_class_of(opened, model_class), _config(opened, model_class))


def _of_transformers(opened: VerifiedFolder, tensors: dict[str, torch.Tensor]) -> nn.Module:
    names = opened.json("config.json").get("architectures") if "config.json" in opened.names else None
    name = names[0] if isinstance(names, list) and names else ""
    # Everything is in memory: transformers sees no path.
    model, found = _class_of(opened, name).from_pretrained(
        None, config=_config(opened, name), state_dict=tensors, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ExportError(f"{opened.signed.folder} lacks {sorted(found['missing_keys'])[:3]} of a {name}")
    if _GENERATION in opened.names and getattr(model, "generation_config", None) is not None:
        model.generation_config = type(model.generation_config).from_dict(opened.json(_GENERATION))
    loaded: nn.Module = model
    return loaded


def _class_of(opened: VerifiedFolder, name: str) -> Any:
    """A model class of transformers, by a name in the signed folder; never code from elsewhere."""
    import transformers

    cls = getattr(transformers, name, None) if name and "config.json" in opened.names else None
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ExportError(
            f"{opened.signed.folder} names no class of transformers ({name!r}): pass model=<a new instance>"
        )
    return cls


def _config(opened: VerifiedFolder, name: str) -> Any:
    return _class_of(opened, name).config_class.from_dict(opened.json("config.json"))


def _filled(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """An instance with the stored weights; a tied weight may be stored under one of its names."""
    result = model.load_state_dict(tensors, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name in tensors}
    missing = [n for n in result.missing_keys if n in parameters and id(parameters[n]) not in loaded]
    if missing or result.unexpected_keys:
        raise ExportError(
            f"the folder is of another model: it lacks {missing[:3]} and has {result.unexpected_keys[:3]} beside"
        )
    return model
