"""A wheel whose kernels were compiled ahead, used where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_USE = """
import ds_compress, torch
from ds_compress.ops import kernels, library
print(kernels().mask_pack(torch.ones(3, dtype=torch.bool)).tolist(), library.loaded_library())
"""


@pytest.mark.network
def test_ops_built_ahead_run_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    # From a copy: setuptools leaves its build folder beside setup.py.
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("ds_compress", "csrc", "benchmarks"):
        shutil.copytree(
            _REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("prebuilt", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, copy)
    built = subprocess.run(
        [*command, str(copy)],
        env=os.environ | {"DS_COMPRESS_BUILD_OPS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    wheel = next(tmp_path.glob("ds_compress-*.whl"))
    assert "linux" in wheel.name  # not for any platform
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "ds_compress/csrc/cpu/isa.cpp" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "DS_COMPRESS_KERNELS")}
    environment |= {"PYTHONPATH": str(site), "PATH": "", "DS_COMPRESS_CACHE": str(tmp_path / "cache")}
    used = subprocess.run(
        [sys.executable, "-c", _USE],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert used.returncode == 0, used.stderr[-3000:]
    assert "[7]" in used.stdout
    assert str(site / "ds_compress" / "ops" / "prebuilt") in used.stdout
