"""`ds_compress plan --world-size`: from options to a prediction of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan
    from ds_compress.config.targets import Weight
    from ds_compress.estimate.run_estimate import RunEstimate

_OF_A_RUN = "says something of a run: say --world-size, too"


def run_estimate(
    plan: Plan,
    config: Path,
    content: Mapping[str, Any],
    world_size: int | None,
    zero_stage: int | None,
    nodes: int,
    gbit_per_s: float | None,
    teacher: Path | None,
) -> RunEstimate | None:
    """None without --world-size; sets `plan.world_size` to the processes that share the state of techniques.

    content: of the file `config`, or of the one that a search writes.

    Raises:
        ValueError: an option without --world-size, or what `estimate` refuses.
    """
    from ds_compress.errors import ROOT
    from ds_compress.estimate.run_estimate import estimate

    given = {
        "--zero-stage": zero_stage is not None,
        "--nodes": nodes != 1,
        "--bandwidth": gbit_per_s is not None,
        "--teacher": teacher is not None,
    }
    if world_size is None:
        for option, is_given in given.items():
            if is_given:
                raise ValueError(f"{option} {_OF_A_RUN}")
        return None
    is_whole = ROOT in content
    made = estimate(
        plan,
        content if is_whole else {},
        world_size,
        zero_stage=zero_stage,
        nodes=nodes,
        gbit_per_s=gbit_per_s,
        teacher=None if teacher is None else _stored_weights(teacher),
    )
    plan.world_size = made.layout.shards
    if is_whole:
        return made
    note = (
        f"{config} is a block without a DeepSpeed config: counted with fp32 weights and DeepSpeed's defaults"
    )
    return replace(made, layout=replace(made.layout, notes=(note, *made.layout.notes)))


def _stored_weights(folder: Path) -> list[Weight]:
    """Those of a transformers folder, in the dtype that its config names."""
    from ds_compress.cli.models import skeleton
    from ds_compress.config.resolve.resolver import resolve

    model = skeleton(folder)
    dtype = getattr(model.config, "dtype", None)
    weights = resolve(model, {}).weights
    return [weight if dtype is None else replace(weight, itemsize=dtype.itemsize) for weight in weights]
