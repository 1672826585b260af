"""No code on a page escapes the other tests, and what a page says that the library prints is in its source."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from ds_compress.ops import functional
from tests.docs.pages import DOCS, ROOT, all_blocks, blocks_of, pages, without_blocks

LANGUAGES = {
    "python": "test_python.py",
    "text": "test_python.py, where it follows python",
    "json": "test_json.py",
    "bash": "test_commands.py",
    "diff": "here",
}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language_that_is_tested(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block.place}: {block.language or 'no language'}"


@pytest.mark.parametrize("sign", "-+")
def test_both_sides_of_a_diff_are_python(sign: str) -> None:
    diffs = all_blocks("diff")
    assert diffs
    for block in diffs:
        ast.parse("\n".join(line[1:] for line in block.text.splitlines() if line[:1] in (" ", sign, "")))


def test_the_page_of_kernels_calls_every_op() -> None:
    code = "".join(block.text for block in blocks_of(DOCS / "kernels.md") if block.language == "python")
    called = set(re.findall(r"\bF\.(\w+)", code))
    assert called == set(functional.__all__)


OUR_MESSAGES = [
    "block in this DeepSpeed config",
    "the model trains in eval() mode",
    "ops run on plain torch, not on native kernels",
    "no C++ compiler: install g++ 12 or newer, or name one in $CXX",
    "gradients are NaN or Inf; this step is skipped",
]


@pytest.mark.parametrize("message", OUR_MESSAGES)
def test_messages_in_troubleshooting_are_those_of_the_source(message: str) -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "ds_compress").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    assert message in page
    assert message in joined


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [
        str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if str(p.relative_to(DOCS)) not in navigation
    ]
    assert not missing


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_json_in_the_running_text_names_keys_that_exist(page: Path) -> None:
    """Such as `"kernel": "int8"`: the key is one of the schema, or of DeepSpeed."""
    schema = (ROOT / "ds_compress" / "config" / "schema" / "compression_training.schema.json").read_text()
    for key in re.findall(r'`"(\w+)": [^`]+`', without_blocks(page)):
        assert f'"{key}"' in schema or key in OF_DEEPSPEED, f"{page.name}: {key}"


OF_DEEPSPEED = {"stage", "torch_adam", "stage3_gather_16bit_weights_on_model_save"}


def test_pictures_are_as_drawn() -> None:
    """The floors come from the contract of imports in pyproject.toml, so a new floor changes the picture."""
    drawing = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    for name, draw in drawing["PICTURES"].items():
        assert draw().svg() == (DOCS / "pictures" / name).read_text(), "run python docs/pictures/draw.py"
