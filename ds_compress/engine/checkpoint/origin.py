"""What a compressed training has to say to whoever gets the model later: written into its config, `ds_compress`.

    {"parameters": how many the model had before any cut, "unfinished": blocks whose result plain weights do not hold}

`save_pretrained` and `Trainer.save_model` write plain weights: of a model with quantizers they are not what training
computed with, and of one with masked structures all units are still there. An export of such a folder is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.quant import layers
from ds_compress.techniques import TECHNIQUES

KEY = "ds_compress"
QUANTIZERS = tuple(name for name, technique in TECHNIQUES.items() if technique.is_in_forward)
"""Blocks whose result stays on the modules, and is stored with them."""
_PARAMETERS = "_ds_compress_parameters"
_METRICS = "_ds_compress_metrics"
_COMMITMENTS = "_ds_compress_commitments"
_RECORD = "_ds_compress_run_record"


def parameters_of(model: nn.Module) -> int:
    """How many the model has now; nothing that compression has added."""
    own = ((n, p) for n, p in model.named_parameters() if not layers.is_step_size(n) and not is_auxiliary(n))
    return sum(math.prod(shape_of(parameter)) for _, parameter in own)


def began_with(model: nn.Module) -> int | None:
    """How many it had when a compressed training began, None: there was none, or it removed nothing."""
    kept = vars(model).get(_PARAMETERS)
    return kept if kept is not None else _mark(model).get("parameters")


def unfinished(model: nn.Module) -> Sequence[str]:
    """Blocks that were in force when the model was saved, or are now."""
    return tuple(_mark(model).get("unfinished", ()))


def remember(model: nn.Module) -> None:
    """Before the first cut."""
    model.__dict__[_PARAMETERS] = began_with(model) or parameters_of(model)


def remember_metrics(model: nn.Module, metrics: Mapping[str, float]) -> None:
    """The last numbers of the techniques, for the report of an export of the finished model."""
    model.__dict__[_METRICS] = dict(metrics)


def last_metrics(model: nn.Module) -> dict[str, float]:
    """What `remember_metrics` was given; empty without."""
    return dict(vars(model).get(_METRICS, {}))


def remember_commitments(model: nn.Module, commitments: Mapping[str, str]) -> None:
    """Hashes of the secret seeds of a random choice, for the same report."""
    model.__dict__[_COMMITMENTS] = {**last_commitments(model), **commitments}


def last_commitments(model: nn.Module) -> dict[str, str]:
    """What `remember_commitments` was given; empty without."""
    return dict(vars(model).get(_COMMITMENTS, {}))


def remember_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """What the training was, for the same export (`engine.record`)."""
    model.__dict__[_RECORD] = dict(record)


def last_record(model: nn.Module) -> dict[str, Any] | None:
    """What `remember_record` was given; None without."""
    return vars(model).get(_RECORD)


def mark(model: nn.Module, blocks: Sequence[str]) -> None:
    """Says in the config, if there is one, which `blocks` a plain copy of the weights would lack."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return
    count = began_with(model)
    if blocks or (count is not None and count != parameters_of(model)):
        setattr(config, KEY, {"parameters": count, "unfinished": list(blocks)})
    else:
        vars(config).pop(KEY, None)


def _mark(model: nn.Module) -> Mapping[str, Any]:
    found = getattr(getattr(model, "config", None), KEY, None)
    return found if isinstance(found, Mapping) else {}


def without(blocks: Sequence[str]) -> str:
    """Why plain weights that were saved while these blocks were in force are not exported."""
    return (
        f"these are plain weights of a model that trained under {' and '.join(blocks)}, whose quantizers or masks they "
        "do not have: export the engine, the Trainer or a checkpoint of the engine (ds_compress export CHECKPOINT "
        "FOLDER), or call ds_compress.finalize(model, config) for masked structures; if you want them as they are, "
        "delete ds_compress from the config"
    )
