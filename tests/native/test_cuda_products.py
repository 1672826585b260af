"""Linear layers on codes on a CUDA device: shapes that reach every kernel, streams, captures, first uses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ds_compress.ops import library
from ds_compress.ops.reference import IMPLEMENTATIONS
from tests.native.test_contract import References

pytestmark = pytest.mark.gpu

# (rows, out_features, in_features): one row; up to 8, 16, 32, 64 rows; every tile of Hopper, whole and with tails; rows
# that TMA cannot reach.
SHAPES = [
    (1, 64, 96), (1, 1000, 4096), (1, 9000, 256), (1, 48, 20000), (3, 130, 2080), (8, 768, 768), (9, 33, 130),
    (16, 4096, 528), (31, 257, 1040), (33, 64, 64), (64, 768, 1040), (65, 1000, 80), (100, 1001, 336),
    (128, 2048, 512), (300, 264, 1008), (513, 1544, 256), (2049, 776, 256), (1900, 1536, 128),
    (1000, 4096, 64), (200, 0, 64), (0, 40, 64), (40, 40, 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_COMPRESS_CUDA", "1")
        yield library.native()


def operands(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, codes, scale, bias; on the CPU."""
    generator = torch.Generator().manual_seed(rows + 7 * outputs + 31 * inputs)
    x = torch.randn(rows, inputs, generator=generator).mul_(3)
    if rows > 4 and inputs:
        x[1], x[2, 0], x[3, -1] = 0.0, torch.nan, torch.inf
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator) * 0.01 + 1e-4
    return x.to(dtype), codes, scale, torch.randn(outputs, generator=generator)


def same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    mine = mine.cpu()
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    assert torch.equal(mine.isnan(), theirs.isnan())
    whole = torch.int32 if mine.dtype is torch.float32 else torch.int16
    differ = (mine.view(whole) != theirs.view(whole)) & ~theirs.isnan()
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ"


def cuda(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_linear_gives_the_bits_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, ops: Any
) -> None:
    x, codes, scale, bias = operands(*shape, dtype)
    packed, theirs = ops.int8_linear_pack(codes.cuda()), IMPLEMENTATIONS["int8_linear_pack"](codes)
    for with_bias, activation, given in ((bias, "none", None), (None, "relu", torch.tensor([0.05]))):
        arguments = [x, scale, with_bias, given]
        x_, scale_, bias_, given_ = (None if a is None else a.cuda() for a in arguments)
        mine = ops.int8_linear(x_, packed, scale_, bias_, given_, activation=activation)
        same(mine, IMPLEMENTATIONS["int8_linear"](x, theirs, scale, with_bias, given, activation=activation))


@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", "silu"])
@pytest.mark.parametrize("rows", [1, 20, 64, 600])
def test_activations_are_within_their_bound(rows: int, activation: str, ops: Any) -> None:
    x, codes, scale, bias = operands(rows, 264, 512, torch.float32)
    mine = ops.int8_linear(
        *cuda(x, ops.int8_linear_pack(codes.cuda()), scale, bias),
        activation=activation,
        out_dtype=torch.float32,
    ).cpu()
    theirs = IMPLEMENTATIONS["int8_linear"](
        x,
        IMPLEMENTATIONS["int8_linear_pack"](codes),
        scale,
        bias,
        activation=activation,
        out_dtype=torch.float32,
    )
    near = (mine - theirs).abs() <= 2e-6 * theirs.abs() + 4e-7
    assert (near | (mine == theirs) | (mine.isnan() & theirs.isnan())).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] <= 300], ids=str)
def test_int4_linear_gives_the_bits_of_the_reference(
    shape: tuple[int, int, int], group: int, ops: Any
) -> None:
    _, outputs, inputs = shape
    x, _, _, bias = operands(*shape, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, -(-inputs // group), generator=generator) * 0.02
    if inputs and outputs and not scale.shape[1]:
        pytest.skip("no groups")
    packed, theirs = (
        ops.int4_linear_pack(*cuda(codes, scale)),
        IMPLEMENTATIONS["int4_linear_pack"](codes, scale),
    )
    mine = ops.int4_linear(x.cuda(), packed, outputs, group, bias.cuda())
    same(mine, IMPLEMENTATIONS["int4_linear"](x, theirs, outputs, group, bias))


# Rows of each expert: tiles of 16, 64 and 128 rows, more experts than a warp has lanes, rows of none.
COUNTS = [
    ([1], 0), ([0, 3, 0, 1], 2), ([1, 0] * 64, 0), ([20, 0, 90, 5], 1), ([700, 0, 300, 128, 1], 3), ([0, 0], 4),
    ([40] * 60, 0),
]  # fmt: skip


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize(("counts", "tail"), COUNTS, ids=lambda value: str(value)[:24])
def test_experts_at_once_give_the_bits_of_the_reference(
    counts: list[int], tail: int, group: int, static: bool, ops: Any
) -> None:
    """int8, and int4 in groups; offsets of either width; and behind NaN, Inf and zeros."""
    outputs, inputs, experts = 776, 528, len(counts)
    x, _, _, _ = operands(sum(counts) + tail, 1, inputs, torch.bfloat16)
    generator = torch.Generator().manual_seed(experts)
    low = -8 if group else -127
    codes = torch.randint(low, -low, (experts, outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(experts, outputs, -(-inputs // group) if group else 1, generator=generator) * 0.02
    bias, given = (
        torch.randn(experts, outputs, generator=generator),
        torch.rand(experts) / 9 if static else None,
    )
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32 if group else torch.int64)

    def multiply(with_ops: Any, device: str) -> torch.Tensor:
        parts = [codes.to(device), scale.to(device)]
        rest = [offsets.to(device), bias.to(device), None if given is None else given.to(device)]
        y: torch.Tensor
        if group:
            packed = torch.stack([with_ops.int4_linear_pack(c, s) for c, s in zip(*parts, strict=True)])
            y = with_ops.int4_grouped_linear(x.to(device), packed, outputs, group, *rest)
        else:
            packed = torch.stack([with_ops.int8_linear_pack(c) for c in parts[0]])
            y = with_ops.int8_grouped_linear(x.to(device), packed, parts[1][:, :, 0].contiguous(), *rest)
        return y

    same(multiply(ops, "cuda"), multiply(References(), "cpu"))


def test_experts_at_once_in_a_captured_graph(ops: Any) -> None:
    """Other offsets than those of the capture: nothing of them was known to the host."""
    codes, scale = torch.randint(-127, 128, (8, 264, 256), dtype=torch.int8), torch.rand(8, 264)
    packed = torch.stack([ops.int8_linear_pack(c) for c in codes.cuda()])
    x, scale = cuda(torch.randn(300, 256), scale)
    offsets = torch.arange(8, device="cuda") + 1
    ops.int8_grouped_linear(x, packed, scale, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.int8_grouped_linear(x, packed, scale, offsets)
    offsets.copy_(torch.tensor([0, 100, 100, 130, 131, 250, 250, 299]))
    graph.replay()
    assert torch.equal(captured, ops.int8_grouped_linear(x, packed, scale, offsets))
    assert not captured[299].any()


@pytest.mark.parametrize("rows", [1, 12, 50, 400])
def test_a_captured_graph_gives_what_calls_give(rows: int, ops: Any) -> None:
    x, codes, scale, bias = cuda(*operands(rows, 768, 512, torch.bfloat16))
    packed = ops.int8_linear_pack(codes)
    packed4 = ops.int4_linear_pack(codes // 16, torch.rand(768, 4, device="cuda"))

    def layers() -> list[torch.Tensor]:
        return [ops.int8_linear(x, packed, scale, bias), ops.int4_linear(x, packed4, 768, 128, bias)]

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    x.copy_(torch.randn_like(x))
    expected = [each.clone() for each in layers()]
    for each in captured:
        each.fill_(7)
    graph.replay()
    for mine, wanted in zip(captured, expected, strict=True):
        assert torch.equal(mine, wanted)


def test_a_stream_of_ones_own(ops: Any) -> None:
    """The kernels run on torch's current stream: nothing waits for the default one."""
    x, codes, scale, bias = operands(128, 512, 256, torch.bfloat16)
    packed = ops.int8_linear_pack(codes.cuda())
    x_, scale_, bias_ = cuda(x, scale, bias)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = ops.int8_linear(x_ * 2, packed, scale_, bias_)
    stream.synchronize()
    theirs = IMPLEMENTATIONS["int8_linear"](x * 2, IMPLEMENTATIONS["int8_linear_pack"](codes), scale, bias)
    same(late, theirs)


_FIRST_USE_IN_A_CAPTURE = """
import torch
from ds_compress.ops import library
ops = library.native()
codes = torch.randint(-127, 128, (512, 256), dtype=torch.int8, device="cuda")
x, scale = torch.randn(400, 256, device="cuda", dtype=torch.bfloat16), torch.rand(512, device="cuda")
packed = ops.int8_linear_pack(codes)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = ops.int8_linear(x, packed, scale)
graph.replay()
assert torch.equal(captured, ops.int8_linear(x, packed, scale))
"""


def test_a_first_use_within_a_capture_tries_nothing_out(ops: Any) -> None:
    """Trying out waits for the device, which a capture forbids: the way that every GPU has serves meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_USE_IN_A_CAPTURE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
