"""`AutoModel...from_pretrained` for folders of `format="torch"`: the quantizer that their `quant_method` names.

transformers builds the model from the config and loads what is stored under its parameters' own names; the layers that
are stored in codes are then put in their places, as `ds_compress.from_pretrained` does it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ds_compress.export.attributes import restore
from ds_compress.export.load import Stored, serve
from ds_compress.export.serving_format import QUANT_METHOD
from ds_compress.export.whole import refuse_damaged

_OURS = {r"(\.|_proj_)weight_(codes|packed|scale|offset|global_scale|values)(_sparse)?$", r"[^.]_sparse$"}


class DsCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a folder of `format="torch"`.

    modules: how each is stored, by name. attributes: numbers of modules that the model's config cannot say.
    shapes: of parameters that were cut.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        attributes: dict[str, dict[str, float]] | None = None,
        shapes: dict[str, list[int]] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config has {', '.join(sorted(unknown))}: it is of a newer version of ds_compress"
            )
        self.quant_method = quant_method
        self.modules, self.attributes, self.shapes = modules or {}, attributes or {}, shapes or {}


class DsCompressQuantizer(HfQuantizer):
    """Loads only: a folder is written by `ds_compress.export`."""

    requires_calibration = True
    quantization_config: DsCompressConfig

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype is not torch.float32:
            raise ValueError(
                f"{QUANT_METHOD}: its layers compute in float32; got dtype={dtype}, leave it out"
            )
        return dtype

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not all(str(place) in ("None", "cpu", "auto") for place in places):
            raise ValueError(f"{QUANT_METHOD} loads on the CPU; got device_map={device_map}, leave it out")
        return None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise ValueError(
                f"{QUANT_METHOD}: it is loaded from the files that ds_compress.export wrote, got none"
            )
        self._folder = Path(files[0]).parent
        refuse_damaged(self._folder, only=[self._folder / "config.json", *map(Path, files)])
        self._added, self._removed = _prefixes(model, self.quantization_config)
        config = self.quantization_config
        restore(
            model,
            {self._in_model(n): values for n, values in config.attributes.items() if self._has(model, n)},
        )
        for name, shape in config.shapes.items():
            self._shape(model, name, shape)
        ignored = set(_OURS)
        for name, scheme in config.modules.items():
            if not self._has(model, name):
                continue
            for local, shape in scheme.get("sparse", {}).items():
                self._shape(model, f"{name}.{local}", shape)
            for matrix, own in scheme.get("experts", {}).items():
                self._shape(model, f"{name}.{matrix}", [0, *own["shape"]])
            if "weight" in scheme:
                self._shape(model, f"{name}.weight", [0, *scheme["weight"]["shape"][1:]])
            elif "plain" in scheme:
                weight = model.get_submodule(self._in_model(name)).weight
                self._shape(model, f"{name}.weight", [0, *weight.shape[1:]])
            ignored |= {f"^{re.escape(self._in_model(name))}\\.{tied}$" for tied in scheme.get("ties", {})}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *_OURS}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *ignored}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        schemes = {
            self._in_model(name): _renamed_ties(scheme, self._in_model)
            for name, scheme in self.quantization_config.modules.items()
            if self._has(model, name)
        }
        serve(model, schemes, Stored(self._folder, self._in_files))
        return model

    def _shape(self, model: nn.Module, name: str, shape: list[int]) -> None:
        """The place of a parameter, on the meta device, gets the shape of what is in the files."""
        owner, _, local = self._in_model(name).rpartition(".")
        if not self._has(model, name.rpartition(".")[0]):
            return
        module = model.get_submodule(owner)
        before = module._parameters.get(local)
        if before is not None:
            empty = torch.empty(shape, dtype=before.dtype, device="meta")
            module._parameters[local] = nn.Parameter(empty, requires_grad=before.requires_grad)

    def _has(self, model: nn.Module, name: str) -> bool:
        try:
            model.get_submodule(self._in_model(name))
        except AttributeError:
            return False
        return True

    def _in_model(self, name: str) -> str:
        return self._added + (name.removeprefix(self._removed) if self._removed else name)

    def _in_files(self, name: str) -> str:
        return self._removed + (name.removeprefix(self._added) if self._added else name)


def register() -> None:
    """With transformers' public registry; idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(DsCompressConfig)
        register_quantizer(QUANT_METHOD)(DsCompressQuantizer)


def _prefixes(model: Any, config: DsCompressConfig) -> tuple[str, str]:
    """What the model's names have that those in the files lack, and the other way round.

    A model with a head has its base model's names behind a prefix; either may be loaded from the other's folder.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    names = [*config.modules, *config.attributes, *(name.rpartition(".")[0] for name in config.shapes)]
    if not prefix or not names:
        return "", ""
    theirs, ours = any(n.startswith(prefix) for n in names), hasattr(model, model.base_model_prefix)
    if theirs and not ours:
        return "", prefix
    return (prefix, "") if ours and not theirs and not _any_module(model, names) else ("", "")


def _any_module(model: nn.Module, names: list[str]) -> bool:
    own = {name for name, _ in model.named_modules()}
    return any(name in own for name in names)


def _renamed_ties(scheme: dict[str, Any], renamed: Any) -> dict[str, Any]:
    if "ties" not in scheme:
        return scheme
    return {**scheme, "ties": {local: renamed(first) for local, first in scheme["ties"].items()}}
