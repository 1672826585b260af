"""The cases of the CUDA linears of many experts and what they must give: those of linear_cases.py, expert by expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.native import linear_cases as cases
from tests.native.emulator import harness
from tests.native.emulator.harness import Library, Program
from tests.native.linear_cases import DTYPES, Inputs, LinearCase, packed_numel, raw

SOURCE = "csrc/cuda/linear/grouped_linear.cu"


@dataclass(frozen=True)
class GroupedCase:
    counts: tuple[int, ...]  # rows of each expert
    n: int
    k: int
    kind: str = "int8"
    group: int = 0
    tail: int = 0  # rows behind them
    wide: bool = False  # int64 offsets
    static: bool = False
    special: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    steps: int = 127

    def __str__(self) -> str:
        counts = "-".join(map(str, self.counts[:8])) + "..." * (len(self.counts) > 8)
        parts = [self.kind + (f"g{self.group}" if self.group else ""), f"{counts}x{self.n}x{self.k}"]
        parts += [word for word in ("wide", "static", "special") if getattr(self, word)]
        return "-".join([*parts, f"tail{self.tail}", str(self.dtype)[6:], str(self.out_dtype)[6:]])

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.tail

    def of(self, expert: int) -> LinearCase:
        return LinearCase(
            self.counts[expert], self.n, self.k, self.kind, self.group, "none", self.bias, self.dtype,
            self.out_dtype, self.steps, self.static, self.special and self.counts[expert] > 0,
        )  # fmt: skip


# Every tile (16, 64 and 128 rows, chosen by the mean), places by row and by tile, more experts than a warp has lanes,
# experts without rows first, last and between, tiles that end with an expert and that do not.
CASES = [
    GroupedCase((3,), 17, 70),
    GroupedCase((0, 1, 0, 2, 1, 0), 140, 100, wide=True),
    GroupedCase((1,) * 40, 9, 48, tail=3),
    GroupedCase((0,) * 20 + (20, 1) + (0,) * 20, 9, 48),
    GroupedCase((16, 0, 33, 17), 130, 200, tail=2, static=True),
    GroupedCase((0, 0, 100, 40, 0), 70, 333, wide=True, dtype=torch.bfloat16, out_dtype=torch.bfloat16),
    GroupedCase((64, 65, 1), 66, 64, tail=1, steps=128),
    GroupedCase((129, 0, 260), 130, 80, static=True, bias=False, dtype=torch.float16, out_dtype=torch.float16),
    GroupedCase((300,), 64, 16, tail=140),
    GroupedCase((9, 7, 0, 8), 19, 50, special=True, steps=128),
    GroupedCase((9, 7, 0, 8), 19, 50, special=True, static=True, wide=True),
    GroupedCase((4, 0), 5, 0),
    GroupedCase((0, 0), 5, 16),
    GroupedCase((0, 0), 5, 16, tail=2),
]  # fmt: skip
CASES += [
    GroupedCase(counts, n, k, "int4", group, tail, static=group == 64, wide=group == 32)
    for counts, n, k, tail in [((2, 0, 5), 17, 70, 1), ((70, 3), 130, 300, 0), ((130, 0, 131), 66, 160, 3)]
    for group in (32, 64, 128)
] + [
    GroupedCase(
        (9, 7, 0, 8), 19, 50, "int4", 32, special=True, dtype=torch.bfloat16, out_dtype=torch.bfloat16
    )
]


@dataclass(frozen=True)
class GroupedInputs:
    experts: list[Inputs]
    x: torch.Tensor  # of all, and the rows behind them
    offsets: torch.Tensor


def make_inputs(case: GroupedCase) -> GroupedInputs:
    """Of each expert its own, with a static scale that no other has."""
    experts = []
    for expert in range(len(case.counts)):
        own = cases.make_inputs(case.of(expert), seed=1000 + expert)
        given = torch.tensor([0.02 + 0.011 * expert]) if case.static else None
        experts.append(Inputs(own.x, own.codes, own.weight_scale, own.bias, given))
    tail = torch.full((case.tail, case.k), torch.nan, dtype=case.dtype)
    offsets = torch.tensor(case.counts).cumsum(0).to(torch.int64 if case.wide else torch.int32)
    return GroupedInputs(experts, torch.cat([*(each.x for each in experts), tail]), offsets)


def expected_quantization(case: GroupedCase, inputs: GroupedInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of all rows; those behind the last expert's by the scale of that."""
    xs = [*inputs.x.split([*case.counts, case.tail])]
    given = [each.input_scale for each in (*inputs.experts, inputs.experts[-1])]
    parts = [cases.expected_quantization(x, case.steps, own) for x, own in zip(xs, given, strict=True)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def quantize_program(case: GroupedCase, inputs: GroupedInputs) -> Program:
    padded = -(-case.k // 16) * 16
    buffers = {
        "x": raw(inputs.x),
        "given": np.concatenate([raw(each.input_scale) for each in inputs.experts]),  # type: ignore[arg-type]
        "offsets": raw(inputs.offsets),
        "codes": np.full((case.rows, padded), 99, np.int8),
        "scales": np.full(case.rows, 7, np.float32),
    }
    arguments = ("x", DTYPES[case.dtype], "given", "offsets", int(case.wide), len(case.counts), case.rows, case.k,
                 case.steps, "codes", "scales", None)  # fmt: skip
    return Program(buffers, [("dsc_quantize_expert_rows", arguments)], ("codes", "scales"))


def linear_program(case: GroupedCase, inputs: GroupedInputs, packed: np.ndarray) -> Program:
    """On codes that are right by construction; packed: of all experts, one after the other."""
    codes, scales = expected_quantization(case, inputs)
    buffers = {
        "codes": raw(torch.nn.functional.pad(codes, (0, -case.k % 16))),
        "input_scale": raw(scales),
        "packed": packed,
        "offsets": raw(inputs.offsets),
        "out": np.full((case.rows, case.n), 99, raw(torch.empty(0, dtype=case.out_dtype)).dtype),
    }
    if case.bias:
        buffers["bias"] = np.concatenate([raw(each.bias) for each in inputs.experts])  # type: ignore[arg-type]
    arguments: list[str | int | None] = ["codes", "input_scale", "packed", packed_numel(case.of(0))]
    if case.kind == "int8":
        buffers["weight_scale"] = np.concatenate([raw(each.weight_scale) for each in inputs.experts])
        arguments.append("weight_scale")
    arguments += ["bias" if case.bias else None, "offsets", int(case.wide), len(case.counts), "out"]
    arguments += [DTYPES[case.out_dtype], case.rows, case.n, case.k]
    arguments += [*([case.group] if case.kind == "int4" else []), None]
    return Program(buffers, [(f"dsc_{case.kind}_grouped_linear", tuple(arguments))], ("out",))


def check_quantization(library: Library, schedule: int) -> None:
    chosen = [case for case in CASES if case.static]
    inputs = [make_inputs(case) for case in chosen]
    programs = [quantize_program(case, each) for case, each in zip(chosen, inputs, strict=True)]
    for case, each, result in zip(
        chosen, inputs, harness.run(library, programs, schedule).results, strict=True
    ):
        codes, scales = expected_quantization(case, each)
        padded = torch.nn.functional.pad(codes, (0, -case.k % 16))
        np.testing.assert_array_equal(result["scales"], scales.numpy(), err_msg=f"{case}: scales differ")
        np.testing.assert_array_equal(result["codes"], padded.numpy(), err_msg=f"{case}: codes differ")


def check_products(chosen: list[GroupedCase], pack: Library, library: Library, schedule: int) -> None:
    inputs = [make_inputs(case) for case in chosen]
    programs = [
        linear_program(case, each, packed_weights(case, each, pack))
        for case, each in zip(chosen, inputs, strict=True)
    ]
    outcome = harness.run(library, programs, schedule)
    for case, each, result in zip(chosen, inputs, outcome.results, strict=True):
        out = torch.from_numpy(result["out"].copy()).view(case.out_dtype).view(case.rows, case.n)
        *of_experts, behind = out.split([*case.counts, case.tail])
        for expert, own in enumerate(of_experts):
            cases.check(case.of(expert), each.experts[expert], own)
        assert not behind.any(), f"{case}: rows of no expert differ from 0"
    assert outcome.statistics.bank_conflicts == 0


def packed_weights(case: GroupedCase, inputs: GroupedInputs, pack: Library) -> np.ndarray:
    programs = [cases.pack_program(case.of(e), each) for e, each in enumerate(inputs.experts)]
    return np.concatenate([result["packed"] for result in harness.run(pack, programs).results])
