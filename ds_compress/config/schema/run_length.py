"""Schedules against the length of a run: which blocks will not have reached their end when it is over.

A schedule that a run cannot finish leaves a model less compressed than the config says (a cubic ramp that is cut off
at a tenth of its length prunes 27 % of what it should), and nothing in the loss shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.enabled import is_enabled
from ds_compress.config.schema.placement import BLOCKS
from ds_compress.errors import ConfigError, Problem, dotted


@dataclass(frozen=True)
class ScheduleEnd:
    """One schedule of one block.

    path: the JSON key that decides its end. value: what that key says. step: applied optimizer steps after which the
    block is what it will be in the end, at least 1.
    """

    block: str
    path: str
    value: object
    step: int


def schedule_ends(config: CompressionConfig) -> Iterator[ScheduleEnd]:
    """The ends of all schedules of the enabled blocks that change what is left of the model, or what is sent."""
    for name in BLOCKS:
        if not is_enabled(config, name):
            continue
        block = getattr(config, name)
        if name == "weight_quantization":
            yield from _bit_widths(config)
        elif name == "activation_quantization":
            offset = block.shared_parameters.schedule_offset
            yield _end(name, ("shared_parameters", "schedule_offset"), offset)
        elif hasattr(block, "warmup_steps"):
            yield _end(name, ("warmup_steps",), block.warmup_steps, block.warmup_steps + 1)
        elif hasattr(block, "shared_parameters"):
            shared = getattr(block, "shared", block.shared_parameters)
            key = "schedule_offset" if shared.schedule_offset_end is None else "schedule_offset_end"
            yield _end(name, ("shared_parameters", key), getattr(shared, key))


def unfinished(config: CompressionConfig, steps: int) -> list[ScheduleEnd]:
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


def _bit_widths(config: CompressionConfig) -> Iterator[ScheduleEnd]:
    block = config.weight_quantization
    assert block is not None
    shared = block.shared_parameters
    path: tuple[str, ...]
    value: object
    for group, settings in block.different_groups.items():
        falls = settings.params.first_bits != settings.params.target_bits
        where = ("different_groups", group, "params", "quantization_period")
        path, value = where, settings.params.quantization_period
        if not falls:
            path, value = ("shared_parameters", "schedule_offset"), shared.schedule_offset
        yield _end("weight_quantization", path, value, settings.params.last_drop(shared.schedule_offset))
        if shared.fp16_mixed_quantize.enabled:
            ratio = shared.fp16_mixed_quantize.quantize_change_ratio
            faded = settings.params.last_drop(shared.schedule_offset) + math.ceil(1 / ratio)
            path = ("shared_parameters", "fp16_mixed_quantize", "quantize_change_ratio")
            yield _end("weight_quantization", path, ratio, faded)


def _end(block: str, keys: tuple[str, ...], value: object, step: int | None = None) -> ScheduleEnd:
    reached = value if step is None else step
    assert isinstance(reached, int)
    return ScheduleEnd(block, dotted(block, *keys), value, max(1, reached))
