"""A DeepSpeed engine as techniques see it: `techniques.training_engine.TrainingEngine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.engine.comm import measure, reduction_points, weight_transport
from ds_compress.engine.patches import Patches
from ds_compress.engine.zero import internals
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.reduce.bandwidth import Comparison
from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.exchange import QuantizedSum
from ds_compress.techniques.training_engine import GradientReducer, WeightTransport


class DeepSpeedTraining:
    """What techniques may ask of `engine`, which has a run attached."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.model: nn.Module = engine.module
        self.data_parallel_group = internals.data_parallel_group(engine)
        self.device = torch.device(engine.device)

    @property
    def applied_steps(self) -> int:
        steps: int = self._engine.compression.applied_steps
        return steps

    def loss_scale(self) -> float:
        return internals.loss_scale(self._engine.optimizer)

    def has_momentum(self) -> bool:
        return internals.has_momentum(self._engine)

    def reductions_per_step(self) -> int:
        return internals.reductions_per_step(self._engine)

    def parameter_shapes(self) -> Iterator[torch.Size]:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield torch.Size(shape_of(parameter))

    def log_events(self, values: Mapping[str, float]) -> None:
        monitor = getattr(self._engine, "monitor", None)
        if monitor is not None and monitor.enabled:
            samples = self._engine.global_samples
            monitor.write_events([(tag, value, samples) for tag, value in values.items()])

    def transform_loss(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        patches = Patches()

        def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(transform(loss), *args, **kwargs)

        original = patches.install(self._engine, "backward", backward)
        return patches.close

    def replace_reductions(self, reducer: GradientReducer) -> Callable[[], None]:
        return reduction_points.connect(self._engine, reducer)

    def compare_reductions(self, quantized: QuantizedSum) -> Comparison:
        return measure.compare_reductions(self._engine, quantized)

    def compare_all_gathers(self, codec: BlockCodec) -> Comparison:
        return measure.compare_all_gathers(self._engine, codec)

    def quantize_weight_transport(
        self, block: ParameterCompressionConfig, codec: BlockCodec
    ) -> WeightTransport:
        return weight_transport.connect(self._engine, block, codec)
