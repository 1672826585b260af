"""The bindings compile against the oldest torch that is supported and the newest, whichever of them is installed.

The headers of both lie in `torch_headers`, as `torch_headers/make.py` took them from the wheels.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from ds_compress.ops import build
from ds_compress.ops.toolchain import OLDEST_TORCH, ToolchainError, Torch
from tests.native.emulator import nvcc

ROOT = Path(__file__).resolve().parents[2]
ARCHIVES = {
    path.name.removeprefix("torch-").removesuffix(".tar.xz"): path
    for path in sorted((ROOT / "tests" / "native" / "torch_headers").glob("torch-*.tar.xz"))
}
OLDEST = "{}.{}.0".format(*OLDEST_TORCH)


@pytest.fixture(scope="module")
def torch_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Torch]:
    """A torch of headers alone, for each version."""
    found = {}
    for version, archive in ARCHIVES.items():
        folder = tmp_path_factory.mktemp(f"torch-{version}")
        with tarfile.open(archive) as opened:
            # Python 3.11 has filters from 3.11.4 on, and these archives are our own.
            opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        found[version] = Torch(folder / "torch", version)
    return found


def check(torch: Torch, source: Path, with_cuda: bool) -> subprocess.CompletedProcess[str]:
    """Compiles one file of the bindings as a build would, up to the point where code is made of it."""
    wanted = replace(build.Build.for_this_machine(with_cuda), torch=torch)
    command = [*wanted.command(source, Path("unused.o")), "-fsyntax-only"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_oldest_is_among_them_and_the_package_asks_for_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>={}.{}".format(*OLDEST_TORCH) in project["dependencies"]
    assert OLDEST in ARCHIVES and len(ARCHIVES) == 2


@pytest.mark.parametrize("version", ARCHIVES)
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "bindings").glob("*.cpp")))
def test_bindings_compile(torch_of: dict[str, Torch], version: str, source: str) -> None:
    with_cuda = source.endswith("_cuda.cpp")
    if with_cuda and not nvcc.available():
        pytest.skip("no CUDA headers: pip install 'ds_compress[cuda-build]'")
    done = check(torch_of[version], ROOT / "csrc" / "bindings" / source, with_cuda)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("version", ARCHIVES)
def test_what_came_later_does_not_compile(torch_of: dict[str, Torch], tmp_path: Path, version: str) -> None:
    """The line that once asked for torch 2.13, against the oldest headers and behind the gate of newer ones."""
    source = tmp_path / "bindings" / "later.cpp"
    source.parent.mkdir()
    source.write_text(
        "#include <torch/csrc/stable/accelerator.h>\n"
        "void* handle() { return torch::stable::accelerator::getCurrentStream(0).nativeHandle(); }\n"
    )
    done = check(torch_of[version], source, with_cuda=False)
    assert done.returncode != 0 and "nativeHandle" in done.stderr


def test_the_library_asks_the_oldest_torch_for_nothing_that_it_lacks(torch_of: dict[str, Torch]) -> None:
    """Built with the torch that is installed here: an inline function of its headers may call what only it has."""
    library = build.ensure_built(build.Build.for_this_machine(nvcc.available()))
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    asked = set(re.findall(r"\b(?:aoti_)?torch_\w+", listed))
    headers = [path.read_text() for path in torch_of[OLDEST].include[0].rglob("*.h")]
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+", "\n".join(headers)))
    assert len(asked) > 20
    assert asked <= declared
    assert "c10" not in listed.replace("libc10", ""), "a C++ symbol of torch is not stable"


def test_an_older_torch_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    monkeypatch.setattr("ds_compress.ops.toolchain._package_folders", lambda: [tmp_path])
    with pytest.raises(ToolchainError, match=r"torch >= 2\.10 .* has 2\.9\.1\+cu128"):
        Torch.find()
