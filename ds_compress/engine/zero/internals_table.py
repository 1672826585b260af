"""The private names of DeepSpeed that we rely on, as data, and whether the installed version has them all.

`tests/unit/engine/zero/test_internals_table.py` walks the table and fails with the name that a new release changed;
`engine.internals_check` does so at the start of a run under a version that was never tested.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Internal:
    """`path` is `module:attribute.attribute`; `parameters` the leading parameter names we rely on."""

    path: str
    parameters: tuple[str, ...] = ()
    source_mentions: tuple[str, ...] = ()


INTERNALS: tuple[Internal, ...] = (
    Internal("deepspeed.runtime.config:DeepSpeedConfig.__init__", ("self", "config", "mpu", "mesh_device")),
    Internal("deepspeed.runtime.config:_REMOVED_TOP_LEVEL_CONFIG_KEYS"),
    Internal("deepspeed.runtime.config:_REMOVED_ZERO_CONFIG_KEYS"),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine.__init__",
        ("self", "args", "model", "optimizer", "model_parameters"),
        source_mentions=("config_class",),
    ),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine._take_model_step",
        ("self", "lr_kwargs"),
        source_mentions=(
            "self.optimizer.step()",
            '"overflow"',
            "self.skipped_steps",
            "self.global_samples +=",
        ),
    ),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine.step",
        source_mentions=("self.monitor.enabled", "self.monitor.write_events"),
    ),
    Internal("deepspeed.runtime.engine:DeepSpeedEngine.steps_per_print", ("self",)),
    Internal("deepspeed.runtime.engine:DeepSpeedEngine.backward"),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine.save_checkpoint",
        ("self", "save_dir", "tag", "client_state", "save_latest"),
        source_mentions=('f"global_step{self.global_steps}"',),
    ),
    Internal("deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint", ("self", "load_dir", "tag")),
    Internal("deepspeed.runtime.engine:DeepSpeedEngine.destroy", ("self",)),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine._create_module_forward_pre_hook",
        ("self",),
        source_mentions=("self.module.register_forward_pre_hook",),
    ),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine._create_module_forward_post_hook",
        ("self",),
        source_mentions=("self.module.register_forward_hook",),
    ),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine._configure_optimizer",
        source_mentions=("self.basic_optimizer",),
    ),
    Internal(
        "deepspeed.runtime.fp16.fused_optimizer:FP16_Optimizer.__init__",
        source_mentions=("self.fp16_groups", "self.fp32_groups_flat"),
    ),
    Internal(
        "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer.__init__",
        source_mentions=("self.fp16_groups", "self.fp32_groups"),
    ),
    Internal(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer._setup_for_real_optimizer",
        source_mentions=("self.bf16_groups_flat", "self.fp32_groups_flat_partition"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.__init__",
        source_mentions=(
            "self.bit16_groups_flat",
            "self.single_partition_of_fp32_groups",
            "self.real_dp_process_group",
            "self.check_grad_overflow",
            "self.torch_autocast_gradscaler",
            "self.clip_grad",
        ),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.initialize_optimizer_states",
        source_mentions=("self.optimizer = torch.optim.Adagrad(",),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step",
        source_mentions=("self.check_grad_overflow",),
    ),
    Internal(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.__init__",
        source_mentions=(
            "self.fp32_partitioned_groups_flat",
            "self.grad_position",
            "self.sub_group_to_group_id",
        ),
    ),
    Internal("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.get_param_id", ("self", "param")),
    Internal(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank",
        ("self", "param"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._optimizer_step",
        ("self", "sub_group_id"),
        source_mentions=("self.backup_optimizer",),
    ),
    Internal("deepspeed.runtime.engine:DeepSpeedEngine.autotp_size", ("self",)),
    Internal(
        "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload._register_deepspeed_module",
        source_mentions=('"pre_bwd_fn" not in module.__dict__', '"post_bwd_fn" not in module.__dict__'),
    ),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine.clip_fp32_gradients",
        source_mentions=("max_norm=self.gradient_clipping()",),
    ),
    *(
        Internal(
            f"deepspeed.runtime.{wrapper}.get_grad_norm_direct", ("self", "gradients", "params", "norm_type")
        )
        for wrapper in (
            "zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        )
    ),
    *(
        Internal(
            f"deepspeed.runtime.{wrapper}.complete_grad_norm_calculation_for_cpu_offload",
            ("self", "params"),
            source_mentions=("self.norm_for_param_grads[param_id]",),
        )
        for wrapper in (
            "zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        )
    ),
    Internal(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.step",
        source_mentions=("max_norm=self.clip_grad", "self._global_grad_norm"),
    ),
    *(
        Internal(
            f"deepspeed.runtime.fp16.{wrapper}.unscale_and_clip_grads", source_mentions=("/ self.clip_grad",)
        )
        for wrapper in ("fused_optimizer:FP16_Optimizer", "unfused_optimizer:FP16_UnfusedOptimizer")
    ),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine._consolidated_16bit_state_dict",
        ("self",),
        source_mentions=("_replace_module_consolidated_state_dict",),
    ),
    Internal("deepspeed.utils.groups:get_tensor_model_parallel_group"),
    Internal("deepspeed.utils:z3_leaf_module"),
    Internal("deepspeed.utils:set_z3_leaf_module", ("model", "flag")),
    Internal(
        "deepspeed.module_inject.layers:TensorParallel_Layer.config_tp_params",
        ("self", "weight"),
        source_mentions=("setattr(weight, DS_TENSOR_MODEL_PARALLEL, True)",),
    ),
    Internal("deepspeed.runtime.zero.partition_parameters:ZeroParamStatus.AVAILABLE"),
    Internal(
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
        source_mentions=("def all_gather(param_list", "def partition(param_list"),
    ),
    Internal("deepspeed:set_optimizer_flags", ("config_class", "model"), source_mentions=('"use_muon"',)),
    Internal("deepspeed.runtime.zero.partition_parameters:DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR"),
    Internal("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params", ("self",)),
    Internal(
        "deepspeed.runtime.torch_autocast:init_autocast_params",
        source_mentions=("module.__class__ in", "PARAM_COMM_DTYPE_ATTR_NAME"),
    ),
    Internal("deepspeed.runtime.torch_autocast:get_default_autocast_lower_precision_modules"),
    Internal(
        "deepspeed.runtime.engine:DeepSpeedEngine.allreduce_bucket",
        ("self", "bucket", "dp_group", "dp_world_size"),
        source_mentions=("self.flatten(bucket)", "self.gradient_average", "dist.all_reduce", "return tensor"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.average_tensor",
        ("self", "tensor", "communication_data_type"),
        source_mentions=(
            "self.gradient_reduction_w_predivide(tensor, communication_data_type)",
            "self.allreduce_and_scatter(",
            "bucket.params",
            "self.use_multi_rank_bucket_allreduce",
            "divide=False",
        ),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks",
        (
            *("self", "small_bucket", "communication_data_type", "log", "divide", "process_group"),
            *("bucket_ranks", "output_bucket"),
        ),
        source_mentions=("self._add_to_grad_partition_buffer(output, synced)", "buf.copy_(synced)"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.gradient_reduction_w_predivide",
        ("self", "tensor", "communication_data_type"),
        source_mentions=("self.sequence_parallel_size", "self.gradient_average"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.allreduce_bucket",
        ("self", "bucket", "communication_data_type", "rank", "log", "divide", "process_group"),
        source_mentions=("self.flatten(bucket)", "return tensor_to_allreduce"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
        ("self", "params_to_reduce", "communication_data_type"),
        source_mentions=("reduce_scatter_coalesced(full_grads_for_rank, process_group)",),
    ),
    Internal(
        "deepspeed.runtime.zero.stage3:reduce_scatter_coalesced",
        ("tensors", "group"),
        source_mentions=("math.ceil(tensor.numel() / world_sz)", "div_(world_sz)"),
    ),
    Internal(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.get_grads_for_reduction",
        ("self",),
        source_mentions=("self.non_expert_gradients",),
    ),
    Internal(
        "deepspeed.runtime.utils:all_gather_dp_groups",
        ("groups_flat", "partitioned_param_groups", "dp_process_group"),
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step",
        source_mentions=("all_gather_dp_groups(groups_flat=self.bit16_groups_flat",),
    ),
    Internal(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.update_lp_params",
        source_mentions=("all_gather_dp_groups(groups_flat=self.bf16_groups_flat",),
    ),
    Internal(
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
        source_mentions=(
            "def all_gather_coalesced(params: Iterable[Parameter],",
            "param.all_gather_coalesced = all_gather_coalesced",
            "param.ds_status = ZeroParamStatus.INFLIGHT",
            "params = sorted(params, key=lambda p: p.ds_id)",
        ),
    ),
    Internal(
        "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator"
        "._PartitionedParameterCoordinator__all_gather_params_",
        source_mentions=("param_group[0].all_gather_coalesced(param_group, quantize=quantize)",),
    ),
    Internal("deepspeed.runtime.zero.config:DeepSpeedZeroConfig"),
    Internal("deepspeed.runtime.pipe.engine:PipelineEngine"),
    Internal("deepspeed.runtime.config_utils:dict_raise_error_on_duplicate_keys"),
)


def missing_internals() -> list[str]:
    """One sentence for each of them that the installed DeepSpeed no longer has; empty when all is well."""
    problems = []
    for internal in INTERNALS:
        module_name, _, attributes = internal.path.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                target = getattr(target, attribute)
        except (ImportError, AttributeError) as error:
            problems.append(f"{internal.path} is gone ({error})")
            continue
        target = _innermost(target)
        names = tuple(inspect.signature(target).parameters) if internal.parameters else ()
        if names[: len(internal.parameters)] != internal.parameters:
            problems.append(f"{internal.path} takes {names}, expected it to start with {internal.parameters}")
        if internal.source_mentions:
            source = inspect.getsource(target)
            problems += [
                f"{internal.path} no longer mentions {m}" for m in internal.source_mentions if m not in source
            ]
    return problems


def _innermost(function: Any) -> Any:
    """What decorators wrap, DeepSpeed's `instrument_w_nvtx` too, which leaves no `__wrapped__` behind."""
    function = inspect.unwrap(function)
    if getattr(function, "__qualname__", "").startswith("instrument_w_nvtx.<locals>"):
        (wrapped,) = (cell.cell_contents for cell in function.__closure__)
        return _innermost(wrapped)
    return function
