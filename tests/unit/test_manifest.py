"""The manifest of a folder finds every kind of damage, and names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_compress.manifest import FILE_NAME, Manifest, ManifestError, entry_of

FILES = {"weights.bin": bytes(range(256)) * 40, "deep/state.json": b"{}", "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Manifest.of(tmp_path / "out", {"step": 3}).write(tmp_path / "out")
    return tmp_path / "out"


def found(folder: Path) -> list[str]:
    manifest = Manifest.read(folder)
    assert manifest is not None
    return manifest.problems(folder)


def test_what_was_written_is_whole(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None and manifest.about == {"step": 3}
    assert set(manifest.files) == set(FILES) and manifest.problems(folder) == []
    (folder / "added").write_text("by somebody")
    assert manifest.problems(folder) == []


@pytest.mark.parametrize("position", [0, 5000, 10239])
def test_a_flipped_bit_is_found(folder: Path, position: int) -> None:
    content = bytearray(FILES["weights.bin"])
    content[position] ^= 1
    (folder / "weights.bin").write_bytes(content)
    (problem,) = found(folder)
    assert str(folder / "weights.bin") in problem and "changed" in problem


def test_truncated_grown_missing_and_swapped_files_are_found(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(FILES["weights.bin"][:-1])
    (folder / "empty").write_bytes(b"x")
    (folder / "deep/state.json").unlink()
    words = "\n".join(found(folder))
    assert "weights.bin has 10239 bytes instead of 10240" in words
    assert "empty has 1 bytes instead of 0" in words and "state.json is missing" in words


def test_processes_that_share_the_work_find_all(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    manifest = Manifest.read(folder)
    assert manifest is not None
    parts = [manifest.problems(folder, part, 2) for part in range(2)]
    assert [*parts[0], *parts[1]] == manifest.problems(folder)
    assert [] in parts


def test_a_manifest_of_another_folder_is_named(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_bytes(b"of another step")
    assert any(str(folder / FILE_NAME) in problem for problem in found(folder))


def test_hashes_that_are_known_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    assert Manifest.of(tmp_path, {}, {"a": (7, "known")}).files == {"a": (7, "known")}
    assert Manifest.of(tmp_path, {}).files == {"a": entry_of(tmp_path / "a")}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace('"step": 3', '"step": 4'), "not what was written"),
        (lambda text: text.replace("weights.bin", "../weights.bin"), "damaged"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "newer version"),
        (lambda text: "\udc80", "damaged"),
    ],
)
def test_a_damaged_manifest_is_an_error_that_names_it(folder: Path, damage: object, words: str) -> None:
    path = folder / FILE_NAME
    path.write_text(damage(path.read_text()), encoding="utf-8", errors="surrogateescape")  # type: ignore[operator]
    with pytest.raises(ManifestError, match=words) as error:
        Manifest.read(folder)
    assert str(path) in str(error.value)


def test_names_that_lead_out_of_the_folder_are_refused_with_a_right_hash(folder: Path) -> None:
    manifest = Manifest({}, {"../other": (1, "0")})
    manifest.write(folder)
    assert json.loads((folder / FILE_NAME).read_text())["files"]
    with pytest.raises(ManifestError, match="no file inside"):
        Manifest.read(folder)


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
