"""What accelerators can do at most, by their vendors' data sheets: dense products, at boost clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_WIDER = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16"}
"""What products of a kind run as where a device has no units for it."""
_KEYS = ("bf16", "int8", "fp8", "fp4", "bandwidth")


@dataclass(frozen=True)
class Device:
    """Peaks of one device.

    tera: 1e12 operations in a second by kind of product ("bf16", "int8", "fp8", "fp4"), a multiplication and an
    addition counted as two. gigabytes: 1e9 bytes in a second between it and its memory.
    """

    name: str
    tera: Mapping[str, float]
    gigabytes: float

    def kind(self, wanted: str) -> str:
        """The kind of product that it has for `wanted`: that, or a wider one."""
        while wanted not in self.tera:
            wanted = _WIDER[wanted]
        return wanted

    def seconds(self, flops: float, nbytes: float, kind: str = "bf16") -> float:
        """Of an operation that is bound by the slower of both (Williams et al., 2009: the roofline model)."""
        return max(flops / (self.tera[self.kind(kind)] * 1e12), self.moving(nbytes))

    def moving(self, nbytes: float) -> float:
        """Seconds that so many bytes take between it and its memory."""
        return nbytes / (self.gigabytes * 1e9)


def _named(name: str, gigabytes: float, **tera: float) -> tuple[str, Device]:
    return name, Device(name, MappingProxyType(tera), gigabytes)


DEVICES = dict(
    (
        _named("a100-80gb-sxm", 2039, bf16=312, int8=624),
        _named("h100-sxm", 3350, bf16=989, int8=1979, fp8=1979),
        _named("h200-sxm", 4800, bf16=989, int8=1979, fp8=1979),
        _named("b200-sxm", 8000, bf16=2250, int8=4500, fp8=4500, fp4=9000),
        _named("l4", 300, bf16=121, int8=242, fp8=242),
        _named("l40s", 864, bf16=362, int8=733, fp8=733),
        _named("mi300x", 5300, bf16=1307, int8=2615, fp8=2615),
    )
)
"""By name. None of these was measured here."""


def device(text: str) -> Device:
    """One of `DEVICES`, or its peaks: "bf16=989,int8=1979,bandwidth=3350" (tera-operations and gigabytes a second).

    Raises:
        ValueError: neither; with what there is.
    """
    if text in DEVICES:
        return DEVICES[text]
    if "=" not in text:
        raise ValueError(
            f"{text} is no device that is known here: choose one of {', '.join(DEVICES)}, or give its peaks as "
            f'"bf16=989,int8=1979,bandwidth=3350" (1e12 operations and 1e9 bytes a second)'
        )
    peaks = dict(_peak(part, text) for part in text.split(","))
    if not {"bf16", "bandwidth"} <= peaks.keys():
        raise ValueError(f"{text}: bf16 and bandwidth are needed, the others are not")
    gigabytes = peaks.pop("bandwidth")
    return Device(text, MappingProxyType(peaks), gigabytes)


def _peak(part: str, text: str) -> tuple[str, float]:
    key, _, number = part.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if key.strip() not in _KEYS or not 0 < value < float("inf"):
        raise ValueError(f"{text}: {part!r} is none of {', '.join(_KEYS)} with a number above 0")
    return key.strip(), value
