"""R2: damage to every file of checkpoints, exports and teacher caches: found before anything is used, and named."""

from __future__ import annotations

import atexit
import functools
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ds_compress
from benchmarks.reliability import runs
from benchmarks.reliability.trial import Trial, Verdict
from ds_compress.distill.cache_format import CacheError
from ds_compress.distill.cache_read import TeacherCache
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.checkpoint.tags import tag_to_load
from ds_compress.errors import CheckpointError, ExportError
from ds_compress.export import model_card
from ds_compress.export.report import ExportReport
from ds_compress.export.whole import refuse_damaged

NAME = "R2"
WHAT = "damage to every file of checkpoints, exports and teacher caches"
PASS = "found, the file named, another checkpoint offered"

STAGES = (0, 2, 3)
FORMATS = ("hf", "compressed-tensors", "torch", "onnx", "openvino")
KINDS = ("early bit", "late bit", "cut", "empty", "deleted", "of another step")


def trials(rng: random.Random) -> Sequence[Trial]:
    """Every file of everything, in each way."""
    found = []
    for what, files in _everything().items():
        for name in files:
            for kind in KINDS:
                found.append(Trial(f"{what}: {name}, {kind}", partial(_trial, what, name, kind)))
    return found


def _everything() -> dict[str, list[str]]:
    """{what: names of its files}."""
    made = _made()
    return {
        path.name: sorted(
            file.relative_to(path).as_posix()
            for file in path.rglob("*")
            if file.is_file() and not _is_of_no_matter(path, file)
        )
        for path in sorted(made.glob("*/"))
        if not path.name.endswith(" before")
    }


def _is_of_no_matter(root: Path, file: Path) -> bool:
    """Other tags than the newest, scripts that DeepSpeed puts beside, and model cards, which people edit."""
    name = file.relative_to(root).as_posix()
    return (
        name.startswith(f"global_step{runs.Run.every}/")
        or name.endswith(".py")
        or name == model_card.FILE_NAME
    )


@functools.cache
def _made() -> Path:
    """A folder with one of everything, and of each another one beside it, for swaps."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for stage in STAGES:
        root = folder / f"checkpoint of stage {stage}"
        run = runs.Run("ramp", stage, root, folder / ".traces", runs.block("ramp", folder), steps=6)
        codes, _, log = runs.finished(run)
        if any(codes):
            raise RuntimeError(log)
    for name, seed in ((" before", 1), ("", 0)):
        for format in FORMATS:
            model = runs.tiny_bert(seed)
            scheme = "FP8_DYNAMIC" if format == "compressed-tensors" else None
            out = folder / f"export {format}{name}"
            ds_compress.export(model, out, format, scheme=scheme, check=False)
        batches = [{key: value for key, value in runs.batch(seed, 0).items() if key != "labels"}]
        ds_compress.cache_teacher(runs.tiny_bert(seed), batches, folder / f"teacher cache{name}", top_k=2)
    shutil.rmtree(folder / ".traces")
    return folder


def _trial(what: str, name: str, kind: str, folder: Path) -> Verdict:
    source = _made() / what
    root = Path(shutil.copytree(source, folder / "damaged"))
    if kind == "of another step":
        before = _of_another_step(source, name)
        if before is None or before.read_bytes() == (root / name).read_bytes():
            return Verdict(True, "the same file")
        shutil.copy(before, root / name)
    else:
        _damage(root / name, kind)
    if what.startswith("checkpoint"):
        return _of_checkpoint(root, name)
    if what.startswith("teacher"):
        return _refusal(partial(TeacherCache, root), CacheError, root / name)
    return _refusal(partial(_read, root), ExportError, root / name)


def _of_another_step(source: Path, name: str) -> Path | None:
    if not source.name.startswith("checkpoint"):
        other = source.with_name(f"{source.name} before") / name
    elif name == "latest":
        other = source.parent / ".latest before"
        other.write_text(f"global_step{runs.Run.every}")
    else:
        other = source / name.replace("global_step6", f"global_step{runs.Run.every}")
    return other if other.exists() else None


def _damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    match kind:
        case "early bit":
            content[len(content) // 50] ^= 1
        case "late bit":
            content[-1 - len(content) // 50] ^= 1
        case "cut":
            del content[len(content) // 2 :]
        case "empty":
            content.clear()
        case "deleted":
            path.unlink()
            return
    path.write_bytes(content)


def _read(root: Path) -> None:
    """As `ds_compress inspect` and `ds_compress.from_pretrained` begin; other loaders do not look at manifests."""
    refuse_damaged(root)
    ExportReport.read(root)


def _refusal(read: Callable[[], object], expected: type[Exception], path: Path) -> Verdict:
    with _Lines() as lines:
        try:
            read()
        except expected as error:
            words = str(error)
        except Exception as error:
            return Verdict(False, "another error", f"{type(error).__name__}: {error}")
        else:
            words = " ".join(lines)
            if not words:
                return Verdict(False, "silently loaded")
    named = path.name in words
    return Verdict(
        named, "refused by name" if named and not lines else "told" if named else "not named", words
    )


def _of_checkpoint(root: Path, name: str) -> Verdict:
    """The pointer is followed when it can be; the newest tag is asked for by name."""
    with _Lines() as lines:
        taken = tag_to_load(root, None, Processes())
    if name == "latest":
        good = taken == "global_step6" or "global_step6 is newer" in " ".join(lines)
        return Verdict(good and bool(lines), "told", " ".join(lines))
    if taken != f"global_step{runs.Run.every}" or not lines:
        return Verdict(False, "silently loaded", f"{taken} {lines}")
    try:
        tag_to_load(root, "global_step6", Processes())
    except CheckpointError as error:
        named = str(root / name) in str(error) and "load the tag 'global_step3' instead" in str(error)
        return Verdict(named, "refused by name" if named else "not named", str(error))
    return Verdict(False, "silently loaded")


class _Lines(logging.Handler):
    """The warnings of a block of code."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("ds_compress").addHandler(self)
        return self._found

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ds_compress").removeHandler(self)
