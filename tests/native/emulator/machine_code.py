"""What nvcc and ptxas made of a source: instruction counts, registers, local memory, per kernel."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.native.emulator import nvcc
from tests.native.emulator.harness import Edit, cached, checked, reachable, read_tree, unpack

SPILLS_ARE_ERRORS = ["-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings"]


@dataclass
class MachineCode:
    """One kernel for one architecture. `counts`: instructions by their name without modifiers, IMMA.SP apart, and
    LDG.128, STG.128."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    counts: Counter[str] = field(default_factory=Counter)


def cubin(source: str, arch: str, edits: Sequence[Edit] = (), flags: Sequence[str] = ()) -> Path:
    """The binary of a source for sm_`arch`. Raises RuntimeError with ptxas' complaint; a spill is one."""
    tree = reachable(read_tree(edits), Path(source))
    all_flags = [*nvcc.FLAGS, *SPILLS_ARE_ERRORS, *flags]

    def make(folder: Path, target: Path) -> None:
        unpack(tree, folder)
        include = f"-I{folder / 'csrc/include'}"
        checked([nvcc.find(), *all_flags, include, f"-arch=sm_{arch}", "-cubin", str(folder / source),
                 "-o", str(target)])  # fmt: skip

    return cached(repr((sorted(tree.items()), all_flags, nvcc.version(), arch)), ".cubin", make)


def inspect(binary: Path) -> dict[str, MachineCode]:
    """The kernels of a cubin by readable name, such as `int8_gemm_kernel<Int8Tile<64, 64, 2, 2, 4>>`."""
    kernels = inspect_mangled(binary)
    names = readable(list(kernels))
    return {names[name]: kernel for name, kernel in kernels.items()}


def inspect_mangled(binary: Path) -> dict[str, MachineCode]:
    usage = checked([nvcc.find("cuobjdump"), "-res-usage", str(binary)])
    kernels: dict[str, MachineCode] = {}
    for name, line in re.findall(r"Function (\w+):\s*\n\s*(REG:[^\n]*)", usage):
        numbers = {key: int(number) for key, number in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
        kernels[name] = MachineCode(numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"])
    current = None
    for line in checked([nvcc.find("cuobjdump"), "-sass", str(binary)]).splitlines():
        if match := re.search(r"Function : (\w+)", line):
            current = kernels[match[1]]
        elif current is not None and (
            match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line)
        ):
            name = match[1].split(".")[0]
            current.counts["IMMA.SP" if name == "IMMA" and ".SP" in match[1] else name] += 1
            if name in ("LDG", "STG") and ".128" in match[1]:
                current.counts[f"{name}.128"] += 1
    return kernels


def readable(mangled: list[str]) -> dict[str, str]:
    """Names without namespaces, arguments and the blanks of c++filt."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = {}
    for name, plain in zip(mangled, done.stdout.splitlines(), strict=True):
        short = re.sub(r"(?:\w+::)+", "", plain.removeprefix("void "))
        names[name] = re.sub(r"\s+>", ">", short[: short.index("(")] if "(" in short else short)
    return names
