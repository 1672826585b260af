"""Runs a training script that nobody may edit, with ds_compress registered.

    deepspeed --num_gpus 8 --module ds_compress.run train.py --deepspeed_config ds_config.json
    deepspeed --num_gpus 8 --module ds_compress.run -m package.train ...

The launcher puts `--local_rank=N` before the script's name; it is handed on behind it, where the script expects it.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

_USAGE = "usage: deepspeed --module ds_compress.run (script.py | -m package.module) [arguments]"
_LETTING_GO_S = 0.1


def split_arguments(argv: list[str]) -> tuple[str, bool, list[str]]:
    """(script or module, is it a module, its arguments) of our own command line.

    Raises:
        SystemExit: no script is named.
    """
    launcher = []
    rest = list(argv)
    while rest and rest[0].startswith(("--local_rank", "--local-rank")):
        launcher.append(rest.pop(0))
        if "=" not in launcher[-1] and rest:
            launcher.append(rest.pop(0))
    is_module = bool(rest) and rest[0] == "-m"
    if is_module:
        rest.pop(0)
    if not rest:
        raise SystemExit(_USAGE)
    return rest[0], is_module, launcher + rest[1:]


def leave_process_group() -> None:
    """Finishes the collectives of the process group, which a script may have left to the end of the process.

    With gloo, a collective whose last reference a worker thread still holds when the interpreter shuts down ends a
    finished run with "terminate called without an active exception", and the launcher then kills the other
    processes, one that is still saving included. Destroying the group waits until its collectives are over; the
    threads let go of them a moment later, for which they need the interpreter.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(_LETTING_GO_S)


def main() -> None:
    import ds_compress

    target, is_module, arguments = split_arguments(sys.argv[1:])
    ds_compress.register()
    sys.argv = [target, *arguments]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")
    leave_process_group()


if __name__ == "__main__":
    main()
