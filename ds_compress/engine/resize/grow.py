"""The way back from a shrink: a checkpoint that was saved before it has the full shapes.

`load_best_model_at_end` of a Trainer is the usual case: the best checkpoint may be older than the cut. The model
becomes whole again, its engine is built anew around it, and the checkpoint then fills in every value; if training goes
on, the schedule shrinks the model once more. What is kept for this is the model's structure, with empty parameters.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

from ds_compress.engine.resize.carried import Carried
from ds_compress.engine.resize.rebuild import rebuild_full
from ds_compress.engine.run import CompressionRun
from ds_compress.engine.zero import internals

logger = logging.getLogger("ds_compress")


def grow(engine: Any) -> None:
    """Rebuilds `engine` in place on the model that it had before the shrink, with weights of zeros; a collective.

    Raises ValueError for a run that was never shrunk.
    """
    run: CompressionRun = engine.compression
    uncut = run.uncut
    if uncut is None:
        raise ValueError("this run was never shrunk: there are no other shapes to go back to")
    carried = Carried(engine)
    run.detach()
    internals.take_down(engine)
    uncut.restore(engine.module, engine.device)
    fresh = object.__new__(type(engine))
    successor = rebuild_full(run, fresh, uncut)
    carried.into(fresh, uncut.origin(engine.module))
    gc.collect()
    logger.info("ds_compress: the model has its full shapes again, at step %d", successor.applied_steps)
