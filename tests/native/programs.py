"""Calls of CUDA launchers on buffers, as tests of the elementwise kernels make them from tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.native.emulator.harness import Program

DTYPE_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Expected = dict[str, torch.Tensor]
Case = tuple[Program, Expected]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes, as integers: numpy has no bf16."""
    return tensor.contiguous().view(INTEGER_OF_SIZE[tensor.element_size()]).numpy().copy()


def program(
    inputs: dict[str, torch.Tensor], calls: list[tuple[str, tuple[Any, ...]]], expected: Expected
) -> Case:
    """A call on `inputs`; what of `expected` is not among them is an output, first full of garbage."""
    garbage = {
        name: torch.full((t.numel() * t.element_size(),), 0xA5, dtype=torch.uint8)
        for name, t in expected.items()
    }
    buffers = {name: to_numpy(t) for name, t in (garbage | inputs).items()}
    return Program(buffers, calls, tuple(expected)), expected


def shifted(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """`tensor` behind `elements` more, so that at a multiple of 16 bytes it does not begin."""
    return torch.cat([torch.full((elements,), 7, dtype=tensor.dtype), tensor])
