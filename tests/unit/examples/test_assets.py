"""Assets without a registry: pip is replaced by a function that puts a made-up package where it should."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ds_compress.examples import assets
from ds_compress.examples.assets import Asset, AssetError, fetch


def unpack_zip(package: Path, folder: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)


class Registry:
    """Stands in for `python -m pip download` and counts how often it was run."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "thing-1.0.zip"
        with zipfile.ZipFile(self.package, "w") as archive:
            archive.writestr("data.txt", "content")
        self.commands: list[list[str]] = []
        self.failure: str | None = None
        self.served = self.package.read_bytes()

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.failure is not None:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        (target / self.package.name).write_bytes(self.served)
        return subprocess.CompletedProcess(command, 0, "", "")

    def asset(self, content: str = "content") -> Asset:
        return Asset(
            name="thing",
            requirement="thing==1.0",
            package_sha256=assets.sha256(self.package),
            unpack=unpack_zip,
            files={"data.txt": hashlib.sha256(content.encode()).hexdigest()},
        )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("DS_COMPRESS_CACHE", str(tmp_path / "cache"))
    fake = Registry(tmp_path)
    monkeypatch.setattr(subprocess, "run", fake.run)
    return fake


def leftovers() -> list[str]:
    cache = assets.cache_folder()
    return [path.name for path in cache.iterdir() if path.name.startswith(".")] if cache.exists() else []


class TestFetch:
    def test_is_downloaded_once_and_then_cached(self, registry: Registry) -> None:
        folder = fetch(registry.asset())
        assert (folder / "data.txt").read_text() == "content"
        assert fetch(registry.asset()) == folder
        assert len(registry.commands) == 1
        assert leftovers() == []

    def test_pip_is_told_the_hash_and_to_run_nothing_else(self, registry: Registry) -> None:
        fetch(registry.asset())
        command = registry.commands[0]
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--require-hashes" in command and "--no-deps" in command
        assert command[command.index("--only-binary") + 1] == "thing"

    def test_another_package_is_refused_and_leaves_nothing(self, registry: Registry) -> None:
        asset = registry.asset()
        registry.served += b"tampered"
        with pytest.raises(AssetError, match="another sha256"):
            fetch(asset)
        assert leftovers() == [] and list(assets.cache_folder().iterdir()) == []

    def test_wrong_content_names_the_folder_to_delete(self, registry: Registry) -> None:
        asset = registry.asset(content="something else")
        with pytest.raises(AssetError, match=r"data\.txt is damaged.*delete the folder .*thing-"):
            fetch(asset)

    def test_damaged_cache_is_noticed(self, registry: Registry) -> None:
        folder = fetch(registry.asset())
        (folder / "data.txt").write_text("contents")
        with pytest.raises(AssetError, match="damaged"):
            fetch(registry.asset())

    def test_unreachable_registry_is_one_sentence(self, registry: Registry) -> None:
        registry.failure = "WARNING: Retrying\nERROR: No matching distribution found for thing==1.0\n"
        with pytest.raises(AssetError) as caught:
            fetch(registry.asset())
        message = str(caught.value)
        assert "No matching distribution found for thing==1.0" in message
        assert "make the package registry reachable" in message and "\n" not in message
        assert leftovers() == []

    def test_pips_own_hash_check_is_reported_as_such(self, registry: Registry) -> None:
        registry.failure = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n"
        with pytest.raises(AssetError, match="another sha256 than the pinned one"):
            fetch(registry.asset())

    def test_hanging_pip_is_given_up(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        def hang(command: list[str], timeout: float, **_: Any) -> None:
            raise subprocess.TimeoutExpired(command, timeout)

        monkeypatch.setattr(subprocess, "run", hang)
        with pytest.raises(AssetError, match="within 900 s"):
            fetch(registry.asset())

    def test_interrupted_unpacking_leaves_nothing(self, registry: Registry) -> None:
        def interrupted(package: Path, folder: Path) -> None:
            (folder / "data.txt").write_text("cont")
            raise KeyboardInterrupt

        asset = registry.asset()
        broken = Asset(asset.name, asset.requirement, asset.package_sha256, interrupted, asset.files)
        with pytest.raises(KeyboardInterrupt):
            fetch(broken)
        assert leftovers() == []
        assert (fetch(asset) / "data.txt").read_text() == "content"

    def test_all_of_several_at_once_get_a_whole_folder(self, registry: Registry) -> None:
        together = threading.Barrier(4)
        asset = registry.asset()

        def unpack_together(package: Path, folder: Path) -> None:
            together.wait(timeout=30)
            unpack_zip(package, folder)

        slow = Asset(asset.name, asset.requirement, asset.package_sha256, unpack_together, asset.files)
        results: list[str] = []
        threads = [
            threading.Thread(target=lambda: results.append((fetch(slow) / "data.txt").read_text()))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert results == ["content"] * 4
        assert leftovers() == []

    def test_cache_that_cannot_be_written(
        self, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DS_COMPRESS_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(AssetError, match="set DS_COMPRESS_CACHE"):
            fetch(registry.asset())


class TestCacheFolder:
    def test_own_variable_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DS_COMPRESS_CACHE", "/one")
        monkeypatch.setenv("XDG_CACHE_HOME", "/two")
        assert assets.cache_folder() == Path("/one")

    def test_then_the_cache_of_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DS_COMPRESS_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/two")
        assert assets.cache_folder() == Path("/two/ds_compress")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert assets.cache_folder() == Path.home() / ".cache" / "ds_compress"


@pytest.mark.network
class TestRealAssets:
    """Skipped with the reason where the registry cannot be reached."""

    @pytest.mark.parametrize("asset", assets.ASSETS, ids=lambda asset: asset.name)
    def test_is_what_was_pinned(self, asset: Asset) -> None:
        try:
            folder = fetch(asset)
        except AssetError as error:
            if "cannot download" not in str(error) and "did not download" not in str(error):
                raise
            pytest.skip(str(error))
        assert all((folder / name).is_file() for name in asset.files)
