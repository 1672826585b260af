"""The explicit forms of what registration does by itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.build import teacher_given
from ds_compress.engine.gather import full_modules
from ds_compress.engine.zero import internals
from ds_compress.errors import ConfigError, Problem
from ds_compress.quant import layers
from ds_compress.quant.packed_weight import BUFFERS, packed_weight_of


def initialize(*args: Any, teacher: nn.Module | None = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with a teacher object.

    Args:
        teacher: a model to distil from, frozen and sharded here; overrides `distillation.teacher`. Without
            a `distillation` block it only initialises the layers of `layer_reduction`.
        *args, **kwargs: those of `deepspeed.initialize`.

    Returns:
        DeepSpeed's usual tuple (engine, optimizer, dataloader, lr_scheduler); `engine.compression` is the
        attached run when the JSON has a `compression_training` block.

    Raises:
        ConfigError: with every problem of the block at once.
    """
    import deepspeed

    with teacher_given(teacher):
        engine, *others = deepspeed.initialize(*args, **kwargs)
    if teacher is not None and not hasattr(engine, "compression"):
        path = "compression_training"
        raise ConfigError([Problem(path, "absent", "a block that uses the teacher given to initialize")])
    return engine, *others


@torch.no_grad()
def export_state_dict(engine: Any) -> dict[str, torch.Tensor]:
    """The compressed model's weights as a process without us would load them: masked, and on their integer grids.

    fp32 CPU tensors by name on process 0, an empty dict elsewhere; learned scales are folded into the weights.
    A collective that makes one module whole at a time, so no process but the first ever holds more than
    a layer. A tied weight has the values of the module that quantizes it."""
    if internals.tensor_parallel_group(engine) is not None:
        return internals.full_state_dict(engine)
    keep = not dist.is_initialized() or dist.get_rank() == 0
    quantized_by = {
        id(module.get_parameter(name)): (module, name)
        for module in engine.module.modules()
        for name in layers.quantized_parameters(module)
        if packed_weight_of(module) is None
    }
    result: dict[str, torch.Tensor] = {}
    values_of: dict[int, torch.Tensor] = {}
    for module_name, module in full_modules(engine.module):
        if not keep:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if layers.is_step_size(name):
                continue
            if id(parameter) not in values_of:
                owner = quantized_by.get(id(parameter))
                values = parameter if owner is None else layers.quantized_weight(*owner)
                values_of[id(parameter)] = values.detach().float().cpu().clone()
            result[_join(module_name, name)] = values_of[id(parameter)]
        is_packed = packed_weight_of(module) is not None
        if is_packed:
            result[_join(module_name, "weight")] = layers.quantized_weight(module).float().cpu()
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not (is_packed and name in BUFFERS):
                result[_join(module_name, name)] = buffer.detach().cpu().clone()
    return result


def _join(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name
