"""What a run says when it starts: which model, which blocks, and what they do not reach."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ds_compress.config.report.coverage import left_out
from ds_compress.config.report.table import describe
from ds_compress.modelinfo.inventory import few

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")


def announce_start(run: CompressionRun, engine: Any) -> None:
    """One line for the run, one for each enabled block, one for what a default left out; hashes of secret seeds."""
    plan = run.plan
    count = sum(weight.numel for weight in plan.weights)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    where = (
        f"ZeRO stage {engine.zero_optimization_stage()}, {processes} process{'es' if processes > 1 else ''}"
    )
    if not run.techniques and not plan.config.layer_reduction:
        return  # the line that nothing is enabled is there already
    logger.info("%s with %s parameters, %s", type(run.model).__name__, f"{count:,}", where)
    for key, what in describe(plan):
        logger.info("%s: %s", key, what)
    for seed, commitment in run.commitments.items():
        logger.info("%s is secret, commitment %s", seed, commitment)
    for key, technique in run.techniques.items():
        if whole := technique.untouched():
            logger.warning(
                "%s removes nothing from %s: its dense_ratio is rounded up to all of the few units there",
                key,
                few(whole),
            )
    for missing in left_out(plan):
        logger.log(logging.INFO if missing.is_expected else logging.WARNING, "%s", missing)
