"""The cases of the CUDA linears and what they must give, for the emulator here and for a GPU (`-m gpu`) alike.

The expected values are written in plain torch from the contract (csrc/README.md), independently of the op's
reference implementation: `none` and `relu` bit for bit, the other activations within the stated bound of fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tests.native.emulator.harness import Program

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("none", "relu", "gelu_erf", "gelu_tanh", "silu")
HEADER_BYTES = 64
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class LinearCase:
    m: int
    n: int
    k: int
    kind: str = "int8"  # int8, int4
    group: int = 0
    activation: str = "none"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    steps: int = 127
    static: bool = False
    special: bool = False  # some rows of x hold NaN, Inf, zeros only, subnormals

    def __str__(self) -> str:
        parts = [
            self.kind + (f"g{self.group}" if self.group else ""),
            f"{self.m}x{self.n}x{self.k}",
            self.activation,
        ]
        parts += [str(t).removeprefix("torch.") for t in (self.dtype, self.out_dtype)]
        parts += ["bias"] * self.bias + ["static"] * self.static + ["special"] * self.special
        return "-".join([*parts, str(self.steps)])


# Every kernel (one row; few rows: to 8, 16, 32; small and large tiles) with tails in every direction, and steps enough
# for a ring of stages to go round in every warp.
SHAPES = [(1, 33, 4100), (1, 700, 1040), (3, 17, 5000), (17, 20, 3100),
          (1, 1, 1), (1, 17, 100), (2, 9, 530), (3, 5, 0), (4, 20, 48), (7, 33, 64), (8, 10, 1040), (9, 65, 70),
          (33, 64, 16), (64, 70, 200), (65, 130, 100), (130, 127, 333), (0, 5, 16), (9, 0, 16)]  # fmt: skip
INT8_CASES = [LinearCase(m, n, k) for m, n, k in SHAPES] + [
    LinearCase(12, 20, 40, activation=a, out_dtype=t) for a in ACTIVATIONS[1:] for t in DTYPES
] + [
    LinearCase(1, 30, 80, activation="gelu_erf", out_dtype=torch.float16),
    LinearCase(5, 18, 64, dtype=torch.bfloat16, out_dtype=torch.bfloat16, bias=False),
    LinearCase(70, 66, 128, dtype=torch.float16, out_dtype=torch.float16, steps=128),
    LinearCase(20, 19, 50, special=True, steps=128),
    LinearCase(20, 19, 50, special=True, static=True, activation="relu"),
    LinearCase(6, 19, 2100, special=True, dtype=torch.bfloat16),
]  # fmt: skip
INT8_CASES += [LinearCase(13, 19, 50, special=True, activation=a) for a in ACTIVATIONS]
INT4_SHAPES = [(1, 33, 6200), (1, 150, 1100), (17, 20, 5300), (1, 1, 1), (50, 20, 300),
               (1, 9, 1100), (3, 17, 33), (8, 12, 2080), (9, 66, 96), (40, 65, 130), (66, 70, 300),
               (130, 64, 160), (0, 5, 32), (9, 0, 40)]  # fmt: skip
INT4_CASES = [LinearCase(m, n, k, "int4", group) for m, n, k in INT4_SHAPES for group in (32, 64, 128)] + [
    LinearCase(3, 5, 0, "int4", 32),
    LinearCase(12, 20, 40, "int4", 32, "silu", out_dtype=torch.bfloat16, dtype=torch.bfloat16, special=True),
    LinearCase(4, 20, 40, "int4", 64, "relu", bias=False, static=True, special=True),
]
SOURCES = {kind: f"csrc/cuda/linear/{kind}_linear.cu" for kind in ("int8", "int4")}


# --- inputs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    codes: torch.Tensor  # int8 (n, k)
    weight_scale: torch.Tensor  # fp32 (n,), of int4 (n, groups)
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None  # fp32 (1,)


def make_inputs(case: LinearCase, seed: int | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(seed_of(case) if seed is None else seed)
    x = torch.randn(case.m, case.k, generator=generator) * 3
    if case.special and case.k:
        x[0 % case.m, 0] = math.nan
        x[1 % case.m, case.k - 1] = math.inf
        x[2 % case.m] = 0.0
        x[3 % case.m] = 1e-40
        x[4 % case.m] = torch.arange(case.k) % 9 * 0.5 - 2.0  # ties, when steps divide
        x[5 % case.m] *= 1e37  # sums overflow to both infinities
    low, high = (-8, 8) if case.kind == "int4" else (-127, 128)
    codes = torch.randint(low, high, (case.n, case.k), generator=generator, dtype=torch.int8)
    shape = (case.n, math.ceil(case.k / case.group)) if case.kind == "int4" else (case.n,)
    weight_scale = torch.rand(shape, generator=generator) * 0.02 + 0.001
    bias = torch.randn(case.n, generator=generator) if case.bias else None
    scale = torch.tensor([0.037]) if case.static else None
    return Inputs(x.to(case.dtype), codes, weight_scale, bias, scale)


def seed_of(case: LinearCase) -> int:
    """Python's hash of a string differs from run to run."""
    return int.from_bytes(str(case).encode()[-7:], "little") % 2**31


# --- expected values ---------------------------------------------------------------------------------------


def expected_quantization(
    x: torch.Tensor, steps: int, given: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 (rows, columns) and scale fp32 (rows,) by the contract."""
    x = x.float()
    if x.shape[1] == 0:
        scale = given.expand(x.shape[0]) if given is not None else torch.full((x.shape[0],), SMALLEST_SCALE)
        return x.to(torch.int8), scale.clone()
    largest = x.abs().amax(1)
    if given is None:
        scale = (largest / steps).clamp_min(SMALLEST_SCALE)
        scale = torch.where(largest.isfinite(), scale, math.nan)
    else:
        scale = torch.where(x.isnan().any(1), math.nan, given.expand(x.shape[0]))
    codes = torch.round(x / scale[:, None]).clamp(-steps, 127).nan_to_num(0.0)
    return codes.to(torch.int8), scale


def exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (m, k) . b (n, k)^T of int8 codes as fp32, rounded once: fp64 holds the integers exactly."""
    return (a.double() @ b.double().T).float()


def expected_before_activation(case: LinearCase, inputs: Inputs) -> torch.Tensor:
    """fp32 (m, n), bit for bit."""
    codes, scale = expected_quantization(inputs.x, case.steps, inputs.input_scale)
    if case.kind == "int4":
        total = torch.full((case.m, case.n), -0.0)
        for g in range(math.ceil(case.k / case.group)):
            columns = slice(g * case.group, (g + 1) * case.group)
            part = exact_product(codes[:, columns], inputs.codes[:, columns])
            total = total + part * inputs.weight_scale[:, g]
        y = total * scale[:, None]
    else:
        y = exact_product(codes, inputs.codes) * (scale[:, None] * inputs.weight_scale)
    return y if inputs.bias is None else y + inputs.bias


def activation(y: torch.Tensor, name: str) -> torch.Tensor:
    """In the dtype of y: give fp64 for the truth."""
    match name:
        case "relu":
            return torch.where(y < 0, 0.0, y)
        case "gelu_erf":
            return torch.nn.functional.gelu(y)
        case "gelu_tanh":
            return torch.nn.functional.gelu(y, approximate="tanh")
        case "silu":
            return torch.nn.functional.silu(y)
    return y


def check(case: LinearCase, inputs: Inputs, out: torch.Tensor) -> None:
    """Raises AssertionError unless `out` (m, n) of out_dtype is what the contract says."""
    before = expected_before_activation(case, inputs)
    if case.activation in ("none", "relu"):
        wanted = activation(before, case.activation).to(case.out_dtype)
        assert torch.equal(out.isnan(), wanted.isnan()), f"{case}: NaN elsewhere"
        wrong = (bits(out) != bits(wanted)) & ~wanted.isnan()
        assert not wrong.any(), f"{case}: {int(wrong.sum())} of {wrong.numel()} differ, first {first(wrong)}"
        return
    # -Inf gives the limit 0, and every activation is 0 in fp64 well before -1000.
    truth = activation(torch.where(before < -1000, -1000.0, before.double()), case.activation)
    step = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[case.out_dtype]
    bound = (2e-6 + step) * truth.abs() + 2e-7
    infinite = truth.to(case.out_dtype).isinf()
    wrong = ((out.double() - truth).abs() > bound) & ~infinite
    wrong |= (out.isnan() != truth.isnan()) | (out.isinf() != infinite)
    assert not wrong.any(), f"{case}: {int(wrong.sum())} of {wrong.numel()} too far off, first {first(wrong)}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def first(wrong: torch.Tensor) -> list[int]:
    return wrong.nonzero()[0].tolist()


# --- programs for the emulator -------------------------------------------------------------------------------


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy, 16-bit floats as their bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def quantize_program(x: torch.Tensor, steps: int, given: torch.Tensor | None) -> Program:
    rows, columns = x.shape
    padded = -(-columns // 16) * 16
    buffers = {
        "x": raw(x),
        "codes": np.full((rows, padded), 99, np.int8),
        "scales": np.full(rows, 7, np.float32),
    }
    if given is not None:
        buffers["given"] = raw(given)
    arguments = ("x", DTYPES[x.dtype], "given" if given is not None else None, rows, columns, steps,
                 "codes", "scales", None)  # fmt: skip
    return Program(buffers, [("dsc_quantize_rows", arguments)], ("codes", "scales"))


def packed_numel(case: LinearCase) -> int:
    """Bytes of the packed weight: exactly what the layout of csrc/cuda/linear/packed.cuh needs."""
    if case.kind == "int8":
        return HEADER_BYTES + case.n * -(-case.k // 16) * 16
    groups = -(-case.k // case.group)
    return HEADER_BYTES + case.n * -(-case.k // 32) * 16 + groups * -(-case.n // 8) * 8 * 4


def pack_program(case: LinearCase, inputs: Inputs) -> Program:
    buffers = {"codes": raw(inputs.codes), "packed": np.full(packed_numel(case), 0xCB, np.uint8)}
    if case.kind == "int4":
        buffers["scale"] = raw(inputs.weight_scale)
        call = ("dsc_int4_pack", ("codes", "scale", case.n, case.k, case.group, "packed", None))
    else:
        call = ("dsc_int8_pack", ("codes", case.n, case.k, "packed", None))
    return Program(buffers, [call], ("packed",))


def linear_program(case: LinearCase, inputs: Inputs, packed: np.ndarray) -> Program:
    """The linear alone, on codes that are right by construction."""
    codes, scale = expected_quantization(inputs.x, case.steps, inputs.input_scale)
    padded = torch.nn.functional.pad(codes, (0, -case.k % 16))
    buffers = {
        "codes": raw(padded),
        "input_scale": raw(scale),
        "packed": packed,
        "out": np.full((case.m, case.n), 99, raw(torch.empty(0, dtype=case.out_dtype)).dtype),
    }
    if case.bias:
        buffers["bias"] = raw(inputs.bias)
    arguments = ["codes", "input_scale", "packed"]
    if case.kind != "int4":
        buffers["weight_scale"] = raw(inputs.weight_scale)
        arguments.append("weight_scale")
    arguments += [
        "bias" if case.bias else None,
        "out",
        DTYPES[case.out_dtype],
        ACTIVATIONS.index(case.activation),
    ]
    arguments += [case.m, case.n, case.k, *([case.group] if case.kind == "int4" else []), None]
    return Program(buffers, [(f"dsc_{case.kind}_linear", tuple(arguments))], ("out",))


def quantizes_itself(case: LinearCase) -> bool:
    """Whether one launch may do all: dsc_quantizes_itself."""
    return case.m == 1 and 0 < case.k <= 16384


def fused_program(case: LinearCase, inputs: Inputs, packed: np.ndarray) -> Program:
    """Quantization and product in one launch."""
    program = linear_program(case, inputs, packed)
    buffers = {name: each for name, each in program.buffers.items() if name not in ("codes", "input_scale")}
    buffers["x"] = raw(inputs.x)
    if inputs.input_scale is not None:
        buffers["given"] = raw(inputs.input_scale)
    [(function, arguments)] = program.calls
    given = "given" if inputs.input_scale is not None else None
    head = ("x", DTYPES[inputs.x.dtype], given, case.steps)
    return Program(buffers, [(f"{function}_of", (*head, *arguments[2:]))], program.outputs)


def as_output(case: LinearCase, out: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(out.copy()).view(case.out_dtype).reshape(case.m, case.n)
