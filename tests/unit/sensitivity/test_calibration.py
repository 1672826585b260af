"""Examples from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_compress.sensitivity.calibration import Example, batches, read_calibration


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [len(word) for word in text.split()]}


def rows(tmp_path: Path, *content: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("a bb ccc\n\n   \ndddd\n")
    assert read_calibration(path, tokenizer, max_length=2) == [Example([1, 2]), Example([4])]


def test_rows_with_labels_and_ids(tmp_path: Path) -> None:
    path = rows(tmp_path, {"review": "a bb", "y": 1}, {"review": [7, 8], "y": 0})
    found = read_calibration(path, tokenizer, column="review", labels="y")
    assert found == [Example([1, 2], 1), Example([7, 8], 0)]
    (batch,) = batches(found, 2, None)
    assert batch["labels"].tolist() == [1, 0] and batch["attention_mask"].sum() == 4


def test_a_draw_depends_on_the_seed_alone_and_keeps_labels(tmp_path: Path) -> None:
    path = rows(tmp_path, *({"text": [n, n], "y": n} for n in range(50)))
    draws = [read_calibration(path, tokenizer, examples=5, labels="y", seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(draws[0]) == 5
    assert all(example.ids[0] == example.label for draw in draws for example in draw)
    assert len(read_calibration(path, tokenizer, examples=500)) == 50


def test_padding_is_masked() -> None:
    first, last = batches([Example([1, 2, 3]), Example([4]), Example([5, 6])], 2, 9)
    assert first["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert last["input_ids"].tolist() == [[5, 6]] and "labels" not in last


@pytest.mark.parametrize("value", [None, "1", 1.0, True, -1])
def test_classes_are_whole_numbers(tmp_path: Path, value: Any) -> None:
    path = rows(tmp_path, {"text": "a", "y": 0}, {"text": "a", "y": value})
    with pytest.raises(ValueError, match=r'line 2: no class .* "y"'):
        read_calibration(path, tokenizer, labels="y")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        read_calibration(rows(tmp_path, {"text": ["a"]}), tokenizer)
    with pytest.raises(ValueError, match="no example with a token"):
        read_calibration(rows(tmp_path, {"text": " "}), tokenizer)
    path = tmp_path / "lines.txt"
    path.write_text("a\n")
    with pytest.raises(ValueError, match="have no labels"):
        read_calibration(path, tokenizer, labels="y")
