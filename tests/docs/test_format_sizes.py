"""The sizes on the page of formats are those of the formats."""

from __future__ import annotations

import re

import pytest

from ds_compress.quant.formats import FORMATS
from tests.docs.pages import DOCS

PAGE = (DOCS / "formats.md").read_text()
ROWS = [row.strip("| ").split(" | ") for row in PAGE.splitlines() if re.match(r"\| `(\w+)`.* \| \d \| ", row)]
BY_NAME = {name: row for row in ROWS for name in re.findall(r"`(\w+)`", row[0]) if name != "int"}


def test_the_page_has_every_format() -> None:
    assert set(BY_NAME) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_with_scales_are_those_of_the_format(name: str) -> None:
    known, (_, bits, shared, _, total) = FORMATS[name], BY_NAME[name]
    assert int(bits) == known.bits
    if known.block is None:
        assert total == "a bit more than 8"
        return
    assert shared.startswith(f"{known.block} weights")
    assert float(total) == known.bits + known.scale_bits / known.block


def test_so_are_those_of_integers() -> None:
    found = {size: float(row[-1]) for row in ROWS if (size := re.search(r"groups of (\d+)", row[0]))}
    assert {int(size[1]): total for size, total in found.items()} == {128: 4 + 32 / 128, 32: 4 + 32 / 32}
