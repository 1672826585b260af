"""The compiled library: whether it is there or why not, and which op runs on what. Nothing is compiled."""

from __future__ import annotations

import os
from collections.abc import Callable

from ds_compress.cli.diagnosis.section import Section

_VARIABLES = (
    "DS_COMPRESS_KERNELS",
    "DS_COMPRESS_CUDA",
    "DS_COMPRESS_CPU_ISA",
    "DS_COMPRESS_CACHE",
    "CXX",
    "CUDA_HOME",
)
_BUILD = "python -m ds_compress.ops"


def look(section: Section) -> None:
    """Adds the toolchain, the library, and the ops by what they run on."""
    from ds_compress.ops import build
    from ds_compress.ops.library import wants_cuda
    from ds_compress.ops.toolchain import Cuda, Cutlass, compiler_version, find_cxx

    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    section.add("variables", ", ".join(f"{k}={v}" for k, v in given.items()) or "none set", given)
    section.add("C++ compiler", _or_error(lambda: f"{find_cxx()} ({compiler_version(find_cxx())})"))
    cuda, cutlass = Cuda.find(), Cutlass.find()
    section.add(
        "nvcc",
        f"{cuda.nvcc} ({cuda.version})" if cuda else "none",
        {"version": cuda.version if cuda else None},
    )
    section.add("CUTLASS", cutlass.version if cutlass else "none: products on Hopper are those of Ampere")
    section.add("sources", _or_error(lambda: str(build.sources_folder())))
    is_wanted = wants_cuda()
    where = _library(section)
    section.add("CUDA kernels", _cuda(is_wanted, cuda is not None, where))
    _ops(section, has_devices=is_wanted)
    _instructions(section)


def _library(section: Section) -> str | None:
    """Finds and loads the library; its file name, None where ops run on plain torch."""
    from ds_compress.ops import build, library
    from ds_compress.ops.library_file import UnsafeLibraryError
    from ds_compress.ops.toolchain import ToolchainError

    try:
        preference = library.from_environment()
    except ValueError as error:
        section.find(str(error), f"unset {library.VARIABLE}, or set it to one of these")
        section.add("library", "not looked for", {"state": "unknown"})
        return None
    insists = preference is library.Preference.NATIVE
    try:
        path = library.find()
    except UnsafeLibraryError as error:
        section.add("library", "refused: others can write it", {"state": "refused"})
        section.find(str(error), "see there: delete it, or chmod go-w, or set DS_COMPRESS_CACHE")
        return None
    except ToolchainError as error:
        section.add(
            "library", f"cannot be built: {error}", {"state": "cannot be built", "reason": str(error)}
        )
        if insists:
            section.find(
                f"native kernels are asked for and cannot be had: {error}", "unset DS_COMPRESS_KERNELS"
            )
        return None
    if path is None:
        words = f"not built yet: the first use compiles it (about a minute), or {_BUILD}"
        section.add("library", words, {"state": "not built", "cache": str(build.cache_folder())})
        return None
    is_loaded = library.load(may_compile=False)
    if library.refused() is not None:
        section.find(f"{library.refused()}", f"{_BUILD} compiles one for this machine")
    path = library.loaded_library() or path
    if not is_loaded:
        reason = library.failure() or library.refused()
        section.add("library", f"{path}: cannot be loaded: {reason}", {"state": "broken"})
        if library.refused() is None:
            section.find(f"{path} cannot be loaded: {reason}", f"delete it, then {_BUILD}")
        return None
    origin = library.origin(path)
    section.add("library", f"{path} ({origin})", {"state": "loaded", "path": str(path), "origin": origin})
    return path.name


def _cuda(is_wanted: bool, has_nvcc: bool, library: str | None) -> str:
    if not is_wanted:
        return "not wanted: torch has no CUDA, or DS_COMPRESS_CUDA=0"
    if library is not None and "_cuda-" in library:
        return "in the library"
    if not has_nvcc:
        remedy = "set CUDA_HOME, or pip install 'ds_compress[cuda-build]'"
        return f"none: no nvcc ({remedy}); CUDA tensors run on plain torch"
    return "not built: CUDA tensors run on plain torch" if library else "not built yet"


def _ops(section: Section, has_devices: bool) -> None:
    """Asks torch's dispatcher which ops have a compiled kernel."""
    from ds_compress.ops import library, schemas

    uses_native = (
        _safe_preference() is not library.Preference.REFERENCE and library.loaded_library() is not None
    )
    for key in ("CPU", "CUDA"):
        if key == "CUDA" and not has_devices:
            section.add("ops on CUDA", "no CUDA here", {"compiled": [], "plain_torch": []})
            continue
        compiled = [name for name in schemas.SCHEMAS if uses_native and library.has_kernel(name, key)]
        plain = [name for name in schemas.SCHEMAS if name not in compiled]
        rest = f"; plain torch: {', '.join(plain)}" if plain else ""
        words = f"{len(compiled)} of {len(schemas.SCHEMAS)} compiled{rest}"
        section.add(f"ops on {key}", words, {"compiled": compiled, "plain_torch": plain})


def _safe_preference() -> object:
    from ds_compress.ops import library

    try:
        return library.from_environment()
    except ValueError:
        return None


def _instructions(section: Section) -> None:
    from ds_compress.ops.instructions import has_avx512, has_int8_tiles

    kind = (
        "AMX"
        if has_int8_tiles()
        else "AVX-512 VNNI"
        if has_avx512()
        else "AVX2, or plain C++ where it is missing"
    )
    section.add("int8 products", f"by {kind}, where the library is loaded", kind)


def _or_error(value: Callable[[], str]) -> str:
    from ds_compress.ops.toolchain import ToolchainError

    try:
        return value()
    except ToolchainError as error:
        return f"none: {error}"
