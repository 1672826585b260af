"""The wheels for a machine without a network: everything is pinned, and they are laid over what that machine has."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_wheels
from benchmarks.gpu_wheels import ALONE, BUILT, NEWER, Pin


def test_everything_that_the_package_needs_is_pinned_within_its_bounds() -> None:
    pinned = {pin.name: pin for pin in gpu_wheels.pins()}
    brought = gpu_wheels.closure(["torch"], set())
    for requirement in map(Requirement, gpu_wheels.wanted()):
        if requirement.name in brought:
            continue
        assert pinned[requirement.name].version in requirement.specifier
    for pin in pinned.values():
        # A fresh environment may have a newer version, with other needs: the pins are whole by themselves.
        if pin.name not in ALONE and importlib.metadata.version(pin.name) == pin.version:
            below = gpu_wheels.closure([pin.name], brought | pinned.keys() - {pin.name}) - brought
            assert below <= pinned.keys(), "python -m benchmarks.gpu_wheels pin"
    assert pinned.keys() >= {*ALONE, *NEWER}
    assert all(pinned[name].hash for name in BUILT + ALONE)


def test_what_is_no_pin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text("# a comment\n\nrich==15.0.0\ntqdm==4.0 --hash=sha256:" + 64 * "a" + "\n")
    assert gpu_wheels.pins(path) == [Pin("rich", "15.0.0"), Pin("tqdm", "4.0", 64 * "a")]
    path.write_text("rich>=15\n")
    with pytest.raises(ValueError, match="rich>=15"):
        gpu_wheels.pins(path)


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A wheel of one module whose `version` is its own."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}\n")
    files[f"{info}/RECORD"] = "".join(lines) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def test_the_folder_completes_what_is_there_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "dsc_missing", "1.0", "Requires-Dist: rich\nRequires-Dist: dsc_below\n")
    wheel(folder, "dsc_below", "2.0")
    wheel(folder, "dsc_alone", "3.0", "Requires-Dist: dsc_not_to_be_had\n")
    wheel(folder, "rich", "999.0")
    monkeypatch.setattr(gpu_wheels, "wanted", lambda: ["dsc-missing>=1", "rich"])
    monkeypatch.setattr(gpu_wheels, "ALONE", ("dsc-alone",))
    python = gpu_wheels.install(folder, tmp_path / "env")
    code = "import dsc_missing, dsc_below, dsc_alone, torch, importlib.metadata as m\n"
    code += "print(dsc_below.version, m.version('rich'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["2.0", importlib.metadata.version("rich")], done.stderr


@pytest.mark.network
@pytest.mark.parametrize("python, machine", [("3.11", "x86_64"), ("3.13", "x86_64"), ("3.12", "aarch64")])
def test_there_is_a_wheel_of_every_pin_for_other_machines(python: str, machine: str, tmp_path: Path) -> None:
    """pip asks for the files' names and their metadata alone."""
    listed = tmp_path / "pins.txt"
    listed.write_text("".join(f"{pin}\n" for pin in gpu_wheels.pins() if not pin.hash))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--target",
        str(tmp_path / "t"),
    ]
    command += [
        "--only-binary=:all:",
        "--python-version",
        python,
        *gpu_wheels.platforms(machine),
        "-r",
        str(listed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "NewConnectionError" in done.stderr or "Temporary failure" in done.stderr:
        pytest.skip("the package registry cannot be reached")
    assert done.returncode == 0 and "Would install" in done.stdout, done.stderr[-2000:]
