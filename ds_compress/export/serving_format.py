"""`torch`: integers and scales for `ds_compress.from_pretrained`, whatever grid they are on.

    weight_codes    int8 or uint8 `[out, in]`; weight_packed: int32, the same in fewer bits
    weight_scale    fp32 `[out, groups]`; weight_offset: likewise, of asymmetric weights; of floats in the dtype of the
                    number format, and beside weight_global_scale where that has one
    <matrix>_weight_codes, ...   of fused experts: those of each expert, stacked `[experts, ...]`
    <tensor>_sparse     uint8, in place of weight_codes, weight_packed, or a weight of floats with many zeros: one bit
                        per element and the other elements, deflated; see `sparse_container`
    weight          empty: its shape fits no model, so that transformers without ds_compress refuses the folder
                    instead of initializing what it does not find at random

Linear layers stay as small in memory: they run on the integer kernels (`serve`), or, where inputs are floats, multiply
by the weight as it is stored (`serve_weight_only`). What no kernel has is smaller in the folder only: fp8, nf4, inputs
that are quantized to floats, convolutions. It is dequantized when it is loaded, and runs as fp32; so do experts, unless
their matrices and inputs are integers that the grouped kernels fit (`serve_experts`).

Embeddings that were not trained in integers are rounded to int8 per row unless embeddings="float".

The `AutoModel...from_pretrained` of transformers loads the folder where ds_compress is imported (see
`ds_compress.hf.quantizer`): `quantization_config` in `config.json` describes it completely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.attributes import attribute_overrides, shape_overrides
from ds_compress.export.check import Answer
from ds_compress.export.fingerprint import fingerprint
from ds_compress.export.format import Format, empty_copy
from ds_compress.export.inputs import run
from ds_compress.export.load import from_pretrained
from ds_compress.export.loaded_tensors import fingerprints_of, input_scales
from ds_compress.export.quantized_experts import QuantizedExperts
from ds_compress.export.quantized_matrix import QuantizedMatrix, quantize_rows
from ds_compress.export.read import Layer
from ds_compress.export.serve import dequantized_because
from ds_compress.export.serve_experts import misfit_of_experts
from ds_compress.export.serving_tensors import (
    PLAIN_VALUES,
    stored_experts,
    stored_weight,
    weight_scheme,
    with_container,
)
from ds_compress.export.source import ExportSource
from ds_compress.export.sparse_container import packed, sparse_name
from ds_compress.modelinfo.experts import follows_registry, fused_experts
from ds_compress.modelinfo.kinds import ModuleKind

QUANT_METHOD = "ds_compress"


@dataclass
class ServingFormat(Format):
    """The only format for Conv1D, Conv2d, asymmetric grids, and models that vanilla HF configs cannot express."""

    name: ClassVar[str] = "torch"
    loads_in_vanilla_hf: ClassVar[bool] = False
    loader: ClassVar[str] = "ours"
    stores_stacks: ClassVar[bool] = True
    rounds_expert_inputs: ClassVar[bool] = True
    same_activations: bool = True

    attribute_overrides: dict[str, dict[str, float]] = field(default_factory=dict)
    shape_overrides: dict[str, list[int]] = field(default_factory=dict)
    _unregistered: frozenset[str] = frozenset()

    def loaded_dtype(self, trained_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def check_source(self, source: ExportSource, final: nn.Module) -> None:
        if source.config is not None:
            self.attribute_overrides, self.shape_overrides = (
                attribute_overrides(final, final.config),
                shape_overrides(final, final.config),
            )
        self._unregistered = frozenset(
            name
            for name, module in final.named_modules()
            if fused_experts(module) and not follows_registry(module)
        )
        if self.options.embeddings not in (None, "int8", "float"):
            raise ExportError(f'embeddings is "int8" or "float", got {self.options.embeddings!r}')
        if source.config is None:
            self.note("no config: load it with ds_compress.from_pretrained(folder, model=<a new instance>)")

    def reload_here(
        self, folder: Path, inputs: Mapping[str, torch.Tensor], final: nn.Module
    ) -> Answer | None:
        """Of a model that only its own code can build, a copy of it is filled in this process."""
        if hasattr(getattr(final, "config", None), "to_diff_dict"):
            return None

        exact = from_pretrained(folder, empty_copy(final), fused=False, activations=False)
        fingerprints = fingerprints_of(exact)
        served = from_pretrained(folder, empty_copy(final), fused=False)
        fingerprints |= {name: fingerprint(scale) for name, scale in input_scales(served).items()}
        logits = {
            "logits": run(from_pretrained(folder, empty_copy(final)), inputs),
            "exact_logits": run(exact, inputs),
        }
        loaded = "ds_compress.from_pretrained(model=), in the process that wrote it"
        return Answer(logits, loaded, fingerprints=fingerprints)

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        stored = self.plain(layer)
        quantized = layer.quantized
        is_table = layer.kind is ModuleKind.EMBEDDING and "weight" in layer.tensors
        if quantized is None and is_table and self.options.embeddings != "float":
            quantized = quantize_rows(layer.tensors["weight"])
            del stored[layer.full("weight")]
            self.rounded[layer.full("weight")] = quantized.dequantize()
            self.note("embeddings that were not trained in integers are rounded to int8, one scale per row")
        scheme: dict[str, Any] = {}
        if self.attribute_overrides and quantized is None and "weight" in layer.tensors and not self.schemes:
            # Nothing else would keep transformers from loading a model without these numbers.
            stored[layer.full(PLAIN_VALUES)] = stored.pop(layer.full("weight"))
            scheme["plain"] = True
        if quantized is not None or "plain" in scheme:
            shape = layer.tensors["weight"].shape if quantized is None else quantized.shape
            stored[layer.full("weight")] = torch.empty(0, *shape[1:])
        if quantized is not None:
            stored |= self._stored(layer, quantized)
            scheme["weight"] = weight_scheme(quantized)
        self._note_experts(layer)
        for name, experts in layer.experts.items():
            stored |= self._stored_experts(layer, name, experts)
            own = {**weight_scheme(experts.matrices[0]), "experts": len(experts.matrices)}
            scheme.setdefault("experts", {})[name] = own
        if layer.expert_inputs:
            scheme["expert_inputs"] = {n: used.as_json() for n, used in layer.expert_inputs.items()}
        if layer.input is not None:
            scheme["input"] = layer.input.as_json()
        if layer.ties:
            scheme["ties"] = layer.ties
        shapes = self._make_sparse(layer, stored)
        if shapes:
            scheme["sparse"] = shapes
        if scheme:
            self.schemes[layer.name] = scheme
        return stored

    def _make_sparse(self, layer: Layer, stored: dict[str, torch.Tensor]) -> dict[str, list[int]]:
        """Weights of floats with many zeros into containers; {parameter: the shape that its place has in the file}."""
        shapes = {}
        for local, given in layer.tensors.items():
            is_plain = layer.full(local) in stored
            name = layer.full(local if is_plain else PLAIN_VALUES)
            if (local != "weight" and given.dim() < 3) or given.dim() < 2 or name not in stored:
                continue
            tensor = stored[name]
            container = (
                packed(tensor, tensor.nbytes) if tensor.is_floating_point() and tensor.numel() else None
            )
            if container is None:
                continue
            stored[sparse_name(name)] = container
            del stored[name]
            if is_plain:  # empty, as beside codes
                stored[name] = torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype)
                shapes[local] = [0, *tensor.shape[1:]]
        return shapes

    def _stored(self, layer: Layer, quantized: QuantizedMatrix) -> dict[str, torch.Tensor]:
        self._note_dequantized(layer, quantized)
        try:
            stored = with_container(stored_weight(quantized), quantized.values)
            return {layer.full(name): tensor for name, tensor in stored.items()}
        except ValueError as error:
            raise ExportError(f"{layer.name}: {error}") from error

    def _note_dequantized(self, layer: Layer, quantized: QuantizedMatrix) -> None:
        reason = dequantized_because(layer.kind, quantized, layer.input)
        if reason is not None:
            self.note(
                "weights are dequantized to fp32 when they are loaded, smaller in the folder, no faster on the CPU: "
                + reason
            )

    def _note_experts(self, layer: Layer) -> None:
        if not layer.experts:
            return
        reason = misfit_of_experts(layer.experts, layer.expert_inputs)
        if layer.name in self._unregistered:
            reason = "their class multiplies in its own way"
        if reason is not None:
            self.note(
                "experts are dequantized to fp32 when they are loaded, smaller in the folder, no faster: "
                + reason
            )

    def _stored_experts(self, layer: Layer, name: str, experts: QuantizedExperts) -> dict[str, torch.Tensor]:
        try:
            codes = torch.stack([matrix.values for matrix in experts.matrices])
            stored = with_container(stored_experts(name, experts), codes, f"{name}_")
        except ValueError as error:
            raise ExportError(f"{layer.full(name)}: {error}") from error
        # Empty, as `weight` is.
        stored[name] = torch.empty(0, *experts.shape[1:])
        return {layer.full(local): tensor for local, tensor in stored.items()}

    def config_entries(self, final: nn.Module) -> dict[str, Any]:
        if not self.schemes and not self.attribute_overrides and not self.shape_overrides:
            return {}
        return {
            "quantization_config": {
                "quant_method": QUANT_METHOD,
                "modules": self.schemes,
                "attributes": self.attribute_overrides,
                "shapes": self.shape_overrides,
            }
        }
