"""Builds and loads the native ops and says what runs here: the first thing to try when an install looks wrong."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch

from ds_compress.ops import build, library, schemas
from ds_compress.ops.library_file import UnsafeLibraryError
from ds_compress.ops.toolchain import Cuda, ToolchainError, compiler_version, find_cxx


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ds_compress.ops", description=(__doc__ or "").strip())
    parser.add_argument(
        "--cuda", action="store_true", help="insist on CUDA kernels (as DS_COMPRESS_CUDA=1 does)"
    )
    if parser.parse_args().cuda:
        os.environ["DS_COMPRESS_CUDA"] = "1"
    try:
        lines = report()
    except UnsafeLibraryError as error:
        raise SystemExit(str(error)) from None
    for name, value in lines:
        print(f"{name:<18}{value}")
    if not library.load():
        raise SystemExit(1)


def report() -> list[tuple[str, str]]:
    """(what, how it is here), after an attempt to load."""
    library.load()
    cuda, path = Cuda.find(), library.loaded_library()
    lines = [
        ("torch", torch.__version__),
        ("C++ compiler", _or_error(lambda: f"{find_cxx()} ({compiler_version(find_cxx())})")),
        ("nvcc", f"{cuda.nvcc} ({cuda.version})" if cuda else "none: CUDA kernels cannot be built"),
        ("sources", _or_error(lambda: str(build.sources_folder()))),
        ("library", f"{path} ({library.origin(path)})" if path else f"none: {library.failure()}"),
        (
            "preference",
            library.from_environment() or f"{library.Preference.AUTO} ({library.VARIABLE} is not set)",
        ),
    ]
    for key in ("CPU", "CUDA"):
        native = [n for n in schemas.SCHEMAS if library.has_kernel(n, key)]
        missing = [n for n in schemas.SCHEMAS if n not in native]
        lines.append((f"native on {key}", f"{len(native)} of {len(schemas.SCHEMAS)}" + _list(missing)))
    return lines


def _list(missing: list[str]) -> str:
    return f" (plain torch: {', '.join(missing)})" if missing else ""


def _or_error(value: Callable[[], str]) -> str:
    try:
        return value()
    except ToolchainError as error:
        return str(error)


if __name__ == "__main__":
    main()
