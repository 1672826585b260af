"""`"security": {"verify": "require"}`: teachers, caches and checkpoints that nobody signed are refused unread."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress import ConfigError, secure
from ds_compress.secure import KeyUnavailableError, TamperedError
from tests.models import tiny_bert
from tests.multirank.common import batches
from tests.secure_folders import encrypted_folder, keys, signed_folder
from tests.unit.engine.engines import engine_of

pytestmark = pytest.mark.usefixtures("single_process")


def pruning(**security: Any) -> dict[str, Any]:
    return {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "topk"},
            "different_groups": {"a": {"params": {"dense_ratio": 0.5}, "modules": ["intermediate"]}},
        },
        "security": security,
    }


def required(**more: Any) -> dict[str, Any]:
    return {"verify": "require", "public_key": str(keys().signing.public), **more}


def distilled(source: dict[str, Any], **security: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "losses": {"logits": {}}, **source}, "security": security}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads a model, a cache or a checkpoint fails the test."""

    def read(*args: Any, **kwargs: Any) -> None:
        pytest.fail("read before it was verified")

    monkeypatch.setattr(torch, "load", read)
    monkeypatch.setattr("ds_compress.engine.teachers.sharded._load", read)
    monkeypatch.setattr("ds_compress.engine.teachers.cached.TeacherCache", read)
    monkeypatch.setattr("ds_compress.engine.checkpoint.tags.Manifest.read", read)
    monkeypatch.setattr("ds_compress.engine.checkpoint.state.read", read)


# -- teachers and caches -------------------------------------------------------------------------------


def test_a_signed_teacher_teaches(tmp_path: Path) -> None:
    teacher = signed_folder(tmp_path / "teacher")
    engine_of(tiny_bert(), distilled({"teacher": str(teacher)}, **required()))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", ["unsigned", "changed", "another's", "no folder"])
def test_other_teachers_are_refused(tmp_path: Path, kind: str) -> None:
    teacher = signed_folder(tmp_path / "teacher")
    if kind == "unsigned":
        (teacher / "model.sig").unlink()
    elif kind == "changed":
        (teacher / "config.json").write_text("{}")
    elif kind == "another's":
        secure.sign(teacher, keys().other.private)
    source = {"teacher": "a-name-of-the-hub" if kind == "no folder" else str(teacher)}
    with pytest.raises(ConfigError) as caught:
        engine_of(tiny_bert(), distilled(source, **required()))
    (problem,) = caught.value.problems
    assert problem.path == "compression_training.distillation.teacher"
    assert "a folder that the owner of security.public_key has signed" in problem.allowed


def test_an_encrypted_teacher_is_an_object(tmp_path: Path) -> None:
    folder = encrypted_folder(tmp_path / "teacher")
    for security in (required(), {"verify": "off"}):
        with pytest.raises(ConfigError, match="load_verified"):
            engine_of(tiny_bert(), distilled({"teacher": str(folder)}, **security))


def test_an_object_has_to_come_from_load_verified(tmp_path: Path) -> None:
    block = distilled({}, **required())
    model = tiny_bert()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "compression_training": block,
    }

    def engine_with(teacher: Any) -> None:
        ds_compress.initialize(
            teacher=teacher, model=model, model_parameters=list(model.parameters()), config=config
        )

    with pytest.raises(ConfigError, match=r"nobody verified this .*load_verified"):
        engine_with(tiny_bert(1))
    folder = encrypted_folder(tmp_path / "teacher")
    other = tmp_path / "other"
    shutil.copytree(folder.with_name("teacher-plain"), other)
    secure.sign(other, keys().other.private)
    with pytest.raises(ConfigError, match="signed by another key"):
        engine_with(ds_compress.load_verified(other, keys().other.public))
    engine_with(ds_compress.load_verified(folder, keys().signing.public, keys().reading.private))


@pytest.mark.parametrize("kind", ["signed", "unsigned", "changed"])
def test_caches(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    cache = tmp_path / "cache"
    ds_compress.cache_teacher(tiny_bert(), batches(2), cache, top_k=2)
    if kind != "unsigned":
        secure.sign(cache, keys().signing.private)
    block = distilled({"teacher_cache": str(cache)}, **required())
    if kind == "signed":
        engine_of(tiny_bert(1), block)
        return
    if kind == "changed":
        manifest = next(path for path in cache.glob("*.json") if path.name != "release.json")
        manifest.write_text(manifest.read_text() + " ")
    request.getfixturevalue("unread")
    with pytest.raises(ConfigError) as caught:
        engine_of(tiny_bert(1), block)
    assert caught.value.problems[0].path == "compression_training.distillation.teacher_cache"


def test_without_it_nothing_is_looked_at(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "teacher")
    engine_of(tiny_bert(), distilled({"teacher": str(tmp_path / "teacher")}, verify="off"))


# -- checkpoints ---------------------------------------------------------------------------------------


def saved(folder: Path, steps: int = 1) -> Path:
    """Checkpoints `global_step1`, ... of a pruned model in a folder."""
    engine = engine_of(tiny_bert(), pruning(verify="off"), stage=2)
    for batch in batches(steps):
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.save_checkpoint(str(folder))
    engine.destroy()
    return folder


def load(folder: Path, tag: str | None = None, **security: Any) -> Any:
    engine = engine_of(tiny_bert(3), pruning(**(security or required())), stage=2)
    path, _ = engine.load_checkpoint(str(folder), tag)
    return path, engine.compression.applied_steps


def test_a_signed_tag_is_loaded(tmp_path: Path) -> None:
    root = saved(tmp_path / "run", steps=2)
    secure.sign(root / "global_step2", keys().signing.private)
    path, steps = load(root)
    assert path is not None and steps == 2
    assert load(root, "global_step2")[1] == 2


def test_a_signature_over_all_of_a_folder_will_do(tmp_path: Path) -> None:
    root = saved(tmp_path / "run", steps=2)
    secure.sign(root, keys().signing.private)
    assert load(root)[1] == 2
    (root / "latest").write_text("global_step1")
    with pytest.raises(TamperedError, match="changed: latest"):
        load(root)


def test_a_trainers_folder_is_signed_whole(tmp_path: Path) -> None:
    """It reads its own files beside the tag, pickles among them."""
    root = saved(tmp_path / "checkpoint-1")
    (root / "trainer_state.json").write_text("{}")
    secure.sign(root / "global_step1", keys().signing.private)
    with pytest.raises(TamperedError, match="checkpoint-1 is not signed"):
        load(root)
    secure.sign(root, keys().signing.private)
    assert load(root)[1] == 1
    (root / "rng_state_0.pth").write_bytes(b"")
    with pytest.raises(TamperedError, match="added: rng_state_0"):
        load(root)


def test_checkpoints_name_keys_and_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = keys().signing.public.read_text()
    monkeypatch.setenv("SIGNER", pem)
    engine = engine_of(tiny_bert(), pruning(verify="require", public_key="env:SIGNER"))
    engine.save_checkpoint(str(tmp_path), "tag")
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"env:SIGNER" in content for content in contents)
    assert not any(pem.splitlines()[1].encode() in content for content in contents)


def flipped(root: Path) -> None:
    path = next((root / "global_step2").glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, Any] = {
    "unsigned": lambda root: (root / "global_step2" / "model.sig").unlink(),
    "flipped": flipped,
    "added": lambda root: (root / "global_step2" / "more.pt").write_bytes(b""),
    "another's": lambda root: secure.sign(root / "global_step2", keys().other.private),
    "older, unsigned": lambda root: (root / "latest").write_text("global_step1"),
    "outside": lambda root: (root / "latest").write_text("../elsewhere"),
    "no latest": lambda root: (root / "latest").unlink(),
    "no tag": lambda root: shutil.rmtree(root / "global_step2"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_checkpoints_are_refused_unread(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    root = saved(tmp_path / "run", steps=2)
    secure.sign(root / "global_step2", keys().signing.private)
    CHANGES[kind](root)
    engine = engine_of(tiny_bert(3), pruning(**required()), stage=2)
    before = [parameter.clone() for parameter in engine.module.parameters()]
    request.getfixturevalue("unread")
    with pytest.raises((TamperedError, ds_compress.CheckpointError)):
        engine.load_checkpoint(str(root))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert load(tmp_path)[0] is None


def test_a_missing_key_lets_nothing_pass(tmp_path: Path) -> None:
    root = saved(tmp_path / "run")
    secure.sign(root / "global_step1", keys().signing.private)
    with pytest.raises(KeyUnavailableError, match="No such file"):
        load(root, verify="require", public_key=str(tmp_path / "nowhere.pub"))


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("trusted", [False, True])
def test_pickles_run_code_only_where_the_json_trusts_them(tmp_path: Path, trusted: bool) -> None:
    """The control for `trust_pickle`: with it the payload does run."""
    from ds_compress.manifest import Manifest

    root, ran = saved(tmp_path / "run"), tmp_path / "ran"
    tag = root / "global_step1"
    file = next(tag.glob("*model_states.pt"))
    state = torch.load(file, weights_only=False)
    torch.save({**state, "payload": Payload(ran)}, file)
    Manifest.of(tag, {**Manifest.read(tag).about}).write(tag)  # type: ignore[union-attr]
    if trusted:
        load(root, verify="off", trust_pickle=True)
        assert ran.exists()
        return
    with pytest.raises(ds_compress.CheckpointError, match="could run any code"):
        load(root, verify="off")
    assert not ran.exists()
