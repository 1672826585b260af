"""Bytes on the wire of one optimizer step, as a config has it and in the other ways that there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.gradient_compression import GradientCompressionConfig
from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.config.targets import Weight
from ds_compress.estimate.gradients import GradientTraffic
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.traffic import Traffic
from ds_compress.estimate.weights import WeightTraffic

PLAIN, CONFIGURED = "plain DeepSpeed", "this config"
BOTH_WAYS, HIERARCHICAL = "8 bits both ways", "8 bits both ways, hierarchical"

NOT_COUNTED = (
    "not counted: norms, overflow flags and monitors (bytes), masks that are made anew, a sharded teacher's weights, "
    "evaluation, checkpoints"
)


@dataclass(frozen=True)
class Way:
    """One way to reduce gradients and to hand out weights, and what it sends in a step."""

    name: str
    gradients: Traffic
    weights: Traffic

    @property
    def total(self) -> Traffic:
        return self.gradients + self.weights


def configured(weights: Sequence[Weight], layout: RunLayout, config: CompressionConfig) -> Way:
    """What the blocks of `config` send after their warm-up, on a link on which quantizing pays."""
    gradients, parameters = config.gradient_compression, config.parameter_compression
    robust = config.robust_reduction
    return _way(
        CONFIGURED,
        weights,
        layout,
        gradients if gradients is not None and gradients.enabled else None,
        parameters if parameters is not None and parameters.enabled else None,
        robust is not None and robust.enabled,
    )


def ways(weights: Sequence[Weight], layout: RunLayout, config: CompressionConfig) -> Iterator[Way]:
    """DeepSpeed's own way, that of `config` where it is another, and both with 8 bits, for comparison.

    weights: all of the model, in its order.
    """
    yield _way(PLAIN, weights, layout)
    enabled = config.enabled_blocks()
    if {"gradient_compression", "parameter_compression", "robust_reduction"} & set(enabled):
        yield configured(weights, layout, config)
    gradients, parameters = (
        GradientCompressionConfig(enabled=True),
        ParameterCompressionConfig(enabled=True),
    )
    yield _way(BOTH_WAYS, weights, layout, gradients, parameters)
    if layout.nodes > 1 and layout.ranks_per_node > 1:
        hierarchical = GradientCompressionConfig(enabled=True, hierarchical=True)
        yield _way(HIERARCHICAL, weights, layout, hierarchical, parameters)


def _way(
    name: str,
    weights: Sequence[Weight],
    layout: RunLayout,
    gradients: GradientCompressionConfig | None = None,
    parameters: ParameterCompressionConfig | None = None,
    robust: bool = False,
) -> Way:
    trained = [weight for weight in weights if weight.trainable]
    if not trained:
        return Way(name, Traffic(), WeightTraffic(layout).of_step(weights))
    return Way(
        name,
        GradientTraffic(layout, gradients, robust).of_step(trained),
        WeightTraffic(layout, parameters).of_step(weights),
    )
