"""What the tests of the elementwise ops share: the native ops, hard values, exact comparison, other machine code.

The native ops are compared with the references bit for bit; a NaN need only be a NaN (its payload is nobody's).
`DSC_TEST_LIBRARY` names a library to test in place of the one that is built: see test_elementwise_code.py.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from hypothesis import settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ds_compress.ops import schemas
from ds_compress.ops.library import native

LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 1000, 12295, 100001)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIALS = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-38, 3e38, -3e38)
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def native_ops() -> Any:
    """The namespace of the native ops."""
    library = os.environ.get("DSC_TEST_LIBRARY")
    if library is None:
        return native()
    torch.ops.load_library(library)
    return getattr(torch.ops, schemas.NAMESPACE)


class Fakes:
    """The ops as a trace calls them: with tensors that have no data."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(getattr(torch.ops, schemas.NAMESPACE), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with FakeTensorMode() as mode:
                fake = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
                return op(*fake[0], **fake[1])

        return call


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit of what is not NaN."""
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    if not mine.is_floating_point():
        return torch.equal(mine, theirs)
    nan = mine.isnan()
    if not torch.equal(nan, theirs.isnan()):
        return False
    integer = _INTEGER_OF_SIZE[mine.element_size()]
    return torch.equal(mine.view(integer)[~nan], theirs.view(integer)[~nan])


def random_values(
    numel: int, dtype: torch.dtype, seed: int, specials: float = 0.0, offset: int = 0
) -> torch.Tensor:
    """(numel,) normal values, each replaced by a hard one with probability `specials`; the data begins `offset`
    elements into its allocation, so at any address."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel + offset, generator=generator)
    hard = torch.tensor(SPECIALS)[torch.randint(len(SPECIALS), values.shape, generator=generator)]
    chosen = torch.rand(values.shape, generator=generator) < specials
    return torch.where(chosen, hard, values).to(dtype)[offset:]


def random_bytes(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)


if "DSC_TEST_EXAMPLES" in os.environ:
    settings.register_profile(
        "elementwise", max_examples=int(os.environ["DSC_TEST_EXAMPLES"]), deadline=None, derandomize=True
    )
    settings.load_profile("elementwise")
