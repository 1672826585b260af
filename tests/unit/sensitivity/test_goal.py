"""Sizes in words, and what they leave for the layers."""

from __future__ import annotations

import pytest

from ds_compress.estimate.devices import DEVICES
from ds_compress.sensitivity.goal import EffectiveBits, Latency, StoredBytes, bytes_of, seconds_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20MB", 20_000_000), ("20 mib", 20 * 2**20), ("1.5GB", 1_500_000_000), ("7", 7), ("3kB", 3000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0", "0.0001B", "20M", "20 MB MB", "1e6", "nan"])
def test_other_words(text: str) -> None:
    with pytest.raises(ValueError, match="MiB"):
        bytes_of(text)


@pytest.mark.parametrize(("text", "expected"), [("10ms", 0.01), ("1.5 S", 1.5), ("250us", 25e-5)])
def test_times(text: str, expected: float) -> None:
    assert seconds_of(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "10", "ms", "-1ms", "0ms", "1min", "1e-3s", "nan"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="latency is a number of"):
        seconds_of(text)


def test_budgets() -> None:
    goal = Latency(2e-9, DEVICES["l4"], 1)
    assert goal.budget(16, 500) == 1500 and str(goal) == "--latency 2e-06ms"
    assert goal.reached(10**9, 16, 10**9) == "2 ms, of which 1 ms are not in the table"
    assert StoredBytes(100).budget(16, 30) == 70
    assert EffectiveBits(4.5).budget(16, 30) == 9
    assert EffectiveBits(4.5).reached(10, 16, 30) == "5 bits"
    assert (
        str(StoredBytes(20_500_000)) == "--size 20.5MB" and str(EffectiveBits(4.5)) == "--effective-bits 4.5"
    )
