"""The one-line names that servers have for how weights and inputs are quantized: "W8A8", "FP8_DYNAMIC", "NVFP4", ...

Those of `compressed_tensors.quantization.PRESET_SCHEMES`, in the words of `quant.grid`. Left out: UNQUANTIZED, which
says nothing, and W4A16_ASYM, because stock tools do not load asymmetric weights back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_compress.errors import listed
from ds_compress.quant.formats import FORMATS
from ds_compress.quant.grid import Granularity, TokenGranularity

_GROUP = 128
"""Weights that share the scale of an integer, inputs that share one of FP8, and both sides of a square block."""

_FEWEST_INPUT_BITS = 4
_INPUT_BITS = 8


@dataclass(frozen=True)
class QuantizerSpec:
    """How one tensor of a layer is quantized.

    format: "int", or a name of `formats.FORMATS`. group_size: values that share a scale where the granularity has
    groups or blocks, else None. static: inputs have an observed range (of nvfp4: for the global scale).
    """

    format: str
    bits: int
    granularity: Granularity | TokenGranularity
    group_size: int | None = None
    static: bool = False


@dataclass(frozen=True)
class Scheme:
    """weights, inputs: None: not quantized. All weights are symmetric."""

    name: str
    weights: QuantizerSpec | None
    inputs: QuantizerSpec | None


def scheme_named(name: str) -> Scheme:
    """The scheme of that name, in any case.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    found = SCHEMES.get(name.upper())
    if found is None:
        raise ValueError(f"a scheme is one of {listed(list(SCHEMES), 'or')}, got {name!r}")
    return found


def _int_weights(bits: int) -> QuantizerSpec:
    return QuantizerSpec("int", bits, Granularity.PER_COLUMN_GROUP, _GROUP)


def _int_inputs(bits: int) -> QuantizerSpec:
    return QuantizerSpec("int", bits, TokenGranularity.PER_TOKEN)


def _fp8(
    granularity: Granularity | TokenGranularity, group_size: int | None = None, static: bool = False
) -> QuantizerSpec:
    return QuantizerSpec("fp8_e4m3", 8, granularity, group_size, static)


def _weights_in_blocks(format: str) -> QuantizerSpec:
    known = FORMATS[format]
    return QuantizerSpec(format, known.bits, Granularity.PER_COLUMN_GROUP, known.block)


def _inputs_in_blocks(format: str, static: bool = False) -> QuantizerSpec:
    known = FORMATS[format]
    return QuantizerSpec(format, known.bits, TokenGranularity.PER_TOKEN_GROUP, known.block, static)


def _of_integers() -> Iterator[Scheme]:
    eight = QuantizerSpec("int", 8, Granularity.PER_CHANNEL)
    for name in ("W8A8", "INT8"):
        yield Scheme(name, eight, _int_inputs(8))
    for bits in range(2, 9):
        yield Scheme(f"W{bits}A16", _int_weights(bits), None)
        if bits < _INPUT_BITS:
            yield Scheme(f"W{bits}A8", _int_weights(bits), _int_inputs(_INPUT_BITS))
        if bits <= _FEWEST_INPUT_BITS:
            yield Scheme(f"W{bits}A4", _int_weights(bits), _int_inputs(_FEWEST_INPUT_BITS))


def _of_floats() -> Iterator[Scheme]:
    per_token = _fp8(TokenGranularity.PER_TOKEN)
    groups_of_fp8 = _fp8(TokenGranularity.PER_TOKEN_GROUP, _GROUP)
    yield Scheme("W4AFP8", _int_weights(4), per_token)
    yield Scheme("FP8", _fp8(Granularity.PER_TENSOR), _fp8(TokenGranularity.PER_TENSOR, static=True))
    yield Scheme("FP8_DYNAMIC", _fp8(Granularity.PER_CHANNEL), per_token)
    yield Scheme("FP8_BLOCK", _fp8(Granularity.PER_BLOCK, _GROUP), groups_of_fp8)
    for name, weights, inputs in (
        ("NVFP4", "nvfp4", _inputs_in_blocks("nvfp4", static=True)),
        ("MXFP4", "mxfp4", _inputs_in_blocks("mxfp4")),
        ("MXFP8", "mxfp8", _inputs_in_blocks("mxfp8")),
    ):
        yield Scheme(f"{name}A16", _weights_in_blocks(weights), None)
        yield Scheme(name, _weights_in_blocks(weights), inputs)
    yield Scheme("MXFP4XFP8", _weights_in_blocks("mxfp4"), groups_of_fp8)
    yield Scheme("MXFP6A16", _weights_in_blocks("mxfp6_e2m3"), None)
    yield Scheme("MXFP6A8", _weights_in_blocks("mxfp6_e2m3"), _inputs_in_blocks("mxfp8"))


SCHEMES = {scheme.name: scheme for scheme in (*_of_integers(), *_of_floats())}
"""By their names in capitals."""
