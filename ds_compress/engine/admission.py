"""Everything that is refused at start, in words: accept or refuse, never ignore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.targets import Weight
from ds_compress.engine.zero import internals
from ds_compress.errors import ROOT, ConfigError, Problem, dotted, shown
from ds_compress.modelinfo.inventory import few
from ds_compress.sharding.layer_shards import LayerShards
from ds_compress.techniques.base import Technique

_TENSOR_PARALLEL = "tensor_parallel.autotp_size"


def refuse_unsupported(
    model: nn.Module, engine_class: str, ds_config: Any, config: CompressionConfig | None = None
) -> None:
    """Raises ConfigError listing every feature of this run that compression does not work with.

    engine_class: name of the engine's class. ds_config: the DeepSpeedConfig object. config: the block.
    """
    problems = [
        Problem(path, shown(got), allowed, hint)
        for path, got, allowed, hint in _unsupported(model, engine_class, ds_config)
    ]
    if config is not None:
        problems += unsupported_beside(config, ds_config)
    if problems:
        raise ConfigError(problems)


def unsupported_beside(config: CompressionConfig, ds_config: Any) -> Iterator[Problem]:
    """Settings of DeepSpeed that single enabled blocks do not work with."""
    key, enabled = "save_muon_momentum_buffer_in_memory", config.enabled_blocks()
    if getattr(ds_config.zero_config, key, False) and any(block.shrinks for block in enabled.values()):
        hint = (
            "remove the key: momenta that DeepSpeed keeps beside the optimizer's state are lost in a shrink"
        )
        yield Problem(f"zero_optimization.{key}", "true", "false with shrink_at_end_of_schedule", hint)
    if {"gradient_compression", "robust_reduction"} & {*enabled}:
        yield from _gradient_problems(ds_config)
    if "parameter_compression" in enabled:
        yield from _parameter_problems(config, ds_config)


def refuse_tensor_parallel(config: CompressionConfig, techniques: Mapping[str, Technique], size: int) -> None:
    """Raises ConfigError for what compression cannot do while `size` processes share each layer."""
    if size <= 1:
        return
    hint = "or train without tensor parallelism, with ZeRO alone"
    problems = [
        Problem(
            dotted(name, *(key.split(".") if key else ())),
            f"{got} beside {_TENSOR_PARALLEL}",
            allowed,
            f"{reason}; {hint}",
        )
        for name, technique in techniques.items()
        for key, got, allowed, reason in technique.with_tensor_parallelism()
    ]
    if "layer_reduction" in config.enabled_blocks():
        (_, got, allowed, reason), *_ = Technique().with_tensor_parallelism()
        path = dotted("layer_reduction")
        problems.append(Problem(path, f"{got} beside {_TENSOR_PARALLEL}", allowed, f"{reason}; {hint}"))
    if problems:
        raise ConfigError(problems)


def refuse_replicated(
    weights: Iterable[Weight], techniques: Mapping[str, Technique], layers: LayerShards
) -> None:
    """Raises ConfigError for pruned weights of which every process of the tensor-parallel group has all, or some."""
    full = {weight.name: weight.numel for weight in weights}
    problems = []
    for technique in techniques.values():
        wrong = [n for n in technique.masked_weights() if layers.places.get(n, (0, 0))[1] != full[n]]
        if wrong:
            problems.append(
                Problem(
                    dotted(technique.name),
                    f"{few(wrong)}, which tensor parallelism leaves whole, or partly the same, in each process",
                    "weights that it shards",
                    "add them to shared_parameters.excluded_modules",
                )
            )
    if problems:
        raise ConfigError(problems)


def refuse_learning_of_frozen(techniques: Iterable[Technique], names: Iterable[str]) -> None:
    """Raises ConfigError for each technique whose masks need training of one of the weights `names`, which get none."""
    frozen = set(names)
    problems = []
    for technique in techniques:
        stuck = [name for name in technique.learning_weights() if name in frozen]
        if stuck:
            problems.append(
                Problem(
                    dotted(technique.name, "shared_parameters", "method"),
                    f"masks that follow the training of {few(stuck)}, which no optimizer steps (frozen?)",
                    "l1 or random, without regrowth, for weights that do not train",
                    "choose such a method, train these weights, or leave them out by excluded_modules",
                )
            )
    if problems:
        raise ConfigError(problems)


def refuse_what_needs_an_engine(model: nn.Module, techniques: Mapping[str, Technique]) -> None:
    """Raises ConfigError for what a training loop without a DeepSpeed engine cannot do."""
    problems = [problem for technique in techniques.values() for problem in technique.without_engine()]
    if any(internals.is_zero3_parameter(parameter) for parameter in model.parameters()):
        hint = "deepspeed.initialize takes a prepared model over, also on ZeRO-0 with one process"
        problems.append(Problem(ROOT, "a model under zero.Init", "whole parameters, or an engine", hint))
    if problems:
        raise ConfigError(problems)


def require_full_layers(engine: Any, what: str) -> None:
    """Raises ValueError where a process would take its shards for the model."""
    if hasattr(engine, "autotp_size") and internals.tensor_parallel_group(engine) is not None:
        raise ValueError(
            f"{what}: AutoTP has sharded the layers of this engine; load ds_compress.export_state_dict(engine), the "
            "whole masked weights, into a model, and go on from that"
        )


def _unsupported(model: nn.Module, engine_class: str, ds_config: Any) -> Iterator[tuple[str, Any, str, str]]:
    zero = ds_config.zero_config
    if engine_class in ("PipelineEngine", "DualPipeVEngine"):
        yield ROOT, f"a pipeline model ({engine_class})", "a plain nn.Module", "use ZeRO data parallelism"
    if engine_class == "DeepSpeedHybridEngine":
        yield "hybrid_engine.enabled", True, "false", "compress in a plain training engine"
    moe = [name for name, p in model.named_parameters() if getattr(p, "allreduce", True) is False]
    if moe:
        yield (
            ROOT,
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


def _gradient_problems(ds_config: Any) -> Iterator[Problem]:
    zero = ds_config.zero_config
    if getattr(ds_config, "sparse_gradients_enabled", False):
        yield Problem(
            "sparse_gradients",
            "true",
            "false",
            "gradients are reduced dense here; sparse ones would go past it",
        )
    if zero.stage in (1, 2) and not zero.use_multi_rank_bucket_allreduce:
        yield Problem(
            "zero_optimization.use_multi_rank_bucket_allreduce",
            "false",
            "true",
            "remove the key: it reduces to one process at a time, which is never faster here",
        )
    if zero.stage == 3 and not zero.reduce_scatter:
        yield Problem(
            "zero_optimization.reduce_scatter",
            "false",
            "true at stage 3",
            "remove the key: gradients are reduce-scattered here; or, for Muon, which wants it, use stage 1 or 2",
        )


def _parameter_problems(config: CompressionConfig, ds_config: Any) -> Iterator[Problem]:
    stage = ds_config.zero_config.stage
    if stage == 0:
        yield Problem(
            f"{ROOT}.parameter_compression.enabled",
            "true",
            "false at ZeRO stage 0, where no weights travel",
            "set zero_optimization.stage to 1, 2 or 3",
        )
    block = config.parameter_compression
    if stage == 3 and block is not None and block.given("refresh_interval"):
        yield Problem(
            f"{ROOT}.parameter_compression.refresh_interval",
            shown(block.refresh_interval),
            "nothing at ZeRO stage 3, where nobody keeps a copy to refresh",
            'remove "refresh_interval"',
        )
    if getattr(ds_config, "torch_autocast_enabled", False):
        yield Problem(
            "torch_autocast.enabled",
            shown(True),
            "false with parameter_compression",
            "autocast sends some weights in another dtype than it keeps; use bf16.enabled",
        )
