"""Regexes for layers: few, exact, and such that a person can read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ds_compress.modelinfo.inventory import exact_pattern

_NUMBER = re.compile(r"\d+")


def patterns(names: Sequence[str], all_names: Iterable[str]) -> list[str]:
    """Regexes that reach these modules of `all_names` and no other.

    Names that differ in one number share a regex: `^layers\\.(0|3)\\.fc$`, or `^layers\\.\\d+\\.fc$` for all of them.
    """
    every = _by_kind(all_names)
    made = []
    for kind, alike in _by_kind(names).items():
        parts = [re.escape(part) for part in kind.split("#")]
        if len(parts) > 1 and set(alike) == set(every[kind]) and len(alike) > 1:
            made.append(f"^{'[0-9]+'.join(parts)}$")
        elif len(parts) == 2 and len(alike) > 1:
            numbers = "|".join(_NUMBER.findall(name)[0] for name in alike)
            made.append(f"^{parts[0]}({numbers}){parts[1]}$")
        else:
            made += [exact_pattern(name) for name in alike]
    return made


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    return kinds
