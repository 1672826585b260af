"""Quantization-aware distillation (QAD, arXiv 2601.20088): a quantized model imitates what it was before quantization.

In the JSON: a quantization block or a `scheme`, and `"distillation": {"enabled": true, "self_teacher": {"weights":
"initial"}}`. Its losses default to the paper's: the forward KL of the logits at temperature 1, and no task loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QUANTIZERS = ("weight_quantization", "activation_quantization")
_LOSS = "task_loss_weight"


def with_defaults(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block with the task loss left out where that is what QAD means and the JSON says nothing else."""
    written = dict(block)
    distillation = written.get("distillation")
    if isinstance(distillation, Mapping) and _LOSS not in distillation and is_qad(written):
        written["distillation"] = {**distillation, _LOSS: 0.0}
    return written


def is_qad(block: Mapping[str, Any]) -> bool:
    """Whether a model that will be quantized learns from itself as it was."""
    teacher = _at(block, "distillation", "self_teacher", "weights")
    quantizes = any(_at(block, key, "shared_parameters", "enabled") is True for key in _QUANTIZERS)
    return teacher == "initial" and _at(block, "distillation", "enabled") is True and quantizes


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
