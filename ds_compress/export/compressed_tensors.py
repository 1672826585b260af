"""`compressed-tensors`: integers that vanilla HF transformers and vLLM load.

    8-bit weights with 8-bit inputs     int-quantized   int8; all weights of T5 and other classes that do not load
                                                        packed ones, see `trial_load`
    other weights of 2 to 8 bits        pack-quantized  packed into int32
    scheme="fp8"                        float-quantized float8_e4m3fn; weights are rounded here, per channel

Scales are those of training. Binary and ternary weights are the 2-bit values -1, 0, 1. What the library (0.20) cannot
load back is refused with the reason: asymmetric weights, and layers other than nn.Linear. Quantized embeddings are
written as floats on their grid. Its emulation rounds dynamic inputs with scale max / 127.5, training with max / 127
(narrow) or max / 128, so logits agree to the size of one rounding and not to the bit; see `check`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.format import OTHER_FORMAT, Format
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme, Layer
from ds_compress.export.source import ExportSource
from ds_compress.export.trial_load import loads_packed
from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers
from ds_compress.quant.grid import TokenGranularity
from ds_compress.quant.qparams import qparams_from_range

_LARGEST_FP8 = 448.0
_INT8 = 8


@dataclass
class CompressedTensorsFormat(Format):
    """One config group per scheme; every Linear that has none is listed in `ignore`."""

    name: ClassVar[str] = "compressed-tensors"
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    packs: bool = True

    def loaded_dtype(self, trained_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def check_source(self, source: ExportSource, final: nn.Module) -> None:
        super().check_source(source, final)
        if self.options.scheme not in (None, "fp8"):
            raise ExportError(f'scheme is None or "fp8", got {self.options.scheme!r}')
        self.packs = _loads_packed(source, final)
        self.note(
            "config.dtype is float32: scales are loaded in that dtype, and a 16-bit one would round them"
        )

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        self.untie(layer)
        stored = self.plain(layer)
        if self.options.scheme == "fp8":
            return self._fp8(layer, stored)
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
        scheme: dict[str, Any] = {"weights": None, "input_activations": None, "format": "dense"}
        if layer.quantized is not None:
            stored |= self._integers(layer, layer.quantized, scheme)
        if layer.input is not None:
            stored |= self._input(layer, layer.input, scheme)
        self._use(layer.name, scheme)
        return stored

    def dequantized(self, layer: Layer, quantized: QuantizedMatrix) -> torch.Tensor:
        values = quantized.dequantize()
        return self.cast(values) if layer.kind is ModuleKind.EMBEDDING else values

    def config_entries(self, final: nn.Module) -> dict[str, Any]:
        import compressed_tensors

        if not self.groups:
            raise ExportError('nothing is quantized: use format="hf", or scheme="fp8"')
        modules = ((name, module) for name, module in final.named_modules() if not is_auxiliary(name))
        linears = {name for name, module in modules if isinstance(module, nn.Linear)}
        formats = {group["format"] for group in self.groups.values()}
        groups = list(self.groups.values())
        quantized = {name for group in groups for name in group["targets"]}
        if len(groups) == 1:
            groups = [{**groups[0], "targets": ["Linear"]}]
        return super().config_entries(final) | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "version": compressed_tensors.__version__,
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "quantization_status": "compressed",
                "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
                "ignore": sorted(linears - quantized),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }

    def _use(self, module: str, scheme: dict[str, Any]) -> None:
        group = self.groups.setdefault(json.dumps(scheme, sort_keys=True), {"targets": [], **scheme})
        group["targets"].append(module)
        self.schemes[module] = {key: value for key, value in scheme.items() if value is not None}

    def _integers(
        self, layer: Layer, quantized: QuantizedMatrix, scheme: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        if quantized.offset is not None:
            raise ExportError(
                f"{layer.name}: its weight is asymmetric (q * scale + offset), which compressed-tensors 0.20 does "
                f"not load back; train with quantization_type symmetric, or {OTHER_FORMAT}"
            )
        grouped = quantized.groups > 1
        bits = max(2, quantized.bits)  # in one bit its values would be -1 and 0
        scheme["weights"] = _arguments(bits, "group" if grouped else "channel", False)
        if grouped:
            scheme["weights"]["group_size"] = quantized.group_size
        stored = {layer.full("weight_scale"): quantized.scale}
        in_bytes = (quantized.bits == _INT8 and layer.input is not None) or not self.packs
        if in_bytes:
            if quantized.bits < _INT8:
                self.note(
                    "values take a byte each: the initialisation of this model class reads the weights that packing "
                    f"would replace; {OTHER_FORMAT} in fewer bits"
                )
            scheme["format"] = "int-quantized"
            stored[layer.full("weight")] = quantized.values
        else:
            scheme["format"] = "pack-quantized"
            stored[layer.full("weight_packed")] = pack_to_int32(quantized.values, bits)
            stored[layer.full("weight_shape")] = torch.tensor(quantized.values.shape)
        return stored

    def _input(self, layer: Layer, used: InputScheme, scheme: dict[str, Any]) -> dict[str, torch.Tensor]:
        grid = used.grid
        per_token = grid.granularity is TokenGranularity.PER_TOKEN
        strategy = "token" if per_token and not grid.static else "tensor"
        arguments = _arguments(grid.bits, strategy, not grid.static)
        arguments["symmetric"] = grid.symmetric
        scheme["input_activations"] = arguments
        if used.input_range is None:
            self.note(
                "dynamic activation ranges are rounded with scale max / 127.5 by compressed-tensors' emulation, with "
                "max / 127 or 128 in training"
            )
            return {}
        qparams = qparams_from_range(used.input_range[0], used.input_range[1], grid)
        stored = {layer.full("input_scale"): qparams.scale.reshape(1)}
        if qparams.offset is not None:
            half = 2 ** (grid.bits - 1)
            zero = -torch.round(qparams.offset / qparams.scale) - half
            if not -half <= float(zero) < half:
                raise ExportError(
                    f"{layer.name}: the range of its input, {used.input_range.tolist()}, does not contain 0, which an "
                    f"int8 zero point needs; {OTHER_FORMAT}"
                )
            stored[layer.full("input_zero_point")] = zero.to(torch.int8).reshape(1)
        return stored

    def _fp8(self, layer: Layer, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if layer.quantized is not None or layer.input is not None:
            raise ExportError(
                f'{layer.name} was trained in integers: scheme="fp8" is for models that were not'
            )
        is_head = layer.name.rpartition(".")[2] in ("lm_head", "embed_out", "decoder")
        if layer.kind is not ModuleKind.LINEAR or "weight" not in layer.tensors or is_head:
            return stored
        weight = layer.tensors["weight"].float()
        scale = (weight.abs().amax(1, keepdim=True) / _LARGEST_FP8).clamp_min(2.0**-126)
        values = (weight / scale).to(torch.float8_e4m3fn)
        stored[layer.full("weight")] = values
        stored[layer.full("weight_scale")] = scale
        self.rounded[layer.full("weight")] = values.float() * scale
        floats = {"type": "float"}
        scheme = {
            "weights": _arguments(8, "channel", False) | floats,
            "input_activations": _arguments(8, "token", True) | floats,
            "format": "float-quantized",
        }
        self._use(layer.name, scheme)
        self.note("fp8 weights and activations are rounded after training")
        return stored


def _arguments(bits: int, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def _loads_packed(source: ExportSource, final: nn.Module) -> bool:
    """Whether the model class loads without the weights that would be packed."""
    fake_quants = {name: layers.fake_quant_of(module) for name, module in source.model.named_modules()}
    renamed = (
        {}
        if source.pruning_plan is None
        else {name: source.pruning_plan.renamed(f"{name}.weight") for name in fake_quants}
    )
    targets = [
        str(renamed.get(name, f"{name}.weight")).removesuffix(".weight")
        for name, fake_quant in fake_quants.items()
        if fake_quant is not None and kind_of(source.model.get_submodule(name)) is ModuleKind.LINEAR
        if renamed.get(name, "") is not None
    ]
    if not targets:
        return True
    users: dict[int, list[bool]] = {}
    for name, module in source.model.named_modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            users.setdefault(id(weight), []).append(fake_quants[name] is not None)
    return loads_packed(final, targets, any(len(set(quantize)) > 1 for quantize in users.values()))
