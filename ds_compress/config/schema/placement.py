"""Blocks of ours that stand where nobody reads them: misspelt, at the top level, inside another object.

DeepSpeed ignores a top-level key that it does not know, so a slip in the one key that matters would train an
uncompressed model without a word.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ds_compress.config.schema.compression_training import block_classes
from ds_compress.errors import ROOT, ConfigError, Problem, shown

_SURELY_MEANT = 0.85
"""Likeness of two keys (difflib's ratio); no key of DeepSpeed comes above 0.77 of one of ours."""
_SHARED_WITH_DEEPSPEED = "weight_quantization"
"""DeepSpeed's ZeRO-Inference has a top-level key of this name, with other keys in it."""
_LEGACY_LAYOUT = frozenset({"shared_parameters", "different_groups"})


def refuse_misplaced(config: Mapping[str, Any]) -> None:
    """Raises ConfigError naming every key of a DeepSpeed config that was surely meant for us and is not read."""
    problems = list(misplaced(config))
    if problems:
        raise ConfigError(problems)


def misplaced(config: Mapping[str, Any], outer: tuple[str, ...] = ()) -> Iterator[Problem]:
    """The problems of `refuse_misplaced`; `outer`: the keys around `config`, () for the whole file."""
    for key, value in config.items():
        if not isinstance(key, str):
            continue
        path = ".".join((*outer, key))
        if key == ROOT and not outer:
            continue
        if _is_root(key, outer):
            allowed = f'the key "{ROOT}" at the top level of the DeepSpeed config'
            yield Problem(path, "a key that nothing reads", allowed, f'did you mean "{ROOT}"?')
        elif (block := _block_meant(key, value)) is not None:
            moved = f'"{ROOT}": {{"{block}": {shown(value)}}}'
            yield Problem(
                path, "a block that nothing reads here", f'"{block}" inside "{ROOT}"', f"write {moved}"
            )
        elif isinstance(value, Mapping):
            yield from misplaced(value, (*outer, key))


def _is_root(key: str, outer: tuple[str, ...]) -> bool:
    plain = _plain(key)
    if plain == ROOT or _alike(plain, ROOT):
        return True
    return not outer and plain.startswith(("compress", "ds_compress"))


def _block_meant(key: str, value: Any) -> str | None:
    plain = _plain(key)
    keys = set(value) if isinstance(value, Mapping) else set()
    for block in block_classes():
        if plain == block and block != _SHARED_WITH_DEEPSPEED:
            return block
        if (plain == block or _alike(plain, block)) and keys & _keys_of(block):
            return block
    return None


def _keys_of(block: str) -> frozenset[str]:
    """Keys by which an object shows that it is this block of ours."""
    if block == _SHARED_WITH_DEEPSPEED:
        return _LEGACY_LAYOUT
    return frozenset(block_classes()[block].model_fields)


def _plain(key: str) -> str:
    return key.strip().casefold().replace("-", "_").replace(" ", "_")


def _alike(one: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, one.replace("_", ""), other.replace("_", ""))
    return matcher.quick_ratio() > _SURELY_MEANT and matcher.ratio() > _SURELY_MEANT
