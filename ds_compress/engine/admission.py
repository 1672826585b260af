"""What we refuse to run with, said at start and in words: accept or refuse, never ignore."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_compress.config.resolve.structures import KIND_OF_BLOCK
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.errors import ConfigError, Problem, shown

_ROOT = "compression_training"


def refuse_unsupported(
    model: nn.Module, engine_class: str, ds_config: Any, config: CompressionConfig | None = None
) -> None:
    """Raises ConfigError listing every feature of this run that compression does not work with.

    `engine_class`: name of the engine's class; `ds_config`: the DeepSpeedConfig object; `config`: the block.
    """
    problems = [
        Problem(path, shown(got), allowed, hint)
        for path, got, allowed, hint in _unsupported(model, engine_class, ds_config)
    ]
    key = "save_muon_momentum_buffer_in_memory"
    if getattr(ds_config.zero_config, key, False) and config is not None and _shrinks(config):
        hint = (
            "remove the key: momenta that DeepSpeed keeps beside the optimizer's state are lost in a shrink"
        )
        problems.append(
            Problem(f"zero_optimization.{key}", "true", "false with shrink_at_end_of_schedule", hint)
        )
    if problems:
        raise ConfigError(problems)


def _shrinks(config: CompressionConfig) -> bool:
    blocks = (getattr(config, key) for key in KIND_OF_BLOCK)
    return any(b is not None and b.shared.enabled and b.shared.shrink_at_end_of_schedule for b in blocks)


def _unsupported(model: nn.Module, engine_class: str, ds_config: Any) -> Any:
    zero = ds_config.zero_config
    if engine_class in ("PipelineEngine", "DualPipeVEngine"):
        yield _ROOT, f"a pipeline model ({engine_class})", "a plain nn.Module", "use ZeRO data parallelism"
    if engine_class == "DeepSpeedHybridEngine":
        yield "hybrid_engine.enabled", True, "false", "compress in a plain training engine"
    moe = [name for name, p in model.named_parameters() if getattr(p, "allreduce", True) is False]
    if moe:
        yield (
            _ROOT,
            f"MoE expert parameters such as {moe[0]!r}",
            "models without expert parallelism",
            ("experts live in other process groups than the rest of the model; remove the MoE layers"),
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if getattr(zero, key, False):
            yield (
                f"zero_optimization.{key}",
                True,
                "false",
                ("it would round the masked and quantized weights a second time"),
            )
    if getattr(zero, "zero_hpz_partition_size", 1) > 1:
        yield "zero_optimization.zero_hpz_partition_size", zero.zero_hpz_partition_size, "1", "remove the key"
    for key in ("offload_optimizer", "offload_param"):
        device = getattr(getattr(zero, key, None), "device", None)
        if getattr(device, "value", device) == "nvme":
            yield f"zero_optimization.{key}.device", "nvme", "cpu or none", "masters on disk cannot be masked"
    if getattr(getattr(zero, "offload_optimizer", None), "super_offload", False):
        yield (
            "zero_optimization.offload_optimizer.super_offload",
            True,
            "false",
            "it has its own optimizer step",
        )
    if getattr(zero, "zenflow", None) is not None:
        yield "zero_optimization.zenflow", "enabled", "absent", "it has its own optimizer step"
    if hasattr(model, "_orig_mod") and getattr(zero, "stage", 0) == 3:
        yield (
            "zero_optimization.stage",
            "3 with the result of torch.compile(model)",
            "a model that is not compiled yet",
            "ZeRO-3 cannot run one: give DeepSpeed the plain model, then call engine.compile() (the Trainer does so)",
        )
    compile_config = getattr(ds_config, "compile_config", None)
    if getattr(compile_config, "deepcompile", False):
        yield "compile.deepcompile", True, "false", "use torch.compile(model) instead"
