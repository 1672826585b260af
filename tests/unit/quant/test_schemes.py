"""The table of schemes against that of compressed-tensors."""

from __future__ import annotations

from typing import Any

import pytest
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.schemes import SCHEMES, QuantizerSpec, scheme_named

NOT_TRAINED = {"UNQUANTIZED", "W4A16_ASYM"}
STRATEGIES = {
    Granularity.PER_TENSOR: "tensor",
    Granularity.PER_CHANNEL: "channel",
    Granularity.PER_COLUMN_GROUP: "group",
    Granularity.PER_BLOCK: "block",
    TokenGranularity.PER_TENSOR: "tensor",
    TokenGranularity.PER_TOKEN: "token",
    TokenGranularity.PER_TOKEN_GROUP: "group",
}


def test_all_presets_are_known_but_those_that_do_not_load():
    assert set(SCHEMES) == set(PRESET_SCHEMES) - NOT_TRAINED


def in_their_words(spec: QuantizerSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    words: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if spec.format == "int" else "float",
        "strategy": "tensor_group" if spec.format == "nvfp4" else STRATEGIES[spec.granularity],
        "symmetric": True,
        "group_size": None if spec.granularity is Granularity.PER_BLOCK else spec.group_size,
        "block_structure": [spec.group_size] * 2 if spec.granularity is Granularity.PER_BLOCK else None,
    }
    if isinstance(spec.granularity, TokenGranularity):
        words["dynamic"] = not spec.static
        if spec.format == "nvfp4":
            words["dynamic"] = "local"
    else:
        words["dynamic"] = False
    if spec.format.startswith(("mx", "nv")):
        words["scale_dtype"] = "torch.float8_e4m3fn" if spec.format == "nvfp4" else "torch.uint8"
    return words


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_the_preset_of_its_name(name):
    scheme, preset = SCHEMES[name], PRESET_SCHEMES[name]
    for spec, theirs in (
        (scheme.weights, preset["weights"]),
        (scheme.inputs, preset.get("input_activations")),
    ):
        words = in_their_words(spec)
        assert (words is None) == (theirs is None)
        if words is not None:
            dumped = theirs.model_dump(mode="json")
            assert words == {key: dumped.get(key) for key in words}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_a_scheme_has_grids(scheme):
    weights, inputs = scheme.weights, scheme.inputs
    WeightGrid(
        bits=weights.bits,
        format=weights.format,
        granularity=weights.granularity,
        group_size=weights.group_size or 128,
    )
    if inputs is not None:
        ActivationGrid(
            bits=inputs.bits, format=inputs.format, granularity=inputs.granularity, static=inputs.static
        )


def test_names_in_any_case():
    assert scheme_named("nvfp4a16") is SCHEMES["NVFP4A16"]
    with pytest.raises(ValueError, match="FP8_BLOCK"):
        scheme_named("FP9")
