"""`from_pretrained`: the `torch` format as a module that runs on the integer kernels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.attributes import restore
from ds_compress.export.fuse import fuse
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme
from ds_compress.export.report import ExportReport
from ds_compress.export.serve import serving_module
from ds_compress.export.serve_experts import serve_experts
from ds_compress.export.served_attention import use_served_attention
from ds_compress.export.serving_tensors import (
    CODES,
    INSTEAD_OF_WEIGHT,
    PACKED,
    PLAIN_VALUES,
    loaded_experts,
    loaded_weight,
)
from ds_compress.export.sparse_container import dense_name, unpacked
from ds_compress.export.whole import refuse_damaged
from ds_compress.files import inside

logger = logging.getLogger("ds_compress")

_OF_WEIGHT = (CODES, PACKED, "weight_scale", "weight_offset", "weight_global_scale")


def from_pretrained(
    folder: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    fused: bool = True,
    activations: bool = True,
) -> nn.Module:
    """The model of a folder that `ds_compress.export(..., format="torch")` wrote, in eval mode, on the CPU.

    Args:
        folder: with `ds_compress.json`.
        model: a new instance to load into, for models that transformers cannot build from `config.json`.
        fused: whether layers that share an input or feed an activation run as one kernel, and attention of short
            sequences by this library's.
        activations: False does not quantize inputs and computes in floats, with the same values of weights, which are
            dequantized when they are loaded.

    Raises:
        ExportError: the folder is incomplete, damaged, or of another format.
    """
    path = Path(folder)
    refuse_damaged(path)
    report = ExportReport.read(path)
    if report.format != "torch":
        raise ExportError(
            f'{path} is of format "{report.format}": load it with transformers, {report.model_class}.from_pretrained'
        )
    if model is None:
        model = meta_model(path, report.model_class)
    return of_report(report, model, Stored(path), fused, activations)


def of_report(
    report: ExportReport, model: nn.Module, stored: Stored, fused: bool = True, activations: bool = True
) -> nn.Module:
    """`model`, a new instance of the exported class, with what is stored, as the report says how; in place."""
    restore(model, report.attributes)
    schemes = {name: module.get("scheme", {}) for name, module in report.modules.items()}
    serve(model, schemes, stored, fused, activations)
    for method in ("save_pretrained", "push_to_hub"):
        if hasattr(model, method):
            vars(model)[method] = _refuse_to_save
    return model


def serve(
    model: nn.Module,
    schemes: Mapping[str, Mapping[str, Any]],
    stored: Stored,
    fused: bool = True,
    activations: bool = True,
) -> None:
    """Makes `model`, a new instance of the exported class, the model of a folder, in place.

    schemes: how each module is stored, by its name; see `ServingFormat`. fused, activations: as `from_pretrained`.

    Raises:
        ExportError: the folder lacks a weight.
    """
    if not activations:
        schemes = {
            name: {k: v for k, v in scheme.items() if k not in ("input", "expert_inputs")}
            for name, scheme in schemes.items()
        }
    for name, module in list(model.named_modules()):
        fill(module, stored.of_module(name, codes=False))
    dequantized = {}
    for name, scheme in schemes.items():
        if "experts" in scheme:
            try:
                reason = _serve_experts(model.get_submodule(name), scheme, stored.of_module(name))
            except ValueError as error:
                raise ExportError(f"{name}: {error}") from error
            if reason is not None and activations:
                dequantized[name] = reason
        _serve(model, name, scheme, stored, weight_only=activations)
    _log_dequantized(dequantized)
    _tie(model, schemes, stored, weight_only=activations)
    _check_complete(model)
    model.requires_grad_(False).eval()
    if fused:
        fuse(model)
        use_served_attention(model)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """In place of a served model's own methods: transformers finds its integers in no parameter, and would write a
    folder without them."""
    raise ExportError(
        "this model serves an export, and the folder of that is its saved form: copy the folder, or upload it by "
        "`hf upload` or huggingface_hub's upload_folder"
    )


class Stored:
    """Tensors by name, from one file or several. A weight that is stored in integers is not among them, and what is
    stored in a container (see `sparse_container`) has the name and the values that it had before.

    renamed: the name in the files for that of a module, where they differ.
    """

    def __init__(self, folder: Path, renamed: Callable[[str], str] | None = None) -> None:
        self._renamed = renamed
        self._in_memory: Mapping[str, torch.Tensor] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        self._where: dict[str, Path] = {}
        for file in files:
            try:
                path = inside(folder, file)
            except ValueError as error:
                raise ExportError(f"{index}: {error}") from error
            if not path.exists():
                raise ExportError(f"{folder} lacks {file}: the export is incomplete")
            with safe_open(path, framework="pt") as opened:
                self._where |= dict.fromkeys(opened.keys(), path)
        self._by_module = _names_by_module(self._where)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Stored:
        """What the files of a folder hold, where it is in memory already."""
        stored = cls.__new__(cls)
        stored._renamed, stored._in_memory, stored._where = None, tensors, {}
        stored._by_module = _names_by_module(tensors)
        return stored

    def of_module(self, module: str, codes: bool = True) -> dict[str, torch.Tensor]:
        """By local name; codes: False leaves containers of codes packed, for who does not look at them.

        Raises:
            ExportError: a container is damaged.
        """
        found, containers = {}, {}
        for name in self._by_module.get(self._renamed(module) if self._renamed else module, ()):
            local, tensor = name.rpartition(".")[2], self._tensor(name)
            dense = dense_name(local, tensor)
            if dense is None:
                found[local] = tensor
            else:
                is_needed = codes or not dense.endswith(CODES)
                containers[dense] = self._unpacked(name, tensor) if is_needed else tensor
        found |= containers
        if any(name in found for name in INSTEAD_OF_WEIGHT):
            found.pop("weight", None)
            if (values := found.pop(PLAIN_VALUES, None)) is not None:
                found["weight"] = values
        for name in [name for name in found if f"{name}_weight_scale" in found]:
            del found[name]  # empty, beside the tensors of quantized experts
        return found

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self._in_memory:
            return self._in_memory[name]
        with safe_open(self._where[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def _unpacked(self, name: str, container: torch.Tensor) -> torch.Tensor:
        try:
            return unpacked(container)
        except ValueError as error:
            where = f"{self._where[name]}: " if name in self._where else ""
            raise ExportError(f"{where}{name} is damaged: {error}") from error


def meta_model(folder: Path, model_class: str) -> nn.Module:
    """The vanilla HF class without weights; buffers are computed, as they are not all stored."""
    import transformers

    cls = getattr(transformers, model_class, None)
    if cls is None or not (folder / "config.json").exists():
        raise ExportError(
            f"transformers has no {model_class}: pass model=<a new instance> to from_pretrained"
        )
    return empty_model(cls, cls.config_class.from_pretrained(folder))


def empty_model(cls: Any, config: Any) -> nn.Module:
    """An instance of a class of transformers without weights; its buffers are computed."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        built: nn.Module = cls(config)
    return built


def _names_by_module(names: Iterable[str]) -> dict[str, list[str]]:
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return by_module


def fill(module: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    """Sets parameters (floats as fp32) and buffers by local name, whatever their size is."""
    for name, tensor in stored.items():
        if name in module._parameters:
            is_whole = tensor.is_floating_point()
            module._parameters[name] = nn.Parameter(
                tensor.float() if is_whole else tensor, requires_grad=False
            )
        elif name in module._buffers:
            before = module._buffers[name]
            module._buffers[name] = tensor if before is None else tensor.to(before.dtype)
    weight = module._parameters.get("weight")
    if weight is not None and isinstance(module, (nn.Linear, nn.Embedding)):
        rows, columns = weight.shape
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = rows, columns
        else:
            module.num_embeddings, module.embedding_dim = rows, columns


def _serve(model: nn.Module, name: str, scheme: Mapping[str, Any], stored: Stored, weight_only: bool) -> None:
    if "weight" not in scheme and "input" not in scheme:
        return
    tensors = {local: tensor for local, tensor in stored.of_module(name).items() if local in _OF_WEIGHT}
    quantized = _loaded(name, tensors, scheme["weight"]) if "weight" in scheme else None
    used = InputScheme.from_json(scheme["input"]) if "input" in scheme else None
    served = serving_module(model.get_submodule(name), quantized, used, weight_only)
    if name:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, served)


def _loaded(name: str, tensors: dict[str, torch.Tensor], scheme: dict[str, Any]) -> QuantizedMatrix:
    try:
        return loaded_weight(tensors, scheme)
    except ValueError as error:
        raise ExportError(f"{name}: {error}") from error


def _serve_experts(
    module: nn.Module, scheme: Mapping[str, Any], stored: dict[str, torch.Tensor]
) -> str | None:
    """Why they are dequantized, None where they run on the kernels."""
    experts = {name: loaded_experts(name, stored, own) for name, own in scheme["experts"].items()}
    inputs = {name: InputScheme.from_json(data) for name, data in scheme.get("expert_inputs", {}).items()}
    return serve_experts(module, experts, inputs)


def _log_dequantized(reasons: Mapping[str, str]) -> None:
    """One line for all modules of experts that compute in floats."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    parts = [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} ({reason})"
        for reason, names in by_reason.items()
    ]
    if parts:
        logger.warning("ds_compress: experts are dequantized and compute in fp32: %s", "; ".join(parts))


def _tie(
    model: nn.Module, schemes: Mapping[str, Mapping[str, Any]], stored: Stored, weight_only: bool
) -> None:
    tables: dict[str, str] = {}
    for name, scheme in schemes.items():
        for local, first in scheme.get("ties", {}).items():
            owner, _, first_local = first.rpartition(".")
            if "weight" in schemes.get(owner, {}) and first_local == "weight":
                tables[name] = owner
            else:
                model.get_submodule(name)._parameters[local] = model.get_parameter(first)
    # Last: the module that takes such a weight copies its bias, which may be tied, too.
    for name, owner in tables.items():
        quantized = _loaded(owner, stored.of_module(owner), schemes[owner]["weight"])
        _replace(model, name, serving_module(model.get_submodule(name), quantized, None, weight_only))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _check_complete(model: nn.Module) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ExportError(f"the folder lacks {', '.join(missing[:4])} ({len(missing)} in all)")
