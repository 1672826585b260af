"""Regexes of the config on names of modules: those of Python, searched by a library that gives up in time.

With `re` a pattern such as "(a+)+$" takes longer than anybody waits, and nothing can interrupt it.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Sequence
from typing import Any

from ds_compress.errors import ROOT, ConfigError, Problem, shown

LONGEST_SEARCH_S = 0.1
_LONGEST_PATTERN = 4000
_DIGITS_OF_A_REPEAT = 3
_USUAL_SEARCH_S = 50e-6
"""More than a search takes on a slow machine."""


def problem_of(pattern: str) -> str | None:
    """Why the pattern is no regex, or one that takes long to compile; None when it is one."""
    import regex

    if len(pattern) > _LONGEST_PATTERN:
        return f"it has {len(pattern):,} characters, and {_LONGEST_PATTERN:,} are enough"
    counts = (
        count for least_and_most in re.findall(r"\{(\d*),?(\d*)\}", pattern) for count in least_and_most
    )
    if any(len(count) > _DIGITS_OF_A_REPEAT for count in counts):
        return f"it repeats something more than {10**_DIGITS_OF_A_REPEAT - 1:,} times"
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
        ConfigError: it takes too long, here or on a name before.
    """
    if pattern not in _slow:
        try:
            return _compiled(pattern).search(name, timeout=LONGEST_SEARCH_S) is not None
        except TimeoutError:
            _slow[pattern] = name
    raise ConfigError([slow_regex(ROOT, pattern, _slow[pattern])])


def slow_search(pattern: str, names: Sequence[str]) -> str | None:
    """The name at which the pattern takes too long, by itself or after the others; None: it does not."""
    longest = LONGEST_SEARCH_S + _USUAL_SEARCH_S * len(names)
    begin = time.thread_time()
    for name in names:
        try:
            occurs(pattern, name)
        except ConfigError:
            return _slow[pattern]
        if time.thread_time() - begin > longest:
            return name
    return None


def slow_regex(path: str, pattern: str, name: str) -> Problem:
    """What to say of a pattern that takes too long."""
    return Problem(
        path,
        f"the regex {shown(pattern)}, which takes more than {LONGEST_SEARCH_S} s on {name!r}",
        "a regex without nested repetitions of the same text",
        'a part of the name is enough, such as "attention": a regex may be found anywhere in it',
    )


_slow: dict[str, str] = {}
"""Patterns that took too long, and on which name: nobody waits for them again."""


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern)
