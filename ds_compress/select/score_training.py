"""How learned scores are trained: by AdamW, with the settings of the weights' parameter group that are AdamW's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DEFAULT_RATE = 1e-3


def adamw_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """lr and weight_decay of an optimizer's parameter group, and betas and eps where they are those of an Adam.

    Other optimizers mean other things by the same names: Adafactor's `eps` is a pair, Lion's `betas` are no decay of
    squares, RMSprop's and Adagrad's `eps` belong to other sums. A group without a rate (Adafactor's relative steps)
    gets AdamW's default.
    """
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
    settings["weight_decay"] = float(group.get("weight_decay") or 0.0)
    rate = group.get("lr")
    settings["lr"] = _DEFAULT_RATE if rate is None else float(rate)
    betas, eps = group.get("betas"), group.get("eps")
    if isinstance(betas, tuple | list) and len(betas) == 2 and isinstance(eps, float):
        settings |= {"betas": (float(betas[0]), float(betas[1])), "eps": eps}
    return settings
