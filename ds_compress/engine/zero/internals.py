"""The only code that reads private names of DeepSpeed; `internals_table` lists them all."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

AVERAGE_OF_STAGE_3 = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


def is_zero12(wrapper: Any) -> bool:
    """DeepSpeedZeroOptimizer: stages 1 and 2, but for BF16_Optimizer."""
    return hasattr(wrapper, "bit16_groups_flat")


def is_zero3(wrapper: Any) -> bool:
    """DeepSpeedZeroOptimizer_Stage3."""
    return hasattr(wrapper, "fp32_partitioned_groups_flat")


def is_bf16_optimizer(wrapper: Any) -> bool:
    """BF16_Optimizer: stage 1 with fp32 gradient accumulation."""
    return hasattr(wrapper, "bf16_groups_flat")


def modules_with_all_gather() -> tuple[Any, Any]:
    """Those that call `all_gather_dp_groups` after a step, each by a global of its own."""
    return (
        importlib.import_module("deepspeed.runtime.zero.stage_1_and_2"),
        importlib.import_module("deepspeed.runtime.bf16_optimizer"),
    )


def mark_in_flight(parameter: Any) -> None:
    """A stage-3 parameter is being made whole; raises RuntimeError when it already is, or is whole."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
        raise RuntimeError(parameter.ds_summary())
    parameter.ds_status = ZeroParamStatus.INFLIGHT


def mark_available(parameter: Any) -> None:
    """A stage-3 parameter is whole."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.ds_status = ZeroParamStatus.AVAILABLE


def current_device() -> str:
    """Where whole parameters live."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def data_parallel_group(engine: Any) -> Any:
    """The processes over which gradients are averaged."""
    return getattr(engine, "seq_data_parallel_group", None) or engine.data_parallel_group


def loss_scale(wrapper: Any) -> float:
    """What gradients are multiplied by at the moment; 1 without loss scaling."""
    config = getattr(wrapper, "loss_scale_config", None)
    return float(getattr(wrapper, "loss_scale", 1.0) if config is None else config.cur_scale)


def has_momentum(engine: Any) -> bool:
    """Whether the optimizer keeps a running mean of gradients itself: SGD with momentum, Adam with betas[0] > 0."""
    groups = torch_optimizers(engine)[0].param_groups
    return any(group.get("momentum") or (group.get("betas") or (0,))[0] for group in groups)


def reductions_per_step(engine: Any) -> int:
    """How many gradients of each parameter are reduced before a step: stages 2 and 3 keep no whole ones until then."""
    steps: int = engine.gradient_accumulation_steps() if engine.zero_optimization_partition_gradients() else 1
    return steps


def removed_config_keys() -> tuple[dict[str, str], dict[str, str]]:
    """Keys that DeepSpeed has removed, with its words: at the top level of its JSON, and in `zero_optimization`."""
    from deepspeed.runtime import config

    return dict(config._REMOVED_TOP_LEVEL_CONFIG_KEYS), dict(config._REMOVED_ZERO_CONFIG_KEYS)


def is_zero3_parameter(parameter: nn.Parameter) -> bool:
    """True once zero.Init or a stage-3 engine has taken the parameter over (its `.data` may be empty)."""
    return hasattr(parameter, "ds_id")


def tensor_parallel_group(engine: Any) -> Any:
    """The group of AutoTP that this process is in; None where layers are whole."""
    if engine.autotp_size() <= 1:
        return None
    from deepspeed.utils import groups

    return groups.get_tensor_model_parallel_group()


def full_state_dict(engine: Any) -> dict[str, torch.Tensor]:
    """The model of an engine with tensor parallelism, fp32 on the CPU in process 0, empty elsewhere; a collective."""
    state = engine._consolidated_16bit_state_dict() or {}
    return {name: values.detach().float().cpu().clone() for name, values in state.items()}


def is_tensor_parallel_shard(parameter: nn.Parameter) -> bool:
    """Whether this process holds a part only of what is one weight in the model's checkpoint."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_gathered(parameter: Any) -> bool:
    """Whether a parameter that ZeRO-3 has taken over is whole in this process just now."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return bool(parameter.ds_status == ZeroParamStatus.AVAILABLE)


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Of parameters that ZeRO-3 has taken over, only the shards stay: whoever needs whole ones gathers them anew.

    A forward leaves some of them whole, and under `torch_autocast` those are rounded to 16 bits, which the shards are
    not. What somebody has gathered by `GatheredParameters` stays whole: it may be about to change.
    """
    whole: list[Any] = [
        p
        for p in parameters
        if is_zero3_parameter(p)
        and is_gathered(p)
        and not getattr(p, "_ds_z3_gathered_param_context_depth", 0)
    ]
    if whole:
        whole[0].partition(whole)


def torch_optimizers(engine: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers that really update master weights (stage 3 with partial offload has two).

    ZeRO replaces some by others of its own (Adagrad): `engine.basic_optimizer` then never steps.
    """
    wrapper = engine.optimizer
    master = wrapper if wrapper is engine.basic_optimizer else wrapper.optimizer
    backup = getattr(wrapper, "backup_optimizer", None)
    return [master] if backup is None else [master, backup]


def clip_limit(engine: Any) -> float:
    """`gradient_clipping` of an engine as it is in force; 0 without."""
    wrapper = engine.optimizer
    limit = engine.gradient_clipping() if wrapper is engine.basic_optimizer else wrapper.clip_grad
    return float(limit or 0.0)


@contextlib.contextmanager
def clip_limit_times(engine: Any, factor: float) -> Iterator[None]:
    """Inside, gradients are clipped at `factor` times the limit."""
    wrapper, limit = engine.optimizer, clip_limit(engine)
    if wrapper is engine.basic_optimizer:
        engine.gradient_clipping = lambda: limit * factor
    else:
        wrapper.clip_grad = limit * factor
    try:
        yield
    finally:
        if wrapper is engine.basic_optimizer:
            del engine.gradient_clipping
        else:
            wrapper.clip_grad = limit


def divide_reported_norm(engine: Any, divisor: float) -> None:
    """What `get_global_grad_norm()` says of the last step, where DeepSpeed says something."""
    for holder in (engine, engine.optimizer):
        norm = getattr(holder, "_global_grad_norm", None)
        if norm is not None:
            holder._global_grad_norm = norm / divisor


def full_gradients(engine: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """The reduced gradients of an optimizer that is not ZeRO's, before it steps; whole in every process."""
    wrapper = engine.optimizer
    if is_bf16_optimizer(wrapper):
        for group, gradients in zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True):
            yield from zip(group, gradients, strict=True)
        return
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            yield parameter, parameter.grad


def group_of(engine: Any, parameter: Any) -> int | None:
    """Which parameter group of the stepped optimizer a parameter of the model is in; None where it does not train."""
    wrapper = engine.optimizer
    if is_zero3(wrapper):
        key = wrapper.get_param_id(parameter)
        if key not in wrapper.grad_position:
            return None
        group: int = wrapper.sub_group_to_group_id[wrapper.grad_position[key][0]]
        return group
    lists = getattr(wrapper, "bit16_groups", None) or getattr(wrapper, "bf16_groups", None)
    lists = lists or getattr(wrapper, "fp16_groups", None) or [g["params"] for g in wrapper.param_groups]
    return next((i for i, group in enumerate(lists) if any(p is parameter for p in group)), None)


def tag_parameters(ds_config: Any, model: nn.Module, added: Iterable[nn.Parameter]) -> None:
    """Muon goes by tags on parameters, which `deepspeed.initialize` wrote: new parameters get theirs here.

    `added` are learned scales, which are no matrices whatever their shape.
    """
    import deepspeed

    deepspeed.set_optimizer_flags(ds_config, model)
    for parameter in added:
        if hasattr(parameter, "use_muon"):
            parameter.use_muon = False


@contextlib.contextmanager
def groups_of_replaced_optimizers() -> Iterator[None]:
    """ZeRO wrappers constructed inside go on with the parameter groups of the optimizer that they were given.

    Some they replace (Adagrad) by one made from the defaults, with one group for everything, and then look for a second
    one; and a scheduler holds on to the groups of the optimizer that was given.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    classes: tuple[Any, ...] = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    originals = [cls.initialize_optimizer_states for cls in classes]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def initialize_optimizer_states(self: Any) -> Any:
            given = self.optimizer
            result = original(self)
            if self.optimizer is not given:
                self.optimizer.param_groups = given.param_groups
            return result

        return initialize_optimizer_states

    for cls, original in zip(classes, originals, strict=True):
        cls.initialize_optimizer_states = wrapped(original)
    try:
        yield
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.initialize_optimizer_states = original


def gradient_scaler(engine: Any) -> Any:
    """torch's scaler of fp16 under `torch_autocast`, which skips steps without a word; None without it."""
    return getattr(engine, "torch_autocast_z0_gradscaler", None) or getattr(
        engine.optimizer, "torch_autocast_gradscaler", None
    )


def take_down(engine: Any) -> None:
    """Ends `engine`: its ZeRO hooks go, and what `destroy` leaves behind on the model and its modules."""
    engine.destroy()
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        handle = getattr(engine, name, None)
        if handle is not None:
            handle.remove()
    # What ZeRO-3 caches on modules calls the coordinator of this engine, and whoever comes next would use it.
    for module in engine.module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            vars(module).pop(name, None)


def flat_16bit_groups(wrapper: Any) -> list[torch.Tensor] | None:
    """The flat parameter buffers of ZeRO 1/2 and BF16_Optimizer, or None for other wrappers."""
    return getattr(wrapper, "bit16_groups_flat", None) or getattr(wrapper, "bf16_groups_flat", None)


def flat_master_partitions(wrapper: Any) -> list[torch.Tensor]:
    """This rank's slice of each buffer of `flat_16bit_groups`, in fp32."""
    return getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition


def reduce_in_autocast_dtype(ds_config: Any, model: nn.Module) -> None:
    """Under `torch_autocast`, gradients of swapped layers travel in 16 bits as those of their base class do.

    DeepSpeed compares classes exactly and would send the gradients of a QATLinear in fp32.
    """
    if not ds_config.torch_autocast_enabled:
        return
    from deepspeed.runtime import torch_autocast

    names = ds_config.torch_autocast_lower_precision_safe_modules
    safe = set()
    for name in torch_autocast.get_default_autocast_lower_precision_modules() if names is None else names:
        module_name, _, class_name = name.rpartition(".")
        safe.add(getattr(importlib.import_module(module_name), class_name))
    for module in model.modules():
        if getattr(module, "_ds_compress_base_class", None) in safe:
            for parameter in module.parameters(recurse=False):
                setattr(parameter, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, ds_config.torch_autocast_dtype)
