"""R7: an attacker has the folder of a signed model, and changes it; the commands and `load_verified` refuse it.

Every trial is a process of its own, as an operator would run it, with a temporary folder that is searched afterwards.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.trial import Trial, Verdict
from ds_compress import secure
from ds_compress.secure.errors import SecurityError, TamperedError

NAME = "R7"
WHAT = "tampering with a signed folder, plain or encrypted; planted libraries; pickles that run code"
PASS = "refused, with the right exit code, nothing of it run, no plaintext left"

WEIGHTS = "model.safetensors"
TAMPERED = 1


@dataclass(frozen=True)
class Scene:
    """What an attacker finds. folder: the release, encrypted or not. older, other: other releases of the same signer,
    of the same model and of another one. mallory: the attacker's own key, without its ending."""

    folder: Path
    older: Path
    other: Path
    mallory: Path
    encrypted: bool
    rng: random.Random

    @property
    def weights(self) -> Path:
        return self.folder / (WEIGHTS + (".age" if self.encrypted else ""))


@dataclass(frozen=True)
class _Stage:
    """Made once for all trials of a process: releases, and the keys of their signer and reader."""

    root: Path

    @property
    def key(self) -> Path:
        return self.root / "release.key"

    @property
    def public(self) -> Path:
        return self.root / "release.pub"

    @property
    def identity(self) -> Path:
        return self.root / "reader.identity"


@functools.cache
def _stage() -> tuple[_Stage, tempfile.TemporaryDirectory[str]]:
    kept = tempfile.TemporaryDirectory(prefix="reliability-keys-")
    stage = _Stage(Path(kept.name))
    secure.generate(stage.root / "release")
    secure.generate(stage.root / "mallory")
    reader = secure.generate(stage.root / "reader", "encryption")
    for folder, name, version in (("new", "bert", 2), ("older", "bert", 1), ("other", "gpt", 2)):
        _save_model(stage.root / folder, seed=len(folder))
        secure.sign(stage.root / folder, stage.key, name=name, version=version)
        secure.encrypt(stage.root / folder, stage.root / f"{folder}-encrypted", [reader.public], stage.key)
    return stage, kept


def _save_model(folder: Path, seed: int) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=64, **size)).save_pretrained(folder)
    torch.save({"module": {}, "step": seed}, folder / "mp_rank_00_model_states.pt")


# -- what is done to the folder ------------------------------------------------------------------------


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _flip_early(scene: Scene) -> None:
    _flip(scene.weights, scene.rng.randrange(64))


def _flip_late(scene: Scene) -> None:
    _flip(scene.weights, -1 - scene.rng.randrange(64))


def _truncate(scene: Scene) -> None:
    os.truncate(scene.weights, scene.rng.randrange(scene.weights.stat().st_size))


def _extra(scene: Scene) -> None:
    (scene.folder / "modeling_bert.py").write_text("print('run')")


def _missing(scene: Scene) -> None:
    scene.weights.unlink()


def _swapped(scene: Scene) -> None:
    one, other = scene.folder / "config.json", scene.folder / "release.json"
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def _swapped_file(scene: Scene) -> None:
    shutil.copy(scene.older / scene.weights.name, scene.weights)


def _swapped_model(scene: Scene) -> None:
    shutil.rmtree(scene.folder)
    shutil.copytree(scene.other, scene.folder)


def _rollback(scene: Scene) -> None:
    shutil.rmtree(scene.folder)
    shutil.copytree(scene.older, scene.folder)


def _wrong_key(scene: Scene) -> None:
    _flip_late(scene)
    secure.sign(scene.folder, scene.mallory.with_suffix(".key"), name="bert", version=2)


def _wrong_key_with_hint(scene: Scene) -> None:
    """Signed by Mallory, in the signer's name."""
    hint = _bundle(scene)["verificationMaterial"]["publicKey"]["hint"]
    _wrong_key(scene)
    bundle = _bundle(scene)
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint
    (scene.folder / "model.sig").write_text(json.dumps(bundle))


def _forged(scene: Scene) -> None:
    """The list of hashes is made to fit the changed file; the signature over the list stays."""
    _flip_late(scene)
    bundle = _bundle(scene)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    resources = payload["predicate"]["resources"]
    for resource in resources:
        resource["digest"] = hashlib.sha256((scene.folder / resource["name"]).read_bytes()).hexdigest()
    root = hashlib.sha256(b"".join(bytes.fromhex(resource["digest"]) for resource in resources)).hexdigest()
    payload["subject"][0]["digest"]["sha256"] = root
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (scene.folder / "model.sig").write_text(json.dumps(bundle))


def _bundle(scene: Scene) -> Any:
    return json.loads((scene.folder / "model.sig").read_text())


def _symlink(scene: Scene) -> None:
    """To the very bytes that were signed: they may become others when nobody looks."""
    elsewhere = scene.folder.with_name("elsewhere")
    shutil.move(scene.weights, elsewhere)
    scene.weights.symlink_to(elsewhere)


def _path_escape(scene: Scene) -> None:
    outside = scene.folder.with_name("outside.safetensors")
    shutil.copy(scene.older / scene.weights.name, outside)
    index = {"metadata": {}, "weight_map": {"bert.pooler.dense.weight": f"../{outside.name}"}}
    (scene.folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _pickle(scene: Scene) -> None:
    """Unpickled, it makes a folder; encrypted to the reader, as anybody can."""
    content = pickle.dumps(_Payload(scene.folder.with_name("ran")))
    path = scene.folder / "mp_rank_00_model_states.pt"
    if scene.encrypted:
        import pyrage

        to = pyrage.x25519.Recipient.from_str(
            (scene.mallory.with_name("reader.recipient")).read_text().strip()
        )
        path, content = path.with_name(path.name + ".age"), pyrage.encrypt(content, [to])
    assert path.exists()
    path.write_bytes(content)


CHANGES: dict[str, Callable[[Scene], None]] = {
    "flip, early": _flip_early,
    "flip, late": _flip_late,
    "truncate": _truncate,
    "extra file": _extra,
    "missing": _missing,
    "swapped files": _swapped,
    "swapped with an older release's file": _swapped_file,
    "swapped with another model": _swapped_model,
    "rollback": _rollback,
    "wrong key": _wrong_key,
    "wrong key in the signer's name": _wrong_key_with_hint,
    "forged list of hashes": _forged,
    "symlink": _symlink,
    "path escape": _path_escape,
    "pickle payload": _pickle,
}
PLANTED = {
    "planted library, others may write it": False,
    "planted library, others may write its folder": True,
}


def trials(rng: random.Random) -> list[Trial]:
    made = []
    for encrypted in (False, True):
        kind = "signed and encrypted" if encrypted else "signed"
        for name, change in CHANGES.items():
            seed = rng.getrandbits(32)
            made.append(Trial(f"{name}, {kind}", functools.partial(_tampered, change, encrypted, seed)))
    made += [Trial(name, functools.partial(_planted, whole)) for name, whole in PLANTED.items()]
    return made


# -- one trial -----------------------------------------------------------------------------------------


def _tampered(change: Callable[[Scene], None], encrypted: bool, seed: int, here: Path) -> Verdict:
    stage, _ = _stage()
    end = "-encrypted" if encrypted else ""
    folder, seen, temporary = here / "model", here / "seen.json", here / "tmp"
    temporary.mkdir()
    shutil.copytree(stage.root / f"new{end}", folder)
    asked = ["--public-key", str(stage.public), "--name", "bert", "--seen", str(seen)]
    secure.verify(folder, stage.public, name="bert", seen=seen)  # yesterday, it was good
    older, other = stage.root / f"older{end}", stage.root / f"other{end}"
    change(Scene(folder, older, other, stage.root / "mallory", encrypted, random.Random(seed)))
    command = ["verify", str(folder), *asked]
    if encrypted:
        command = ["decrypt", str(folder), str(here / "out"), "--identity", str(stage.identity), *asked]
    done = _run(command, temporary)
    if done.returncode != TAMPERED:
        return Verdict(
            False, "accepted" if done.returncode == 0 else f"exit {done.returncode}", done.stderr[-300:]
        )
    try:
        secure.load_verified(folder, stage.public, stage.identity, name="bert", seen=seen)
        return Verdict(False, "loaded")
    except TamperedError as error:
        words = str(error)
    except SecurityError as error:
        return Verdict(False, "the wrong error", repr(error))
    if (here / "ran").exists():
        return Verdict(False, "ran")
    left = [*temporary.iterdir(), *(_plaintext(here, stage.root / "new") if encrypted else ())]
    if left:
        return Verdict(False, "plaintext left", str(left[0]))
    if (here / "out").exists() or any(here.glob(".out*")):
        return Verdict(False, "plaintext left", "out")
    said = done.stderr.strip().splitlines()
    if len(said) != 1 or str(folder) not in said[0] or _secret_in(done.stderr + done.stdout + words, stage):
        return Verdict(False, "other words", done.stderr[-300:])
    return Verdict(True, "refused")


def _run(arguments: list[str], temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ds_compress", *arguments],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _plaintext(here: Path, plain: Path) -> list[Path]:
    """Files with any stretch of the weights, below a folder that only has an encrypted model."""
    content = (plain / WEIGHTS).read_bytes()
    stretches = [content[start : start + 64] for start in range(len(content) // 2, len(content), 8192)]
    files = [path for path in here.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(stretch in path.read_bytes() for stretch in stretches)]


def _secret_in(text: str, stage: _Stage) -> bool:
    secrets = [stage.identity.read_text().split()[-1], *stage.key.read_text().splitlines()[1:-1]]
    return any(secret[:24] in text for secret in secrets)


_LIBRARY = """
#include <sys/stat.h>
__attribute__((constructor)) static void run(void) {{ mkdir("{marker}", 0755); }}
"""
_USE = """
import torch
from ds_compress.ops import kernels
kernels().mask_apply_(torch.ones(8), torch.zeros(1, dtype=torch.uint8))
"""


def _planted(folder_too: bool, here: Path) -> Verdict:
    """A library of the right name and with a right checksum, which anybody could have put there, is never loaded."""
    from ds_compress.ops import library
    from ds_compress.ops.library_file import checksum_file

    cache, marker = here / "cache", here / "ran"
    cache.mkdir(mode=0o755)
    planted = cache / library.wanted_build().name
    source = here / "planted.c"
    source.write_text(_LIBRARY.format(marker=marker))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(planted), str(source)], check=True)
    digest = hashlib.sha256(planted.read_bytes()).hexdigest()
    checksum_file(planted).write_text(f"{digest}  {planted.name}\n")
    planted.chmod(0o755 if folder_too else 0o777)
    cache.chmod(0o777 if folder_too else 0o755)
    environment = {"DS_COMPRESS_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    for preference in ("native", "auto"):
        done = subprocess.run(
            [sys.executable, "-c", _USE],
            env={**os.environ, **environment, "DS_COMPRESS_KERNELS": preference},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if marker.exists():
            return Verdict(False, "ran", preference)
        if done.returncode == 0 or str(planted if not folder_too else cache) not in done.stderr:
            return Verdict(False, "accepted", done.stderr[-300:])
    return Verdict(True, "refused")
