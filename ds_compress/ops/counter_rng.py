"""Random numbers as a pure function of (key, element index): no state, no process, no order of calls.

The generator is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")
read at an arbitrary counter: ``u_i = mix(mix(key) + (start + i) * GOLDEN)``, of which the upper 24 bits
become a float. Any process can therefore draw exactly its own slice of a parameter's randomness, and
backward can draw again what forward drew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_CHUNK = 1 << 15  # elements: two int64 buffers of it stay inside a core's second-level cache
_CHUNK_OF_A_DEVICE = 1 << 23  # there a chunk costs ten launches, and may be 64 MB


def stream_key(seed: int, name: str, step: int = 0) -> int:
    """A signed 64-bit key for `uniform`, equal in every process and every Python run.

    `seed`: any int; `name`: usually a qualified parameter name; `step`: applied optimizer steps.
    """
    digest = hashlib.blake2b(f"{seed}\0{step}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(
    shape: int | Sequence[int],
    key: int,
    start: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """fp32 tensor of `shape` in [0, 1), multiples of 2^-24; element i depends on (key, start + i) only.

    `shape`: a number of elements or a shape (elements counted in row-major order);
    `key`: an int of 64 bits, signed or unsigned; `start`: index of the first element, below 2^63.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(sizes)
    origin = _mix_(torch.full((), _as_signed(key), dtype=torch.int64, device=device))
    chunk = _CHUNK if origin.device.type == "cpu" else _CHUNK_OF_A_DEVICE
    if torch.compiler.is_compiling() or count <= chunk:
        return _uniform_run(origin, start, count).view(sizes)
    out = torch.empty(count, dtype=torch.float32, device=device)
    for begin in range(0, count, chunk):
        length = min(chunk, count - begin)
        out[begin : begin + length] = _uniform_run(origin, start + begin, length)
    return out.view(sizes)


def uniform_at(indices: torch.Tensor, key: int) -> torch.Tensor:
    """What `uniform` gives the elements with these int64 indices: fp32 in [0, 1), shaped like `indices`."""
    origin = _mix_(torch.full((), _as_signed(key), dtype=torch.int64, device=indices.device))
    return _to_unit_interval_(indices.to(torch.int64) * _GOLDEN + origin)


def _uniform_run(origin: torch.Tensor, start: int, count: int) -> torch.Tensor:
    counter = torch.arange(start, start + count, dtype=torch.int64, device=origin.device)
    return _to_unit_interval_(counter.mul_(_GOLDEN).add_(origin))


def _to_unit_interval_(state: torch.Tensor) -> torch.Tensor:
    return _shift_right(_mix_(state), 40).to(torch.float32).mul_(2.0**-24)


def _mix_(state: torch.Tensor) -> torch.Tensor:
    """The SplitMix64 finalizer (Stafford's mix 13) in place; int64 products wrap as unsigned ones do."""
    state.bitwise_xor_(_shift_right(state, 30)).mul_(_MIX_1)
    state.bitwise_xor_(_shift_right(state, 27)).mul_(_MIX_2)
    return state.bitwise_xor_(_shift_right(state, 31))


def _shift_right(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own is arithmetic."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _as_signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key
