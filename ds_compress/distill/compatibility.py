"""Whether a student can learn from a teacher, as far as their configs and captured activations show."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ds_compress.config.schema import distillation as schema
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.errors import ConfigError, Problem

_PATH = "compression_training.distillation"
# Vocabularies are padded to multiples of up to this many rows; a larger difference is another vocabulary.
_LARGEST_PADDING = 512


def check_pair(config: schema.DistillationConfig, student: nn.Module, teacher: nn.Module | None) -> None:
    """Raises ConfigError for a teacher that this student cannot learn from, as far as their configs show."""
    if teacher is student and config.self_teacher is None:
        raise ConfigError(
            [
                Problem(
                    f"{_PATH}.teacher",
                    "the student itself",
                    "another model object",
                    'for a model that teaches itself set "self_teacher": {"weights": "ema"}',
                )
            ]
        )
    if teacher is None:
        return
    own, theirs = _config_of(student), _config_of(teacher)
    problems = []
    if config.losses.contrastive is not None and hidden_widths(student, teacher) is None:
        problems.append(
            Problem(
                f"{_PATH}.losses.contrastive",
                "models without a hidden_size in their config",
                "models with a hidden_size in their config",
            )
        )
    heads = getattr(own, "num_attention_heads", None), getattr(theirs, "num_attention_heads", None)
    attention = config.losses.attention
    if attention is not None and attention.kind == "maps" and heads[0] != heads[1]:
        problems.append(
            Problem(
                f"{_PATH}.losses.attention.kind",
                f'"maps" between {heads[0]} and {heads[1]} heads',
                "a teacher with the student's number of heads",
                'use "kind": "relation"',
            )
        )
    labels = getattr(own, "num_labels", None), getattr(theirs, "num_labels", None)
    if _classifies(student) and None not in labels and labels[0] != labels[1]:
        problems.append(
            Problem(
                f"{_PATH}.teacher",
                f"a teacher of {labels[1]} classes",
                f"{labels[0]} classes, as the student",
            )
        )
    vocabularies: Any = getattr(own, "vocab_size", None), getattr(theirs, "vocab_size", None)
    if None not in vocabularies and abs(vocabularies[0] - vocabularies[1]) > _LARGEST_PADDING:
        problems.append(
            Problem(
                f"{_PATH}.teacher",
                f"a teacher with a vocabulary of {vocabularies[1]}",
                f"{vocabularies[0]}, as the student (padding of up to {_LARGEST_PADDING} rows is cut)",
                "teacher and student must read the same token ids",
            )
        )
    if problems:
        raise ConfigError(problems)


def check_captured(own: CapturedActivations, theirs: CapturedActivations) -> None:
    """Raises for activations that cannot be compared, which only a forward pass shows."""
    if any(not tensor.requires_grad for tensor in own.tensors()):
        raise RuntimeError(
            "distillation: the student's hidden states carry no gradient; "
            "use gradient checkpointing with use_reentrant=False"
        )
    if len(own.maps) != len(theirs.maps):
        raise ConfigError(
            [
                Problem(
                    f"{_PATH}.losses.attention.kind",
                    '"maps" with layers that do not use the attention kernels of transformers',
                    "models whose attention kernel can be chosen",
                    'use "kind": "relation"',
                )
            ]
        )


def hidden_widths(student: nn.Module, teacher: nn.Module | None) -> tuple[int, int] | None:
    """Hidden sizes of both; None when one config has none."""
    widths = [getattr(_config_of(model), "hidden_size", None) for model in (student, teacher)]
    return (widths[0], widths[1]) if all(isinstance(width, int) for width in widths) else None  # type: ignore[return-value]


def common_heads(student: nn.Module, teacher: nn.Module | None) -> int:
    """The largest number of heads that divides every query, key and value of both models."""
    counts = []
    for model in (student, teacher):
        config = _config_of(model)
        counts += [getattr(config, key, 0) or 0 for key in ("num_attention_heads", "num_key_value_heads")]
    return math.gcd(*counts) or 1


def _config_of(model: nn.Module | None) -> Any:
    """The config; of a composite one, that of the text model."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def _classifies(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__
