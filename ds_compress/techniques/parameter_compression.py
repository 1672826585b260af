"""`parameter_compression`: weights travel between processes as int8 or int4 values.

    "parameter_compression": {"enabled": true, "bits": 8, "refresh_interval": 100}

**Stages 1 and 2** (BF16_Optimizer too): after a step every process holds new fp32 weights of its own slice, and the
16-bit copies of all slices. What travels is the difference (see `reduce.weight_deltas`). Copies are equal in all
processes at any time, and exactly the rounded fp32 weights after a refresh: every `refresh_interval` steps, whenever a
weight has become zero (a new mask), and before a checkpoint, an export or the end of the compression. Between
refreshes they are within half a quantization step of them, and the fp32 weights, which the optimizer moves, are exact
always.

**Stage 3**: nobody keeps a copy, and a layer fetches its weights before its forward and its backward. While the
model trains they travel quantized themselves (ZeRO++'s qwZ, Wang et al. 2023, on any device): forward and backward see
weights rounded to 127 steps per block, zeros exactly. Small and one-dimensional parameters (see `reduce.uncompressed`),
those whose slice is shorter than a block, and those that DeepSpeed keeps between steps travel as they are, in the same
payload. In eval mode, and for whoever reads weights otherwise, they are exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch.distributed as dist

from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.errors import Problem
from ds_compress.reduce.codec import BlockCodec
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.base import Technique, TechniqueContext, engine_only
from ds_compress.techniques.gradient_compression import log_once
from ds_compress.techniques.gradient_reduction import ALONE
from ds_compress.techniques.training_engine import TrainingEngine, WeightTransport


class ParameterCompression(Technique):
    name = "parameter_compression"

    @classmethod
    def of(cls, context: TechniqueContext) -> ParameterCompression | None:
        block = context.config.parameter_compression
        return cls(block) if block is not None and block.enabled else None

    def __init__(self, block: ParameterCompressionConfig) -> None:
        self.block = block
        self._transport: WeightTransport | None = None

    def attach_engine(self, engine: TrainingEngine) -> None:
        """Takes over the all-gathers of `engine`; a collective."""
        group = engine.data_parallel_group
        if dist.get_world_size(group) == 1:
            log_once(group, f"parameter_compression: {ALONE}", logging.WARNING)
            return
        codec = BlockCodec(self.block.bits, self.block.effective_block_size)
        if self.block.measure_link:
            found = engine.compare_all_gathers(codec)
            state = "on" if found.is_worthwhile else "off on this link; measure_link: false insists"
            log_once(group, f"parameter_compression is {state}: {found}")
            if not found.is_worthwhile:
                return
        self._transport = engine.quantize_weight_transport(self.block, codec)

    def attach(self, shards: Shards) -> None:
        # Called again when weights were loaded: what the other processes have is what is there now.
        if self._transport is not None:
            self._transport.start()

    def refresh(self) -> None:
        if self._transport is not None:
            self._transport.refresh()

    def detach(self) -> None:
        if self._transport is not None:
            self._transport.refresh()
            self._transport.close()
            self._transport = None

    def without_engine(self) -> Iterator[Problem]:
        yield engine_only(self.name, "enabled", "true", "false")

    def metrics(self) -> dict[str, float]:
        return {} if self._transport is None else dict(self._transport.counts)
