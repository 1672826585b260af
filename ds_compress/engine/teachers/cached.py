"""A teacher that is a folder: it says what `ds_compress cache-teacher` wrote down."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.distill.cache_format import CacheError
from ds_compress.distill.cache_read import TeacherCache
from ds_compress.engine.signed import refuse_unsigned
from ds_compress.engine.teachers.sharded import ShardedTeacher
from ds_compress.errors import ConfigError, Problem, shown
from ds_compress.manifest import Manifest

_PATH = "compression_training.distillation"


def cached_teacher(config: CompressionConfig, student: nn.Module) -> ShardedTeacher | None:
    """The teacher of the JSON's `teacher_cache`, None when it has none.

    Raises:
        ConfigError: a cache that cannot be read, or of another temperature, vocabulary or number of classes.
    """
    block = config.distillation
    if block is None or not block.enabled or block.teacher_cache is None:
        return None
    refuse_unsigned(block.teacher_cache, config, "distillation", "teacher_cache")
    try:
        cache = TeacherCache(block.teacher_cache)
    except CacheError as error:
        raise _error("teacher_cache", block.teacher_cache, f"a complete cache ({error})") from error
    logits, made = block.losses.logits, cache.contents
    if logits is not None and logits.temperature != made.temperature:
        allowed = f"{made.temperature}, for which the cache was made"
        raise _error("losses.logits.temperature", logits.temperature, allowed)
    vocabulary = getattr(getattr(student, "config", None), "vocab_size", None)
    if made.per_token and isinstance(vocabulary, int) and made.vocabulary > vocabulary:
        allowed = (
            f"a cache of a teacher with at most {vocabulary} tokens, as the student, not {made.vocabulary}"
        )
        raise _error("teacher_cache", block.teacher_cache, allowed)
    classes = getattr(getattr(student, "config", None), "num_labels", None)
    if not made.per_token and isinstance(classes, int) and made.vocabulary != classes:
        allowed = f"a cache of a teacher of {classes} classes, as the student, not of {made.vocabulary}"
        raise _error("teacher_cache", block.teacher_cache, allowed)
    return CachedTeacher(cache)


class CachedTeacher(ShardedTeacher):
    """Its output has `.logits` (SparseLogits) and nothing else."""

    def __init__(self, cache: TeacherCache) -> None:
        self.model = None
        self.cache = cache

    def identity(self) -> str:
        manifest = Manifest.read(self.cache.folder)
        files = [] if manifest is None else sorted(manifest.files.items())
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise RuntimeError("distillation.teacher_cache: the model is called without input_ids to look up")
        return SimpleNamespace(logits=self.cache.logits(ids, kwargs.get("attention_mask")))


def _error(key: str, got: Any, allowed: str) -> ConfigError:
    return ConfigError([Problem(f"{_PATH}.{key}", shown(got), allowed)])
