"""A folder of wheels with everything that `gpu_check` needs beyond torch, for a machine without a network.

    python -m benchmarks.gpu_wheels collect gpu-wheels [--python 3.12] [--machine x86_64]
    python -m benchmarks.gpu_wheels install gpu-wheels .venv-gpu      # there
    python -m benchmarks.gpu_wheels pin                               # writes gpu_requirements.txt anew

`collect` downloads the versions of `gpu_requirements.txt`: wheels that fit every machine by their hash, those that are
for one Python and one kind of processor by their version, and builds DeepSpeed's (no wheel of it is published) without
its compiled ops. `install` makes a virtual environment on top of the Python that runs it: what that has, torch above
all, stays as it is; what is missing, or too old for this package, comes from the folder. `pin` takes the versions from
the environment that runs it.

Imports nothing but the standard library, and `packaging` to pin.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = Path(__file__).with_name("gpu_requirements.txt")
LARGEST_MB = 60
BUILT = ("deepspeed",)  # of these the hash is that of the source archive
ALONE = ("nvidia-cutlass",)  # wanted for its headers only: what it depends on is for its Python side
NEWER = ("typing-extensions",)  # torch brings it, but is content with one that is too old for pydantic
TEST_TOOLS = ("pytest", "hypothesis", "pytest-timeout", "pytest-xdist", "peft", "torch-pruning")
HEADER = """\
# What gpu_check needs beyond torch, and beyond what torch brings. Written by `python -m benchmarks.gpu_wheels pin`.
# A hash: the one wheel for every machine (DeepSpeed: its source archive). None: a wheel for each Python and processor.
"""


@dataclass(frozen=True)
class Pin:
    name: str
    version: str
    hash: str | None = None

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" + (f" --hash=sha256:{self.hash}" if self.hash else "")


def pins(path: Path = PINS) -> list[Pin]:
    """The lines of the file.

    Raises:
        ValueError: a line is something else than a name, a version and perhaps a hash.
    """
    found = []
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        parts = re.fullmatch(r"([a-z0-9-]+)==([^\s]+)(?: --hash=sha256:([0-9a-f]{64}))?", line)
        if parts is None:
            raise ValueError(f"{path}: {line!r} is no pin")
        found.append(Pin(*parts.groups()))
    return found


def collect(folder: Path, python: str, machine: str) -> list[Path]:
    """Downloads and builds all wheels into `folder`, and returns them.

    Raises:
        RuntimeError: they are larger than LARGEST_MB.
        subprocess.CalledProcessError: pip failed; it said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = pins()
    target = [
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms(machine),
    ]
    _pip(
        ["download", "--dest", str(folder), *target],
        [p for p in everything if p.hash and p.name not in BUILT],
    )
    _pip(["download", "--dest", str(folder), *target], [p for p in everything if not p.hash])
    _pip(
        ["wheel", "--wheel-dir", str(folder), "--no-binary=:all:"], [p for p in everything if p.name in BUILT]
    )
    wheels = sorted(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels) / 1e6
    if size > LARGEST_MB:
        raise RuntimeError(f"{size:.0f} MB of wheels in {folder}, more than {LARGEST_MB}")
    print(f"{len(wheels)} wheels, {size:.1f} MB, for Python {python} on {machine}: {folder}")
    return wheels


def platforms(machine: str) -> list[str]:
    """pip's arguments for every Linux from glibc 2.5 to 2.39: it matches each name exactly."""
    names = [f"manylinux_2_{minor}_{machine}" for minor in range(39, 4, -1)]
    names += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    return [part for name in names for part in ("--platform", name)]


def install(folder: Path, target: Path) -> Path:
    """A virtual environment at `target` as the module says; returns its Python."""
    venv.create(target, with_pip=False, clear=True)
    python = target / "bin" / "python"
    paths = {"base": str(target), "platbase": str(target)}
    own = Path(sysconfig.get_path("purelib", "posix_prefix", paths))
    # Where this Python finds its packages, after the environment's own. (system_site_packages would be the base
    # Python's, when this one is in a virtual environment itself.)
    (own / "beside.pth").write_text("\n".join(_package_folders()) + "\n")
    common = ["--python", str(python), "install", "--quiet", "--no-index", "--find-links", str(folder)]
    common += ["--no-warn-conflicts", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *common, *wanted()], check=True)
    subprocess.run([sys.executable, "-m", "pip", *common, "--no-deps", *ALONE], check=True)
    return python


def wanted() -> list[str]:
    """What this package asks for beside torch, and what its tests do, as requirements with their bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = [line for line in project["optional-dependencies"]["test"] if _name(line) in TEST_TOOLS]
    return [line for line in [*project["dependencies"], *tools] if _name(line) != "torch"]


def pin() -> None:
    """Writes PINS from the versions that are installed here."""
    brought = closure(["torch"], set())
    names = sorted((closure(map(_name, wanted()), brought) - brought).union(ALONE, NEWER))
    kept = {p.name: p.version for p in pins()} if PINS.exists() else {}
    found = []
    for name in names:
        version = kept[name] if name in ALONE else importlib.metadata.version(name)
        with tempfile.TemporaryDirectory() as folder:
            kind = "--no-binary=:all:" if name in BUILT else "--only-binary=:all:"
            _pip(["download", "--dest", folder, kind], [Pin(name, version)])
            (path,) = Path(folder).iterdir()
            whole = name in BUILT or path.name.endswith("-none-any.whl")
            found.append(Pin(name, version, hashlib.sha256(path.read_bytes()).hexdigest() if whole else None))
    PINS.write_text(HEADER + "".join(f"{p}\n" for p in found))


def closure(names: Iterable[str], stop: set[str]) -> set[str]:
    """Installed packages that `names` need, directly or not, with themselves; nothing in `stop` is followed."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen or name in stop:
            continue
        seen.add(name)
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        waiting += [_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return seen


def _name(requirement: str) -> str:
    """The package's name as registries normalize it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def _package_folders() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _pip(command: Sequence[str], wanted: Sequence[Pin]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("".join(f"{p}\n" for p in wanted))
        listed.flush()
        quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "-r", listed.name]
        # DeepSpeed's build would compile its ops; they are compiled when they are used, or not at all.
        subprocess.run(
            [sys.executable, "-m", "pip", *command, *quiet],
            check=True,
            env=os.environ | {"DS_BUILD_OPS": "0"},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="where there is a network")
    collecting.add_argument("folder", type=Path)
    collecting.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    collecting.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64")
    installing = commands.add_parser("install", help="where there is none")
    installing.add_argument("folder", type=Path)
    installing.add_argument("target", type=Path)
    commands.add_parser("pin", help="write gpu_requirements.txt anew")
    args = parser.parse_args()
    if args.command == "collect":
        collect(args.folder, args.python, args.machine)
    elif args.command == "install":
        install(args.folder, args.target)
    else:
        pin()


if __name__ == "__main__":
    main()
