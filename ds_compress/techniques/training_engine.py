"""What a technique may ask of the engine that trains its model; `engine.training_engine` answers for DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
    from ds_compress.reduce.bandwidth import Comparison
    from ds_compress.reduce.codec import BlockCodec
    from ds_compress.reduce.exchange import QuantizedSum
    from ds_compress.reduce.slices import Part, Segment

Deliver = Callable[["Part", torch.Tensor], None]
"""Gets a part of a segment that this process owns, and its reduced fp32 values, (end - begin,)."""


class GradientReducer(Protocol):
    """What is called in the place of an engine's own reductions of gradients."""

    @property
    def needs_keys(self) -> bool:
        """Whether segments have to end where their parameter does, and to say which it is."""

    def handles(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a bucket of `numel` elements in all is reduced here; the same in every process."""

    def reduce_scatter(
        self, group: Any, segments: Sequence[Segment], deliver: Deliver, multiplier: float
    ) -> None:
        """Gives each owner `multiplier` times the sum of its segments: see `reduce.exchange`."""

    def all_reduce(self, group: Any, segments: Sequence[Segment], multiplier: float) -> None:
        """Replaces all segments by `multiplier` times their sum, with the same bits everywhere."""


class WeightTransport(Protocol):
    """Weights that travel between processes as quantized values."""

    counts: dict[str, float]

    def start(self) -> None:
        """Begins with the copies as they are now, which have to be equal in all processes."""

    def refresh(self) -> None:
        """All copies become exact; a collective."""

    def close(self) -> None:
        """The engine sends its weights itself again."""


class TrainingEngine(Protocol):
    """An engine with an optimizer, of one process."""

    model: nn.Module
    data_parallel_group: Any
    device: torch.device

    @property
    def applied_steps(self) -> int:
        """Optimizer steps applied so far."""

    def loss_scale(self) -> float:
        """What gradients are multiplied by at the moment; 1 without loss scaling."""

    def has_momentum(self) -> bool:
        """Whether the optimizer keeps a running mean of gradients itself."""

    def reductions_per_step(self) -> int:
        """How often the gradient of each parameter is reduced before a step."""

    def parameter_shapes(self) -> Iterator[torch.Size]:
        """Full shapes of all parameters that train."""

    def log_events(self, values: Mapping[str, float]) -> None:
        """Sends numbers to the engine's monitor, under exactly these tags; nothing where it has none."""

    def transform_loss(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        """`backward(loss)` is that of `transform(loss)` from now on; returns what ends it."""

    def replace_reductions(self, reducer: GradientReducer) -> Callable[[], None]:
        """Buckets of gradients are offered to `reducer` from now on; returns what ends it."""

    def compare_reductions(self, quantized: QuantizedSum) -> Comparison:
        """Times one reduction of the engine's kind, plain and quantized; a collective."""

    def compare_all_gathers(self, codec: BlockCodec) -> Comparison:
        """Times one all-gather of weights, plain and quantized; a collective."""

    def quantize_weight_transport(
        self, block: ParameterCompressionConfig, codec: BlockCodec
    ) -> WeightTransport:
        """Weights travel as `codec` makes them from now on; a collective."""
