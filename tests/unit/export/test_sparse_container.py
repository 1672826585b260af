"""The container of a tensor with many zeros: the same bits, in less space or not at all, and no damage unnoticed."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.export.sparse_container import MAGIC, dense_name, packed, sparse_name, unpacked

DTYPES = (torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def sparse(shape: tuple[int, ...], zeros: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Like a weight: values near zero are more frequent, and `zeros` of all are zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values = values if dtype.is_floating_point else (values * 40).round().clamp(-128, 127)
    kept = torch.rand(shape, generator=generator) >= zeros
    values = torch.where(kept, values, 0.0)
    return values.to(torch.int16).to(dtype) if dtype is torch.uint8 else values.to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = _BITS[one.element_size()]
    return (
        one.dtype is other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(bits), other.view(bits))
    )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_it_gives_the_same_bits_or_is_none(
    rows: int, columns: int, zeros: float, dtype: torch.dtype, seed: int
) -> None:
    tensor = sparse((rows, columns, 3), zeros, dtype, seed)
    container = packed(tensor, tensor.nbytes)
    if container is not None:
        assert container.numel() < tensor.nbytes and same_bits(unpacked(container), tensor)


def test_special_floats_and_a_uint8_that_is_not_zero() -> None:
    tensor = torch.zeros(64, 64)
    tensor[0, :6] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, -1e-38, 3e38])
    tensor.view(torch.int32)[1, 0] = 0x7FC00123  # a NaN with a payload
    container = packed(tensor, tensor.nbytes)
    assert container is not None and same_bits(unpacked(container), tensor)
    codes = torch.full((64, 64), 137, dtype=torch.uint8)  # the zero of an asymmetric grid
    codes[:, ::5] = torch.randint(0, 256, (64, 13), dtype=torch.uint8)
    container = packed(codes, codes.nbytes)
    assert container is not None and torch.equal(unpacked(container), codes)


def test_dense_and_small_tensors_stay_as_they_are() -> None:
    assert packed(sparse((100, 100), 0.2, torch.int8), 10_000) is None
    assert packed(torch.zeros(10, 10), 400) is None
    assert packed(torch.zeros(100, 100, dtype=torch.int64), 80_000) is None
    ternary = sparse((100, 100), 0.8, torch.int8).sign()
    container = packed(ternary, 2500)
    assert container is not None and packed(ternary, container.numel()) is None


@pytest.mark.parametrize(("zeros", "ratio"), [(0.5, 1.7), (0.8, 3.6), (0.9, 6.3)])
def test_int8_is_as_small_as_promised(zeros: float, ratio: float) -> None:
    tensor = sparse((512, 512), zeros, torch.int8)
    container = packed(tensor, tensor.nbytes)
    assert container is not None and tensor.nbytes / container.numel() > ratio


def test_names() -> None:
    container = packed(torch.zeros(64, 64), 2**14)
    assert container is not None
    assert dense_name(sparse_name("weight"), container) == "weight"
    assert dense_name("weight", container) is None
    assert dense_name("mask_sparse", torch.zeros(64, dtype=torch.uint8)) is None
    assert dense_name("mask_sparse", torch.zeros(4, dtype=torch.uint8)) is None


# --- damage ---------------------------------------------------------------------------------------------------


def parts(container: torch.Tensor) -> tuple[dict[str, object], bytes, bytes]:
    data = container.numpy().tobytes()
    begin = len(MAGIC) + 4
    end = begin + struct.unpack("<I", data[len(MAGIC) : begin])[0]
    head = json.loads(data[begin:end])
    middle = end + head["mask"][0]
    return head, data[end:middle], data[middle:]


def joined(head: dict[str, object], mask: bytes, values: bytes) -> torch.Tensor:
    text = json.dumps(head).encode()
    return torch.frombuffer(
        bytearray(MAGIC + struct.pack("<I", len(text)) + text + mask + values), dtype=torch.uint8
    )


def with_raw_parts() -> tuple[torch.Tensor, torch.Tensor]:
    """(a tensor, its container without deflated parts): noise of which half is zero."""
    torch.manual_seed(1)
    kept = torch.rand(40, 40) < 0.5
    tensor = torch.where(kept, torch.randint(1, 256, (40, 40)), 0).to(torch.uint8).view(torch.int8)
    container = packed(tensor, tensor.nbytes)
    assert container is not None
    head = parts(container)[0]
    assert head["mask"] == [200, "raw"] and head["values"][1] == "raw"  # type: ignore[index]
    return tensor, container


@pytest.mark.parametrize("bit", [0, 700, 1599])
def test_a_mask_with_another_number_of_bits_than_values_is_an_error(bit: int) -> None:
    tensor, container = with_raw_parts()
    head, mask, values = parts(container)
    changed = bytearray(mask)
    changed[bit // 8] ^= 1 << bit % 8
    count = int(tensor.count_nonzero())
    found = count + (1 if changed[bit // 8] >> bit % 8 & 1 else -1)
    with pytest.raises(ValueError, match=f"its mask has {found} bits in 1600 elements, and {count} values"):
        unpacked(joined(head, bytes(changed), values))


def test_a_bit_behind_the_last_element_is_an_error() -> None:
    tensor = sparse((37, 37), 0.8, torch.int8)
    container = packed(tensor, tensor.nbytes)
    assert container is not None
    head, _, values = parts(container)
    bits = torch.nn.functional.pad((tensor != 0).flatten(), (0, -tensor.numel() % 8)).view(-1, 8)
    mask = bytearray((bits * (1 << torch.arange(8))).sum(1).to(torch.uint8).numpy().tobytes())
    assert torch.equal(unpacked(joined({**head, "mask": [len(mask), "raw"]}, bytes(mask), values)), tensor)
    mask[-1] |= 0x80
    with pytest.raises(ValueError, match="its mask has"):
        unpacked(joined({**head, "mask": [len(mask), "raw"]}, bytes(mask), values))


@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_every_changed_byte_of_a_deflated_part_is_an_error(zeros: float) -> None:
    tensor = sparse((40, 60), zeros, torch.int8)
    container = packed(tensor, tensor.nbytes)
    assert container is not None
    head, mask, values = parts(container)
    deflated = [name for name in ("mask", "values") if head[name][1] == "deflate"]  # type: ignore[index]
    assert deflated
    begin = container.numel() - len(values) - (len(mask) if "mask" in deflated else 0)
    end = container.numel() - (0 if "values" in deflated else len(values))
    for at in range(begin, end):
        changed = container.clone()
        changed[at] ^= 0x10
        try:
            found = unpacked(changed)
        except ValueError:
            continue
        assert torch.equal(found, tensor), at  # bits that the format ignores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int64"}, "its head is damaged: impossible entries"),
        ({"shape": [40, -40]}, "impossible entries"),
        ({"shape": [40, 41]}, "the bytes of its mask have another length: 205 are expected"),
        ({"shape": [2**40]}, "impossible entries"),
        ({"shape": "all"}, "its head is damaged"),
        ({"fill": 256}, "the fill is too large"),
        ({"count": 1}, "the bytes of its values have another length"),
        ({"count": 10**9}, "impossible entries"),
        ({"mask": [200, "zstd"]}, "impossible entries"),
        ({"mask": [199, "raw"]}, "its head says"),
    ],
)
def test_a_wrong_head_is_an_error(change: dict[str, object], message: str) -> None:
    head, mask, values = parts(with_raw_parts()[1])
    with pytest.raises(ValueError, match=message):
        unpacked(joined({**head, **change}, mask, values))


def test_a_short_container_is_an_error() -> None:
    container = with_raw_parts()[1]
    for size in (0, 5, 11, 12, 60, container.numel() - 1):
        with pytest.raises(ValueError, match=r"damaged|head says"):
            unpacked(container[:size])


def test_a_deflated_part_that_never_ends_is_not_inflated() -> None:
    """Zeros without end are not asked for beyond what the head promises."""
    import zlib

    tensor = torch.zeros(1024, dtype=torch.int8)
    container = packed(tensor, tensor.nbytes)
    assert container is not None
    head, _, values = parts(container)
    bomb = zlib.compress(bytes(10**7))
    with pytest.raises(ValueError, match="the bytes of its mask do not end there: 128 are expected"):
        unpacked(joined({**head, "mask": [len(bomb), "deflate"]}, bomb, values))
