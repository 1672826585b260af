"""Which libraries may be loaded: nobody else's, and whole ones."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_compress.ops import library_file
from ds_compress.ops.library_file import UnsafeLibraryError, check_file, make_safe_folder, safe_folder

NOBODY = 65534


@pytest.fixture
def library(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    path = make_safe_folder(tmp_path / "cache") / "ops.so"
    path.write_bytes(b"code")
    path.chmod(0o755)
    library_file.write_checksum(path, path)
    return path


def refused(check: Callable[[], object], *words: str) -> None:
    with pytest.raises(UnsafeLibraryError) as raised:
        check()
    for word in (*words, "DS_COMPRESS_CACHE", "DS_COMPRESS_KERNELS=reference"):
        assert word in str(raised.value)


def test_one_that_was_built_here_is_taken(library: Path) -> None:
    assert safe_folder(library.parent) == library.parent
    check_file(library)
    assert library_file.damage(library) is None


def test_folders_are_made_for_the_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        folder = make_safe_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent, folder.parent.parent)] == [
        0o755
    ] * 3


@pytest.mark.parametrize("which", ["file", "folder"])
class TestOthers:
    def check(self, library: Path, which: str) -> Callable[[], object]:
        return (lambda: check_file(library)) if which == "file" else (lambda: safe_folder(library.parent))

    def path(self, library: Path, which: str) -> Path:
        return library if which == "file" else library.parent

    def test_everybody_may_write(self, library: Path, which: str) -> None:
        self.path(library, which).chmod(0o777)
        refused(self.check(library, which), f"{self.path(library, which)} may be written by everybody")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    def test_it_is_of_another_user(self, library: Path, which: str) -> None:
        os.chown(self.path(library, which), NOBODY, -1)
        refused(self.check(library, which), f"belongs to {pwd.getpwuid(NOBODY).pw_name}")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root owns everything here")
    def test_it_is_of_the_user_that_ran_before(
        self, library: Path, which: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
        refused(self.check(library, which), "not to you")

    @pytest.mark.parametrize(
        ("name", "primary", "members", "fine"),
        [
            ("me", True, [], True),
            ("me", True, ["me"], True),
            ("me", True, ["me", "you"], False),
            ("me", False, [], False),
            ("staff", True, [], False),
        ],
    )
    def test_a_group_may_write_where_it_is_the_owners_own(
        self,
        library: Path,
        which: str,
        name: str,
        primary: bool,
        members: list[str],
        fine: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = self.path(library, which)
        path.chmod(0o775)
        gid = path.stat().st_gid
        user = SimpleNamespace(pw_name="me", pw_gid=gid if primary else gid + 1)
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
        monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
        if fine:
            self.check(library, which)()
        else:
            refused(self.check(library, which), f"{path} may be written by the group {name}")

    def test_a_group_without_a_name_may_not(
        self, library: Path, which: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(gid: int) -> object:
            raise KeyError(gid)

        self.path(library, which).chmod(0o775)
        monkeypatch.setattr(grp, "getgrgid", unknown)
        refused(self.check(library, which), f"by the group {library.stat().st_gid}")


def test_a_folder_above_may_be_for_everybody_only_when_sticky(tmp_path: Path, library: Path) -> None:
    tmp_path.chmod(0o1777)
    safe_folder(library.parent)
    tmp_path.chmod(0o777)
    refused(lambda: safe_folder(library.parent), str(tmp_path))


def test_a_link_in_the_place_of_the_library_is_refused(library: Path) -> None:
    other = library.with_name("other.so")
    library.rename(other)
    library.symlink_to(other)
    refused(lambda: check_file(library), "is a link")


def test_a_link_to_the_folder_is_followed_and_its_target_is_checked(tmp_path: Path, library: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(library.parent)
    assert make_safe_folder(link) == library.parent
    library.parent.chmod(0o777)
    refused(lambda: make_safe_folder(link), str(library.parent))


@pytest.mark.parametrize(
    ("hurt", "wrong"),
    [
        (lambda library: library.write_bytes(b"cod3"), "differs from its checksum"),
        (lambda library: library.write_bytes(b""), "differs from its checksum"),
        (lambda library: library_file.checksum_file(library).unlink(), "has no checksum"),
        (lambda library: library_file.checksum_file(library).write_bytes(b""), "differs from its checksum"),
        (lambda library: library_file.checksum_file(library).write_bytes(b"\xff"), "has no checksum"),
    ],
    ids=["changed", "empty", "no checksum", "empty checksum", "no text"],
)
def test_damage_is_found(library: Path, hurt: Callable[[Path], object], wrong: str) -> None:
    hurt(library)
    assert wrong in str(library_file.damage(library))
