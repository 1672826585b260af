"""What a run says when it starts: which model, which blocks, and what they do not reach."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ds_compress.config import words
from ds_compress.config.coverage import left_out
from ds_compress.config.inventory import few

if TYPE_CHECKING:
    from ds_compress.engine.session import Compression

logger = logging.getLogger("ds_compress")


def announce_start(session: Compression, engine: Any) -> None:
    """One line for the run, one for each enabled block, one for what a default left out."""
    plan = session.plan
    count = sum(weight.numel for weight in plan.weights)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    where = (
        f"ZeRO stage {engine.zero_optimization_stage()}, {processes} process{'es' if processes > 1 else ''}"
    )
    if not session.stages and not plan.config.layer_reduction:
        return  # the line that nothing is enabled is there already
    logger.info("%s with %s parameters, %s", type(session.model).__name__, f"{count:,}", where)
    claimed = {key: len(technique.targets) for key, technique in plan.techniques.items()}
    for key, what in (*words.structure_lines(plan.structures), *words.block_lines(plan.config, claimed)):
        logger.info("%s: %s", key, what)
    for key, stage in session.stages.items():
        if whole := stage.untouched():
            logger.warning(
                "%s removes nothing from %s: its dense_ratio is rounded up to all of the few units there",
                key,
                few(whole),
            )
    for missing in left_out(plan):
        logger.log(logging.INFO if missing.is_expected else logging.WARNING, "%s", missing)
