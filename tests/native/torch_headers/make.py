"""Packs what the bindings can include of a torch wheel: its stable ABI, the C functions under it, what they include.

    pip download --no-deps --platform macosx_11_0_arm64 --only-binary=:all: torch==2.10.0
    python -m tests.native.torch_headers.make torch-2.10.0-*.whl

The headers are the same for every platform, and the wheels for macOS are the smallest. The archive comes out the same,
byte for byte, whenever it is made.
"""

from __future__ import annotations

import io
import lzma
import re
import sys
import tarfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOTS = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
INCLUDE = re.compile(rb'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        wanted = sorted(
            f"torch/include/{name}" for name in closure(opened, names) | {"torch/headeronly/version.h"}
        )
        licence = next(
            name for name in names if re.fullmatch(r"torch-[^/]+\.dist-info(/licenses)?/LICENSE", name)
        )
        parts = {"LICENSE": opened.read(licence)} | {
            name: opened.read(name) for name in ["torch/version.py", *wanted]
        }
    version = wheel.name.split("-")[1].split("+")[0]
    target = FOLDER / f"torch-{version}.tar.xz"
    target.write_bytes(lzma.compress(tar_of(parts), preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {len(parts)} files, {target.stat().st_size} bytes")


def closure(wheel: zipfile.ZipFile, names: set[str]) -> set[str]:
    """Every header under ROOTS, and whatever these reach by `#include` within torch's folder of headers."""
    waiting = [name.removeprefix("torch/include/") for name in names if name.endswith(".h")]
    waiting = [name for name in waiting if name.startswith(ROOTS)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found or f"torch/include/{name}" not in names:
            continue
        found.add(name)
        waiting += [match.decode() for match in INCLUDE.findall(wheel.read(f"torch/include/{name}"))]
    return found


def tar_of(parts: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
