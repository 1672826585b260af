"""How gradient elements become the bytes of a payload, and how the payloads of several workers are summed."""

from __future__ import annotations

from typing import Protocol

import torch

from ds_compress.ops import kernels
from ds_compress.ops.sizes import payload_bytes


class Codec(Protocol):
    """Encodes flat float tensors; payloads are uint8 rows of `message_bytes(numel)` bytes.

    alignment: elements that are encoded together; a payload of fewer is as long.
    """

    alignment: int

    def payload_bytes(self, numel: int) -> int:
        """Bytes of the payload of `numel` elements; 0 for none."""

    def encode(self, x: torch.Tensor, payload: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """Writes x (n,) to `payload` (payload_bytes(n),); `residual` fp32 (n,): see `ops.block_quantize`."""

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """Reads a payload of out.numel() elements into `out` (n,), any float dtype."""

    def sum(self, payloads: torch.Tensor, out: torch.Tensor, multiplier: float) -> None:
        """out (n,) fp32 = the sum over the rows of `payloads` (W, payload_bytes(n)), in order, times `multiplier`."""


class BlockCodec:
    """int8 or int4 values and one fp32 scale per block: the `block_*` ops, fused and alike on CPU and CUDA.

    A block that holds NaN or Inf arrives as NaN, so that the receiver detects an overflow.
    """

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block, self.alignment = bits, block, block
        self._ops = kernels()

    def payload_bytes(self, numel: int) -> int:
        return payload_bytes(numel, self.bits, self.block)

    def encode(self, x: torch.Tensor, payload: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        self._ops.block_quantize(x, payload.view(1, -1), residual, x.numel(), self.bits, self.block)

    def encode_rows(
        self, x: torch.Tensor, payloads: torch.Tensor, residual: torch.Tensor | None, shard: int
    ) -> None:
        """Elements w * shard to (w + 1) * shard become row w; elements beyond x are 0."""
        self._ops.block_quantize(x, payloads, residual, shard, self.bits, self.block)

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        self._ops.block_dequantize(payload.view(1, -1), out, out.numel(), self.bits, self.block)

    def decode_rows(self, payloads: torch.Tensor, out: torch.Tensor, shard: int) -> None:
        """The inverse of `encode_rows`."""
        self._ops.block_dequantize(payloads, out, shard, self.bits, self.block)

    def sum(self, payloads: torch.Tensor, out: torch.Tensor, multiplier: float) -> None:
        self._ops.block_reduce(payloads, out, self.bits, self.block, multiplier)

    def sum_and_encode(
        self,
        payloads: torch.Tensor,
        payload: torch.Tensor,
        residual: torch.Tensor | None,
        numel: int,
        multiplier: float,
    ) -> None:
        """`sum`, then `encode` of it, in one pass."""
        self._ops.block_reduce_quantize(payloads, payload, residual, numel, self.bits, self.block, multiplier)


class PlainCodec:
    """The elements as they are."""

    alignment = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def payload_bytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def encode(self, x: torch.Tensor, payload: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        if residual is not None:
            raise ValueError("a plain payload loses nothing: there is no residual to keep")
        payload.view(self.dtype).copy_(x)

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(payload.view(self.dtype))

    def sum(self, payloads: torch.Tensor, out: torch.Tensor, multiplier: float) -> None:
        self.decode(payloads[0], out)
        for payload in payloads[1:]:
            out.add_(payload.view(self.dtype))
        if multiplier != 1:
            out.mul_(multiplier)
