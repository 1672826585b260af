"""Files and folders appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_compress import files
from ds_compress.files import (
    UnfinishedFolder,
    atomic_write,
    inside,
    replace_folder,
    restore_folder,
    write_tensors,
)


@pytest.mark.parametrize(
    "content", ["tür\n", "tür\n".encode(), lambda path: path.write_text("tür\n", "utf-8")]
)
def test_content_of_each_kind_replaces_the_file(tmp_path: Path, content: object) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    atomic_write(path, content)  # type: ignore[arg-type]
    assert path.read_text("utf-8") == "tür\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise error

    with pytest.raises(error):
        atomic_write(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with UnfinishedFolder(out) as unfinished:
            (unfinished.path / text).write_text(text)
            assert not (out / text).exists()
            unfinished.finish()
        assert [path.name for path in out.iterdir()] == [text]
    assert list(out.parent.iterdir()) == [out] and out.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_was_not_finished_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), UnfinishedFolder(tmp_path / "out") as unfinished:
        (unfinished.path / "half").write_text("")
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "deep/er.pt", "..hidden", "a..b"])
def test_names_inside_of_a_folder(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../../x", "/etc/passwd", "..", "..\\x", "C:\\x", "\\x", "a\0b", None, 3, ["x"]]
)
def test_names_that_lead_out_of_it_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="is no file inside of"):
        inside(tmp_path, name)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_read_tensors_as_they_read_other_new_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
        (tmp_path / "other").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_with_and_without_an_exchange_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("first", "second"):
        new = tmp_path / f"new-{text}"
        new.mkdir()
        (new / text).write_text(text)
        replace_folder(new, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [text]
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("killed_before", range(5))
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_in_the_replacement_leaves_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: int, can_exchange: bool
) -> None:
    """Every step of `replace_folder` is the last one once."""

    class Kill(BaseException):
        pass

    steps = 0

    def counted(step: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            nonlocal steps
            steps += 1
            if steps > killed_before:
                raise Kill
            return step(*args, **kwargs)

        return call

    out, new = tmp_path / "out", tmp_path / "new"
    for folder, text in ((out, "old"), (new, "new")):
        folder.mkdir()
        (folder / "content").write_text(text)
    with monkeypatch.context() as patch:
        exchange = files._exchange if can_exchange else lambda one, other: False
        patch.setattr(files, "_exchange", counted(exchange))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(files.shutil, "rmtree", counted(files.shutil.rmtree))
        patch.setattr(files, "sync", counted(files.sync))
        with contextlib.suppress(Kill):
            replace_folder(new, out)
    restore_folder(out)
    assert (out / "content").read_text() in ("old", "new")
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_left_is_removed_by_the_next_writer_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    left = tmp_path / ".out.unfinished-abc"
    left.mkdir()
    (left / "half").write_text("")
    with UnfinishedFolder(tmp_path / "out") as one:
        assert not left.exists()
        with UnfinishedFolder(tmp_path / "out") as other:
            assert one.path.exists() and other.path.exists()
