"""Names of formats, what they say in the JSON, and which layers they fit."""

from __future__ import annotations

import pytest

from ds_compress.cli.sensitivity import _FORMATS
from ds_compress.config.schema.weight_params import WeightQuantizationParams
from ds_compress.quant.formats import FORMATS
from ds_compress.sensitivity.formats import DEFAULT, format_named, formats_named


@pytest.mark.parametrize(
    "name", [*DEFAULT, "int5", "int4_g128", *(name for name in FORMATS if name != "fp8_e5m2")]
)
def test_a_name_is_what_the_json_accepts(name: str) -> None:
    found = format_named(name)
    params = WeightQuantizationParams.model_validate(found.params)
    assert not list(params.conflicts())
    if name.startswith("int"):
        assert params.final_bits == int(name[3])
        assert params.group_size == (int(name.partition("_g")[2]) if "_g" in name else None)
    else:
        assert params.format == name and found.group_size == FORMATS[name].block


@pytest.mark.parametrize("name", ["int1", "int9", "int4_g0", "int4g64", "INT4", "fp8_e5m2", "keep", ""])
def test_other_names_are_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="nvfp4"):
        format_named(name)


def test_lists_of_names() -> None:
    with pytest.raises(ValueError, match="int8 is given twice"):
        formats_named(["int8", "nvfp4", "int8"])
    with pytest.raises(ValueError, match="no format"):
        formats_named([])


def test_the_command_has_the_same_default() -> None:
    assert tuple(_FORMATS.split(",")) == DEFAULT
