"""Everything but the C++ sources is in pyproject.toml.

A wheel carries `csrc` inside the package, so that native ops can be compiled where it is installed. They are compiled
ahead of time, into the wheel, by

    DS_COMPRESS_BUILD_OPS=1 pip install .              (DS_COMPRESS_CUDA=1: with CUDA kernels)

which uses the torch of the environment that pip belongs to, whether or not pip isolates the build. Such a wheel is for
every Python 3 and every torch from the oldest that is supported on: the library uses torch's stable ABI and nothing of
Python's. `make wheel` does it for a release. The kernels' microbenchmarks come along as `ds_compress.benchmarks`:
`ds_compress bench mask_apply --quick`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MICROBENCHMARKS = (
    "__init__.py",
    "bandwidth.py",
    "block_quantize.py",
    "fake_quantize.py",
    "int8_linear.py",
    "linear_peers.py",
    "mask_apply.py",
    "peaks.cpp",
    "peaks.py",
    "record.py",
    "timing.py",
)
AHEAD_OF_TIME = os.environ.get("DS_COMPRESS_BUILD_OPS") == "1"


class BuildWithSources(build_py):
    """Adds `csrc`, the microbenchmarks of the kernels, and the compiled library when it is asked for."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "ds_compress"
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
            (package / "benchmarks").mkdir(exist_ok=True)
            for name in MICROBENCHMARKS:
                shutil.copy(ROOT / "benchmarks" / name, package / "benchmarks" / name)
        if AHEAD_OF_TIME:
            package = ROOT / "ds_compress" if self.editable_mode else Path(self.build_lib) / "ds_compress"
            compile_ahead(package / "ops" / "prebuilt")


class BinaryDistribution(Distribution):
    """A wheel with a compiled library is for one platform."""

    def has_ext_modules(self) -> bool:
        return AHEAD_OF_TIME


class WheelForAnyPython(bdist_wheel):
    """Of the three parts of a tag only the platform matters."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def compile_ahead(folder: Path) -> None:
    # The packages' own __init__ import torch, which an isolated build cannot: stand-ins let us past them.
    for name in ("ds_compress", "ds_compress.ops"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package
    build = importlib.import_module("ds_compress.ops.build")
    wanted = build.Build.for_this_machine(with_cuda=os.environ.get("DS_COMPRESS_CUDA") == "1")
    folder.mkdir(parents=True, exist_ok=True)
    # Its name is a hash of all that goes into it: one that was compiled here before is the same.
    compiled = build.find_built(wanted)
    if compiled is None:
        build.compile_library(wanted, folder / wanted.name, print)
        return
    for suffix in ("", ".sha256"):
        shutil.copy(f"{compiled}{suffix}", folder)


setup(cmdclass={"build_py": BuildWithSources, "bdist_wheel": WheelForAnyPython}, distclass=BinaryDistribution)
