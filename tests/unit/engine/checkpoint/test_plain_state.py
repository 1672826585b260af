"""Nested state in a file of safetensors: what goes in comes out, and nothing else goes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.engine.checkpoint import plain_state
from ds_compress.errors import CheckpointError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same_kind = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def tensors() -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(
        lambda shape, dtype: torch.randint(0, 2, shape).to(dtype), shapes, st.sampled_from(DTYPES)
    )


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
STATES = st.dictionaries(
    st.text(),
    st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10),
)


@given(STATES)
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    plain_state.write(path, state)
    assert equal(state, plain_state.read(path))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_views_and_shared_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    state = {"whole": whole, "again": whole, "column": whole[:, 1], "turned": whole.T}
    plain_state.write(tmp_path / "s", state)
    assert equal(state, plain_state.read(tmp_path / "s"))


@pytest.mark.parametrize("value", [object(), {1: 2}, {"tensor": 1}, {3}, b"bytes", 1j, torch.float32])
def test_what_is_not_plain_is_an_error_and_leaves_no_file(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint holds no"):
        plain_state.write(tmp_path / "s", {"x": [value]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no", b"\x10" + bytes(7) + b"{}              ", bytes(64)])
def test_other_files_are_an_error_that_names_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(CheckpointError, match="s is damaged"):
        plain_state.read(tmp_path / "s")
