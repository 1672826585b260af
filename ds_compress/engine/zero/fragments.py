"""Fragments of fp32 master weights: what this process owns of each parameter, for every ZeRO stage.

Which wrapper DeepSpeed chose decides where the masters are, and the wrapper is asked, never the stage number:

| wrapper | masters |
|---|---|
| none (stage 0, fp32) | the parameters themselves |
| FP16_Optimizer, FP16_UnfusedOptimizer | whole fp32 copies, replicated |
| DeepSpeedZeroOptimizer, BF16_Optimizer | one flat fp32 slice per group and process |
| DeepSpeedZeroOptimizer_Stage3 | flat fp32 sub-groups of parameter slices |

At stages 1 and 2 a parameter is found by its *address* in the flat 16-bit buffer. DeepSpeed's own
`_hp_mapping` points at the wrong parameter when `round_robin_gradients` is set.

A weight that no optimizer steps (frozen, or left out of `model_parameters`) has no master. Its fragment is a part of
the weight itself, sharded over processes exactly where masters are: see `frozen`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.zero import internals
from ds_compress.sharding.fragment import Fragment, full_fragment


def all_fragments(engine: Any, data_parallel_group: Any) -> Iterator[Fragment]:
    """One fragment of each parameter, in the order of `engine.module.named_parameters()`.

    A tied parameter comes once, under its first name. Where this process owns no element of a parameter, `numel` is 0.
    """
    wrapper = engine.optimizer
    stepped = {
        id(p) for o in internals.torch_optimizers(engine) for group in o.param_groups for p in group["params"]
    }
    for name, parameter in engine.module.named_parameters():
        if internals.is_zero3_parameter(parameter):
            yield _zero3_master(name, parameter) or _zero3_weight(name, parameter)
        elif internals.flat_16bit_groups(wrapper) is not None:
            master = _flat_slice_master(name, parameter, wrapper) if parameter.requires_grad else None
            yield master or _slice_of_weight(name, parameter, data_parallel_group)
        elif hasattr(wrapper, "fp16_groups"):
            master = _replicated_master(name, parameter, wrapper)
            yield master or full_fragment(name, parameter, parameter, 0, has_optimizer=False)
        else:
            yield full_fragment(
                name,
                parameter,
                parameter,
                0,
                has_optimizer=parameter.requires_grad and id(parameter) in stepped,
            )


def _zero3_master(name: str, parameter: Any) -> Fragment | None:
    zero3 = getattr(parameter, "_z3_optimizer", None)
    if zero3 is None or zero3.get_param_id(parameter) not in zero3.grad_position:
        return None
    sub_group, offset, slice_numel = zero3.grad_position[zero3.get_param_id(parameter)]
    start = zero3._get_param_partition_rank(parameter) * slice_numel
    # The last slice is padded up to the common slice length; padding is not part of the parameter.
    numel = max(0, min(parameter.ds_numel - start, slice_numel))
    return Fragment(
        name,
        parameter,
        tuple(parameter.ds_shape),
        start,
        numel,
        zero3.fp32_partitioned_groups_flat[sub_group],
        offset,
        parameter.ds_process_group,
    )


def _zero3_weight(name: str, parameter: Any) -> Fragment:
    group, slice_numel = parameter.ds_process_group, parameter.ds_tensor.numel()
    start = dist.get_rank(group) * slice_numel
    numel = max(0, min(parameter.ds_numel - start, slice_numel))
    shape = tuple(parameter.ds_shape)
    return Fragment(name, parameter, shape, start, numel, parameter.ds_tensor, 0, group, has_optimizer=False)


def _flat_slice_master(name: str, parameter: nn.Parameter, wrapper: Any) -> Fragment | None:
    for index, flat in enumerate(internals.flat_16bit_groups(wrapper) or ()):
        byte_offset = parameter.data_ptr() - flat.data_ptr()
        if not 0 <= byte_offset < flat.numel() * flat.element_size():
            continue
        begin = byte_offset // flat.element_size()
        group = wrapper.real_dp_process_group[index]
        slice_numel = flat.numel() // dist.get_world_size(group)
        slice_begin = dist.get_rank(group) * slice_numel
        low = max(begin, slice_begin)
        high = min(begin + parameter.numel(), slice_begin + slice_numel)
        return Fragment(
            name,
            parameter,
            tuple(parameter.shape),
            low - begin,
            max(0, high - low),
            internals.flat_master_partitions(wrapper)[index],
            low - slice_begin,
            group,
        )
    return None


def _slice_of_weight(name: str, parameter: nn.Parameter, group: Any) -> Fragment:
    """Every process holds the whole weight; each answers for an equal part of it."""
    slice_numel = -(-parameter.numel() // dist.get_world_size(group))
    start = min(dist.get_rank(group) * slice_numel, parameter.numel())
    numel = min(slice_numel, parameter.numel() - start)
    shape = tuple(parameter.shape)
    return Fragment(name, parameter, shape, start, numel, parameter, start, group, has_optimizer=False)


def _replicated_master(name: str, parameter: nn.Parameter, wrapper: Any) -> Fragment | None:
    flat_masters = getattr(wrapper, "fp32_groups_flat", None)
    for index, group in enumerate(wrapper.fp16_groups):
        offset = 0
        for position, candidate in enumerate(group):
            if candidate is parameter:
                if flat_masters is not None:
                    return full_fragment(name, parameter, flat_masters[index], offset)
                return full_fragment(name, parameter, wrapper.fp32_groups[index][position], 0)
            offset += candidate.numel()
    return None


def check_fragments(fragments: list[Fragment]) -> None:
    """Raises RuntimeError when a master does not round to the parameter it is believed to be the master of.

    A wrong map would prune other weights than the ones named in the JSON, without a sign: this is the
    one check that a new DeepSpeed layout cannot slip through.
    """
    for fragment in fragments:
        if not fragment.has_optimizer:
            continue
        parameter = fragment.parameter
        if internals.is_zero3_parameter(parameter):
            stored = parameter.ds_tensor.data.view(-1)[: fragment.numel]  # type: ignore[attr-defined]
        else:
            stored = parameter.data.view(-1)[fragment.start : fragment.start + fragment.numel]
        master = fragment.values.to(device=stored.device, dtype=stored.dtype)
        if not torch.equal(torch.nan_to_num(master), torch.nan_to_num(stored)):
            raise RuntimeError(
                f"ds_compress: the fp32 master found for {fragment.name!r} is not the master of that parameter. "
                "This DeepSpeed layout is not supported; please report the DeepSpeed config and version."
            )
