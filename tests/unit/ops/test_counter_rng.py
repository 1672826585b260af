"""The counter generator: published vectors, independence of slicing, and the statistics of uniformity."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from ds_compress.ops.counter_rng import stream_key, uniform, uniform_at

MASK = 2**64 - 1


def splitmix_finalizer(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def reference(key: int, index: int) -> float:
    state = (splitmix_finalizer(key & MASK) + index * 0x9E3779B97F4A7C15) & MASK
    return (splitmix_finalizer(state) >> 40) * 2.0**-24


def test_finalizer_reproduces_published_splitmix64_outputs():
    # First outputs of SplitMix64 seeded with 1234567 (the test vector of the reference C code).
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix_finalizer((1234567 + (i + 1) * golden) & MASK) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 123456789])
@pytest.mark.parametrize("start", [0, 7, 2**31 - 2, 2**31 + 5, 2**40, 2**62])
def test_equals_integer_arithmetic_of_python(key: int, start: int):
    drawn = uniform(5, key, start)
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == [reference(key, start + i) for i in range(5)]


def test_a_slice_is_a_slice_whatever_the_chunks():
    whole = uniform(100_000, 42, 2**33)
    for begin, end in [(0, 1), (32_767, 32_770), (50_001, 99_999)]:
        assert torch.equal(uniform(end - begin, 42, 2**33 + begin), whole[begin:end])
    assert torch.equal(uniform((100, 1000), 42, 2**33).flatten(), whole)


def test_scattered_elements_equal_the_run():
    indices = torch.tensor([[7, 2**31], [2**40, 7]])
    drawn = uniform_at(indices, 42)
    assert drawn.tolist() == [[uniform(1, 42, int(i)).item() for i in row] for row in indices]


def test_empty():
    assert uniform(0, 3).shape == (0,)
    assert uniform((3, 0), 3).shape == (3, 0)


def test_moments_and_histogram():
    n = 1 << 20
    drawn = uniform(n, stream_key(0, "layer.weight", 3)).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(drawn.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(drawn, bins=256, min=0, max=1)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 384, 32_768])
def test_no_correlation_between_neighbours(lag: int):
    drawn = uniform(1 << 19, 9).double() - 0.5
    correlation = (drawn[lag:] * drawn[:-lag]).mean() * 12
    assert abs(correlation) < 5 / math.sqrt(drawn.numel() - lag)


def test_no_correlation_between_neighbouring_keys_and_steps():
    n = 1 << 19
    names = [(0, "w", 0), (0, "w", 1), (1, "w", 0), (0, "v", 0)]
    keys = [0, 1, 2, *(stream_key(*name) for name in names)]
    streams = torch.stack([uniform(n, key) for key in keys]).double() - 0.5
    correlation = (streams @ streams.T) * 12 / n
    off_diagonal = correlation - torch.diag(correlation.diag())
    assert off_diagonal.abs().max() < 5 / math.sqrt(n)


def test_every_output_bit_is_balanced():
    n = 1 << 18
    bits = (uniform(n, 77) * 2**24).to(torch.int64)
    for position in range(24):
        ones = ((bits >> position) & 1).double().mean()
        assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(n), position


def test_key_is_the_same_in_another_process():
    code = "from ds_compress.ops.counter_rng import stream_key; print(stream_key(5, 'bert.weight', 17))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout.splitlines()[-1]) == stream_key(5, "bert.weight", 17)  # imports may log above
    assert -(2**63) <= stream_key(5, "bert.weight", 17) < 2**63


def test_keys_do_not_run_fields_together():
    assert len({stream_key(1, "1w", 1), stream_key(11, "w", 1), stream_key(1, "w", 11)}) == 3
