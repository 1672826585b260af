"""`ds_compress plan --tokens`: from options to a prediction of what a step and a forward compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan
    from ds_compress.estimate.compute import Compute

_LONGEST_TEXT = 2048


def compute_estimate(
    model: Any,
    plan: Plan,
    content: Mapping[str, Any],
    tokens: int | None,
    sequence: int | None,
    device: str | None,
    layout_options: tuple[int, int, int | None],
    teacher: Path | None,
) -> Compute | None:
    """None without --tokens.

    model: on the meta device. content: of the config. layout_options: world size, nodes and ZeRO stage.

    Raises:
        ValueError: an option without --tokens, a device that is not known, or what `compute` and `RunLayout` refuse.
    """
    if tokens is None:
        for option, value in (("--sequence", sequence), ("--device", device)):
            if value is not None:
                raise ValueError(f"{option} says something of what is computed: say --tokens, too")
        return None
    from ds_compress.cli.models import skeleton
    from ds_compress.config.resolve.resolver import resolve
    from ds_compress.errors import ROOT
    from ds_compress.estimate import devices
    from ds_compress.estimate.compute import compute
    from ds_compress.estimate.products import work_of
    from ds_compress.estimate.run_layout import RunLayout

    taught = None
    if teacher is not None:
        model_that_teaches = skeleton(teacher)
        taught = work_of(model_that_teaches, resolve(model_that_teaches, {}))
    return compute(
        plan,
        work_of(model, plan),
        RunLayout.of(content if ROOT in content else {}, *layout_options),
        tokens,
        min(tokens, _LONGEST_TEXT) if sequence is None else sequence,
        taught,
        None if device is None else devices.device(device),
    )
