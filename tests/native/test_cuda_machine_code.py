"""Tiers 1 and 2: every CUDA source compiles for sm_80 and sm_90, and its machine code keeps to its budget.

Spills are errors of the compilation. budgets.toml says what each kernel must contain (tensor-core, ldmatrix and
cp.async instructions: their exact number) and how many registers it may take; local memory and stack are zero.
Skipped only where nvcc is not installed; cuobjdump and nvdisasm come with `ds_compress[cuda-build]`.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import tomllib

import pytest

from tests.native.emulator import harness, machine_code, nvcc
from tests.native.emulator.machine_code import MachineCode

pytestmark = pytest.mark.skipif(not nvcc.available(), reason="nvcc is not installed")

# Those of Hopper are CUTLASS's, compiled once with the library: see test_hopper_code.py.
SOURCES = sorted(
    str(path.relative_to(harness.REPOSITORY))
    for path in (harness.REPOSITORY / "csrc/cuda").rglob("*.cu")
    if path.parent.name != "hopper"
)
BUDGETS = harness.REPOSITORY / "tests/native/budgets.toml"
WIDE = ("LDG.128", "STG.128")
COUNTED = ("IMMA", "LDSM", "LDGSTS", "IDP")
# The activations may approximate: their bound is 2e-6, and they are written to hold it.
MAY_APPROXIMATE = {f"csrc/cuda/linear/{kind}_linear.cu" for kind in ("int8", "int4")}


@functools.cache
def budgets() -> dict[str, dict[str, int]]:
    return tomllib.loads(BUDGETS.read_text())


@functools.cache
def binaries() -> dict[tuple[str, str], object]:
    jobs = [(source, arch) for source in SOURCES for arch in nvcc.ARCHITECTURES]
    outcomes = harness.in_parallel([functools.partial(machine_code.cubin, *job) for job in jobs])
    return dict(zip(jobs, outcomes, strict=True))


def kernels(source: str, arch: str) -> dict[str, MachineCode]:
    outcome = binaries()[source, arch]
    if isinstance(outcome, Exception):
        raise outcome
    return machine_code.inspect(outcome)  # type: ignore[arg-type]


def budget_of(name: str) -> dict[str, int]:
    """Its own, or that of the first pattern with a * that it fits; without one that of the other kernels."""
    patterns = [pattern for pattern in budgets() if "*" in pattern and fnmatch.fnmatchcase(name, pattern)]
    return budgets()[next(iter([name] if name in budgets() else patterns), "other kernels")]


def violations(name: str, arch: str, code: MachineCode) -> list[str]:
    """How a kernel breaks its budget."""
    budget = budget_of(name)
    found = []
    if code.registers > budget["registers"]:
        found.append(f"{code.registers} registers, allowed are {budget['registers']}")
    if code.local_bytes or code.stack_bytes or code.counts["LDL"] or code.counts["STL"]:
        found.append(f"local memory: {code.local_bytes} bytes, stack {code.stack_bytes}")
    for instruction in COUNTED:
        if code.counts[instruction] != budget.get(instruction, 0):
            found.append(f"{code.counts[instruction]} {instruction}, not {budget.get(instruction, 0)}")
    for instruction in WIDE:
        if code.counts[instruction] < budget.get(instruction, 0):
            found.append(
                f"{code.counts[instruction]} {instruction}, at least {budget[instruction]} are needed"
            )
    return [f"{name} for sm_{arch}: {what}" for what in found]


def approximations(source: str, ptx: str) -> set[str]:
    """The approximate or flushing instructions that a source must not have."""
    allowed = (
        {"ex2.approx.f32", "ex2.approx.ftz.f32", "rcp.approx.ftz.f32"} if source in MAY_APPROXIMATE else set()
    )
    return set(re.findall(r"\b[\w.]*\.(?:approx|ftz)\b[\w.]*", ptx)) - allowed


@pytest.mark.parametrize("arch", nvcc.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_keep_to_their_budget(source: str, arch: str) -> None:
    found = kernels(source, arch)
    assert found
    assert [each for name, code in found.items() for each in violations(name, arch, code)] == []


def test_every_budget_has_a_kernel() -> None:
    existing = [name for source in SOURCES for name in kernels(source, "80")]
    idle = [
        pattern for pattern in budgets() if not any(fnmatch.fnmatchcase(name, pattern) for name in existing)
    ]
    assert idle == ["other kernels"]


@pytest.mark.parametrize("source", SOURCES)
def test_ptx_is_exact_where_bits_are_promised(source: str) -> None:
    """No approximate division and no flushed subnormals, but in the activations."""
    assert approximations(source, harness.ptx_text(source)) == set()
