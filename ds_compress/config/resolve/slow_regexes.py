"""Regexes of the config that take too long on the names of a model, found before anything else searches with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from ds_compress.config.schema.block import GroupedBlock
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.errors import Problem, dotted
from ds_compress.modelinfo.inventory import EVERY_LAYER, Entry
from ds_compress.regexes import slow_regex, slow_search

_MOST = 3
"""Each takes its time, so that a long list of them is not tried to its end."""


def slow_regexes(config: CompressionConfig, entries: Sequence[Entry]) -> list[Problem]:
    """The first three of the enabled blocks, each with its path."""
    names = list(dict.fromkeys(name for entry in entries for name in (*entry.names, *entry.hosts)))
    problems: list[Problem] = []
    tried: dict[str, str | None] = {EVERY_LAYER: None}
    for where, pattern in _patterns(config):
        if pattern not in tried:
            tried[pattern] = slow_search(pattern, names)
        name = tried[pattern]
        if name is not None:
            problems.append(slow_regex(dotted(*where), pattern, name))
        if len(problems) == _MOST:
            break
    return problems


def _patterns(config: CompressionConfig) -> Iterator[tuple[tuple[str | int, ...], str]]:
    of_scheme = () if config.scheme is None else ("weight_quantization", "activation_quantization")
    if isinstance(config.scheme, Mapping):
        for name, patterns in config.scheme.items():
            yield from _of_list(("scheme", name), patterns)
    for key, block in config.enabled_blocks().items():
        if isinstance(block, GroupedBlock):
            excluded = getattr(block.settings, "excluded_modules", ())
            yield from _of_list((key, "shared_parameters", "excluded_modules"), excluded)
            for name, group in block.groups.items() if key not in of_scheme else ():
                where = (key, "different_groups", name)
                yield from _of_list((*where, "modules"), group.modules)
                for index, related in enumerate(group.related_modules or ()):
                    yield from _of_list((*where, "related_modules", index), related)


def _of_list(
    where: tuple[str | int, ...], patterns: Collection[str]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    return (((*where, index), pattern) for index, pattern in enumerate(patterns))
