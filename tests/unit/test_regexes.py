"""Regexes of the config end in time."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ds_compress
from benchmarks.reliability.bad_json import HOSTILE_REGEXES
from ds_compress import regexes
from ds_compress.errors import ConfigError
from ds_compress.regexes import LONGEST_SEARCH_S, occurs, problem_of
from tests.models import tiny_bert

NAME = f"bert.encoder.layer.11.{'a' * 60}!"
HOSTILE = (*(p for p in HOSTILE_REGEXES if problem_of(p) is None), r"(a?){60}a{60}b")


@pytest.mark.parametrize("pattern", HOSTILE)
def test_it_ends(pattern: str) -> None:
    """Found or not, or an error that shows the pattern: what matters is that it ends."""
    start = time.thread_time()
    try:
        occurs(pattern, NAME)
    except ConfigError as error:
        assert pattern.replace("\\", "\\\\") in str(error)
    assert time.thread_time() - start < 10 * LONGEST_SEARCH_S


SLOW = r"(.*?){20}(\w+\s?)*q$"


def block_with(modules: list[str], excluded: tuple[str, ...] = (), groups: int = 1) -> dict[str, Any]:
    group = {"params": {"dense_ratio": 0.5}, "modules": modules}
    shared = {"enabled": True, "excluded_modules": excluded}
    return {
        "sparse_pruning": {
            "shared_parameters": shared,
            "different_groups": dict.fromkeys("abcdefgh"[:groups], group),
        }
    }


@pytest.mark.parametrize(
    ("block", "path"),
    [
        (block_with(["encoder", SLOW]), "sparse_pruning.different_groups.a.modules[1]"),
        (block_with(["encoder"], ("pooler", SLOW)), "sparse_pruning.shared_parameters.excluded_modules[1]"),
        ({"scheme": {"W4A16": ["encoder", SLOW]}}, "scheme.W4A16[1]"),
        (
            {
                "row_pruning": {
                    "shared_parameters": {"enabled": True},
                    "different_groups": {
                        "a": {
                            "params": {"dense_ratio": 0.5},
                            "modules": ["intermediate"],
                            "related_modules": [[SLOW]],
                        }
                    },
                }
            },
            "row_pruning.different_groups.a.related_modules[0][0]",
        ),
    ],
)
def test_a_search_that_takes_too_long_is_an_error_with_its_path(block: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match="takes more than") as raised:
        ds_compress.plan(tiny_bert(), block)
    assert [problem.path for problem in raised.value.problems] == [f"compression_training.{path}"]
    assert SLOW.replace("\\", "\\\\") in str(raised.value)


def test_many_slow_ones_are_not_all_tried() -> None:
    many = [rf"(.*?){{{count}}}(\w+\s?)*q$" for count in range(20, 60)]
    begin = time.thread_time()
    with pytest.raises(ConfigError, match="3 problems"):
        ds_compress.plan(tiny_bert(), block_with(many, groups=8))
    assert time.thread_time() - begin < 1


def test_what_took_too_long_is_not_searched_again() -> None:
    with pytest.raises(ConfigError):
        occurs(r"(.*?){19}(\w+\s?)*q$", "bert.encoder.layer.0.attention.self.query")
    begin = time.thread_time()
    for _ in range(100):
        with pytest.raises(ConfigError):
            occurs(r"(.*?){19}(\w+\s?)*q$", "short")
    assert time.thread_time() - begin < LONGEST_SEARCH_S


def test_many_searches_that_are_each_fast_enough_are_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regexes, "LONGEST_SEARCH_S", 0.02)
    monkeypatch.setattr(regexes, "_USUAL_SEARCH_S", 0.0)
    monkeypatch.setattr(regexes, "occurs", lambda pattern, name: sum(range(100_000)) < 0)
    assert regexes.slow_search("layer", ["a"] * 1000) == "a"
    assert regexes.slow_search("layer", ["a"]) is None


def test_a_block_that_is_not_enabled_is_not_searched() -> None:
    block = block_with([SLOW])
    block["sparse_pruning"]["shared_parameters"]["enabled"] = False
    ds_compress.plan(tiny_bert(), block)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a" * 4001, "it has 4,001 characters, and 4,000 are enough"),
        ("a{1000}", "it repeats something more than 999 times"),
        ("a{2,1000}", "it repeats something more than 999 times"),
        ("a{999}", None),
        ("a" * 4000, None),
    ],
)
def test_those_that_take_long_to_compile_are_none(pattern: str, problem: str | None) -> None:
    assert problem_of(pattern) == problem


@given(st.from_regex(re.compile(r"[a-z.\\d*+?()|^$\[\]0-9]{1,12}"), fullmatch=True))
def test_it_finds_what_python_finds(pattern: str) -> None:
    if problem_of(pattern) is not None:
        return
    names = ("", "bert.encoder.layer.0.attention.self.query", "a.b", "layer.10", "lm_head")
    for name in names:
        assert occurs(pattern, name) == (re.search(pattern, name) is not None)
