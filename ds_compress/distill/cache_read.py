"""Reads the predictions of a teacher from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ds_compress.distill.cache_format import CONTENTS, CacheError, Contents, key_of, real_tokens
from ds_compress.distill.sparse_logits import SparseLogits
from ds_compress.files import inside
from ds_compress.manifest import FILE_NAME, Manifest, ManifestError

# At padding positions: any finite number, as they have no weight.
_OF_PADDING = -1.0


class TeacherCache:
    """A folder that `cache_teacher` wrote. Only the examples of a batch are read; their index is in memory.

    Raises:
        CacheError: it is incomplete, or a file is not what was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_dir() and any(self.folder.iterdir()):
            _refuse_damaged(self.folder)
        self.contents = Contents.read(self.folder)
        self._place: dict[int, tuple[Any, int, int]] = {}
        for name in self.contents.shards:
            try:
                path = inside(self.folder, name)
            except ValueError as error:
                raise CacheError(f"{self.folder / CONTENTS}: {error}") from error
            shard = safe_open(path, framework="pt")
            starts = shard.get_tensor("start").tolist()
            for row, key in enumerate(shard.get_tensor("key").tolist()):
                self._place[key] = (shard, starts[row], starts[row + 1])

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None) -> SparseLogits:
        """The teacher's predictions for `ids` [examples, tokens].

        Raises:
            CacheError: an example is not there.
        """
        per_token, k = self.contents.per_token, self.contents.top_k
        shape = (*ids.shape, k) if per_token else (len(ids), k)
        indices = torch.zeros(shape, dtype=torch.int64)
        log_probs = torch.full(shape, _OF_PADDING)
        for row, real in enumerate(real_tokens(ids.cpu(), None if mask is None else mask.cpu())):
            shard, start, end = self._found(ids[row].cpu()[real], row)
            stored = shard.get_slice("indices")[start:end], shard.get_slice("log_probs")[start:end]
            for target, value in zip((indices[row], log_probs[row]), stored, strict=True):
                if per_token:
                    target[real] = value.to(target.dtype)
                else:
                    target.copy_(value[0])
        whole = torch.Size((*shape[:-1], self.contents.vocabulary))
        return SparseLogits(
            indices.flatten(0, -2).to(ids.device), log_probs.flatten(0, -2).to(ids.device), whole
        )

    def _found(self, tokens: torch.Tensor, row: int) -> tuple[Any, int, int]:
        place = self._place.get(key_of(tokens))
        if place is None:
            raise CacheError(
                f"example {row} of the batch (tokens {tokens[:8].tolist()}...) is not in {self.folder}: it was made "
                "from other data, with another tokenizer, or with another maximal length"
            )
        return place


def _refuse_damaged(folder: Path) -> None:
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        raise CacheError(f"{error}: make the cache again") from error
    if manifest is None:
        raise CacheError(f"{folder / FILE_NAME} is missing: make the cache again")
    if problems := manifest.problems(folder):
        raise CacheError(f"{'; '.join(problems[:3])}: make the cache again")
