"""A save that is whole or not there: DeepSpeed's files and ours under a temporary name, renamed when all are written.

Every process writes its files into `.<tag>.unfinished-...`; a write that fails in one process is kept until all have
done theirs, because DeepSpeed's collectives need everybody, and is then raised in every process. When all are on the
disk, the manifest is written, the folder is renamed to the tag, and `latest` is replaced. A kill at any moment leaves
the checkpoint that was there, under the same tag, too.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ds_compress.engine.checkpoint import state
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.checkpoint.tags import FOLDER, LATEST
from ds_compress.engine.patches import Patches
from ds_compress.engine.run import CompressionRun
from ds_compress.errors import CheckpointError
from ds_compress.files import UnfinishedFolder, atomic_write, sync
from ds_compress.manifest import Entry, Manifest, entry_of


def save(
    engine: Any, run: CompressionRun, original: Callable[..., Any], save_dir: Path, tag: str, latest: bool
) -> None:
    """Saves under `tag`; a collective.

    original: DeepSpeed's `save_checkpoint(save_dir, tag, save_latest=...)`, with what else the caller gave.

    Raises:
        CheckpointError: in every process, when one could not write. What was saved before is as it was.
    """
    processes = Processes.of(engine)
    _Save(engine, run, processes, save_dir, tag).run(original, latest)


class _Save:
    def __init__(
        self, engine: Any, run: CompressionRun, processes: Processes, save_dir: Path, tag: str
    ) -> None:
        self._engine, self._run, self._processes = engine, run, processes
        self._save_dir, self._tag = save_dir, tag
        nonce = processes.from_first(secrets.token_hex(4))
        self._unfinished = UnfinishedFolder(save_dir / tag, nonce)
        self._failures: list[BaseException] = []
        self._written: dict[str, Entry] = {}

    def run(self, original: Callable[..., Any], latest: bool) -> None:
        folder = self._unfinished.path
        with contextlib.ExitStack() as stack:
            if self._processes.leads:
                # Removes what is left of the folder, whatever happens.
                stack.callback(self._unfinished.__exit__, None, None, None)
                self._attempt(self._unfinished.__enter__)
            self._vote()
            state.save(folder / FOLDER, self._run, self._processes, self._attempt)
            with self._writes_are_attempts():
                original(str(self._save_dir), str(folder.relative_to(self._save_dir)), save_latest=False)
                if self._engine.checkpoint_engine.is_decoupled():
                    # Its writers work beside the training; there is no whole folder before they are done.
                    self._engine._commit_decoupled_checkpoint()
            known = self._vote()
            if self._processes.leads:
                self._attempt(lambda: self._finish(known, latest))
            self._vote()

    def _finish(self, known: dict[str, Entry], latest: bool) -> None:
        folder = self._unfinished.path
        about = {
            "saved": datetime.now(UTC).isoformat(),
            "latest": latest,
            "global_steps": self._engine.global_steps,
            "applied_steps": self._run.applied_steps,
            "processes": self._processes.count,
            "zero_stage": self._engine.zero_optimization_stage(),
        }
        Manifest.of(folder, about, known).write(folder)
        self._unfinished.finish()
        if latest:
            atomic_write(self._save_dir / LATEST, self._tag)

    @contextlib.contextmanager
    def _writes_are_attempts(self) -> Iterator[None]:
        """DeepSpeed's writer goes on after a failure; what it has written is hashed and synced beside its next file."""
        writer = self._engine.checkpoint_engine
        # Other writers may still be at it when `save` returns.
        is_done_at_return = type(writer).__name__ == "TorchCheckpointEngine"

        def save(state_dict: Any, path: str, *args: Any, **kwargs: Any) -> None:
            def write() -> None:
                original_save(state_dict, path, *args, **kwargs)
                if is_done_at_return:
                    settled.append((Path(path), beside.submit(_settled, Path(path))))

            self._attempt(write)

        def note(path: Path, entry: Future[Entry]) -> None:
            self._written[path.relative_to(self._unfinished.path).as_posix()] = entry.result()

        def makedirs(path: str, exist_ok: bool = False) -> None:
            self._attempt(lambda: original_makedirs(path, exist_ok=exist_ok))

        def copy_recovery_script(*args: Any, **kwargs: Any) -> None:
            self._attempt(lambda: original_copy(*args, **kwargs))

        patches = Patches()
        original_save = patches.install(writer, "save", save)
        original_makedirs = patches.install(writer, "makedirs", makedirs)
        original_copy = patches.install(self._engine, "_copy_recovery_script", copy_recovery_script)
        settled: list[tuple[Path, Future[Entry]]] = []
        with ThreadPoolExecutor(1) as beside:
            try:
                yield
            finally:
                patches.close()
            for path, entry in settled:
                self._attempt(partial(note, path, entry))

    def _attempt(self, write: Callable[[], object]) -> None:
        """A failure is kept for the vote."""
        try:
            write()
        except Exception as error:
            self._failures.append(error)

    def _vote(self) -> dict[str, Entry]:
        """What the processes of this folder have written; a collective of all.

        Raises:
            CheckpointError: in every process, when one has failed.
        """
        own = None if not self._failures else _words(self._failures[0])
        told = self._processes.gather((own, self._processes.leader, self._written))
        failed = [f"process {rank}: {words}" for rank, (words, *_) in enumerate(told) if words is not None]
        if failed:
            raise CheckpointError(
                f"{self._save_dir / self._tag} was not saved, what was there before is as it was: {'; '.join(failed)}"
            ) from (self._failures[0] if self._failures else None)
        here = [written for _, leader, written in told if leader == self._processes.leader]
        return {name: entry for written in here for name, entry in written.items()}


def _settled(path: Path) -> Entry:
    entry = entry_of(path)
    sync(path)
    return entry


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
