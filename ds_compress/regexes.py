"""Regexes of the config on names of modules: those of Python, searched by a library that gives up in time.

With `re` a pattern such as "(a+)+$" takes longer than anybody waits, and nothing can interrupt it.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

from ds_compress.errors import ConfigError, Problem, shown

LONGEST_SEARCH_S = 0.2


def problem_of(pattern: str) -> str | None:
    """Why the pattern is no regex; None when it is one."""
    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            _compiled(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return None


def occurs(pattern: str, name: str) -> bool:
    """Whether the pattern is found anywhere in the name (re.search).

    Raises:
        ConfigError: it takes too long.
    """
    try:
        return _compiled(pattern).search(name, timeout=LONGEST_SEARCH_S) is not None
    except TimeoutError as error:
        problem = Problem(
            "compression_training",
            f"the regex {shown(pattern)}, which takes more than {LONGEST_SEARCH_S} s on {name!r}",
            "a regex without nested repetitions of the same text",
            'a part of the name is enough, such as "attention": a regex may be found anywhere in it',
        )
        raise ConfigError([problem]) from error


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern)
