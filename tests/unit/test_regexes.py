"""Regexes of the config end in time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ds_compress
from ds_compress.errors import ConfigError
from ds_compress.regexes import LONGEST_SEARCH_S, occurs, problem_of
from tests.models import tiny_bert

NAME = f"bert.encoder.layer.11.{'a' * 60}!"
HOSTILE = (
    r"(a+)+$",
    r"(a|a)*$b",
    r"(.*)*x$",
    r"(\w+\.?)+!x",
    r"([a-z]+)*\d$",
    r"((a*)*)*b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(?:a|aa)+$",
    r"(a?){60}a{60}b",
)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_it_ends(pattern: str) -> None:
    """Found or not, or an error that shows the pattern: what matters is that it ends."""
    start = time.monotonic()
    try:
        occurs(pattern, NAME)
    except ConfigError as error:
        assert pattern.replace("\\", "\\\\") in str(error)
    assert time.monotonic() - start < 10 * LONGEST_SEARCH_S


def test_a_search_that_takes_too_long_is_an_error_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_compress.regexes.LONGEST_SEARCH_S", 1e-9)
    groups = {"all": {"params": {"dense_ratio": 0.5}, "modules": [r"(.*?){20}(\w+\s?)*q$"]}}
    block = {"sparse_pruning": {"shared_parameters": {"enabled": True}, "different_groups": groups}}
    with pytest.raises(ConfigError, match="takes more than"):
        ds_compress.plan(tiny_bert(), block)


@given(st.from_regex(re.compile(r"[a-z.\\d*+?()|^$\[\]0-9]{1,12}"), fullmatch=True))
def test_it_finds_what_python_finds(pattern: str) -> None:
    if problem_of(pattern) is not None:
        return
    names = ("", "bert.encoder.layer.0.attention.self.query", "a.b", "layer.10", "lm_head")
    for name in names:
        assert occurs(pattern, name) == (re.search(pattern, name) is not None)
