"""`layer_reduction`: the student keeps some of the teacher's layers.

    "layer_reduction": {"enabled": true, "teacher_layer": [1, 3, 5]}

Student layer i starts as teacher layer `teacher_layer[i]` (or `keep_number_layer` evenly spaced ones). A model
that still has all its layers is cut in place, so a script that loads the fine-tuned model needs no second
class; a model that was built with fewer layers is filled from the teacher. With a teacher the layers, and
`other_module_name` (absent: everything else that both have), are copied from it. The model's config
is rewritten, so that what is saved loads again. Sanh et al. 2019 (DistilBERT) initialise a student so.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.layer_reduction import LayerReductionConfig
from ds_compress.errors import ConfigError, Problem, nearest, shown
from ds_compress.modelinfo.layers import find_layers
from ds_compress.structure.model_config import configs_of_stack, set_depth

logger = logging.getLogger("ds_compress")

_PATH = "compression_training.layer_reduction"
ParameterPairs = list[tuple[nn.Parameter, nn.Parameter]]


def reduce_layers(
    model: nn.Module,
    config: CompressionConfig,
    teacher: nn.Module | None,
    copy_parameters: Callable[[ParameterPairs], None],
) -> list[nn.Parameter]:
    """Cuts or fills `model` as its `layer_reduction` block says; returns the parameters that were removed.

    `copy_parameters([(target, source), ...])` copies whole parameters wherever they are kept.

    Raises:
        ConfigError: layers that do not exist, a teacher of another width, a name that matches nothing.
    """
    block = config.layer_reduction
    if block is None or not block.enabled:
        return []
    name, layers = find_layers(model, block.module_name_prefix)
    teacher_layers = layers if teacher is None else find_layers(teacher, block.module_name_prefix)[1]
    chosen = chosen_layers(block, len(teacher_layers))
    _check_depth(layers, chosen, teacher_layers, teacher)
    before = {id(p): p for p in model.parameters()}
    depth = len(layers)
    if depth == len(chosen) and teacher is None:
        logger.warning(
            "layer_reduction does nothing: the model has %d layers, as many as it keeps, and there is no teacher to "
            "fill them from",
            depth,
        )
    if depth > len(chosen):
        configs = configs_of_stack(model, name, depth)
        _cut(layers, chosen if teacher is None or _increasing(chosen) else range(len(chosen)))
        for described in configs:
            set_depth(described, name, depth, chosen)
    if teacher is not None:
        pairs = [
            pair
            for layer, index in zip(layers, chosen, strict=True)
            for pair in _pairs(layer, teacher_layers[index], f"{name}.{index}")
        ]
        copy_parameters(pairs + _other_pairs(model, teacher, name, block.other_module_name))
    kept = {id(p) for p in model.parameters()}
    return [p for key, p in before.items() if key not in kept]


def chosen_layers(block: LayerReductionConfig, depth: int) -> tuple[int, ...]:
    """The teacher layer of each student layer; evenly spaced, the last one included, when only a number is given."""
    if block.teacher_layer is not None:
        chosen = tuple(block.teacher_layer)
    else:
        chosen = uniform_map(block.keep_number_layer or depth, depth)
    outside = [index for index in chosen if index >= depth]
    if outside or len(chosen) > depth:
        key = "teacher_layer" if block.teacher_layer is not None else "keep_number_layer"
        allowed = f"layers 0 to {depth - 1} of the teacher"
        raise ConfigError([Problem(f"{_PATH}.{key}", shown(list(chosen)), allowed, f"it has {depth} layers")])
    return chosen


def uniform_map(students: int, depth: int) -> tuple[int, ...]:
    """Teacher layer (i + 1) * depth / students - 1 for each student layer i: TinyBERT's uniform strategy."""
    return tuple((index + 1) * depth // students - 1 for index in range(students))


def _increasing(chosen: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(chosen))


def _check_depth(
    layers: nn.ModuleList, chosen: Sequence[int], teacher_layers: nn.ModuleList, teacher: nn.Module | None
) -> None:
    wanted, have = len(chosen), len(layers)
    if teacher is None and not _increasing(chosen):
        raise ConfigError(
            [
                Problem(
                    f"{_PATH}.teacher_layer",
                    shown(list(chosen)),
                    "increasing layer numbers when the model is cut from itself",
                    "name a teacher (distillation.teacher, or ds_compress.initialize(teacher=)) to repeat or reorder",
                )
            ]
        )
    if have not in (wanted, len(teacher_layers)):
        allowed = f"a model with {wanted} layers (the student) or {len(teacher_layers)} (cut to it)"
        raise ConfigError(
            [Problem(_PATH, f"a model with {have} layers", allowed, "change teacher_layer or the model")]
        )


def _cut(layers: nn.ModuleList, chosen: Sequence[int]) -> None:
    """Deletes the other layers from the list itself, which whoever holds a reference to it must see."""
    for index in reversed(range(len(layers))):
        if index not in chosen:
            del layers[index]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            # Attention modules know their place, for the key-value cache.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]


def _pairs(target: nn.Module, source: nn.Module, source_name: str) -> ParameterPairs:
    sources = dict(source.named_parameters())
    pairs = []
    for name, parameter in target.named_parameters():
        if name not in sources or _shape(parameter) != _shape(sources[name]):
            theirs = _shape(sources[name]) if name in sources else "no such parameter"
            raise ConfigError(
                [
                    Problem(
                        _PATH,
                        f"{source_name}.{name} of the teacher: {theirs}",
                        f"shape {_shape(parameter)}, as in the student",
                        "student and teacher must have the same hidden size, heads and FFN size",
                    )
                ]
            )
        pairs.append((parameter, sources[name]))
    _copy_buffers(target, source)
    return pairs


def _other_pairs(
    model: nn.Module, teacher: nn.Module, layers_name: str, names: Sequence[str] | None
) -> ParameterPairs:
    if names is None:
        outside = layers_name + "."
        _copy_buffers(model, teacher, lambda name: not name.startswith(outside))
        sources = dict(teacher.named_parameters())
        return [
            (parameter, sources[name])
            for name, parameter in model.named_parameters()
            if not name.startswith(outside) and name in sources and _shape(parameter) == _shape(sources[name])
        ]
    pairs = []
    for name in names:
        modules, teachers = dict(model.named_modules()), dict(teacher.named_modules())
        if name not in modules or name not in teachers:
            close = nearest(name, modules.keys() & teachers.keys(), cutoff=0.0)
            hint = f"did you mean {close!r}?" if close else ""
            path = f"{_PATH}.other_module_name"
            raise ConfigError(
                [Problem(path, shown(name), "a module that student and teacher both have", hint)]
            )
        pairs += _pairs(modules[name], teachers[name], name)
    return pairs


@torch.no_grad()
def _copy_buffers(
    target: nn.Module, source: nn.Module, chosen: Callable[[str], bool] = lambda name: True
) -> None:
    sources = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in sources and sources[name].shape == buffer.shape and chosen(name):
            buffer.copy_(sources[name])


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also while ZeRO-3 keeps only a share of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
