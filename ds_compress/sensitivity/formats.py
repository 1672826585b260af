"""What a layer can be stored in, by short names, and what the JSON says of it.

int4          integers of 4 bits, one scale for each output
int4_g64      the same with one scale for each 64 inputs
fp8_e4m3, mxfp8, mxfp6_e2m3, mxfp6_e3m2, mxfp4, nvfp4, nf4      as `weight_quantization` knows them
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_compress.config.targets import Target, inputs_of
from ds_compress.errors import listed
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.formats import FORMATS

DEFAULT = ("int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8")
_INTEGER = re.compile(r"int([2-8])(?:_g([1-9][0-9]*))?")
_FLOATS = tuple(name for name in FORMATS if name != "fp8_e5m2")


@dataclass(frozen=True)
class Format:
    """params: of a group of `weight_quantization`. group_size: inputs that share a scale; None: all of an output.

    must_divide: whether the inputs of a layer have to be a multiple of it, also where they are fewer.
    """

    name: str
    params: dict[str, Any]
    group_size: int | None
    must_divide: bool

    def fits(self, target: Target) -> bool:
        """Whether a layer of this shape and kind can be stored in it."""
        if self.group_size is None:
            return True
        if target.kind is ModuleKind.CONV2D and self.must_divide:
            return False
        inputs = inputs_of(target)
        return inputs % self.group_size == 0 or (inputs < self.group_size and not self.must_divide)


def format_named(name: str) -> Format:
    """Raises ValueError where there is none; says what there is."""
    found = _INTEGER.fullmatch(name)
    if found is not None:
        bits = {"target_bits": int(found[1])}
        if found[2] is None:
            return Format(name, {**bits, "granularity": "per_channel"}, None, False)
        size = int(found[2])
        params = {**bits, "granularity": "per_column_group", "group_size": size}
        return Format(name, params, size, False)
    if name not in _FLOATS:
        raise ValueError(
            f"a format is int2 to int8, with _g64 behind it where 64 inputs share a scale, or {listed(_FLOATS, 'or')}; "
            f"got {name!r}"
        )
    block = FORMATS[name].block
    return Format(name, {"format": name}, block, block is not None)


def formats_named(names: Sequence[str]) -> list[Format]:
    """Raises ValueError for a name that there is not, for one that is given twice, and for none at all."""
    if not names:
        raise ValueError("no format is given")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the format {twice} is given twice")
    return [format_named(name) for name in names]
