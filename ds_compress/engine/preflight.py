"""What the start of a training would refuse, found without one: no process group, no weights, no engine.

The checks are those that a training makes: of `config`, of DeepSpeed's own config class, of `admission`, of `resolve`,
and of the techniques. What only a run can know is left: files of a teacher, frozen weights, adapters, devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ds_compress.config.report.coverage import left_out
from ds_compress.config.report.plan import Plan
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import SCHEMA_KEY, CompressionConfig, parse_config
from ds_compress.config.schema.enabled import idle_lines
from ds_compress.config.schema.placement import misplaced
from ds_compress.config.schema.source import block_of
from ds_compress.engine import admission, build
from ds_compress.errors import ROOT, ConfigError, Problem, shown
from ds_compress.export import compatibility
from ds_compress.ops.library import Preference, kernel_preference

_AUTO = "auto"
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OBJECTS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedBF16Config": "bf16",
}
"""Which object of the JSON a class of DeepSpeed describes, for the paths of its errors."""


@dataclass
class Preflight:
    """problems: each ends a training at its start. notes: what is worth a look. config: the block; None where it is
    broken. plan: of the block for the model; None without a model, or where something is wrong."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: CompressionConfig | None = None
    plan: Plan | None = None


def preflight(config: Mapping[str, Any], model: nn.Module | None = None) -> Preflight:
    """Checks a DeepSpeed config, or a `compression_training` block by itself.

    model: changed by this; on the meta device is enough.
    """
    found = Preflight()
    is_whole = isinstance(config, Mapping) and ROOT in config
    found.config = _parsed(config, is_whole, found)
    if found.config is not None:
        found.notes += idle_lines(found.config)
    parsed = _check_deepspeed(config, model, found) if is_whole else None
    if model is not None and found.config is not None and not found.problems:
        size = 1 if parsed is None else parsed.tensor_parallel_config.autotp_size
        _check_model(model, found.config, size, found)
    return found


def _parsed(config: Any, is_whole: bool, found: Preflight) -> CompressionConfig | None:
    try:
        if not is_whole:
            return parse_config(block_of(config))
        found.problems += misplaced(config)
        if config[ROOT] is None:
            found.notes.append(f"{ROOT} is null: nothing is enabled, and the model trains uncompressed")
            return None
        return parse_config(config[ROOT])
    except ConfigError as error:
        found.problems += error.problems
        return None


def _check_deepspeed(config: Mapping[str, Any], model: nn.Module | None, found: Preflight) -> Any:
    """The DeepSpeedConfig object, None where there is none."""
    from deepspeed.runtime.config import DeepSpeedConfig

    own, left = _without_auto({key: value for key, value in config.items() if key not in (ROOT, SCHEMA_KEY)})
    if left:
        found.notes.append(
            f'not checked, because the Trainer or accelerate replaces "auto": {", ".join(left)}'
        )
    if any(key in left for key in _BATCH) and not own.keys() & set(_BATCH[:2]):
        own[_BATCH[1]] = 1
    try:
        parsed: Any = DeepSpeedConfig(_for_one_process(own, found))
    except ConfigError:  # of `registration`, for blocks outside: `found` has them
        return None
    except Exception as error:  # assertions, pydantic's, its own, TypeErrors of values that it computes with
        found.problems += _of_deepspeed(error)
        return None
    hybrid = getattr(parsed, "hybrid_engine", None)
    engine = "DeepSpeedHybridEngine" if getattr(hybrid, "enabled", False) else "DeepSpeedEngine"
    try:
        admission.refuse_unsupported(nn.Module() if model is None else model, engine, parsed, found.config)
    except ConfigError as error:
        found.problems += error.problems
    return parsed


def _check_model(model: nn.Module, config: CompressionConfig, size: int, found: Preflight) -> None:
    """size: processes that share each layer, by tensor parallelism."""
    try:
        plan = resolve(model, config)
        compatibility.refuse_unfit(plan, model)
        with kernel_preference(
            Preference.REFERENCE
        ):  # whatever a technique asks of an op, nothing is compiled
            admission.refuse_tensor_parallel(config, build.make_techniques(model, plan), size)
    except ConfigError as error:
        found.problems += error.problems
        return
    found.plan = plan
    found.notes += [str(missing) for missing in left_out(plan) if not missing.is_expected]


def _for_one_process(config: dict[str, Any], found: Preflight) -> dict[str, Any]:
    """DeepSpeed counts one process here: of three batch sizes that fit another number, the whole one is left out."""
    whole, micro, steps = (config.get(key) for key in _BATCH)
    if not (isinstance(whole, int) and isinstance(micro, int) and isinstance(steps, int)):
        return config
    if min(whole, micro, steps) < 1 or whole % (micro * steps):
        return config
    found.notes.append(f"the batch sizes are those of a run with {whole // (micro * steps)} processes")
    return {key: value for key, value in config.items() if key != _BATCH[0]}


def _without_auto(config: Mapping[str, Any], outer: str = "") -> tuple[dict[str, Any], list[str]]:
    """(a copy without values "auto", their paths)"""
    kept: dict[str, Any] = {}
    left: list[str] = []
    for key, value in config.items():
        if isinstance(value, str) and value == _AUTO:
            left.append(f"{outer}{key}")
        elif isinstance(value, Mapping):
            kept[key], inner = _without_auto(value, f"{outer}{key}.")
            left += inner
        else:
            kept[key] = value
    return kept, left


def _of_deepspeed(error: Exception) -> Iterator[Problem]:
    """What DeepSpeed's config class raised, as problems; its own words say what is allowed."""
    title, details = getattr(error, "title", None), getattr(error, "errors", None)
    if title is None or not callable(details):
        yield Problem("the DeepSpeed config", type(error).__name__, f"what DeepSpeed accepts: {error}")
        return
    for detail in details():
        path = ".".join(map(str, (_OBJECTS.get(title, title), *detail["loc"])))
        yield Problem(path, shown(detail.get("input")), f"what DeepSpeed accepts: {detail['msg']}")
