"""Versions grow: an older release, or one of another model, is refused though its signature is good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_compress import secure
from ds_compress.secure import TamperedError
from tests.secure_folders import keys


def release(folder: Path, version: int, name: str = "bert") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(f"{name} {version}")
    secure.sign(folder, keys().signing.private, name=name, version=version)
    return folder


def test_a_rollback_is_refused_once_a_newer_one_was_seen(tmp_path: Path) -> None:
    old, new = release(tmp_path / "old", 1), release(tmp_path / "new", 2)
    seen, public = tmp_path / "seen.json", keys().signing.public
    secure.verify(old, public, seen=seen)
    secure.verify(new, public, seen=seen)
    with pytest.raises(TamperedError, match=r"version 1 of 'bert', older than 2: a rollback"):
        secure.verify(old, public, seen=seen)
    secure.verify(new, public, seen=seen)
    secure.verify(old, public)  # whoever remembers nothing sees nothing


def test_each_model_has_versions_of_its_own(tmp_path: Path) -> None:
    seen, public = tmp_path / "seen.json", keys().signing.public
    secure.verify(release(tmp_path / "a", 9, "a"), public, seen=seen)
    secure.verify(release(tmp_path / "b", 1, "b"), public, seen=seen)
    assert sorted(json.loads(seen.read_text()).values()) == [1, 9]
    with pytest.raises(TamperedError, match="a release of 'b', not of 'a'"):
        secure.verify(tmp_path / "b", public, name="a")


def test_the_lowest_version_that_is_accepted(tmp_path: Path) -> None:
    folder = release(tmp_path / "model", 5)
    secure.verify(folder, keys().signing.public, min_version=5)
    with pytest.raises(TamperedError, match="older than 6"):
        secure.verify(folder, keys().signing.public, min_version=6)


def test_nothing_is_remembered_of_what_was_refused(tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    folder = release(tmp_path / "model", 5)
    with pytest.raises(TamperedError):
        secure.verify(folder, keys().signing.public, name="other", seen=seen)
    (folder / "weights").write_text("changed")
    with pytest.raises(TamperedError):
        secure.verify(folder, keys().signing.public, seen=seen)
    assert not seen.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', '{"a": true}', "\udcff"])
def test_a_damaged_memory_is_no_empty_one(tmp_path: Path, content: str) -> None:
    seen = tmp_path / "seen.json"
    seen.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is damaged"):
        secure.verify(release(tmp_path / "model", 5), keys().signing.public, seen=seen)


def test_a_folder_without_a_release_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    from ds_compress.secure.signing import signing_config, write_signature

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    write_signature(tmp_path / "model", signing_config(keys().signing.private))
    assert secure.verify(tmp_path / "model", keys().signing.public).release is None
    for asked in ({"name": "bert"}, {"min_version": 0}, {"seen": tmp_path / "seen.json"}):
        with pytest.raises(TamperedError, match=r"has no release\.json"):
            secure.verify(tmp_path / "model", keys().signing.public, **asked)


def test_versions_grow_when_a_folder_is_signed_again(tmp_path: Path) -> None:
    folder = release(tmp_path / "model", 5)
    with pytest.raises(ValueError, match="lower than 5: versions grow"):
        secure.sign(folder, keys().signing.private, version=4)
    assert secure.verify(folder, keys().signing.public).release == secure.Release("bert", 5)
    secure.sign(folder, keys().signing.private)  # seconds since 1970, by default
    signed = secure.verify(folder, keys().signing.public)
    assert (
        signed.release is not None
        and signed.release.name == "bert"
        and signed.release.version > 1_700_000_000
    )


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"format": 2, "name": "a", "version": 1}', '{"format": 1, "name": "a", "version": true}'],
)
def test_a_signed_release_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    from ds_compress.secure.signing import signing_config, write_signature

    folder = release(tmp_path / "model", 5)
    (folder / "release.json").write_text(content)
    write_signature(folder, signing_config(keys().signing.private))
    with pytest.raises(TamperedError, match="no release that this version reads"):
        secure.verify(folder, keys().signing.public)
