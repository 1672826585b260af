"""Sizes in words, and what they leave for the layers."""

from __future__ import annotations

import pytest

from ds_compress.sensitivity.goal import EffectiveBits, StoredBytes, bytes_of


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


def test_budgets() -> None:
    assert StoredBytes(100).budget(16, 30) == 70
    assert EffectiveBits(4.5).budget(16, 30) == 9
    assert EffectiveBits(4.5).reached(10, 16, 30) == "5 bits"
    assert (
        str(StoredBytes(20_500_000)) == "--size 20.5MB" and str(EffectiveBits(4.5)) == "--effective-bits 4.5"
    )
