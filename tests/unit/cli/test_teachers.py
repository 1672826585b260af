"""`ds_compress cache-teacher` and `ds_compress teacher-text`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ds_compress.cli import app
from ds_compress.distill.cache_format import tokenizer_hash
from ds_compress.distill.cache_read import TeacherCache
from ds_compress.distill.teacher_text import teacher_text
from tests.multirank.distilling import VOCABULARY, llama

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(VOCABULARY - 3))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    model = llama()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_cache_of_a_text_file_holds_what_the_teacher_says(
    teacher: Path, tmp_path: Path, suffix: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["w1 w2 w3 w4", "w5 w6", "w1 w2 w3 w4", "w7 w8 w9 w10 w11 w12 w13"]
    data = tmp_path / f"data{suffix}"
    lines = texts if suffix == ".txt" else [json.dumps({"review": text}) for text in texts]
    data.write_text("\n".join(lines) + "\n")
    out = tmp_path / "cache"
    column = [] if suffix == ".txt" else ["--column", "review"]
    code, output = call(
        "cache-teacher", teacher, data, out, "--top-k", 5, "--batch", 3, "--max-length", 6, *column
    )
    assert code == 0, output
    assert "3 examples" in output
    cache = TeacherCache(out)
    words = AutoTokenizer.from_pretrained(teacher)
    assert cache.contents.tokenizer == tokenizer_hash(words)
    ids = torch.tensor([words(texts[3])["input_ids"][:6]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(teacher)(input_ids=ids).logits.log_softmax(-1).topk(5)
    said = cache.logits(ids, None)
    assert torch.equal(said.indices, expected.indices[0])
    torch.testing.assert_close(said.log_probs, expected.values[0])


def test_a_missing_column_names_the_line_and_the_one_that_is_there(teacher: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"texts": "w1"}\n')
    code, output = call("cache-teacher", teacher, data, tmp_path / "cache")
    assert code == 2
    assert "line 1" in output and 'did you mean "texts"' in output
    assert not (tmp_path / "cache").exists()


def test_a_teacher_writes_text_that_can_be_cached(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "text.jsonl"
    arguments = ["teacher-text", teacher, out, "--samples", 5, "--tokens", 7, "--batch", 2, "--seed", 3]
    code, output = call(*arguments)
    assert code == 0, output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["input_ids"][0] == 1 and 1 < len(row["input_ids"]) <= 8 for row in rows)
    assert len({tuple(row["input_ids"]) for row in rows}) > 1
    code, output = call(*arguments)
    assert code == 2 and "--overwrite" in output
    before = out.read_text()
    assert call(*arguments, "--overwrite")[0] == 0
    assert out.read_text() == before
    assert call("cache-teacher", teacher, out, tmp_path / "cache", "--column", "input_ids")[0] == 0
    TeacherCache(tmp_path / "cache").logits(torch.tensor([rows[0]["input_ids"]]), None)


def test_prompts_of_different_lengths_are_continued_each(teacher: Path) -> None:
    prompts = [[1, 5, 6, 7], [1, 9]]
    texts = list(teacher_text(llama(), prompts, 4, 3, pad_id=0, batch=2))
    for at, text in enumerate(texts):
        prompt = prompts[at % 2]
        assert text[: len(prompt)] == prompt
        assert len(prompt) < len(text) <= len(prompt) + 3
