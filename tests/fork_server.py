"""Python processes that start at once: forks of a process that has already imported the large libraries.

torch, transformers and DeepSpeed take 4 to 8 seconds of a core to import, and the tests start hundreds of processes
that want them. A fork has what any new process has otherwise: an environment and a folder of its own, its own state of
`random`, its own output. What it shares with the other forks of its server is the seed of hashes, which decides the
order of sets: processes that are compared with each other come from different servers.

    python -m tests.fork_server PACKAGE.MODULE[:FUNCTION] ...     imports, and calls, before the first fork
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_REPOSITORY = Path(__file__).resolve().parents[1]


@functools.cache
def fork_server(number: int, *preloaded: str) -> ForkServer:
    """The server of this process with that number and those modules; it ends with this process."""
    return ForkServer(preloaded)


class ForkServer:
    """Starts Python processes from one that has imported `preloaded`, "package.module" or "package.module:function"."""

    def __init__(self, preloaded: Sequence[str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *preloaded],
            cwd=_REPOSITORY,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, arguments: Sequence[str], output: Path, environment: Mapping[str, str] = os.environ
    ) -> ForkedProcess:
        """`python ARGUMENTS` ("-m" and a module, or a script, and what it takes) in the folder that this process is in.

        Its stdout and stderr are in `output`.
        """
        request = {"arguments": list(arguments), "output": str(output), "environment": dict(environment)}
        return ForkedProcess(self, self.ask(request | {"folder": str(Path.cwd())}))

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server has ended, code {self._server.wait()}")
        return json.loads(answer)


class ForkedProcess:
    """As much of `subprocess.Popen` as the tests use."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _serve(preloaded: Sequence[str]) -> None:
    # What is printed at import, or by a fork before it has its own output, must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in preloaded:
        module, _, function = name.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(arguments: Sequence[str], output: str, environment: Mapping[str, str], folder: str) -> NoReturn:
    os.chdir(folder)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    code: Any = 1
    try:
        code = _run(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _run(arguments: Sequence[str]) -> int:
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1:])
