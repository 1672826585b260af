"""Bytes of weights between processes: what a step has changed (ZeRO-1 and 2), or what a layer needs (3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.config.targets import Weight
from ds_compress.estimate.buckets import flat_numel, shard_numel
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.traffic import Collectives, Traffic
from ds_compress.ops.sizes import payload_bytes
from ds_compress.reduce.uncompressed import is_sent_uncompressed


@dataclass(frozen=True)
class WeightTraffic:
    """Of one step; under compression at stages 1 and 2 the mean over `refresh_interval` steps.

    A step that makes new masks sends exact copies beside, which are not counted.
    """

    layout: RunLayout
    compression: ParameterCompressionConfig | None = None

    def of_step(self, weights: Sequence[Weight]) -> Traffic:
        """weights: all, in the order of the model."""
        if self.layout.world_size == 1 or self.layout.stage == 0:
            return Traffic()
        if self.layout.stage == 3:
            return self._fetches(weights)
        return self._copies([weight for weight in weights if weight.trainable])

    def _item(self, weight: Weight) -> int:
        return self.layout.weight_bytes or weight.itemsize

    def _copies(self, weights: Sequence[Weight]) -> Traffic:
        """Stages 1 and 2."""
        world, collectives, block = self.layout.world_size, Collectives(self.layout), self.compression
        numel = flat_numel(weights, world)
        exact = collectives.all_gather(numel * self._item(weights[0]))
        if block is None or numel < block.min_elements:
            return exact
        size = block.effective_block_size
        chunk = max(1, block.chunk_elements(world) // world // size) * size
        full, rest = divmod(numel // world, chunk)
        of_chunk = collectives.all_gather(world * payload_bytes(chunk, block.bits, size))
        quantized = of_chunk * full
        if rest:
            quantized += collectives.all_gather(world * payload_bytes(rest, block.bits, size))
        refreshes = 1 / block.refresh_interval
        return quantized * (1 - refreshes) + exact * refreshes

    def _fetches(self, weights: Sequence[Weight]) -> Traffic:
        """Stage 3: before forward, and before backward where a layer was not kept until then."""
        layout, collectives = self.layout, Collectives(self.layout)
        traffic, behind = Traffic(), sum(weight.numel for weight in weights)
        kept = max(layout.reuse, layout.prefetch)
        for weight in weights:
            behind -= weight.numel
            nbytes = layout.world_size * shard_numel(weight, layout.world_size) * self._item(weight)
            if weight.numel <= layout.persistent:
                # Stays whole, and is gathered once, when the optimizer has changed it.
                traffic += collectives.all_gather(nbytes) if weight.trainable else Traffic()
                continue
            # What lies behind it is traversed twice until backward needs it again.
            fetches = layout.accumulation * (1 if 2 * behind < kept else 2)
            traffic += collectives.all_gather(self._fetched(weight, nbytes)) * fetches
        return traffic

    def _fetched(self, weight: Weight, nbytes: float) -> float:
        block, world = self.compression, self.layout.world_size
        if block is None or not weight.trainable or weight.numel < block.min_elements:
            return nbytes
        shard, size = shard_numel(weight, world), block.effective_block_size
        if shard < size or is_sent_uncompressed(weight.shape):
            return nbytes
        return world * payload_bytes(shard, block.bits, size)
