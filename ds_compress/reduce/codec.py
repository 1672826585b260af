"""How a run of gradient elements becomes bytes on the wire, and how messages of several workers are added up."""

from __future__ import annotations

from typing import Protocol

import torch

from ds_compress.ops import kernels
from ds_compress.ops.schemas import message_bytes


class Codec(Protocol):
    """Encodes flat float tensors; messages are uint8 rows of `message_bytes(numel)` bytes.

    granule: elements that are encoded together; a message of fewer is as long.
    """

    granule: int

    def message_bytes(self, numel: int) -> int:
        """Bytes of the message of `numel` elements; 0 for none."""

    def encode(self, x: torch.Tensor, message: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """Writes x (n,) to `message` (message_bytes(n),); `residual` fp32 (n,): see `ops.block_quantize`."""

    def decode(self, message: torch.Tensor, out: torch.Tensor) -> None:
        """Reads a message of out.numel() elements into `out` (n,), any float dtype."""

    def sum(self, messages: torch.Tensor, out: torch.Tensor, multiplier: float) -> None:
        """out (n,) fp32 = the sum over the rows of `messages` (W, message_bytes(n)), in order, times `multiplier`."""


class BlockCodec:
    """int8 or int4 codes and one fp32 scale per block: the `block_*` ops, fused and alike on CPU and CUDA.

    A block that holds NaN or Inf arrives as NaN, so an overflow is seen by whoever receives it.
    """

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block, self.granule = bits, block, block
        self._ops = kernels()

    def message_bytes(self, numel: int) -> int:
        return message_bytes(numel, self.bits, self.block)

    def encode(self, x: torch.Tensor, message: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        self._ops.block_quantize(x, message.view(1, -1), residual, x.numel(), self.bits, self.block)

    def quantize_rows(
        self, x: torch.Tensor, messages: torch.Tensor, residual: torch.Tensor | None, chunk: int
    ) -> None:
        """Elements w * chunk to (w + 1) * chunk become row w; elements beyond x are 0."""
        self._ops.block_quantize(x, messages, residual, chunk, self.bits, self.block)

    def decode(self, message: torch.Tensor, out: torch.Tensor) -> None:
        self._ops.block_dequantize(message.view(1, -1), out, out.numel(), self.bits, self.block)

    def decode_rows(self, messages: torch.Tensor, out: torch.Tensor, chunk: int) -> None:
        """The inverse of `quantize_rows`."""
        self._ops.block_dequantize(messages, out, chunk, self.bits, self.block)

    def sum(self, messages: torch.Tensor, out: torch.Tensor, multiplier: float) -> None:
        self._ops.block_reduce(messages, out, self.bits, self.block, multiplier)

    def sum_and_encode(
        self,
        messages: torch.Tensor,
        message: torch.Tensor,
        residual: torch.Tensor | None,
        numel: int,
        multiplier: float,
    ) -> None:
        """`sum`, then `encode` of it, in one pass."""
        self._ops.block_reduce_quantize(messages, message, residual, numel, self.bits, self.block, multiplier)


class PlainCodec:
    """The elements as they are."""

    granule = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def message_bytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def encode(self, x: torch.Tensor, message: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        if residual is not None:
            raise ValueError("a plain message loses nothing: there is no residual to keep")
        message.view(self.dtype).copy_(x)

    def decode(self, message: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(message.view(self.dtype))

    def sum(self, messages: torch.Tensor, out: torch.Tensor, multiplier: float) -> None:
        self.decode(messages[0], out)
        for message in messages[1:]:
            out.add_(message.view(self.dtype))
        if multiplier != 1:
            out.mul_(multiplier)
