"""A teacher on disk says what the live one says, and everything that does not fit it is one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.distill.cache_format import CONTENTS, CacheError, Contents, key_of, tokenizer_hash
from ds_compress.distill.cache_read import TeacherCache
from ds_compress.distill.cache_write import cache_teacher
from ds_compress.manifest import Manifest
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import ds_config, full_weights

pytestmark = pytest.mark.usefixtures("single_process")

VOCABULARY = 61
LENGTHS = (9, 4, 7, 1, 6, 9)
TEMPERATURE, TOP_K = 2.0, 5


def llama(seed: int = 0, vocabulary: int = VOCABULARY, hidden: int = 16) -> nn.Module:
    sizes = {"layers": 1, "hidden": hidden, "heads": 2, "key_value_heads": 1, "intermediate": 24}
    return tiny_llama(seed, **sizes, tied=False, vocab_size=vocabulary)


def examples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded(some: list[torch.Tensor], side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    longest = max(map(len, some)) + extra
    ids = torch.zeros(len(some), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(some):
        where = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, where], mask[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def batches(size: int = 3, **how: Any) -> Iterator[dict[str, torch.Tensor]]:
    every = examples()
    return (padded(every[start : start + size], **how) for start in range(0, len(every), size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("teacher") / "cache"
    cache_teacher(llama(3, hidden=24), batches(), target, top_k=TOP_K, temperature=TEMPERATURE)
    return target


def block(cache: Path | None, **logits: Any) -> dict[str, Any]:
    own = {"temperature": TEMPERATURE, "chunk_tokens": 5, **logits}
    source = {"teacher_zero_stage": 0} if cache is None else {"teacher_cache": str(cache)}
    return {"distillation": {"enabled": True, "losses": {"logits": own}, **source}}


def engine_of(
    cache: Path | None, student: nn.Module | None = None, teacher: Any = None, **logits: Any
) -> Any:
    student = student or llama()
    engine, *_ = ds_compress.initialize(
        model=student,
        model_parameters=student.parameters(),
        config=ds_config(0, block(cache, **logits)),
        teacher=teacher,
    )
    return engine


def trained(engine: Any, data: Any) -> dict[str, Any]:
    found = []
    for batch in data:
        engine.backward(engine(**batch).loss)
        engine.step()
        found.append(engine.compression.metrics()["distillation/logits"])
    weights = full_weights(engine.module)
    engine.destroy()
    return {"metrics": found, "weights": weights}


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("chunk", [0, 5])
def test_training_is_that_with_the_live_teacher(folder: Path, kind: str, chunk: int) -> None:
    changed: dict[str, Any] = {"kind": kind, "chunk_tokens": chunk}
    got = trained(engine_of(folder, **changed), batches())
    live = trained(engine_of(None, None, llama(3, hidden=24), top_k=TOP_K, **changed), batches())
    assert got["metrics"] == pytest.approx(live["metrics"], rel=1e-4)
    assert all(value > 0 for value in got["metrics"])
    for name, weight in live["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("order", "side", "extra"),
    [((5, 0, 3), "right", 0), ((2, 1, 4, 0, 5, 3), "left", 0), ((3,), "right", 6), ((1, 1), "left", 3)],
)
def test_examples_are_found_in_any_order_and_padding(
    folder: Path, order: tuple[int, ...], side: str, extra: int
) -> None:
    chosen = [examples()[index] for index in order]
    batch = padded(chosen, side, extra)
    got = TeacherCache(folder).logits(batch["input_ids"], batch["attention_mask"])
    assert got.shape == (*batch["input_ids"].shape, VOCABULARY)
    real = batch["attention_mask"].bool().flatten()
    teacher = llama(3, hidden=24).eval()
    with torch.no_grad():
        expected = [
            (teacher(input_ids=tokens[None]).logits[0] / TEMPERATURE).log_softmax(-1).topk(TOP_K)
            for tokens in chosen
        ]
    torch.testing.assert_close(got.log_probs[real], torch.cat([e.values for e in expected]))
    assert torch.equal(got.indices[real], torch.cat([e.indices for e in expected]))
    assert torch.isfinite(got.log_probs).all()


def test_a_batch_without_a_mask_is_all_real(folder: Path) -> None:
    ids = torch.stack([examples()[0], examples()[5]])
    assert torch.isfinite(TeacherCache(folder).logits(ids, None).log_probs).all()


def test_another_order_of_writing_gives_the_same_predictions(folder: Path, tmp_path: Path) -> None:
    shuffled = [examples()[index] for index in (4, 2, 0, 5, 3, 1)]
    data = [padded(shuffled[:4], "left"), padded(shuffled[4:] + shuffled[:2], extra=2)]
    contents = cache_teacher(
        llama(3, hidden=24), data, tmp_path / "other", top_k=TOP_K, temperature=TEMPERATURE
    )
    assert contents.examples == len(LENGTHS)
    batch = padded(examples())
    one, other = (
        TeacherCache(path).logits(batch["input_ids"], batch["attention_mask"])
        for path in (folder, tmp_path / "other")
    )
    torch.testing.assert_close(one.log_probs, other.log_probs)
    assert torch.equal(one.indices, other.indices)


def test_many_shards_are_one_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_compress.distill.cache_write._POSITIONS_PER_SHARD", 8)
    contents = cache_teacher(
        llama(3, hidden=24), batches(1), tmp_path / "shards", top_k=TOP_K, temperature=TEMPERATURE
    )
    assert len(contents.shards) > 2
    batch = padded(examples())
    one, other = (
        TeacherCache(path).logits(batch["input_ids"], batch["attention_mask"])
        for path in (folder, tmp_path / "shards")
    )
    torch.testing.assert_close(one.log_probs, other.log_probs)


def test_a_classifier_says_one_thing_of_an_example(tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (6, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": rows, "labels": torch.zeros(3, dtype=torch.long)} for rows in ids.split(3)]
    teacher = tiny_bert(seed=2, labels=4)
    contents = cache_teacher(teacher, data, tmp_path / "cache", top_k=64, temperature=TEMPERATURE)
    assert (contents.per_token, contents.top_k, contents.vocabulary) == (False, 4, 4)
    got = trained(engine_of(tmp_path / "cache", tiny_bert(seed=1, labels=4)), data)
    live = trained(engine_of(None, tiny_bert(seed=1, labels=4), tiny_bert(seed=2, labels=4)), data)
    # All four classes are stored: what is left for others is a millionth.
    assert got["metrics"] == pytest.approx(live["metrics"], rel=1e-4, abs=1e-6)


def test_a_classifier_of_other_classes_is_refused(tmp_path: Path) -> None:
    data = [{"input_ids": torch.randint(3, 100, (3, 8))}]
    cache_teacher(tiny_bert(labels=4), data, tmp_path / "cache", temperature=TEMPERATURE)
    with pytest.raises(ds_compress.ConfigError, match="of 2 classes, as the student, not of 4"):
        engine_of(tmp_path / "cache", tiny_bert(labels=2))


# --- what does not fit --------------------------------------------------------------------------------------


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def sealed(cache: Path) -> None:
    """The files are what was written, says the manifest."""
    Manifest.of(cache, {}).write(cache)


def refusal(cache: Path, path: str, student: nn.Module | None = None, **logits: Any) -> str:
    with pytest.raises(ds_compress.ConfigError) as caught:
        engine_of(cache, student, **logits)
    (problem,) = caught.value.problems
    assert problem.path == f"compression_training.distillation.{path}"
    return str(caught.value)


def test_a_changed_shard(folder: Path, tmp_path: Path) -> None:
    cache = copied(folder, tmp_path)
    (shard,) = cache.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert f"{shard.name} was changed" in refusal(cache, "teacher_cache")


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    cache = copied(folder, tmp_path)
    next(cache.glob("*.safetensors")).unlink()
    assert "make the cache again" in refusal(cache, "teacher_cache")


def test_a_shard_outside_of_the_folder(folder: Path, tmp_path: Path) -> None:
    cache = copied(folder, tmp_path)
    (shard,) = cache.glob("*.safetensors")
    contents = json.loads((cache / "teacher_cache.json").read_text())
    contents["shards"] = [f"../{shard.name}"]
    (cache / "teacher_cache.json").write_text(json.dumps(contents))
    shard.rename(cache.parent / shard.name)
    sealed(cache)
    assert "is no file inside of" in refusal(cache, "teacher_cache")


@pytest.mark.parametrize("damage", ["absent", "cut", "of other keys", "a list", "no folder"])
def test_a_missing_or_broken_manifest(folder: Path, tmp_path: Path, damage: str) -> None:
    cache = copied(folder, tmp_path)
    contents = cache / CONTENTS
    if damage == "absent":
        contents.unlink()
    elif damage == "cut":
        contents.write_text(contents.read_text()[:40])
    elif damage == "of other keys":
        contents.write_text(json.dumps({"format": 2}))
    elif damage == "a list":
        contents.write_text("[]")
    else:
        cache = tmp_path / "nowhere"
    if cache.exists():
        assert "make the cache again" in refusal(cache, "teacher_cache")
        sealed(cache)
    assert "is no complete teacher cache" in refusal(cache, "teacher_cache")


def test_a_later_format(folder: Path, tmp_path: Path) -> None:
    cache = copied(folder, tmp_path)
    content = json.loads((cache / CONTENTS).read_text())
    (cache / CONTENTS).write_text(json.dumps({**content, "format": 99}))
    sealed(cache)
    assert "format 99, this version reads 2: make it again" in refusal(cache, "teacher_cache")


def test_another_temperature(folder: Path) -> None:
    message = refusal(folder, "losses.logits.temperature", temperature=3.0)
    assert "2.0, for which the cache was made" in message and "3.0" in message


def test_a_smaller_vocabulary(folder: Path) -> None:
    assert "at most 40 tokens, as the student, not 61" in refusal(
        folder, "teacher_cache", llama(vocabulary=40)
    )


def test_a_larger_vocabulary_is_padding_as_with_a_live_teacher(folder: Path) -> None:
    got = trained(engine_of(folder, llama(vocabulary=64)), batches())
    live = trained(engine_of(None, llama(vocabulary=64), llama(3, hidden=24), top_k=TOP_K), batches())
    assert got["metrics"] == pytest.approx(live["metrics"], rel=1e-4)


def test_an_example_that_is_not_there(folder: Path) -> None:
    engine = engine_of(folder)
    batch = padded([examples()[0], examples()[1][:-1]])
    with pytest.raises(CacheError, match=r"example 1 of the batch .* is not in .*another maximal length"):
        engine(**batch)
    engine.destroy()


def test_a_model_that_is_called_without_ids(folder: Path) -> None:
    engine = engine_of(folder)
    with pytest.raises(RuntimeError, match="without input_ids"):
        engine(inputs_embeds=torch.zeros(1, 3, 16))
    engine.destroy()


# --- writing ------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    cache_teacher(llama(3), batches(), target, top_k=2)
    before = Contents.read(target)
    with pytest.raises(CacheError, match="exists: choose another folder, or overwrite it"):
        cache_teacher(llama(4), batches(), target, top_k=3)
    assert Contents.read(target) == before
    cache_teacher(llama(4), batches(), target, top_k=3, overwrite=True)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years")
    with pytest.raises(CacheError, match="is no teacher cache, and is not replaced"):
        cache_teacher(llama(4), batches(), foreign, top_k=3, overwrite=True)
    assert (foreign / "chapter.tex").read_text() == "years"
    assert Contents.read(target).top_k == 3
    TeacherCache(target)


def failing() -> Iterator[dict[str, torch.Tensor]]:
    yield next(iter(batches()))
    raise RuntimeError("the data set broke")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_writer_that_fails_leaves_things_as_they_were(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "cache"
    if overwrite:
        cache_teacher(llama(3), batches(), target, top_k=2)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model = llama(3)
    with pytest.raises(RuntimeError, match="the data set broke"):
        cache_teacher(model, failing(), target, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert isinstance(model(input_ids=examples()[0][None]).logits, torch.Tensor)


def test_no_examples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no example to store"):
        cache_teacher(llama(), [], tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from types import SimpleNamespace
import torch
from ds_compress.distill import cache_write

cache_write._POSITIONS_PER_SHARD = 1

class Says(torch.nn.Module):
    def forward(self, input_ids):
        return SimpleNamespace(logits=torch.ones(*input_ids.shape, 7))

def until_killed():
    yield {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    os.kill(os.getpid(), signal.SIGKILL)

cache_write.cache_teacher(Says(), until_killed(), sys.argv[1])
"""


def test_a_killed_writer_leaves_no_folder(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target)],
        cwd=root,
        env=os.environ,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not target.exists()
    # What it had begun is there under another name, without a contents.
    assert not list(tmp_path.rglob(CONTENTS)) and list(tmp_path.rglob("*.safetensors"))
    cache_teacher(llama(), batches(), target)
    TeacherCache(target)


# --- keys ---------------------------------------------------------------------------------------------------


def test_the_key_of_an_example_is_that_of_its_numbers() -> None:
    tokens = examples()[0]
    assert key_of(tokens) == key_of(tokens.int()) == key_of(torch.stack([tokens, tokens], 1)[:, 0])
    assert len({key_of(tokens), key_of(tokens[:-1]), key_of(tokens.flip(0))}) == 3


def tokenizer(words: tuple[str, ...] = ("a", "b", "c")) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("[UNK]", "[PAD]", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def test_the_hash_of_a_tokenizer_is_that_of_what_it_does(tmp_path: Path) -> None:
    plain, used = tokenizer(), tokenizer()
    expected = tokenizer_hash(plain)
    used(["a b c", "a"], padding="max_length", truncation=True, max_length=2)
    assert used.backend_tokenizer.padding is not None
    assert tokenizer_hash(used) == expected
    used.padding_side = "left"
    assert tokenizer_hash(used) == expected
    used.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == expected
    assert tokenizer_hash(tokenizer(("a", "c", "b"))) != expected


def test_the_manifest_says_what_made_it(tmp_path: Path) -> None:
    own = tokenizer()
    contents = cache_teacher(llama(), batches(), tmp_path / "cache", top_k=1000, tokenizer=own)
    assert contents == Contents.read(tmp_path / "cache")
    assert contents.tokenizer == tokenizer_hash(own)
    assert (contents.top_k, contents.vocabulary, contents.per_token) == (VOCABULARY, VOCABULARY, True)
    assert contents.examples == len(LENGTHS)
