"""Each block has a page, and each page lists the keys as the schema has them."""

from __future__ import annotations

import ds_compress
from tests.docs.key_tables import WHOLE, stale_pages, tables_in
from tests.docs.pages import DOCS

BESIDE_THE_BLOCKS = {"recipe", "seed", "kernels", "scheme", "export_to"}


def test_every_block_has_a_page_with_its_keys() -> None:
    blocks = set(type(ds_compress.parse_config({})).model_fields) - BESIDE_THE_BLOCKS
    pages = {page.stem: page for page in (DOCS / "blocks").glob("*.md")}
    assert set(pages) == blocks | {"index"}
    assert {name: tables_in(page) for name, page in pages.items() if name != "index"} == {
        name: [name] for name in blocks
    }
    assert tables_in(pages["index"]) == [WHOLE]


def test_tables_are_current() -> None:
    assert not stale_pages(), "run python -m tests.docs.key_tables"
