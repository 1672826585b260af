"""Regexes reach what they name and nothing else."""

from __future__ import annotations

import random
import re

import pytest

from ds_compress.sensitivity.patterns import patterns

NAMES = [
    *(f"model.layers.{layer}.{name}" for layer in range(12) for name in ("mlp.fc", "attn.q", "mlp.fc2")),
    *(f"a.{x}.b.{y}.c" for x in range(3) for y in range(2)),
    "classifier",
    "model.layers.1xmlp.fc",
]


@pytest.mark.parametrize("seed", range(20))
def test_exactly_these(seed: int) -> None:
    wanted = random.Random(seed).sample(NAMES, random.Random(seed).randrange(1, len(NAMES)))
    found = patterns(wanted, NAMES)
    assert {name for name in NAMES if any(re.search(p, name) for p in found)} == set(wanted)


def test_they_are_short() -> None:
    fc = [name for name in NAMES if name.endswith("mlp.fc") and "x" not in name]
    assert patterns(fc, NAMES) == [r"^model\.layers\.[0-9]+\.mlp\.fc$"]
    assert patterns([fc[0], fc[7], "classifier"], NAMES) == [
        r"^model\.layers\.(0|7)\.mlp\.fc$",
        "^classifier$",
    ]
    assert patterns([fc[3]], NAMES) == [r"^model\.layers\.3\.mlp\.fc$"]
