"""Builds CUDA sources for the emulator and runs their launchers on numpy arrays.

    library = build(REPOSITORY / "csrc/cuda/linear/quantize.cu", "asan")
    result = run(library, [Program({"x": x, "y": y}, [("dsc_something", ("x", "y", 7, None))], ("y",))])

Modes: `plain`, `asan` (address and undefined behaviour), `tsan` (every CUDA thread a thread of its own) run the
source; `ptx` runs what nvcc made of it (see ptx_to_cpp). A fault of the emulator or a report of a sanitizer is
raised as `Fault` with the report. Libraries are cached by the content of everything that they are made of.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.native.emulator import nvcc, ptx_to_cpp

REPOSITORY = Path(__file__).resolve().parents[3]
EMULATOR = Path("tests/native/emulator")
FOLDERS = (Path("csrc/include"), Path("csrc/cuda"), EMULATOR)  # all that a library can be made of
SUFFIXES = {".h", ".cuh", ".cu", ".cpp"}

COMMON = [
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-unknown-pragmas",
]  # nvcc's #pragma unroll
MODES = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    # The labels and registers that the translation does not use are nvcc's, and -O1 compiles them quickly.
    "ptx": ["-O1", "-Wno-unused", "-Wno-maybe-uninitialized"],
}
PRELOADED = {"asan": "libasan.so", "tsan": "libtsan.so"}
RUN_SECONDS = 300.0


class Fault(Exception):
    """The kernel broke a rule: the text is the report of the emulator or of the sanitizer."""


@dataclass(frozen=True)
class Edit:
    """A change of a source file before it is compiled; `old` must occur in it exactly `count` times."""

    file: str  # relative to the repository
    old: str
    new: str
    count: int = 1


@dataclass(frozen=True)
class Library:
    path: Path
    mode: str


@dataclass(frozen=True)
class Program:
    """Launcher calls on named buffers. In a call a string is a buffer, "x+6" a place in it, None a null pointer (or the
    stream), a list an array on the host.
    """

    buffers: dict[str, np.ndarray]
    calls: list[tuple[str, tuple[str | int | float | list[str] | list[int] | None, ...]]]
    outputs: tuple[str, ...]


@dataclass
class Statistics:
    launches: int = 0
    blocks: int = 0
    switches: int = 0
    collectives: int = 0
    ldmatrix_phases: int = 0
    bank_conflicts: int = 0


@dataclass
class Outcome:
    results: list[dict[str, np.ndarray]]
    statistics: Statistics = field(default_factory=Statistics)


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DS_COMPRESS_TEST_CACHE") or Path(root) / "ds_compress" / "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_tree(edits: Sequence[Edit] = ()) -> dict[Path, str]:
    """The sources by relative path, `edits` applied. Raises ValueError when one does not apply."""
    tree = {
        path.relative_to(REPOSITORY): path.read_text()
        for folder in FOLDERS
        for path in sorted((REPOSITORY / folder).rglob("*"))
        if path.suffix in SUFFIXES
    }
    for edit in edits:
        text = tree[Path(edit.file)]
        if text.count(edit.old) != edit.count:
            found = text.count(edit.old)
            raise ValueError(f"{edit.file} has {found} times, not {edit.count} times:\n{edit.old}")
        tree[Path(edit.file)] = text.replace(edit.old, edit.new)
    return tree


def reachable(tree: dict[Path, str], source: Path) -> dict[Path, str]:
    """What `source` includes of the tree, and all of the emulator: a change elsewhere rebuilds nothing."""
    wanted = {source} | {path for path in tree if path.parent == EMULATOR}
    todo = sorted(wanted)
    while todo:
        current = todo.pop()
        for line in tree[current].splitlines():
            if not line.startswith('#include "'):
                continue
            name = line.split('"')[1]
            for folder in (current.parent, Path("csrc/include"), EMULATOR.parent):
                path = Path(os.path.normpath(folder / name))
                if path in tree and path not in wanted:
                    wanted.add(path)
                    todo.append(path)
    return {path: tree[path] for path in sorted(wanted)}


@functools.cache
def compiler() -> tuple[str, str]:
    """The host compiler and its version. CXX, else g++: the sanitizers' fiber hooks are tried with gcc."""
    name = os.environ.get("CXX", "g++")
    version = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    return name, version.splitlines()[0]


def cached(key: str, suffix: str, make: Callable[[Path, Path], None]) -> Path:
    """The file that `make(folder, target)` writes, made once per key; safe against concurrent makers."""
    target = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            make(Path(folder), Path(folder) / target.name)
            os.replace(Path(folder) / target.name, target)
    return target


def build(
    source: str, mode: str, edits: Sequence[Edit] = (), ptx: str | None = None, only: str = ""
) -> Library:
    """The launchers of `source` (relative to the repository) as a library of the given mode.

    `ptx`: in the mode `ptx`, what to run in place of what nvcc makes of the source; `only`: of that, the kernels
    whose name contains it.
    """
    if mode == "ptx" and ptx is None:
        ptx = ptx_text(source, edits)
    tree = reachable(read_tree(edits), Path(source))
    flags = [*COMMON, *MODES[mode]]

    def make(folder: Path, target: Path) -> None:
        unpack(tree, folder)
        parts = [str(folder / source), str(folder / EMULATOR / "library.cpp")]
        if ptx is not None:
            translated = folder / "translated.cpp"
            translated.write_text(ptx_to_cpp.translate(ptx, only))
            parts.append(str(translated))
        includes = [f"-I{folder / 'csrc/include'}", f"-I{folder / EMULATOR.parent}"]
        command = [compiler()[0], *flags, *includes, "-x", "c++", *parts, "-o", str(target), "-ldl"]
        checked(command)

    key = repr((sorted(tree.items()), flags, compiler()[1], source))
    if ptx is not None:
        key += only + ptx + ptx_to_cpp.sources()
    return Library(cached(key, ".so", make), mode)


def ptx_text(source: str, edits: Sequence[Edit] = (), arch: str = "80") -> str:
    """nvcc's PTX of `source`."""
    tree = reachable(read_tree(edits), Path(source))

    def make(folder: Path, target: Path) -> None:
        unpack(tree, folder)
        checked([nvcc.find(), *nvcc.FLAGS, f"-I{folder / 'csrc/include'}", "-ptx", f"-arch=compute_{arch}",
                 str(folder / source), "-o", str(target)])  # fmt: skip

    key = repr((sorted(tree.items()), nvcc.FLAGS, nvcc.version(), arch, "ptx"))
    return cached(key, ".ptx", make).read_text()


def unpack(tree: dict[Path, str], folder: Path) -> None:
    for path, text in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def checked(command: list[str]) -> str:
    """Runs a compiler; its complaint is the exception's text."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
    return done.stdout + done.stderr


def in_parallel(jobs: Sequence[Callable[[], object]]) -> list[object]:
    """Each job's result or exception. Threads suffice: the work is in compilers and worker processes."""

    def outcome(job: Callable[[], object]) -> object:
        try:
            return job()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(outcome, jobs))


def build_all(sources: Sequence[str], mode: str) -> dict[str, Library]:
    """Libraries by source, built in parallel. Raises the first failure."""
    built = in_parallel([functools.partial(build, source, mode) for source in sources])
    for outcome in built:
        if isinstance(outcome, Exception):
            raise outcome
    return {
        source: library
        for source, library in zip(sources, built, strict=True)
        if isinstance(library, Library)
    }


def run(library: Library, programs: Sequence[Program], schedule: int = 0) -> Outcome:
    """Runs the programs in a fresh process; raises `Fault` with what the emulator or a sanitizer says."""
    packed = [
        ({name: array.tobytes() for name, array in program.buffers.items()}, program.calls, program.outputs)
        for program in programs
    ]
    command = [sys.executable, "-S", "-E", str(REPOSITORY / EMULATOR / "worker.py")]
    if library.mode == "tsan" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # TSan's shadow wants the program at its usual addresses
    done = subprocess.run(
        command,
        input=pickle.dumps((str(library.path), schedule, packed)),
        capture_output=True,
        env={**os.environ, **sanitizer_environment(library.mode)},
        timeout=RUN_SECONDS,
    )
    if done.returncode != 0:
        raise Fault(f"exit status {done.returncode}\n{done.stderr.decode(errors='replace')}")
    results, counts = pickle.loads(done.stdout)
    arrays = [
        {
            name: np.frombuffer(content, program.buffers[name].dtype).reshape(program.buffers[name].shape)
            for name, content in result.items()
        }
        for program, result in zip(programs, results, strict=True)
    ]
    return Outcome(arrays, Statistics(*counts))


def sanitizer_environment(mode: str) -> dict[str, str]:
    if mode not in PRELOADED:
        return {}
    found = subprocess.run(
        [compiler()[0], f"-print-file-name={PRELOADED[mode]}"], capture_output=True, text=True, check=True
    )
    return {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
    }
