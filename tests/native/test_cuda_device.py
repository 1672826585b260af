"""The same cases on a CUDA device: against the reference, which the CPU kernels are held against too.

CI has no device. Without one, these kernels are known by their source on fibers, their PTX on the CPU, and their
machine code; an H100 and an H200 have run this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ds_compress.ops import library
from ds_compress.ops.reference import IMPLEMENTATIONS
from tests.native.cases import CASES, Case, resolve_packed
from tests.native.test_contract import References, as_list, compare, has_private_result, tensors

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_COMPRESS_CUDA", "1")
        yield library.native()


@pytest.mark.parametrize("case", [case for case in CASES if not has_private_result(case)], ids=str)
def test_cuda_and_reference_agree(case: Case, ops: Any) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ds_compress::{case.op}", "CUDA")
    mine = resolve_packed(case.arguments("cuda"), ops)
    theirs = resolve_packed(case.arguments(), References())
    got = getattr(ops, case.op)(*mine[0], **mine[1])
    expected = IMPLEMENTATIONS[case.op](*theirs[0], **theirs[1])
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        compare(a.cpu(), b, case.exact)
    for index in case.mutated:
        for a, b in zip(as_list(mine[0][index]), as_list(theirs[0][index]), strict=True):
            compare(a.cpu(), b, case.exact)
