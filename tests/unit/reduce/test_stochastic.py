"""Stochastic rounding of payloads: right on average, at most a step away, the same draw in every process."""

from __future__ import annotations

import math

import pytest
import torch

from ds_compress.config import ConfigError, parse_config
from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.stochastic import Dither, StochasticBlockCodec

FORMATS = [(8, 512), (4, 128)]


def sent(codec: BlockCodec, x: torch.Tensor) -> torch.Tensor:
    payload = torch.empty(codec.payload_bytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, payload)
    read = torch.empty(x.numel())
    codec.decode(payload, read)
    return read


def gradients(numel: int = 3000) -> torch.Tensor:
    """Of very different sizes inside every block."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(numel, generator=generator) * torch.logspace(-4, 0, numel).roll(7 * 64)


@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_the_mean_of_many_messages_is_the_gradient(bits: int, block: int) -> None:
    x, rounds = gradients(), 400
    dither = Dither()
    codec = StochasticBlockCodec(bits, block, dither)
    total = torch.zeros(x.numel(), dtype=torch.float64)
    for _ in range(rounds):
        dither.begin()
        total += sent(codec, x)
    padded = torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    step = (padded.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7)).expand_as(padded)
    step = step.reshape(-1)[: x.numel()]
    # A rounding of f of a step has variance f (1 - f); six standard deviations of the mean, and fp32.
    deviation = 6 * 0.5 / math.sqrt(rounds) * step + 1e-5 * x.abs()
    assert bool(((total / rounds - x).abs() <= deviation).all())
    nearest = sent(BlockCodec(bits, block), x)
    assert float((nearest - x).abs().sum()) > 5 * float((total / rounds - x).abs().sum())


@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_codes_are_the_two_neighbours_and_scales_those_of_nearest(bits: int, block: int) -> None:
    x = gradients()
    dither = Dither()
    codec, plain = StochasticBlockCodec(bits, block, dither), BlockCodec(bits, block)
    scales = 4 * -(-x.numel() // block)
    payloads = []
    for coder in (codec, plain):
        payload = torch.empty(coder.payload_bytes(x.numel()), dtype=torch.uint8)
        coder.encode(x, payload)
        payloads.append(payload)
    assert torch.equal(payloads[0][:scales], payloads[1][:scales])
    padded = torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    step = (padded.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7)).expand_as(padded)
    assert bool(((sent(codec, x) - x).abs() <= 1.0001 * step.reshape(-1)[: x.numel()]).all())


def test_equal_gradients_of_many_processes_lose_a_fraction_of_the_noise() -> None:
    x, world = torch.full((512,), 0.3), 4
    x[0] = 127.0
    read = [sent(StochasticBlockCodec(8, 512, Dither(rank / world)), x) for rank in range(world)]
    mean = torch.stack(read).mean(0)
    assert bool(((mean[1:] - 0.3).abs() <= 1 / world).all()), "one or two of four round up, never none or all"
    assert 0 < float(mean[1:].std()) < 0.2


def test_draws_depend_on_bucket_and_message_and_on_nothing_else() -> None:
    one, two = Dither(), Dither()
    for dither in (one, two):
        dither.begin()
    first = one.draw(100, torch.device("cpu"))
    assert torch.equal(first, two.draw(100, torch.device("cpu")))
    assert not torch.equal(first, one.draw(100, torch.device("cpu")))
    resumed = Dither()
    resumed.buckets = one.buckets
    one.begin(), resumed.begin()
    again = one.draw(100, torch.device("cpu"))
    assert torch.equal(again, resumed.draw(100, torch.device("cpu"))) and not torch.equal(again, first)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_overflow_is_seen(bad: float) -> None:
    x = torch.ones(1024)
    x[700] = bad
    read = sent(StochasticBlockCodec(4, 128, Dither()), x)
    assert (
        bool(read[640:768].isnan().all()) and bool((read[:640] == 1).all()) and bool((read[768:] == 1).all())
    )


def test_zeros_stay_zeros_and_the_ends_of_the_range_stay_finite() -> None:
    x = torch.zeros(1024)
    x[512:] = 3.3e38
    read = sent(StochasticBlockCodec(8, 512, Dither()), x)
    assert not read[:512].any() and torch.allclose(read[512:], x[512:])


def test_error_feedback_has_nothing_to_keep() -> None:
    codec = StochasticBlockCodec(8, 512, Dither())
    payload = torch.empty(codec.payload_bytes(10), dtype=torch.uint8)
    with pytest.raises(ValueError, match="no bias"):
        codec.encode(torch.ones(10), payload, torch.zeros(10))


def test_it_is_not_combined_with_error_feedback_and_the_plan_says_it() -> None:
    block = {"enabled": True, "rounding": "stochastic"}
    config = parse_config({"gradient_compression": block})
    assert "stochastic rounding" in config.enabled_blocks()["gradient_compression"].describe()
    with pytest.raises(ConfigError) as error:
        parse_config({"gradient_compression": {**block, "error_feedback": True}})
    (problem,) = error.value.problems
    assert problem.path == "compression_training.gradient_compression.rounding"
