"""Whatever the JSON says, the answer is a config or a ConfigError; and a misspelt key is named correctly."""

from __future__ import annotations

import copy
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.config import CompressionConfig, ConfigError, parse_config
from ds_compress.config.report.table import LineItem, collapse
from ds_compress.config.schema.translate import _models_below
from ds_compress.modelinfo.inventory import nearest_names
from tests.complete_block import COMPLETE

_NAMED_BY_THE_USER = "different_groups"


def key_paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return []
    keys = [] if path and path[-1] == _NAMED_BY_THE_USER else [(*path, key) for key in value]
    return keys + [found for key, item in value.items() for found in key_paths(item, (*path, key))]


PATHS = key_paths(COMPLETE)

# Every key of the schema, for the complete block has one teacher of several kinds, and one format of an export.
KEYS = {key for _, model in _models_below(CompressionConfig) for key in model.model_fields}


@st.composite
def misspelt(draw: st.DrawFn, word: str) -> str:
    """One slip of a finger: a letter left out, put in, replaced, or swapped with its neighbour."""
    position = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase))
    head, tail = word[:position], word[position:]
    slip = draw(
        st.sampled_from(
            [head + tail[1:], head + letter + tail, head + letter + tail[1:], head + tail[1::-1] + tail[2:]]
        )
    )
    return slip if slip != word else word + "s"


def value_at(block: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        block = block[key]
    return block


def test_the_complete_block_is_complete_and_valid() -> None:
    config = parse_config(COMPLETE)
    fields = set(CompressionConfig.model_fields)
    # Which format an export will have is said beside the blocks that decide whether it can; a scheme and a recipe stand
    # for blocks.
    assert set(COMPLETE) == fields - {"export_to", "scheme", "recipe"}
    for block in ("sparse_pruning", "weight_quantization", "activation_quantization"):
        shared = getattr(config, block).shared_parameters
        assert set(COMPLETE[block]["shared_parameters"]) == set(type(shared).model_fields)
    for block in (
        "kv_cache",
        "gradient_compression",
        "parameter_compression",
        "robust_reduction",
        "security",
    ):
        assert set(COMPLETE[block]) == set(type(getattr(config, block)).model_fields)


@given(st.data())
def test_a_misspelt_key_is_named_with_the_right_one(data: st.DataObject) -> None:
    *outer, key = path = data.draw(st.sampled_from(PATHS))
    # A slip that is another block's key ("weights" for "weight") is told where it belongs.
    wrong = data.draw(misspelt(key).filter(lambda word: word not in KEYS))
    block = copy.deepcopy(COMPLETE)
    owner = value_at(block, tuple(outer))
    owner[wrong] = owner.pop(key)
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    place = ".".join(("compression_training", *outer, wrong))
    (problem,) = (problem for problem in caught.value.problems if problem.path == place)
    assert problem.hint == f'did you mean "{key}"?', path
    assert f'"{key}"' in problem.allowed


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "*", "(", "2:4", "l1", str(10**30), "auto "]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(sorted({path[-1] for path in PATHS})), inner, max_size=4
        )
    ),
    max_leaves=25,
)


@given(JSON)
def test_arbitrary_json_is_a_config_or_a_config_error(block: Any) -> None:
    try:
        assert isinstance(parse_config(block), CompressionConfig)
    except ConfigError as error:
        assert error.problems and str(error)
        assert all(problem.path.startswith("compression_training") for problem in error.problems)


@given(st.sampled_from(PATHS), JSON)
def test_any_value_in_any_place_is_accepted_or_located(path: tuple[str, ...], value: Any) -> None:
    block = copy.deepcopy(COMPLETE)
    value_at(block, path[:-1])[path[-1]] = value
    try:
        assert isinstance(parse_config(block), CompressionConfig)
    except ConfigError as error:
        # A value may contradict one elsewhere in its block, but never in another block.
        blocks = {problem.path.split(".")[1] for problem in error.problems}
        assert blocks <= {path[0], "distillation" if path[0] == "layer_reduction" else path[0]}
        assert all("pydantic" not in str(problem) for problem in error.problems)


@given(st.text(max_size=30), st.lists(st.text("ab.0", max_size=12), max_size=8, unique=True))
def test_nearest_names_never_fail(pattern: str, names: list[str]) -> None:
    found = nearest_names(pattern, names)
    assert len(found) <= 3 and set(found) <= set(names)


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_collapsed_lines_lose_no_module(places: set[tuple[int, int]]) -> None:
    same = LineItem((1,), ("", "", ""), "")
    names = [f"a.{first}.b.{second}.c" for first, second in sorted(places)]
    lines = collapse(dict.fromkeys(names, same))
    assert sorted(name for _, members in lines for name in members) == sorted(names)
