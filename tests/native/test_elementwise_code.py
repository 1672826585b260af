"""The elementwise kernels as machine code: other instruction sets give the same bits, hot loops are vectors.

A library chooses its instruction set once, so each runs the tests of the ops in a process of its own. On a CPU
without AVX-512, code for 16 lanes still runs, for the instructions that are there: without intrinsics, and with those
of AVX-512 in plain C++ (see avx512_emulated.h).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from ds_compress.ops.build import Build
from ds_compress.ops.library import wanted_build

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = CSRC / "cpu" / "elementwise"
FILES = [
    f"tests/native/test_{name}.py"
    for name in ("mask", "fake_quantize", "fake_quantize_float", "block_quantize")
]
FIRST_OP = (
    "import torch; from tests.native.elementwise import native_ops;"
    "native_ops().mask_pack(torch.ones(9, dtype=torch.bool))"
)


# --- the same bits ------------------------------------------------------------------------------------------------


def in_process(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)


def run_op_tests(**variables: str) -> None:
    """All tests of the ops, with fewer examples of each property: every branch is still taken many times."""
    done = in_process(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES], DSC_TEST_EXAMPLES="15", **variables
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d{3} passed in", done.stdout, re.MULTILINE), done.stdout[-500:]


@pytest.mark.parametrize("isa", ("scalar", "avx2"))
def test_other_instruction_sets_give_the_same_bits(isa: str) -> None:
    """The best one is what the tests of the ops run on anyway."""
    if isa == "avx2" and (not has("avx2") or not has("avx512")):
        pytest.skip("avx2 is the best that this CPU has" if has("avx2") else "this CPU has no avx2")
    run_op_tests(DS_COMPRESS_CPU_ISA=isa)


def test_sixteen_lanes_without_intrinsics_give_the_same_bits(tmp_path: Path) -> None:
    library = library_with(tmp_path, "-DDSC_PORTABLE_LANES=16")
    run_op_tests(DS_COMPRESS_CPU_ISA="scalar", DSC_TEST_LIBRARY=str(library))


def test_the_source_for_avx512_gives_the_same_bits(tmp_path: Path) -> None:
    if not has("avx2"):
        pytest.skip("its vectors of 32 bytes and below are AVX2's")
    emulated = ROOT / "tests" / "native" / "avx512_emulated.h"
    library = library_with(tmp_path, "-mavx2", "-mfma", "-mf16c", "-include", str(emulated))
    run_op_tests(DS_COMPRESS_CPU_ISA="scalar", DSC_TEST_LIBRARY=str(library))


def test_an_unknown_instruction_set_is_refused() -> None:
    done = in_process(["-c", FIRST_OP], DS_COMPRESS_CPU_ISA="mmx")
    assert (
        done.returncode != 0 and "DS_COMPRESS_CPU_ISA=mmx: allowed are scalar, avx2 and avx512" in done.stderr
    )


@cache
def has(isa: str) -> bool:
    """Asks the library itself, which refuses an instruction set that the CPU lacks."""
    done = in_process(["-c", FIRST_OP], DS_COMPRESS_CPU_ISA=isa)
    assert done.returncode == 0 or "this CPU does not have it" in done.stderr, done.stderr[-2000:]
    return done.returncode == 0


def library_with(folder: Path, *flags: str) -> Path:
    """The elementwise ops alone; `flags` make another instruction set of the kernels for every CPU."""
    build = wanted_build()
    every = sorted((CSRC / "bindings").glob("*_cpu.cpp"))
    bindings = [path for path in every if '#include "elementwise_cpu.h"' in path.read_text()]
    sources = [*bindings, *sorted(KERNELS.glob("*.cpp")), CSRC / "cpu" / "isa.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = []
    for source, target in zip(sources, objects, strict=True):
        command = [part for part in build.command(source, target) if not part.startswith("-m")]
        extra = flags if source.stem == "elementwise_scalar" else ()
        running.append(subprocess.Popen([*command, *extra, "-Wno-psabi"]))
    assert not any(process.wait(timeout=300) for process in running)
    library = folder / "elementwise.so"
    rpath = f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"
    subprocess.run([*build.link_command(objects, library), rpath], check=True, timeout=300)
    return library


# --- hot loops --------------------------------------------------------------------------------------------------

LONGEST_LOOP = 200  # instructions


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, and the demangled function that it is in."""

    function: str
    instructions: tuple[str, ...]

    def has(self, *patterns: str) -> bool:
        return all(any(re.search(p, line) for line in self.instructions) for p in patterns)

    @property
    def spills(self) -> list[str]:
        """Vector registers moved to or from the stack."""
        return [
            line for line in self.instructions if re.search(r"[xyz]mm", line) and re.search(r"%r[sb]p", line)
        ]


def loops_of(object_file: Path) -> list[Loop]:
    listing = subprocess.run(
        ["objdump", "-d", "--demangle", "--no-show-raw-insn", str(object_file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = []
    for body in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        name = re.match(r"[0-9a-f]+ <(.*)>:", body)
        lines = re.findall(r"^ +([0-9a-f]+):\t(.*)$", body, re.MULTILINE)
        if name is None or not lines:
            continue
        place = {int(address, 16): index for index, (address, _) in enumerate(lines)}
        jumps = []
        for index, (_, text) in enumerate(lines):
            target = re.match(r"j\w+ +([0-9a-f]+) ", text)
            begin = place.get(int(target[1], 16)) if target else None
            if begin is not None and begin <= index < begin + LONGEST_LOOP:
                jumps.append((begin, index))
        for begin, end in jumps:
            body_lines = tuple(text for _, text in lines[begin : end + 1])
            is_innermost = not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in jumps)
            # What calls or returns is the way back from a cold corner, such as the end of a row.
            if is_innermost and not any(line.startswith(("call", "ret")) for line in body_lines):
                found.append(Loop(name[1], body_lines))
    return found


HOT = {
    # function: what one of its innermost loops must contain; R stands for the register of the instruction set
    "apply<unsigned int, false>": (r"^vpand\w* .*%R", r"^vmovdq\w+ %R\d+(\{%k\d\})?,.*\("),
    "quantize_block<8>": (r"^vdivps .*%R", r"^v(round|rndscale)ps .*%R", r"^v(packssdw|pmovdb) .*%R"),
    "quantize_block<4>": (r"^vdivps .*%R", r"^vpack\w+|^vpshufb"),
    "block_dequantize_as<.*Fp32, 8>": (r"^vpmovsxbd .*%R", r"^vcvtdq2ps .*%R", r"^vmulps .*%R"),
    "block_reduce_bits<8>": (r"^vpmovsxbd .*%R", r"^vmulps .*%R", r"^vaddps .*%R"),
    "fake_quantize(_as<.*Fp32.*>)?": (
        r"^vdivps .*%R",
        r"^v(round|rndscale)ps .*%R",
        r"^vminps .*%R",
        r"^vmulps .*%R",
    ),
    r"fake_quantize_float_as<.*Fp32, .*Lengths\)1>": (  # blocks of whole vectors
        r"^v(div|mul)ps .*%R",
        r"^vpmaxsd .*%R",
        r"^vaddps .*%R",
        r"^vsubps .*%R",
        r"^vminps .*%R",
    ),
    "measure_as<.*Fp32, true>": (r"^vpmax[su]d .*%R", r"^vpand\w* .*%R"),
}


def missing(loops: list[Loop], register: str) -> list[str]:
    """Which of `HOT` have no such loop, or one that keeps vectors on the stack."""
    lacking = []
    for function, patterns in HOT.items():
        wanted = [pattern.replace("%R", f"%{register}") for pattern in patterns]
        hot = [loop for loop in loops if re.search(rf"::{function}\(", loop.function) and loop.has(*wanted)]
        if not hot or any(loop.spills for loop in hot):
            lacking.append(function)
    return lacking


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump here")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the listings are those of x86-64")
    folder, build = tmp_path_factory.mktemp("objects"), wanted_build()
    return {isa: compiled(build, isa, folder) for isa in ("scalar", "avx2", "avx512")}


def compiled(build: Build, isa: str, folder: Path, *flags: str) -> Path:
    target = folder / f"{isa}{''.join(flags)}.o"
    command = build.command(KERNELS / f"elementwise_{isa}.cpp", target)
    subprocess.run([*command, *flags], check=True, capture_output=True, timeout=300)
    return target


@pytest.mark.parametrize(("isa", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_hot_loops_are_vectors_in_registers(objects: dict[str, Path], isa: str, register: str) -> None:
    assert missing(loops_of(objects[isa]), register) == []


def test_the_check_finds_loops_that_are_not(objects: dict[str, Path], tmp_path: Path) -> None:
    assert missing(loops_of(objects["scalar"]), "ymm") == list(HOT)
    # Without registers for its constants, a loop has to keep them on the stack.
    starved = compiled(wanted_build(), "avx2", tmp_path, *(f"-ffixed-xmm{i}" for i in range(3, 16)))
    assert {"quantize_block<8>", "fake_quantize(_as<.*Fp32.*>)?"} <= set(missing(loops_of(starved), "ymm"))


@pytest.mark.parametrize("isa", ("scalar", "avx2", "avx512"))
def test_nothing_is_contracted(objects: dict[str, Path], isa: str, tmp_path: Path) -> None:
    assert not fused_in(objects[isa])
    if isa == "avx2":  # the check sees what the flag prevents
        assert fused_in(compiled(wanted_build(), isa, tmp_path, "-ffp-contract=fast"))


def fused_in(object_file: Path) -> bool:
    listing = subprocess.run(["objdump", "-d", str(object_file)], capture_output=True, text=True, check=True)
    return re.search(r"\tvfn?m(add|sub)", listing.stdout) is not None
