"""The compilers and the torch that native ops are built with. Imports neither torch nor anything of ours, because
`setup.py` uses it inside an isolated build environment, where torch cannot be imported but lies beside."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OLDEST_TORCH = (2, 10)  # its stable ABI is the first with parallel_for, contiguous and const_data_ptr


class ToolchainError(RuntimeError):
    """Something that a build needs is not there; the message says what and how to get it."""


@dataclass(frozen=True)
class Torch:
    """Where an installed torch keeps its headers and libraries."""

    root: Path
    version: str

    @classmethod
    def find(cls) -> Torch:
        """The torch of this environment, found without importing it.

        Raises:
            ToolchainError: there is none, it is older than OLDEST_TORCH, or it has no headers.
        """
        needed = "torch >= {}.{} with headers".format(*OLDEST_TORCH)
        for folder in _package_folders():
            version_file = folder / "torch" / "version.py"
            if version_file.is_file():
                found = re.search(r"__version__ = '([^']+)'", version_file.read_text())
                if found and tuple(map(int, found[1].split(".")[:2])) < OLDEST_TORCH:
                    raise ToolchainError(
                        f"{needed} is needed, this environment has {found[1]}: pip install -U torch"
                    )
                if found and (folder / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
                    return cls(folder / "torch", found[1])
        raise ToolchainError(f"no {needed} in this environment: pip install torch")

    @property
    def include(self) -> list[Path]:
        return [self.root / "include", self.root / "include" / "torch" / "csrc" / "api" / "include"]

    @property
    def libraries(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class Cuda:
    """An nvcc with what it compiles against."""

    nvcc: Path
    include: Path
    library: Path

    @classmethod
    def find(cls) -> Cuda | None:
        """From $CUDA_HOME, else nvcc on PATH, else the wheels of `ds_compress[cuda-build]`; None without any."""
        roots = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
        on_path = shutil.which("nvcc")
        if on_path:
            roots.append(_toolkit_of(Path(on_path)))
        roots += [folder / "nvidia" / "cu13" for folder in _package_folders()]
        for root in roots:
            nvcc = root / "bin" / "nvcc"
            library = next((root / name for name in ("lib64", "lib") if (root / name).is_dir()), None)
            if nvcc.is_file() and library is not None and (root / "include" / "cuda_runtime.h").is_file():
                return cls(nvcc, root / "include", library)
        return None

    @property
    def version(self) -> str:
        return _first_line_with("release", str(self.nvcc), "--version")


@dataclass(frozen=True)
class Cutlass:
    """CUTLASS's headers, which the products of Hopper are made of."""

    include: Path
    version: str

    @classmethod
    def find(cls) -> Cutlass | None:
        """From $CUTLASS_HOME, else the wheel `nvidia-cutlass`; None without, or before 4.0."""
        roots = [Path(os.environ["CUTLASS_HOME"])] if os.environ.get("CUTLASS_HOME") else []
        roots += [folder / "cutlass_library" / "source" for folder in _package_folders()]
        for root in roots:
            version_file = root / "include" / "cutlass" / "version.h"
            if version_file.is_file():
                parts = dict(
                    re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) +(\d+)", version_file.read_text())
                )
                if int(parts.get("MAJOR", 0)) >= 4:
                    return cls(root / "include", ".".join(parts[p] for p in ("MAJOR", "MINOR", "PATCH")))
        return None


def find_cxx() -> Path:
    """The C++ compiler: $CXX, else g++ or c++ on PATH.

    Raises:
        ToolchainError: none is there.
    """
    for name in (os.environ.get("CXX"), "g++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found)
    raise ToolchainError("no C++ compiler: install g++ 12 or newer, or name one in $CXX")


@cache
def compiler_version(compiler: Path) -> str:
    return _first_line_with("", str(compiler), "--version")


def _toolkit_of(nvcc: Path) -> Path:
    """The root that nvcc itself reports (the one on PATH may be a script that starts another)."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "-E", os.devnull]
    trace = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", trace, flags=re.M)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1]


def _first_line_with(word: str, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if word in line), "unknown")


def _package_folders() -> list[Path]:
    """Where packages of this interpreter lie: the torch that can be imported first, then site-packages."""
    folders = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parents[1])
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([*folders, Path(paths["platlib"]), Path(paths["purelib"])]))
