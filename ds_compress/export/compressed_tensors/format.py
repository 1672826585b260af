"""`compressed-tensors`: integers and floats that vanilla HF transformers and vLLM load.

`integers` and `floats` say how weights are stored, `inputs` how inputs are rounded, `fused` what vLLM joins.

Codes and scales are those of training. What the library (0.20) or transformers (5.24) cannot load back is refused with
the reason: asymmetric weights, number formats without a compressor, layers other than nn.Linear. Quantized embeddings
are written as floats on their grid. Emulation rounds dynamic inputs of integers with scale max / 127.5, training with
max / 127 (narrow) or max / 128, so logits agree to the size of one rounding and not to the bit; see `check`. That of
floats is the one of training.

Floats of blocks are decompressed to bfloat16, whatever the dtype of the model: `config.dtype` is bfloat16 where there
are any, since fp32 products with bfloat16 weights fail. Else it is float32, because scales are loaded in that dtype.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export import kv_cache
from ds_compress.export.compressed_tensors import experts, floats, inputs, integers
from ds_compress.export.compressed_tensors.fused import ScalesOfTensors
from ds_compress.export.compressed_tensors.groups import ConfigGroups, notes_on
from ds_compress.export.compressed_tensors.packing import loads_when_packed
from ds_compress.export.format import OTHER_FORMAT, Format
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers

_INT8 = 8
_OF_STACKS = 3
_AS_TRAINED = ("group", "tensor_group")


@dataclass
class CompressedTensorsFormat(Format):
    """One config group per scheme; every Linear that has none is listed in `ignore`.

    computes_in: the dtype of the loaded model.
    """

    name: ClassVar[str] = "compressed-tensors"
    stores_stacks: ClassVar[bool] = True
    groups: ConfigGroups = field(default_factory=ConfigGroups)
    packs: bool = True
    computes_in: torch.dtype = torch.float32
    same_activations: bool = True
    of_tensors: ScalesOfTensors = field(default_factory=ScalesOfTensors)
    expert_schemes: set[str | None] = field(default_factory=set)

    @property
    def rounds_plain_to(self) -> torch.dtype | None:
        return self.options.dtype if self.computes_in is torch.float32 else self.computes_in

    def loaded_dtype(self, trained_dtype: torch.dtype) -> torch.dtype:
        return self.computes_in

    def check_source(self, source: ExportSource, final: nn.Module) -> None:
        super().check_source(source, final)
        self.packs = loads_when_packed(source, final, self.scheme)
        if not any(floats.in_16_bits(format) for format in self._weight_formats(source.model)):
            self.note(
                "config.dtype is float32: scales are loaded in that dtype, and a 16-bit one would round them"
            )
            return
        self.computes_in = torch.bfloat16
        if self.options.dtype is torch.float16:
            raise ExportError(
                "dtype float16: a model with floats of blocks is loaded in bfloat16; leave dtype out"
            )
        self.note(
            "config.dtype is bfloat16, as compressed-tensors decompresses floats of blocks to it: transformers rounds "
            "what is not quantized, and values of NVFP4, to bfloat16; what is stored is exact"
        )

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        self.untie(layer)
        stored = self.plain(layer)
        if layer.quantized is None and layer.input is None:
            return stored
        if layer.kind is ModuleKind.EMBEDDING and layer.quantized is not None:
            stored[layer.full("weight")] = self.dequantized(layer, layer.quantized)
            self.note(
                f"{layer.name}: a quantized embedding does not load back, so its rounded values are floats"
            )
            return stored
        if layer.kind is not ModuleKind.LINEAR:
            raise ExportError(
                f"{layer.name} is a {layer.kind}, and compressed-tensors quantizes nn.Linear only; {OTHER_FORMAT}"
            )
        try:
            found = self._quantized(layer)
        except ValueError as error:
            raise ExportError(f"{layer.name}: {error}; {_way_out(layer)}") from error
        return stored | {layer.full(name): tensor for name, tensor in found.items()}

    def files(self, layer: Layer) -> dict[str, torch.Tensor]:
        return super().files(layer) | self._experts(layer)

    def _experts(self, layer: Layer) -> dict[str, torch.Tensor]:
        """By full name: each matrix of each expert as a layer of its own."""
        stored: dict[str, torch.Tensor] = {}
        for local, stack in layer.experts.items():
            inputs = layer.expert_inputs.get(local)
            try:
                reason = experts.misread_matrix(stack.first, layer, local)
                if reason is not None:
                    raise ValueError(f"{reason}; {experts.INSTEAD}")
                for name, matrix, used in experts.single_matrices(layer, local, stack, self.hub):
                    one = Layer(name, ModuleKind.LINEAR, matrix, input=used)
                    stored |= {one.full(key): tensor for key, tensor in self._quantized(one).items()}
            except ValueError as error:
                raise ExportError(f"{layer.full(local)}: {error}") from error
            if inputs is not None:
                self.same_activations = False
                self.note(
                    "inputs of experts are quantized by servers as in training; transformers dequantizes experts when "
                    "it loads them and leaves their inputs as they are"
                )
        self._check_alike(layer)
        return stored

    def _check_alike(self, layer: Layer) -> None:
        """transformers reads all experts of a model by one scheme, and would read other ones wrongly."""
        if layer.kind is None or not layer.kind.is_experts:
            return
        plain = [None for tensor in layer.tensors.values() if tensor.dim() == _OF_STACKS]
        self.expert_schemes |= {
            *plain,
            *(
                json.dumps(scheme, sort_keys=True)
                for name, scheme in self.schemes.items()
                if name.startswith(f"{layer.name}.") or experts.is_of_expert(name)
            ),
        }
        if len(self.expert_schemes) > 1:
            raise ExportError(
                f"{layer.name}: experts of one model are quantized in one way, or stock transformers reads them "
                f"wrongly; quantize both matrices of all experts alike, or {OTHER_FORMAT}"
            )

    def _quantized(self, layer: Layer) -> dict[str, torch.Tensor]:
        """By local name. Raises ValueError where compressed-tensors cannot say it."""
        scheme: dict[str, Any] = {"weights": None, "input_activations": None, "format": "dense"}
        found: dict[str, torch.Tensor] = {}
        if layer.quantized is not None:
            found = self._weight(layer, layer.quantized, scheme)
        if layer.input is not None:
            columns = (layer.tensors["weight"] if layer.quantized is None else layer.quantized.values).shape[
                1
            ]
            scheme["input_activations"] = inputs.input_arguments(layer.input, columns)
            found |= inputs.stored_inputs(layer.input)
            if layer.input.grid.format == "int" and layer.input.input_range is None:
                self.note(
                    "dynamic activation ranges are rounded with scale max / 127.5 by compressed-tensors' "
                    "emulation, with max / 127 or 128 in training"
                )
        self.of_tensors.add(layer.name, found)
        self._use(layer.name, scheme)
        return found

    def dequantized(self, layer: Layer, quantized: QuantizedMatrix) -> torch.Tensor:
        if layer.kind is ModuleKind.EMBEDDING:
            return self.cast(quantized.dequantize())
        values = quantized.loaded_in(self.computes_in)
        if not self.rounds_weights and not torch.equal(values, quantized.dequantize()):
            self.rounds_weights = True
            if quantized.format != "nvfp4":
                self.note(
                    f"{layer.name}: scales in fp32 are stored exactly, as vLLM reads them; transformers loads them in "
                    "bfloat16 beside floats of blocks, and rounds them"
                )
        return values

    def values(self, layer: Layer) -> dict[str, torch.Tensor]:
        return {
            name: value if self.is_kept_in_fp32(name) else value.to(self.computes_in)
            for name, value in super().values(layer).items()
        }

    def cache_tensors(self) -> dict[str, torch.Tensor]:
        if self.kv_cache:
            self.note(
                "scales of the KV cache are k_scale and v_scale of each attention module, as vLLM reads them; "
                "transformers 5.24 with compressed-tensors 0.20 calls them unexpected and leaves its cache unquantized"
            )
        return kv_cache.stored(self.kv_cache)

    def loaded_scale(self, name: str, scale: torch.Tensor) -> torch.Tensor:
        # A global scale is fp32 in a model of any dtype.
        return scale if name.endswith("global_scale") else scale.to(self.computes_in)

    def loaded_input_scales(self, layer: Layer) -> dict[str, torch.Tensor]:
        stored = {} if layer.input is None else inputs.stored_inputs(layer.input)
        scales = {layer.full(name): scale for name, scale in stored.items() if scale.is_floating_point()}
        return {name: self.loaded_scale(name, scale) for name, scale in scales.items()}

    def config_entries(self, final: nn.Module) -> dict[str, Any]:
        import compressed_tensors

        if not self.groups and not self.kv_cache:
            raise ExportError('nothing is quantized: use format="hf", or scheme="FP8_DYNAMIC"')
        for text in self.of_tensors.notes():
            self.note(text)
        modules = ((name, module) for name, module in final.named_modules() if not is_auxiliary(name))
        linears = {name for name, module in modules if isinstance(module, nn.Linear)}
        return super().config_entries(final) | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "version": compressed_tensors.__version__,
                "format": self.groups.format(),
                "quantization_status": "compressed",
                "config_groups": self.groups.as_json(),
                "ignore": sorted(linears - self.groups.modules()),
                "kv_cache_scheme": kv_cache.scheme() if self.kv_cache else None,
                "global_compression_ratio": None,
            }
        }

    def _use(self, module: str, scheme: dict[str, Any]) -> None:
        weights, used = scheme["weights"], scheme["input_activations"]
        if self.groups.add(module, scheme):
            for text in notes_on(module, weights, used):
                self.note(text)
        if used is not None and used["strategy"] not in _AS_TRAINED:
            # Inputs of two dimensions have one scale in its emulation where training had one for each token.
            self.same_activations = False
        self.schemes[module] = {key: value for key, value in scheme.items() if value is not None}

    def _weight(
        self, layer: Layer, quantized: QuantizedMatrix, scheme: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        if quantized.offset is not None:
            raise ValueError(
                "its weight is asymmetric (q * scale + offset), which compressed-tensors 0.20 does not load back; "
                "train with quantization_type symmetric"
            )
        if quantized.format != "int":
            scheme["weights"] = floats.weight_arguments(quantized)
            scheme["format"] = floats.COMPRESSORS[quantized.format]
            if not self.packs and quantized.format in floats.PACKED:
                raise ValueError(
                    "the initialisation of this model class reads the weights that packing replaces, so that stock "
                    "transformers does not load them"
                )
            return floats.stored_floats(quantized)
        scheme["weights"] = integers.weight_arguments(quantized)
        int_inputs = layer.input is not None and layer.input.grid.format == "int"
        in_bytes = (quantized.bits == _INT8 and int_inputs) or not self.packs
        if in_bytes and quantized.bits < _INT8:
            self.note(
                "values take a byte each: the initialisation of this model class reads the weights that packing "
                f"would replace; {OTHER_FORMAT} in fewer bits"
            )
        scheme["format"] = "int-quantized" if in_bytes else "pack-quantized"
        return integers.stored_integers(quantized, in_bytes)

    def _weight_formats(self, model: nn.Module) -> set[str]:
        found = {
            fake_quant.grid.format
            for module in model.modules()
            if kind_of(module) is ModuleKind.LINEAR or fused_experts(module) is not None
            for fake_quant in layers.quantized_parameters(module).values()
        }
        rounded = self.scheme.weights if self.scheme is not None else None
        return found if rounded is None else found | {rounded.format}


def _way_out(layer: Layer) -> str:
    """For errors."""
    quantized = layer.quantized
    is_float = (quantized is not None and quantized.format != "int") or (
        layer.input is not None and layer.input.grid.format != "int"
    )
    return f'{OTHER_FORMAT}, and format="hf" its values' if is_float else OTHER_FORMAT
