from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from ds_compress.examples import movie_reviews
from ds_compress.examples.movie_reviews import Sentences, evaluation_batches, split, training_batches


def sentences(count: int) -> Sentences:
    """Sentence i has 1 + i % 7 tokens, all of them 100 + i."""
    return Sentences([[100 + i] * (1 + i % 7) for i in range(count)], [i % 2 for i in range(count)], pad_id=0)


class TestReading:
    def test_rows_with_broken_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.txt"
        path.write_bytes(b"1\t2.5\tgood \xff film\n2\t-0.75\ttab\there\n")
        assert movie_reviews.read_scored(path) == [("1", 2.5, "good � film"), ("2", -0.75, "tab\there")]

    def test_label_is_the_sign_and_weak_scores_are_left_out(self) -> None:
        rows = [("1", 0.5, "a"), ("2", -0.5, "b"), ("3", 0.49, "c"), ("4", -0.49, "d"), ("5", 4.0, "e")]
        training, held_out = split(rows)
        assert sorted(training + held_out) == [("a", 1), ("b", 0), ("e", 1)]

    def test_split_depends_on_the_id_alone(self) -> None:
        rows = [(str(i), 1.0, str(i)) for i in range(1, 10_001)]
        training, held_out = split(rows)
        again, held_out_again = split(rows[::-1])
        assert set(training) == set(again) and set(held_out) == set(held_out_again)
        assert len(held_out) == pytest.approx(2_000, abs=120)
        # sha1("7") = 902ba3cda1883801594b6e1b452790cc53948fda, a multiple of 5 as a number or not: for ever.
        sevens = int("902ba3cda1883801594b6e1b452790cc53948fda", 16) % 5 == 0
        assert (("7", 1) in held_out) == sevens


class TestBatch:
    def test_padding_and_mask(self) -> None:
        batch = sentences(8).batch([0, 2], length=4)
        assert batch["input_ids"].tolist() == [[100, 0, 0, 0], [102, 102, 102, 0]]
        assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
        assert batch["labels"].tolist() == [0, 0]
        assert all(tensor.dtype is torch.int64 for tensor in batch.values())

    def test_is_as_long_as_its_longest(self) -> None:
        assert sentences(8).batch([1, 5])["input_ids"].shape == (2, 6)

    def test_no_rows_are_one_sentence_that_counts_for_nothing(self) -> None:
        batch = sentences(8).batch([])
        assert batch["input_ids"].shape == (1, 1) and batch["labels"].tolist() == [-100]


class TestOrder:
    def test_training_sees_all_before_any_again(self) -> None:
        batches = list(training_batches(sentences(64), 8, 8, seed=3))
        assert sorted(row for batch in batches for row in batch) == list(range(64))

    def test_number_and_size_of_batches(self) -> None:
        batches = list(training_batches(sentences(70), 8, 20, seed=3))
        assert [len(batch) for batch in batches] == [8] * 20
        assert max(Counter(row for batch in batches for row in batch).values()) == 3

    def test_seed_decides(self) -> None:
        one, same, other = (list(training_batches(sentences(64), 8, 8, seed)) for seed in (1, 1, 2))
        assert one == same and one != other

    def test_batches_hold_sentences_of_like_length(self) -> None:
        data = sentences(700)
        widths = [
            max(lengths) - min(lengths)
            for batch in training_batches(data, 8, 80, seed=0)
            if (lengths := [len(data.tokens[row]) for row in batch])
        ]
        assert sum(widths) / len(widths) < 1

    def test_evaluation_covers_every_sentence_once(self) -> None:
        batches = evaluation_batches(sentences(30), 8)
        assert sorted(row for batch in batches for row in batch) == list(range(30))
        assert [len(batch) for batch in batches] == [8, 8, 8, 6]
