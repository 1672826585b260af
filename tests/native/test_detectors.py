"""Every detector is shown to detect: each planted bug of mutants.py is seen by the tier that is named for it.

A mutant that is `silent` gives the right results in a plain run: without its tier nothing would see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest

from tests.native import linear_cases as cases
from tests.native.emulator import harness, machine_code, nvcc
from tests.native.emulator.harness import Fault, Library
from tests.native.linear_cases import LinearCase
from tests.native.linear_runs import LINEAR_SOURCES, check_quantization
from tests.native.mutants import MUTANTS, Mutant
from tests.native.test_cuda_machine_code import approximations, violations

NEED_NVCC = {"compile", "machine code", "exactness", "ptx"}


def run_mutant(mutant: Mutant, mode: str) -> None:
    """Runs the mutant's cases; raises what the tier says."""
    source = LINEAR_SOURCES[mutant.source.removesuffix("_linear")]
    mutated = harness.build(source, mode, mutant.edits, only=mutant.kernel)
    if mutant.source == "quantize":
        return check_quantization(mutated, schedule=1)
    case_kind = mutant.cases[0].kind
    pack_mode = "plain" if mode == "ptx" else mode
    pack = mutated if mutant.source == "pack" else harness.build(LINEAR_SOURCES["pack"], pack_mode)
    linear = mutated if mutant.source != "pack" else harness.build(LINEAR_SOURCES[case_kind], mode)
    check_cases(mutant.cases, pack, linear)


def check_cases(chosen: Sequence[LinearCase], pack: Library, linear: Library) -> None:
    for case in chosen:
        inputs = cases.make_inputs(case)
        packed = harness.run(pack, [cases.pack_program(case, inputs)], 1).results[0]["packed"]
        ways = [cases.linear_program] + [cases.fused_program] * cases.quantizes_itself(case)
        for way in ways:
            outcome = harness.run(linear, [way(case, inputs, packed)], 1)
            cases.check(case, inputs, cases.as_output(case, outcome.results[0]["out"]))
            assert outcome.statistics.bank_conflicts == 0, "bank conflicts"


def evidence(mutant: Mutant) -> str:
    """What the mutant's tier says of it; empty when it sees nothing."""
    source = LINEAR_SOURCES[mutant.source.removesuffix("_linear")]
    match mutant.seen_by:
        case "compile":
            try:
                machine_code.cubin(source, "80", mutant.edits)
            except RuntimeError as error:
                return str(error)
            return ""
        case "machine code":
            kernels = machine_code.inspect(machine_code.cubin(source, "80", mutant.edits))
            return " ".join(each for name, code in kernels.items() for each in violations(name, "80", code))
        case "exactness":
            return " ".join(approximations(source, harness.ptx_text(source, mutant.edits)))
    mode = "plain" if mutant.seen_by == "conflicts" else mutant.seen_by
    try:
        run_mutant(mutant, mode)
    except (AssertionError, Fault) as report:
        return str(report)
    return ""


@functools.cache
def all_evidence() -> dict[str, object]:
    """Of all mutants at once: the work is in compilers, and the machine has more than one core."""
    chosen = [mutant for mutant in MUTANTS if nvcc.available() or mutant.seen_by not in NEED_NVCC]
    outcomes = harness.in_parallel([functools.partial(evidence, mutant) for mutant in chosen])
    return {mutant.name: outcome for mutant, outcome in zip(chosen, outcomes, strict=True)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.seen_by}: {mutant.name}")
def test_a_planted_bug_is_seen_by_its_tier(mutant: Mutant) -> None:
    if mutant.seen_by in NEED_NVCC and not nvcc.available():
        pytest.skip("nvcc is not installed")
    seen = all_evidence()[mutant.name]
    if isinstance(seen, Exception):
        raise seen
    assert mutant.report in str(seen)


def test_silent_bugs_give_the_right_results() -> None:
    """So that their tiers are needed: nothing else in this list would see them."""

    def plain(mutant: Mutant) -> None:
        try:
            run_mutant(mutant, "plain")
        except AssertionError as report:
            if "bank conflicts" not in str(report):
                raise

    silent = [mutant for mutant in MUTANTS if mutant.silent]
    jobs: list[Callable[[], object]] = [functools.partial(plain, mutant) for mutant in silent]
    assert len(silent) >= 4
    assert harness.in_parallel(jobs) == [None] * len(silent)


def test_without_a_planted_bug_no_tier_sees_anything() -> None:
    """The probes themselves are silent on the sources as they are."""
    for kind, mode in (("int8", "plain"), ("int4", "tsan"), ("int8", "asan")):
        chosen = [case for mutant in MUTANTS for case in mutant.cases if case.kind == kind]
        check_cases(
            list(dict.fromkeys(chosen)),
            harness.build(LINEAR_SOURCES["pack"], mode),
            harness.build(LINEAR_SOURCES[kind], mode),
        )
