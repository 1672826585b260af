"""Weights of integers as compressed-tensors stores them.

    8-bit weights with 8-bit integers as inputs   int-quantized   int8; also all weights of T5 and other classes that do
                                                                  not load packed ones, see `trial_load`
    other weights of 2 to 8 bits                  pack-quantized  packed into int32

Binary and ternary weights are the 2-bit values -1, 0, 1.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.export.compressed_tensors.arguments import arguments
from ds_compress.export.quantized_matrix import QuantizedMatrix

_FEWEST_BITS = 2  # in one bit its values would be -1 and 0


def weight_arguments(quantized: QuantizedMatrix) -> dict[str, Any]:
    bits = max(_FEWEST_BITS, quantized.bits)
    if quantized.groups == 1:
        return arguments(bits, "channel")
    return arguments(bits, "group", group_size=quantized.group_size)


def stored_integers(quantized: QuantizedMatrix, in_bytes: bool) -> dict[str, torch.Tensor]:
    """By local name."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored = {"weight_scale": quantized.scale}
    if in_bytes:
        return {**stored, "weight": quantized.values}
    return {
        **stored,
        "weight_packed": pack_to_int32(quantized.values, max(_FEWEST_BITS, quantized.bits)),
        "weight_shape": torch.tensor(quantized.values.shape),
    }
