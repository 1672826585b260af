"""What holds for every op alike: its schema tells the truth, it can be traced, faked and compiled, and the native
kernel and the reference agree."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_compress.ops import kernels, schemas
from ds_compress.ops.reference import IMPLEMENTATIONS
from tests.native.cases import CASES, Case, resolve_packed

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def ops() -> Any:
    """The dispatcher's ops, on native kernels where this machine can build them."""
    kernels()
    return torch.ops.ds_compress


def test_every_op_has_a_case_a_reference_and_a_schema() -> None:
    assert {case.op for case in CASES} == set(schemas.SCHEMAS) == set(IMPLEMENTATIONS)


@each_case
def test_opcheck(case: Case, ops: Any) -> None:
    args, kwargs = resolve_packed(case.arguments(), ops)
    torch.library.opcheck(getattr(ops, case.op).default, args, kwargs)


def has_private_result(case: Case) -> bool:
    """Packed weights: what is computed from them is compared, not their bytes."""
    return "linear" in case.op and case.op.endswith("_pack")


@pytest.mark.parametrize("case", [case for case in CASES if not has_private_result(case)], ids=str)
def test_native_and_reference_agree(case: Case, ops: Any) -> None:
    mine = resolve_packed(case.arguments(), ops)
    theirs = resolve_packed(case.arguments(), References())
    got = getattr(ops, case.op)(*mine[0], **mine[1])
    expected = IMPLEMENTATIONS[case.op](*theirs[0], **theirs[1])
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        compare(a, b, case.exact)
    for index in case.mutated:
        compare(mine[0][index], theirs[0][index], case.exact)


@each_case
def test_a_fake_cuda_device_gives_shapes_and_dtypes(case: Case, ops: Any) -> None:
    real_args = resolve_packed(case.arguments(), ops)
    real = getattr(ops, case.op)(*copy.deepcopy(real_args[0]), **real_args[1])
    with FakeTensorMode() as mode:
        args = [_fake_cuda(a, mode) for a in real_args[0]]
        kwargs = {k: _fake_cuda(v, mode) for k, v in real_args[1].items()}
        fake = getattr(ops, case.op)(*args, **kwargs)
    for a, b in zip(tensors(fake), tensors(real), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "cuda")


def with_a_wrong_first_tensor(case: Case, ops: Any, device: str, **changed: Any) -> Any:
    """Calls the op with its first tensor, or the first of a list, changed to what no op takes."""
    args, kwargs = resolve_packed(case.arguments(), ops)
    first = [args[0][0].to(**changed), *args[0][1:]] if isinstance(args[0], list) else args[0].to(**changed)
    if device == "cpu":
        return getattr(ops, case.op)(first, *args[1:], **kwargs)
    with FakeTensorMode() as mode:
        arguments = [_fake_cuda(a, mode) for a in (first, *args[1:])]
        return getattr(ops, case.op)(*arguments, **{k: _fake_cuda(v, mode) for k, v in kwargs.items()})


@pytest.mark.parametrize("device", ["cpu", "fake cuda"])
@pytest.mark.parametrize("case", [case for case in CASES if case.title != "0"], ids=str)
def test_a_wrong_dtype_is_refused_by_kernel_and_fake(case: Case, device: str, ops: Any) -> None:
    with pytest.raises(ValueError, match="got "):
        with_a_wrong_first_tensor(case, ops, device, dtype=torch.int32)


@each_case
def test_it_compiles_without_a_graph_break(case: Case, ops: Any) -> None:
    op = getattr(ops, case.op)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        if result is not None:
            return result
        changed = args[case.mutated[0]]
        return [each + 0 for each in changed] if isinstance(changed, list) else changed + 0

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    args, kwargs = resolve_packed(case.arguments(), ops)
    expected = call(*copy.deepcopy(args), **kwargs)
    for a, b in zip(tensors(compiled(*args, **kwargs)), tensors(expected), strict=True):
        assert torch.equal(a, b)


def test_a_reference_is_traced_without_a_graph_break() -> None:
    """Where a run prefers plain torch, its compiled layers hold the reference itself and not an op."""
    torch._dynamo.reset()
    packed = torch.randint(0, 256, (9,), dtype=torch.uint8)
    unpack = IMPLEMENTATIONS["mask_unpack"]
    compiled = torch.compile(lambda p: unpack(p, 65, 3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(packed), unpack(packed, 65, 3))


class References:
    """The reference implementations under the names of the ops."""

    def __getattr__(self, name: str) -> Any:
        return IMPLEMENTATIONS[name]


def tensors(result: Any) -> list[torch.Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else list(result)


def as_list(argument: Any) -> list[torch.Tensor]:
    return argument if isinstance(argument, list) else [argument]


def _fake_cuda(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, list):
        return [_fake_cuda(each, mode) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def compare(mine: torch.Tensor, theirs: torch.Tensor, exact: bool) -> None:
    if exact:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(mine, theirs)
