"""Writes the predictions of a teacher for a data set to a cache, once, for any number of trainings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_compress.distill.cache_format import (
    CONTENTS,
    CacheError,
    Contents,
    key_of,
    real_tokens,
    tokenizer_hash,
)
from ds_compress.distill.divergence import log_probabilities
from ds_compress.distill.lazy_logits import LazyLogits
from ds_compress.distill.lm_head import lazy_head
from ds_compress.files import UnfinishedFolder, write_tensors
from ds_compress.manifest import Manifest

_POSITIONS_PER_SHARD = 2**20


@torch.no_grad()
def cache_teacher(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    folder: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Contents:
    """Stores the `top_k` likeliest tokens of every position of every example, with their log-probabilities.

    Args:
        model: the teacher, a model of transformers; it is put into eval mode.
        batches: inputs as the training will have them: `input_ids` [examples, tokens] and, with padding,
            `attention_mask`; everything else but `labels` is passed to the model. A repeated example is stored once.
        folder: appears when everything is written.
        top_k: per position; all classes where there are fewer.
        temperature: that of the loss that will use the cache.
        tokenizer: its hash is stored in the contents.

    Raises:
        CacheError: the folder exists, or there was no batch.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise CacheError(f"{target} exists: choose another folder, or overwrite it")
    if target.exists() and not (target / CONTENTS).exists():
        raise CacheError(f"{target} is no teacher cache, and is not replaced: choose another folder")
    with UnfinishedFolder(target) as unfinished:
        writer = _Writer(unfinished.path, top_k, temperature)
        head = lazy_head(model, None)
        try:
            for batch in batches:
                writer.add(*_predict(model.eval(), head, batch))
        finally:
            if head is not None:
                head.remove()
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        contents = writer.finish(name, None if tokenizer is None else tokenizer_hash(tokenizer))
        unfinished.finish()
    return contents


def _predict(model: Any, head: Any, batch: Mapping[str, torch.Tensor]) -> tuple[Any, torch.Tensor, Any]:
    if head is not None:
        head.is_on = True
    try:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    finally:
        if head is not None:
            head.is_on = False
    return logits, batch["input_ids"], batch.get("attention_mask")


class _Writer:
    def __init__(self, folder: Path, top_k: int, temperature: float) -> None:
        self._folder, self._top_k, self._temperature = folder, top_k, temperature
        self._known: set[int] = set()
        self._data = hashlib.sha256()
        self._shards: list[str] = []
        self._vocabulary, self._per_token = 0, True
        self._empty()

    def _empty(self) -> None:
        self._keys: list[int] = []
        self._counts: list[int] = []
        self._indices: list[torch.Tensor] = []
        self._log_probs: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor | LazyLogits, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._vocabulary, self._per_token = logits.shape[-1], len(logits.shape) == 3
        log_probs, indices = self._likeliest(logits)
        for row, real in enumerate(real_tokens(ids, mask)):
            key = key_of(ids[row][real])
            self._data.update(key.to_bytes(8, "little", signed=True))
            if key in self._known:
                continue
            self._known.add(key)
            positions = real if self._per_token else slice(None)
            kept = log_probs[row][positions].reshape(-1, log_probs.shape[-1])
            self._keys.append(key)
            self._counts.append(len(kept))
            self._log_probs.append(kept)
            self._indices.append(indices[row][positions].reshape(-1, indices.shape[-1]))
        if sum(self._counts) >= _POSITIONS_PER_SHARD:
            self._write()

    def _likeliest(self, logits: torch.Tensor | LazyLogits) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities fp32, indices int32), each [examples, (tokens,) k]."""
        k = min(self._top_k, logits.shape[-1])
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []

        def of_rows(rows: torch.Tensor) -> None:
            likely = log_probabilities(rows, self._temperature).topk(k, dim=-1)
            parts.append((likely.values.cpu(), likely.indices.int().cpu()))

        if isinstance(logits, LazyLogits):
            logits.each_chunk(of_rows)
        else:
            of_rows(logits.reshape(-1, logits.shape[-1]))
        shape = (*logits.shape[:-1], k)
        return torch.cat([p for p, _ in parts]).view(shape), torch.cat([i for _, i in parts]).view(shape)

    def _write(self) -> None:
        name = f"shard_{len(self._shards):05d}.safetensors"
        content = {
            "key": torch.tensor(self._keys, dtype=torch.int64),
            "start": torch.tensor([0, *self._counts], dtype=torch.int64).cumsum(0),
            "indices": torch.cat(self._indices),
            "log_probs": torch.cat(self._log_probs),
        }
        write_tensors(self._folder / name, content)
        self._shards.append(name)
        self._empty()

    def finish(self, teacher: str, tokenizer: str | None) -> Contents:
        if self._keys:
            self._write()
        if not self._shards:
            raise CacheError("there was no example to store")
        contents = Contents(
            top_k=min(self._top_k, self._vocabulary),
            temperature=self._temperature,
            vocabulary=self._vocabulary,
            per_token=self._per_token,
            examples=len(self._known),
            teacher=teacher,
            tokenizer=tokenizer,
            data=self._data.hexdigest(),
            shards=self._shards,
        )
        contents.write(self._folder)
        Manifest.of(self._folder, {}).write(self._folder)
        return contents
