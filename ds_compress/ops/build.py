"""Compiles `csrc` into one shared library, once per content.

The library's name holds a hash of the sources and one of what made it: flags, compilers, torch. A library made ahead
(`DS_COMPRESS_BUILD_OPS=1 pip install .`) lies in the package and needs to match in its sources only: it runs where no
compiler is. Otherwise the cache is searched, then the library is built: every file by its own compiler process, linked
under a temporary name, renamed when whole. So no reader ever sees half a library.

The first process to build takes an flock; the others of this machine wait and then find the result. The kernel drops
the lock of a process that dies, and whoever has waited longer than any build takes builds for itself, so that a
killed build can never hang the next one.

A library of the cache is taken only when nobody else could have written it and it is whole (`library_file`): a damaged
one is built anew with a line that says so, one that others can write is an error.

Imports neither torch nor anything of ours but `toolchain` and `library_file`: `setup.py` loads it by path.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ds_compress.ops.library_file import (
    check_file,
    damage,
    make_safe_folder,
    safe_folder,
    write_checksum,
)
from ds_compress.ops.toolchain import (
    OLDEST_TORCH,
    Cuda,
    Cutlass,
    ToolchainError,
    Torch,
    compiler_version,
    find_cxx,
)

PACKAGE = Path(__file__).resolve().parents[1]
PREBUILT = PACKAGE / "ops" / "prebuilt"
LONGEST_BUILD_S = 900

_CXX_FLAGS = shlex.split(
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra "
    # The contract of csrc/README.md: results do not depend on whether a compiler fuses a multiply and an add.
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"
)
_ISA_FLAGS = {
    "_avx2": shlex.split("-mavx2 -mfma -mf16c"),
    "_avx512": shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c"),
}
_NVCC_FLAGS = shlex.split(
    "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden "
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]"
)
_HOPPER_FLAGS = shlex.split(
    # NDEBUG: an assert is a call, and ptxas serializes wgmma around calls.
    "-std=c++17 -O3 --fmad=false -DNDEBUG --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden "
    "-gencode arch=compute_90a,code=sm_90a"
)
# Built with any torch from OLDEST_TORCH on, the library loads on every such torch.
_STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH), "-DUSE_CUDA"]


class BuildError(RuntimeError):
    """A compiler failed; the message ends with what it said."""


def sources_folder() -> Path:
    """`csrc`: beside the package in a checkout, inside it when installed."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "bindings").is_dir():
            return folder
    raise ToolchainError(
        "the C++ sources are not there: install ds_compress from its repository or a full wheel"
    )


def cache_folder() -> Path:
    """Where libraries are kept between runs: $DS_COMPRESS_CACHE, else beside torch's own extensions."""
    chosen = os.environ.get("DS_COMPRESS_CACHE")
    if chosen:
        return Path(chosen)
    torch_extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    if torch_extensions:
        return Path(torch_extensions) / "ds_compress"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_compress"


@dataclass(frozen=True)
class Build:
    """One library that can be built: for the CPU, for CUDA too when `cuda` is given, and with Hopper's own products
    when `cutlass` is."""

    torch: Torch
    cxx: Path
    cuda: Cuda | None = None
    cutlass: Cutlass | None = None

    @classmethod
    def for_this_machine(cls, with_cuda: bool) -> Build:
        """Raises ToolchainError when something is missing."""
        cuda = Cuda.find() if with_cuda else None
        if with_cuda and cuda is None:
            raise ToolchainError(
                "no nvcc: set CUDA_HOME, put nvcc on PATH, or pip install 'ds_compress[cuda-build]'"
            )
        return cls(Torch.find(), find_cxx(), cuda, Cutlass.find() if cuda else None)

    @cached_property
    def sources(self) -> list[Path]:
        """What is compiled, what takes longest first; `_cuda` bindings and .cu files only with CUDA, those of `hopper`
        only with CUTLASS."""
        root = sources_folder()
        bindings = [
            path for path in root.glob("bindings/*.cpp") if self.cuda or not path.stem.endswith("_cuda")
        ]
        kernels = [*root.glob("cpu/**/*.cpp"), *(root.glob("cuda/**/*.cu") if self.cuda else ())]
        if platform.machine() not in ("x86_64", "AMD64"):
            kernels = [path for path in kernels if not path.stem.endswith(tuple(_ISA_FLAGS))]
        if not self.cutlass:
            kernels = [path for path in kernels if path.parent.name != "hopper"]
        return sorted([*bindings, *kernels], key=lambda path: (path.parent.name != "hopper", path))

    @cached_property
    def name(self) -> str:
        """File name of the library: its sources, then what makes it."""
        tools = [self.torch.version, str(self.cxx), compiler_version(self.cxx), platform.machine()]
        tools += [self.cuda.version] if self.cuda else []
        tools += [self.cutlass.version] if self.cutlass else []
        made_by = repr([tools, _CXX_FLAGS, _ISA_FLAGS, _NVCC_FLAGS, _HOPPER_FLAGS, _STABLE_ABI]).encode()
        return f"{stem_of(self.cuda is not None)}-{hashlib.sha256(made_by).hexdigest()[:8]}.so"

    def command(self, source: Path, target: Path) -> list[str]:
        """The compiler call for one source file."""
        root = sources_folder()
        include = ["-I", str(root / "include")]
        if source.suffix == ".cu":
            assert self.cuda is not None
            flags = list(_NVCC_FLAGS)
            if source.parent.name == "hopper":
                assert self.cutlass is not None
                flags = [*_HOPPER_FLAGS, "-isystem", str(self.cutlass.include)]
            return [str(self.cuda.nvcc), *flags, *include, "-c", str(source), "-o", str(target)]
        flags = list(_CXX_FLAGS)
        for ending, isa_flags in _ISA_FLAGS.items():
            if source.stem.endswith(ending):
                flags += isa_flags
        if source.parent.name == "bindings":
            flags += _STABLE_ABI if self.cuda else _STABLE_ABI[:1]
            # Their warnings are not ours to fix.
            include += [part for folder in self.torch.include for part in ("-isystem", str(folder))]
            if self.cuda:
                include += ["-isystem", str(self.cuda.include)]
        return [str(self.cxx), *flags, *include, "-c", str(source), "-o", str(target)]

    def link_command(self, objects: list[Path], target: Path) -> list[str]:
        # A symbol that nobody defines is an error of the build, not of the first load.
        command = [str(self.cxx), "-shared", "-Wl,-z,defs", "-o", str(target), *map(str, objects)]
        command += ["-L", str(self.torch.libraries), "-ltorch_cpu", "-ltorch", "-lc10"]
        if self.cuda:
            command += ["-L", str(self.cuda.library), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        return command


def stem_of(with_cuda: bool) -> str:
    """The first part of a library's name: the device, and the hash of everything in `csrc`."""
    root = sources_folder()
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"ds_compress_ops{'_cuda' if with_cuda else ''}-{digest.hexdigest()[:16]}"


def find_prebuilt(with_cuda: bool, say: Callable[[str], object] = lambda line: None) -> Path | None:
    """The library built ahead from these very sources, by whatever compiler; one with CUDA serves the CPU too.

    It is as trustworthy as the package's Python files, among which it lies; only damage is looked for.
    """
    for variant in (True,) if with_cuda else (False, True):
        for path in PREBUILT.glob(f"{stem_of(variant)}-*.so"):
            wrong = damage(path)
            if wrong is None:
                return path
            say(f"ds_compress: the library of the package is not used: {path} {wrong}; reinstall ds_compress")
    return None


def ensure_built(build: Build, say: Callable[[str], object] = lambda line: None) -> Path:
    """The library's path, building it if nobody has; any number of processes may call this at once.

    Raises:
        BuildError: a compiler failed.
        UnsafeLibraryError: others could have written the library that is there, or what would be built.
    """
    folder = make_safe_folder(cache_folder())
    library = folder / build.name
    if _is_whole(library):
        return library
    with _turn(library.with_suffix(".lock"), say):
        if _is_whole(library):
            return library
        if library.exists():
            say(f"ds_compress: compiling native ops anew: {library} {damage(library)}")
        _remove_abandoned(folder)
        return compile_library(build, library, say)


def find_built(build: Build) -> Path | None:
    """The library in the cache, if it is there and whole; compiles and creates nothing.

    Raises:
        UnsafeLibraryError: others could have written it.
    """
    if not cache_folder().is_dir():
        return None
    library = safe_folder(cache_folder()) / build.name
    return library if _is_whole(library) else None


def _is_whole(library: Path) -> bool:
    if not library.is_symlink() and not library.exists():
        return False
    check_file(library)
    return damage(library) is None


def _remove_abandoned(folder: Path) -> None:
    """What builds left that were killed: no build lasts that long."""
    for unfinished in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > 2 * LONGEST_BUILD_S:
                shutil.rmtree(unfinished)


def compile_library(build: Build, library: Path, say: Callable[[str], object] = lambda line: None) -> Path:
    """Compiles and links everything to `library`, which appears only when it is whole, after its checksum."""
    started = time.monotonic()
    count = len(build.sources)
    how_long = "some minutes, with Hopper's kernels" if build.cutlass else "about a minute"
    say(f"ds_compress: compiling native ops ({count} files), once for this machine; it takes {how_long}")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=library.parent) as folder:
        objects = [Path(folder) / f"{index}.o" for index in range(count)]
        with ThreadPoolExecutor(_jobs()) as pool:
            jobs = [
                pool.submit(_run, build.command(source, target))
                for source, target in zip(build.sources, objects, strict=True)
            ]
            try:
                for done, job in enumerate(as_completed(jobs), start=1):
                    job.result()
                    say(f"ds_compress: compiling native ops, {done} of {count} files")
            except BuildError:
                pool.shutdown(cancel_futures=True)
                raise
        whole = Path(folder) / build.name
        _run(build.link_command(objects, whole))
        whole.chmod(0o755)
        write_checksum(whole, library)
        os.replace(whole, library)
    say(f"ds_compress: native ops built in {time.monotonic() - started:.0f} s: {library}")
    return library


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{(done.stderr or done.stdout)[-4000:]}")


@contextlib.contextmanager
def _turn(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """One process of this machine at a time, for as long as locks are to be trusted."""
    deadline = time.monotonic() + LONGEST_BUILD_S
    with open(path, "w") as lock:
        waiting = False
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say("ds_compress: another process is compiling the native ops, waiting for it")
                    waiting = True
                time.sleep(0.2)
            except OSError:  # a file system without locks: everybody builds, the last rename wins
                break
        yield


def to_stderr(line: str) -> None:
    """A progress line: rewritten in place on a terminal, plain lines in a log."""
    is_step = " of " in line
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="" if is_step else "\n", file=sys.stderr, flush=True)
    elif not is_step:
        print(line, file=sys.stderr, flush=True)
