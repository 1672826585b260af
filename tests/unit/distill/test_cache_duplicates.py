"""An example that comes again is stored once, wherever and however padded it comes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_compress.distill.cache_read import TeacherCache
from ds_compress.distill.cache_write import cache_teacher
from tests.unit.distill.test_cache import TEMPERATURE, TOP_K, examples, llama, padded


def rows_on_disk(folder: Path) -> tuple[int, int]:
    """(examples, positions) over all shards."""
    contents = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return sum(len(c["key"]) for c in contents), sum(len(c["indices"]) for c in contents)


def test_duplicates_take_no_room(tmp_path: Path) -> None:
    every = examples()
    data = [
        padded([every[0], every[1], every[0]]),  # twice in one batch
        padded([every[1], every[2]], side="left", extra=3),  # again in another, padded otherwise
        padded(every),
        padded(every[::-1], extra=1),
    ]
    manifest = cache_teacher(llama(3, hidden=24), data, tmp_path / "c", top_k=TOP_K, temperature=TEMPERATURE)
    assert manifest.examples == len(every)
    assert rows_on_disk(tmp_path / "c") == (len(every), sum(map(len, every)))
    once = cache_teacher(
        llama(3, hidden=24), [padded(every)], tmp_path / "once", top_k=TOP_K, temperature=TEMPERATURE
    )
    assert rows_on_disk(tmp_path / "once") == rows_on_disk(tmp_path / "c")
    assert once.data != manifest.data, "the data set is another one, and its hash says so"
    batch = padded(every)
    one, other = (
        TeacherCache(tmp_path / name).logits(batch["input_ids"], batch["attention_mask"])
        for name in ("c", "once")
    )
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-5)


def test_they_take_none_across_shards_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_compress.distill.cache_write._POSITIONS_PER_SHARD", 4)
    every = examples()
    data = [padded([tokens]) for tokens in (*every, *every[::-1], every[2])]
    manifest = cache_teacher(llama(3, hidden=24), data, tmp_path / "c", top_k=TOP_K, temperature=TEMPERATURE)
    assert len(manifest.shards) > 2
    assert rows_on_disk(tmp_path / "c") == (len(every), sum(map(len, every)))
