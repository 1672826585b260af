"""All python in README and docs runs, and prints what the page says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.docs import execution
from tests.docs.pages import ROOT, blocks_of, pages
from tests.docs.training import save_teacher
from tests.models import tiny_bert
from tests.single import init_single_process

RUN_ELSEWHERE = {
    "README.md": "test_readme.py",
    "README.zh-CN.md": "test_readme.py",
    "tutorial.md": "test_tutorial.py",
    "contributing.md": "test_contributing.py",
}
PAGES = [
    page
    for page in pages()
    if page.name not in RUN_ELSEWHERE and any(block.language == "python" for block in blocks_of(page))
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models under the names that the pages use for the reader's own."""
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "path" / "to" / "teacher")
    tiny_bert(layers=6).save_pretrained(folder / "path" / "to" / "model")
    return folder


@pytest.fixture(autouse=True)
def nothing_left_by_hugging_face() -> Iterator[None]:
    yield
    execution.forget_hugging_face()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(
    page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_single_process()
    (tmp_path / "path").symlink_to(models / "path")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    # A page may leave the process group; the pages after it need it.
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *_: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    execution.write_files(page, tmp_path)
    printed = execution.run_page(page)
    gc.collect()
    if execution.updating():
        execution.update(printed)
    differences = [
        f"{block.place}: {found}"
        for block, text in printed
        if (found := execution.difference(block.text, text))
    ]
    assert execution.updating() or not differences, "\n".join(differences)
