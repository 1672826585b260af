"""What a search is to stay within."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds_compress.errors import listed
from ds_compress.estimate.devices import Device

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
PICOSECOND = 1e-12
"""Of times as the solver adds them: whole numbers."""
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class StoredBytes:
    """bytes: at most so many in the weight files of an export."""

    bytes: int

    def budget(self, weights: int, others: int) -> int:
        """Bytes for the `weights` of the layers in the table, beside `others` for everything else in the files."""
        return self.bytes - others

    def reached(self, size: int, weights: int, others: int) -> str:
        """In words what layers of `size` bytes come to."""
        return f"{(size + others) / 1e6:.2f} MB, of which {others / 1e6:.2f} MB are not in the table"

    def __str__(self) -> str:
        return f"--size {self.bytes / 1e6:g}MB"


@dataclass(frozen=True)
class EffectiveBits:
    """bits: at most so many for each weight of the layers in the table, scales included, on the average."""

    bits: float

    def budget(self, weights: int, others: int) -> int:
        """See `StoredBytes.budget`."""
        return int(self.bits * weights / 8)

    def reached(self, size: int, weights: int, others: int) -> str:
        """See `StoredBytes.reached`."""
        return f"{8 * size / weights:.4g} bits"

    def __str__(self) -> str:
        return f"--effective-bits {self.bits:g}"


@dataclass(frozen=True)
class Latency:
    """seconds: at most so long for one forward of `tokens` tokens, if `device` reached its peaks. Sizes are times, in
    `PICOSECOND`."""

    seconds: float
    device: Device
    tokens: int

    def budget(self, weights: int, others: int) -> int:
        """See `StoredBytes.budget`."""
        return int(self.seconds / PICOSECOND) - others

    def reached(self, size: int, weights: int, others: int) -> str:
        """See `StoredBytes.reached`."""
        total, rest = (size + others) * PICOSECOND * 1e3, others * PICOSECOND * 1e3
        return f"{total:.4g} ms, of which {rest:.4g} ms are not in the table"

    def __str__(self) -> str:
        return f"--latency {self.seconds * 1e3:g}ms"


Goal = StoredBytes | EffectiveBits | Latency


def seconds_of(text: str) -> float:
    """ "10ms" is 0.01; units are s, ms and us.

    Raises:
        ValueError: it is no such time.
    """
    found = _SIZE.fullmatch(text)
    unit = None if found is None else _TIMES.get(found[2].lower())
    seconds = 0.0 if found is None or unit is None else float(found[1]) * unit
    if seconds <= 0:
        raise ValueError(f"a latency is a number of {listed(list(_TIMES))}, got {text!r}")
    return seconds


def bytes_of(text: str) -> int:
    """ "20MB" is 20,000,000, "20MiB" is 20 * 2^20; without a unit it is bytes.

    Raises:
        ValueError: it is no such size.
    """
    found = _SIZE.fullmatch(text)
    unit = None if found is None else _UNITS.get(found[2].upper() or "B")
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size <= 0:
        raise ValueError(
            f"a size is a number of {listed(['B', 'kB', 'MB', 'GB', 'KiB', 'MiB', 'GiB'])}, got {text!r}"
        )
    return size
