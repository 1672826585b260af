"""What a format of the export is."""

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
from ds_compress.export.check import Answer
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.quant import layers
from ds_compress.structure.vanilla_hf import differing_shapes, vanilla_hf_obstacles

OTHER_FORMAT = 'format="torch", which ds_compress.from_pretrained loads, can store it'


@dataclass
class Options:
    """dtype: of tensors that are not quantized, None: as they are. embeddings: "int8" or "float" for tables that
    were not trained in integers (None: as the format likes). scheme: "fp8" rounds an unquantized model."""

    dtype: torch.dtype | None = None
    embeddings: str | None = None
    scheme: str | None = None


@dataclass
class Format(ABC):
    """Turns layers into tensors of a file, and says what `config.json` must know of them.

    loads_in_stock: transformers does. loader: who checks, see `check`. has_shards: tensors are written one by one.

    schemes: JSON of how each module is stored, by name. notes: sentences for whoever reads the report. rounded:
    values that only the export rounded, by parameter name, so that the check compares like with like. untied:
    modules whose tied weight is stored a second time. ignores_inputs: what is loaded does not quantize activations.
    trained_dtype: of the trained model. checked: what is written will be loaded and compared. doubts: how a model that
    is built from the config differs, where only logits can tell whether it matters.
    """

    name: ClassVar[str]
    loads_in_vanilla_hf: ClassVar[bool] = True
    loader: ClassVar[str] = "vanilla_hf"
    has_shards: ClassVar[bool] = True

    options: Options
    schemes: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounded: dict[str, torch.Tensor] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    ignores_inputs: bool = False
    trained_dtype: torch.dtype = torch.float32
    checked: bool = True
    doubts: list[str] = field(default_factory=list)

    @abstractmethod
    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What is stored of a layer, by full name.

        Raises:
            ExportError: this format has no words for it; names the module.
        """

    def check_source(self, trained: ExportSource, final: nn.Module) -> None:
        """Raises ExportError before anything is read; `final` is the model after its cuts, shapes only."""
        if self.loads_in_vanilla_hf:
            self.doubts = refuse_unless_vanilla_hf(trained, final, self.name, self.checked)

    def loaded_dtype(self, trained_dtype: torch.dtype) -> torch.dtype:
        """In which a loader should hold the model: `dtype` of `config.json`."""
        return self.options.dtype or trained_dtype

    def config_entries(self, final: nn.Module) -> dict[str, Any]:
        """Entries of `config.json` that say how the weights are stored."""
        return {"tie_word_embeddings": False} if self.untied else {}

    def finish(  # noqa: B027
        self, folder: Path, trained: ExportSource, final: nn.Module, inputs: Mapping[str, torch.Tensor] | None
    ) -> None:
        """After all tensors were written. final: the model after its cuts; inputs: those of the check, if any."""

    def reload_here(
        self, folder: Path, inputs: Mapping[str, torch.Tensor], final: nn.Module
    ) -> Answer | None:
        """What the folder computes, where that needs no loader of a fresh process; None: ask one."""
        return None

    def untie(self, layer: Layer) -> None:
        """Of a tied weight that only one user quantizes, both values are stored, and the config says so."""
        if layer.split_from:
            self.untied.append(f"{layer.name} from {layer.split_from}")
            self.note(f"{layer.name} is untied from {layer.split_from}: only one of them is quantized")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def plain(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Its tensors that are not quantized, in the dtype asked for."""
        return {layer.full(name): self.cast(tensor) for name, tensor in layer.tensors.items()}

    def values(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What a loader must hold of a layer, by full name, once it was written."""
        values = {name: tensor for name, tensor in self.plain(layer).items() if tensor.is_floating_point()}
        if layer.quantized is not None:
            values[layer.full("weight")] = self.dequantized(layer, layer.quantized)
        return {name: self.rounded.get(name, value) for name, value in values.items()}

    def dequantized(self, layer: Layer, quantized: QuantizedMatrix) -> torch.Tensor:
        """A quantized weight as a loader must hold it."""
        return quantized.dequantize()

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        is_float = tensor.is_floating_point() and self.options.dtype is not None
        return tensor.to(self.options.dtype) if is_float else tensor


def refuse_unless_vanilla_hf(trained: ExportSource, final: nn.Module, name: str, checked: bool) -> list[str]:
    """Where stock transformers would build another model than `final` from its config, and it may not matter.

    checked: the exported folder will be loaded, so that the logits decide what is returned here.

    Raises:
        ExportError: it is sure to matter, or nothing will decide.
    """
    if trained.config is None:
        raise ExportError(
            f'format "{name}" is for models of transformers, and a {type(trained.model).__name__} has no config; '
            + OTHER_FORMAT
        )
    obstacles = vanilla_hf_obstacles(final)
    is_open = checked and (trained.pruning_plan is None or not trained.pruning_plan.active())
    if obstacles and (not is_open or differing_shapes(final)):
        raise ExportError(f"{another_model(name, obstacles)}. {OTHER_FORMAT}")
    return obstacles


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def emptied(model: nn.Module) -> nn.Module:
    """A copy without quantizers and without values, of a model that only its own code can build.

    Its parameters are whole and plain, also where those of the model are sharded, and hooks of a training engine stay
    behind.
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
                    (k, hook) for k, hook in hooks.items() if not _is_of_training(hook)
                )
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module._parameters = dict(module._parameters.items())
        if isinstance(module, layers.QATModule):
            module.weight_quantizer = module.input_quantizer = None
            layers.detach(module)
    return copied


def _is_of_training(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # a functools.partial has its function's
    return str(getattr(function, "__module__", "")).startswith(("deepspeed.", "ds_compress."))


def is_of_transformers(model: nn.Module) -> bool:
    """Whether it has a config that could rebuild it."""
    return hasattr(getattr(model, "config", None), "to_diff_dict")


def another_model(name: str, obstacles: Sequence[str]) -> str:
    """A sentence for errors."""
    return f'stock transformers would load another model from format "{name}": {"; ".join(obstacles)}'
