"""Schedules against the length of a run: which blocks will not have reached their end when it is over.

A schedule that a run cannot finish leaves a model less compressed than the config says (a cubic ramp that is cut off
at a tenth of its length prunes 27 % of what it should), and nothing in the loss shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_compress.config.recipes.expand import telling
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.errors import ConfigError, Problem, dotted


@dataclass(frozen=True)
class BlockEnd:
    """When one schedule of one block has ended.

    path: the JSON key that decides it. value: what that key says. step: applied optimizer steps after which the block
    is what it will be in the end, at least 1.
    """

    block: str
    path: str
    value: object
    step: int


def schedule_ends(config: CompressionConfig) -> Iterator[BlockEnd]:
    """The ends of all schedules of the enabled blocks that change what is left of the model, or what is sent."""
    for name, block in config.enabled_blocks().items():
        for keys, value, step in block.schedule_ends():
            yield BlockEnd(name, dotted(name, *keys), value, max(1, step))


def unfinished(config: CompressionConfig, steps: int) -> list[BlockEnd]:
    """The schedules that have not reached their end after `steps` applied optimizer steps."""
    return [end for end in schedule_ends(config) if end.step > steps]


def refuse_unfinished(config: CompressionConfig, steps: int, source: str) -> None:
    """Raises ConfigError when a run of `steps` optimizer steps, as `source` says it is, ends before a schedule."""
    problems = [
        Problem(
            end.path,
            f"{end.value}: {end.block} is in full force after {end.step:,} steps",
            f"an end within the {steps:,} optimizer steps of this run ({source})",
            "lower it, or train longer",
        )
        for end in unfinished(config, steps)
    ]
    if problems:
        with telling(config.applied_recipe):
            raise ConfigError(problems)


def unfinished_line(config: CompressionConfig, steps: int) -> str | None:
    """What is not finished after `steps` applied steps, in one line; None when everything is."""
    ends = unfinished(config, steps)
    if not ends:
        return None
    last: dict[str, int] = {}
    for end in ends:
        last[end.block] = max(end.step, last.get(end.block, 0))
    what = ", ".join(f"{block} (step {step:,})" for block, step in last.items())
    return (
        f"the compression is not finished: {steps:,} optimizer steps were applied, and these schedules end later: "
        f"{what}. What is saved or exported now is less compressed than the config says"
    )
