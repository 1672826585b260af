"""What gradient and parameter traffic of ours does not work with, said at start and in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.errors import ConfigError, Problem, shown

_ROOT = "compression_training"


def traffic_blocks(config: CompressionConfig) -> list[str]:
    """The enabled blocks that change what travels between processes, by their keys."""
    keys = ("gradient_compression", "robust_reduction", "parameter_compression")
    return [key for key in keys if (block := getattr(config, key)) is not None and block.enabled]


def refuse_unsupported_reductions(config: CompressionConfig, ds_config: Any) -> None:
    """Raises ConfigError with all DeepSpeed settings that the enabled blocks cannot live with."""
    enabled = traffic_blocks(config)
    problems: list[Problem] = []
    if {"gradient_compression", "robust_reduction"} & {*enabled}:
        problems += _gradient_problems(ds_config)
    if "parameter_compression" in enabled:
        problems += _parameter_problems(config, ds_config)
    if problems:
        raise ConfigError(problems)


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
            f"{_ROOT}.parameter_compression.enabled",
            "true",
            "false at ZeRO stage 0, where no weights travel",
            "set zero_optimization.stage to 1, 2 or 3",
        )
    block = config.parameter_compression
    if stage == 3 and block is not None and block.given("refresh_interval"):
        yield Problem(
            f"{_ROOT}.parameter_compression.refresh_interval",
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
