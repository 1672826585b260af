"""The format of a teacher cache: the likeliest tokens of a teacher, on disk.

    <folder>/teacher_cache.json           how it was made: see `Contents`
    <folder>/ds_compress_manifest.json    sizes and hashes of all files: see `ds_compress.manifest`; written last
    <folder>/shard_00000.safetensors      some examples: key int64 [examples], start int64 [examples + 1],
                                          indices int32 [positions, k], log_probs fp32 [positions, k]

An example is looked up by the hash of its token ids, so order, batches, padding and processes of the training do not
matter, and an example that was tokenized differently is not found.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
CONTENTS = "teacher_cache.json"


class CacheError(ValueError):
    """A cache that is incomplete, changed, or made for something else; the message says what to do."""


@dataclass(frozen=True)
class Contents:
    """top_k, temperature: of the stored log-probabilities. vocabulary: of the teacher. tokenizer, data: sha256 of the
    tokenizer and of all examples' keys in order. shards: names of files. per_token: False where a model gives one
    prediction for an example."""

    top_k: int
    temperature: float
    vocabulary: int
    per_token: bool
    examples: int
    teacher: str
    tokenizer: str | None
    data: str
    shards: list[str]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / CONTENTS).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Raises CacheError where there is none, or one of another format."""
        try:
            content = json.loads((folder / CONTENTS).read_text())
            if content["format"] != FORMAT:
                raise CacheError(
                    f"{folder} has format {content['format']}, this version reads {FORMAT}: make it again"
                )
            return cls(**content)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"{folder} is no complete teacher cache ({error}): make it with `ds_compress cache-teacher`"
            ) from error


def key_of(tokens: torch.Tensor) -> int:
    """int64 hash of an example's token ids, padding left out."""
    content = tokens.to(torch.int64).cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the behaviour of a tokenizer, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are settings of a call, not of the tokenizer.
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def real_tokens(ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """bool [tokens] for each example of a batch: where it is not padding."""
    present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return list(present)
