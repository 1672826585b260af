"""Calls of every op, a few each, for tests that treat all ops alike: the contract, tracing, and CUDA devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_compress.ops.reference import IMPLEMENTATIONS
from ds_compress.ops.reference.block_sparse import count_blocks
from ds_compress.ops.reference.float_formats import E2M1, E4M3, FloatFormat, ScaleKind
from ds_compress.ops.sizes import payload_bytes

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`make()` gives fresh arguments on the CPU, the same at every call; `exact`: results are equal to the last bit."""

    op: str
    title: str
    make: Callable[[], Arguments]
    exact: bool = True
    mutated: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.op}-{self.title}"

    def arguments(self, device: str = "cpu") -> Arguments:
        """Weights that the op expects packed are codes here until they are packed where they are used."""
        torch.manual_seed(7)
        args, kwargs = self.make()
        return tuple(_on(a, device) for a in args), {k: _on(v, device) for k, v in kwargs.items()}


@dataclass(frozen=True)
class Packed:
    """A weight that is packed by `op` on the device of the call: layouts differ between implementations."""

    op: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class PackedExperts:
    """Packed weights, one row for each expert."""

    weights: tuple[Packed, ...]


def resolve_packed(arguments: Arguments, ops: Any) -> Arguments:
    """The arguments with every `Packed` made by the implementation that will use it."""

    def made(value: Any) -> Any:
        if isinstance(value, PackedExperts):
            return torch.stack([made(each) for each in value.weights])
        return getattr(ops, value.op)(*value.arguments) if isinstance(value, Packed) else value

    args, kwargs = arguments
    return tuple(made(a) for a in args), {k: made(v) for k, v in kwargs.items()}


def _on(value: Any, device: str) -> Any:
    if isinstance(value, Packed):
        return Packed(value.op, tuple(_on(each, device) for each in value.arguments))
    if isinstance(value, PackedExperts):
        return PackedExperts(tuple(_on(each, device) for each in value.weights))
    if isinstance(value, list):
        return [_on(each, device) for each in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def codes(rows: int, columns: int, bits: int = 8) -> torch.Tensor:
    top = 2 ** (bits - 1)
    return torch.randint(-top + (bits == 8), top, (rows, columns), dtype=torch.int8)


def _linear(
    m: int, n: int, k: int, activation: str = "none", dtype: torch.dtype = torch.float32, **extra: Any
) -> Case:
    def make() -> Arguments:
        args = torch.randn(m, k).to(dtype), Packed("int8_linear_pack", (codes(n, k),)), torch.rand(n) / 100
        return (*args, torch.randn(n), extra.get("scale")), {
            "activation": activation,
            "steps": extra.get("steps", 127),
        }

    exact = activation in ("none", "relu")
    return Case(
        "int8_linear", f"{m}x{n}x{k}-{activation}-{str(dtype)[6:]}{'-static' * bool(extra)}", make, exact
    )


def _int4(m: int, n: int, k: int, group: int) -> Case:
    def make() -> Arguments:
        scale = torch.rand(n, -(-k // group)) / 100
        packed = Packed("int4_linear_pack", (codes(n, k, bits=4), scale))
        return (torch.randn(m, k), packed, n, group, torch.randn(n)), {}

    return Case("int4_linear", f"{m}x{n}x{k}-group{group}", make)


def _block_sparse(m: int, n: int, k: int, activation: str = "none", static: bool = False) -> Case:
    def make() -> Arguments:
        weight = with_zero_blocks(codes(n, k), 0.7)
        packed = Packed("block_sparse_int8_linear_pack", (weight, count_blocks(weight)))
        args = torch.randn(m, k), packed, torch.rand(n) / 100, torch.randn(n)
        return (*args, torch.rand(1) if static else None), {"activation": activation, "steps": 128}

    exact = activation in ("none", "relu")
    return Case("block_sparse_int8_linear", f"{m}x{n}x{k}-{activation}{'-static' * static}", make, exact)


def with_zero_blocks(weight: torch.Tensor, share: float) -> torch.Tensor:
    """`weight` (N, K) with so many of its blocks of 4 x 16 set to zero, drawn from torch's generator."""
    rows, columns = weight.shape
    kept = torch.rand(-(-rows // 4), -(-columns // 16)) >= share
    return weight * kept.repeat_interleave(4, 0)[:rows].repeat_interleave(16, 1)[:, :columns]


def _weight_only(
    m: int, n: int, k: int, group: int, bits: int, dtype: torch.dtype = torch.float32, offset: bool = False
) -> Case:
    def make() -> Arguments:
        shape = n, -(-k // group)
        values = codes(n, k, bits).view(torch.uint8) & (2**bits - 1) if offset else codes(n, k, bits)
        offsets = torch.randn(shape) / 30 if offset else None
        arguments = (values, torch.rand(shape) / 100, offsets, group, f"int{bits}")
        return (
            torch.randn(m, k).to(dtype),
            Packed("weight_only_linear_pack", arguments),
            n,
            torch.randn(n),
        ), {}

    title = f"{m}x{n}x{k}-group{group}-int{bits}-{str(dtype)[6:]}{'-offset' * offset}"
    return Case("weight_only_linear", title, make)


def _attention(
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    mask: str = "",
) -> Case:
    """mask: "added", "bool", "causal" or ""."""

    def make() -> Arguments:
        q, k = torch.randn(2, heads, queries, width), torch.randn(2, groups, keys, width)
        given = {"added": torch.randn(2, 1, 1, keys), "bool": torch.rand(1, heads, queries, keys) < 0.7}.get(
            mask
        )
        v = torch.randn(2, keys, groups, width).transpose(1, 2)
        return (q.to(dtype), k.to(dtype), v.to(dtype), given), {"scale": 0.3, "is_causal": mask == "causal"}

    title = f"{heads}-{groups}x{queries}x{keys}x{width}-{str(dtype)[6:]}-{mask or 'all'}"
    return Case("attention", title, make, exact=False)


def _grouped(counts: list[int], n: int, k: int, group: int = 0, tail: int = 0, static: bool = False) -> Case:
    """Of experts with so many rows each; `tail` rows behind them."""
    experts = len(counts)

    def make() -> Arguments:
        x, ends = torch.randn(sum(counts) + tail, k), torch.tensor(counts, dtype=torch.int32).cumsum(0)
        if group:
            weights = [(codes(n, k, bits=4), torch.rand(n, -(-k // group)) / 100) for _ in counts]
            packed = PackedExperts(tuple(Packed("int4_linear_pack", each) for each in weights))
            head: tuple[Any, ...] = (x, packed, n, group, ends)
        else:
            packed = PackedExperts(tuple(Packed("int8_linear_pack", (codes(n, k),)) for _ in counts))
            head = (x.bfloat16(), packed, torch.rand(experts, n) / 100, ends.int())
        return (*head, torch.randn(experts, n), torch.rand(experts) if static else None), {"steps": 128}

    title = f"{'-'.join(map(str, counts))}x{n}x{k}{f'-group{group}' * bool(group)}{'-static' * static}"
    return Case("int4_grouped_linear" if group else "int8_grouped_linear", title, make)


def _fake_quantize(rows: int, columns: int, symmetric: bool, dtype: torch.dtype) -> Case:
    def make() -> Arguments:
        low, high, steps = (-128, 127, 128) if symmetric else (0, 255, 256)
        grid = {
            "quant_min": low,
            "quant_max": high,
            "steps": steps,
            "symmetric": symmetric,
            "with_mask": True,
        }
        return (torch.randn(rows, columns).to(dtype),), grid

    kind = "symmetric" if symmetric else "asymmetric"
    return Case("fake_quantize", f"{rows}x{columns}-{kind}-{str(dtype)[6:]}", make)


def _fake_quantize_float(
    title: str, number: FloatFormat, kind: ScaleKind, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> Case:
    def make() -> Arguments:
        wanted = torch.full((1,), 500.0) if kind is ScaleKind.E4M3 else None
        return (torch.randn(shape).to(dtype), None, wanted), {
            "exponent_bits": number.exponent_bits,
            "mantissa_bits": number.mantissa_bits,
            "largest": number.largest,
            "scale_kind": int(kind),
            "block": block,
            "with_mask": True,
        }

    return Case("fake_quantize_float", f"{title}-{shape[0]}x{shape[1]}-{str(dtype)[6:]}", make)


def _bits(numel: int) -> torch.Tensor:
    return torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8)


def _payloads(count: int, chunk: int, bits: int, block: int) -> torch.Tensor:
    payloads = torch.zeros(count, payload_bytes(chunk, bits, block), dtype=torch.uint8)
    IMPLEMENTATIONS["block_quantize"](torch.randn(count * chunk), payloads, None, chunk, bits, block)
    return payloads


def _block_cases(bits: int, block: int, chunk: int) -> Iterator[Case]:
    size, title = payload_bytes(chunk, bits, block), f"int{bits}-block{block}-chunk{chunk}"
    numel = 3 * chunk - 5
    yield Case(
        "block_quantize",
        title,
        lambda: (
            (
                torch.randn(numel),
                torch.zeros(3, size, dtype=torch.uint8),
                torch.randn(numel),
                chunk,
                bits,
                block,
            ),
            {},
        ),
        mutated=(1, 2),
    )
    yield Case(
        "block_dequantize",
        title,
        lambda: ((_payloads(3, chunk, bits, block), torch.empty(numel), chunk, bits, block), {}),
        mutated=(1,),
    )
    yield Case(
        "block_reduce",
        title,
        lambda: ((_payloads(3, chunk, bits, block), torch.empty(chunk), bits, block, 1 / 3), {}),
        mutated=(1,),
    )
    yield Case(
        "block_reduce_quantize",
        title,
        lambda: (
            (
                _payloads(3, chunk, bits, block),
                torch.zeros(size, dtype=torch.uint8),
                torch.randn(chunk),
                chunk,
                bits,
                block,
                1 / 3,
            ),
            {},
        ),
        mutated=(1, 2),
    )


def _mask_cases(numel: int, offset: int, dtype: torch.dtype) -> Iterator[Case]:
    title = f"{numel}-from{offset}-{str(dtype)[6:]}"
    yield Case(
        "mask_apply_",
        title,
        lambda: ((torch.randn(numel).to(dtype), _bits(numel + offset), offset, -1.0), {}),
        mutated=(0,),
    )
    yield Case("mask_unpack", title, lambda: ((_bits(numel + offset), numel, offset), {}))


def _mask_many(count: int) -> Case:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

    def make() -> Arguments:
        sizes = [(37 * i * i) % 5000 for i in range(count)]  # 0 is one of them
        offsets = [i % 11 for i in range(count)]
        weights = [torch.randn(n).to(dtypes[i % 4]) for i, n in enumerate(sizes)]
        return (weights, [_bits(n + o) for n, o in zip(sizes, offsets, strict=True)], offsets, 0.5), {}

    return Case("mask_apply_many_", f"{count}", make, mutated=(0,))


CASES = [
    Case("int8_linear_pack", "17x70", lambda: ((codes(17, 70),), {})),
    Case("int8_linear_quantize_pack", "17x70", lambda: ((torch.randn(17, 70), torch.rand(17) / 30, 127), {})),
    Case("int4_linear_pack", "17x70", lambda: ((codes(17, 70, bits=4), torch.rand(17, 3)), {})),
    _linear(5, 17, 70),
    _linear(1, 48, 64, "relu", torch.bfloat16),
    _linear(33, 50, 130, "gelu_erf", torch.float16),
    _linear(4, 9, 33, "gelu_tanh"),
    _linear(4, 9, 33, "silu", scale=torch.tensor([0.02]), steps=128),
    _int4(5, 17, 70, 32),
    _int4(1, 50, 256, 128),
    Case("block_sparse_int8_linear_pack", "17x70", lambda: ((codes(17, 70), 25), {})),
    _block_sparse(5, 17, 70),
    _block_sparse(1, 50, 2100, "relu"),
    _block_sparse(33, 100, 130, "gelu_erf", static=True),
    Case(
        "weight_only_linear_pack",
        "17x70",
        lambda: ((codes(17, 70, bits=4), torch.rand(17, 3), None, 32, "int4"), {}),
    ),
    _weight_only(5, 17, 70, 32, 4),
    _weight_only(1, 70, 256, 128, 8, torch.bfloat16),
    _weight_only(3, 17, 70, 70, 2, torch.float16, offset=True),
    _attention(4, 4, 9, 9, 16),
    _attention(6, 2, 5, 40, 33, mask="added"),
    _attention(2, 1, 40, 40, 32, torch.bfloat16, "bool"),
    _attention(3, 3, 17, 17, 8, torch.float16, "causal"),
    _grouped([3, 0, 5, 1], 17, 70),
    _grouped([0, 40, 2], 50, 130, tail=3, static=True),
    _grouped([1, 0, 20], 17, 70, group=32, tail=2),
    _grouped([70, 1], 50, 256, group=128, static=True),
    _fake_quantize(7, 33, True, torch.float32),
    _fake_quantize(7, 33, False, torch.bfloat16),
    _fake_quantize_float("mxfp4", E2M1, ScaleKind.E8M0, (7, 96), 32, torch.bfloat16),
    _fake_quantize_float("nvfp4", E2M1, ScaleKind.E4M3, (7, 64), 16, torch.float32),
    _fake_quantize_float("fp8", E4M3, ScaleKind.FP32, (7, 33), 33, torch.float16),
    *_mask_cases(1003, 5, torch.float32),
    *_mask_cases(77, 0, torch.bfloat16),
    _mask_many(0),
    _mask_many(5),
    _mask_many(70),
    Case("mask_pack", "1003", lambda: ((torch.rand(1003) < 0.3,), {})),
    Case("mask_n_of_m", "9x22-2:4", lambda: ((torch.randn(9, 22), 2, 4), {})),
    Case("mask_window", "1003", lambda: ((torch.randn(1003), None, 2**29, 2**30 - 2**20, True, 99), {})),
    Case("mask_square_sums", "1003", lambda: ((torch.randn(1003), _bits(1003)), {}), exact=False),
    Case("mask_square_sums", "130-all", lambda: ((torch.randn(130), None), {}), exact=False),
    Case("mask_square_sums", "77", lambda: ((torch.randn(77).bfloat16(), _bits(77)), {}), exact=False),
    Case("mask_window", "77-some", lambda: ((torch.randn(77), _bits(77), -(2**30), 2**28, False, 7), {})),
    *_block_cases(8, 512, 1300),
    *_block_cases(4, 128, 300),
]
