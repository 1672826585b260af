"""The base class of export formats."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export import kv_cache
from ds_compress.export.check import Answer
from ds_compress.export.exact import is_kept_in_fp32
from ds_compress.export.hub_names import Converter, hub_names
from ds_compress.export.loaded_tensors import input_scale
from ds_compress.export.quantized_experts import QuantizedExperts
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.quant import layers
from ds_compress.quant.schemes import Scheme
from ds_compress.structure.vanilla_hf import differing_shapes, vanilla_hf_obstacles

OTHER_FORMAT = 'format="torch", which ds_compress.from_pretrained loads, can store it'


@dataclass
class Options:
    """dtype: of tensors that are not quantized; None: as they are. embeddings: "int8" or "float" for tables that
    were not trained in integers; None: the format's default. scheme: the name of one to which an unquantized model is
    rounded, see `ptq`."""

    dtype: torch.dtype | None = None
    embeddings: str | None = None
    scheme: str | None = None


@dataclass
class Format(ABC):
    """Converts layers to tensors of a file and entries of `config.json`.

    loads_in_stock: transformers does. loader: who checks, see `check`. has_shards: tensors are written one by one.
    stores_stacks: it can say how the matrices of fused experts are quantized. rounds_expert_inputs: what is loaded
    quantizes their inputs, too.

    schemes: JSON of how each module is stored, by name. notes: sentences for whoever reads the report. rounded:
    values that only the export rounded, by parameter name, so that the check compares like with like. untied:
    modules whose tied weight is stored a second time. ignores_inputs: what is loaded does not quantize activations;
    ignored_inputs: not those of these modules.
    trained_dtype: of the trained model. checked: what is written will be loaded and compared. doubts: how a model that
    is built from the config differs, where only logits can tell whether it matters. scheme: to which the export rounds
    weights. rounds_weights: a loader rounds quantized weights. same_activations: what is loaded rounds activations as
    training did. kv_cache: its observed scales. hub: names of tensors in the files, see `hub_names`.
    final: the pruned model, of formats that transformers loads.
    """

    name: ClassVar[str]
    loads_in_vanilla_hf: ClassVar[bool] = True
    loader: ClassVar[str] = "vanilla_hf"
    has_shards: ClassVar[bool] = True
    stores_stacks: ClassVar[bool] = False
    rounds_expert_inputs: ClassVar[bool] = False

    options: Options
    schemes: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounded: dict[str, torch.Tensor] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    ignores_inputs: bool = False
    ignored_inputs: list[str] = field(default_factory=list)
    trained_dtype: torch.dtype = torch.float32
    checked: bool = True
    differences: list[str] = field(default_factory=list)
    scheme: Scheme | None = None
    kv_cache: kv_cache.Scales = field(default_factory=dict)
    rounds_weights: bool = False
    same_activations: bool = False
    hub: Converter = dict
    final: nn.Module | None = None

    @property
    def rounds_plain_to(self) -> torch.dtype | None:
        """To which dtype the export, or a loader, rounds what is not quantized; None: it stays as it is."""
        return self.options.dtype

    @abstractmethod
    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What is stored of a layer, by full name.

        Raises:
            ExportError: this format cannot represent it; names the module.
        """

    def check_source(self, source: ExportSource, final: nn.Module) -> None:
        """Raises ExportError before anything is read; `final` is the pruned model, on the meta device."""
        if self.loads_in_vanilla_hf:
            self.differences = refuse_unless_vanilla_hf(source, final, self.name, self.checked)
            self.hub, self.final = hub_names(final), final

    def loaded_dtype(self, trained_dtype: torch.dtype) -> torch.dtype:
        """In which a loader should hold the model: `dtype` of `config.json`."""
        return self.options.dtype or trained_dtype

    def config_entries(self, final: nn.Module) -> dict[str, Any]:
        """Entries of `config.json` that say how the weights are stored."""
        return {"tie_word_embeddings": False} if self.untied else {}

    def finish(  # noqa: B027
        self, folder: Path, source: ExportSource, final: nn.Module, inputs: Mapping[str, torch.Tensor] | None
    ) -> None:
        """Called after all tensors were written. final: the pruned model. inputs: those of the check, if any."""

    def reload_here(
        self, folder: Path, inputs: Mapping[str, torch.Tensor], final: nn.Module
    ) -> Answer | None:
        """What the folder computes, where no fresh process can load it; None: a fresh process does."""
        return None

    def untie(self, layer: Layer) -> None:
        """Stores both values of a tied weight that only one of its layers quantizes, and unties it in the config."""
        if layer.split_from:
            self.untied.append(f"{layer.name} from {layer.split_from}")
            self.note(f"{layer.name} is untied from {layer.split_from}: only one of them is quantized")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def plain(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Its tensors that are not quantized, in the dtype asked for."""
        named = {layer.full(name): tensor for name, tensor in layer.tensors.items()}
        return {
            name: tensor if self.is_kept_in_fp32(name) else self.cast(tensor)
            for name, tensor in named.items()
        }

    def is_kept_in_fp32(self, name: str) -> bool:
        """Whether a loader holds this tensor in fp32 in a 16-bit model, too."""
        return self.final is not None and is_kept_in_fp32(self.final, name)

    def values(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What a loader must hold of a layer, by full name, once it was written."""
        values = {name: tensor for name, tensor in self.plain(layer).items() if tensor.is_floating_point()}
        if layer.quantized is not None:
            values[layer.full("weight")] = self.dequantized(layer, layer.quantized)
        for name, experts in layer.experts.items():
            values[layer.full(name)] = self.dequantized_experts(layer, experts)
        return {name: self.rounded.get(name, value) for name, value in values.items()}

    def cache_tensors(self) -> dict[str, torch.Tensor]:
        """Scales of a quantized KV cache, by full name."""
        if self.kv_cache:
            self.note(
                f'the scales of the KV cache are not stored: format "{self.name}" has no word for them, '
                '"compressed-tensors" has'
            )
        return {}

    def loaded_scale(self, name: str, scale: torch.Tensor) -> torch.Tensor:
        """A stored fp32 scale as a loader must hold it."""
        return scale

    def loaded_input_scales(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Of a static range, by full name, as a loader must hold it."""
        scale = None if layer.input is None else input_scale(layer.input)
        return {} if scale is None else {layer.full("input_scale"): scale}

    def dequantized(self, layer: Layer, quantized: QuantizedMatrix) -> torch.Tensor:
        """A quantized weight as a loader must hold it."""
        return quantized.dequantize()

    def dequantized_experts(self, layer: Layer, experts: QuantizedExperts) -> torch.Tensor:
        """A quantized stack as a loader must hold it."""
        return experts.as_stack(lambda matrix: self.dequantized(layer, matrix))

    def files(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What is stored of a layer, by its name in the files."""
        return self.hub(self.tensors(layer))

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        is_float = tensor.is_floating_point() and self.options.dtype is not None
        return tensor.to(self.options.dtype) if is_float else tensor


def refuse_quantized_experts(model: nn.Module, name: str) -> None:
    """Raises ExportError where fused experts are quantized."""
    for module_name, module in model.named_modules():
        if fused_experts(module) and (
            layers.quantized_parameters(module) or layers.input_quantizers_of(module)
        ):
            raise ExportError(
                f'{module_name}: format "{name}" has no word for quantized experts that are fused; format="hf" writes '
                "the values that training computed with"
            )


def refuse_unless_vanilla_hf(source: ExportSource, final: nn.Module, name: str, checked: bool) -> list[str]:
    """Differences between `final` and the model that vanilla HF builds from its config, which may not affect logits.

    checked: the exported folder will be loaded, so that logits show whether they do.

    Raises:
        ExportError: they surely do, or the folder will not be checked.
    """
    if source.config is None:
        raise ExportError(
            f'format "{name}" is for models of transformers, and a {type(source.model).__name__} has no config; '
            + OTHER_FORMAT
        )
    obstacles = vanilla_hf_obstacles(final)
    is_open = checked and (source.pruning_plan is None or not source.pruning_plan.active())
    if obstacles and (not is_open or differing_shapes(final)):
        raise ExportError(f"{another_model(name, obstacles)}. {OTHER_FORMAT}")
    return obstacles


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy without quantizers and without values, of a model that only its own code can build.

    Its parameters are plain and of full shape, also where those of the model are sharded; hooks of a training engine
    are not copied.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(shape_of(p), dtype=p.dtype), requires_grad=False)
        for p in model.parameters()
    }
    for module in model.modules():
        for kind in _HOOKS:
            hooks = vars(module).get(kind)
            if hooks:
                memo[id(hooks)] = type(hooks)(
                    (k, hook) for k, hook in hooks.items() if not _is_training_hook(hook)
                )
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module._parameters = dict(module._parameters.items())
        layers.take_quantizers(module)
    return copied


def _is_training_hook(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # a functools.partial has its function's
    return str(getattr(function, "__module__", "")).startswith(("deepspeed.", "ds_compress."))


def is_hf_model(model: nn.Module) -> bool:
    """Whether it has a config that could rebuild it."""
    return hasattr(getattr(model, "config", None), "to_diff_dict")


def another_model(name: str, obstacles: Sequence[str]) -> str:
    """A sentence for errors."""
    return f'stock transformers would load another model from format "{name}": {"; ".join(obstacles)}'
