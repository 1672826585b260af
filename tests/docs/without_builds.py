"""Runs a script as the launcher would, without DeepSpeed's communication library, whose build takes minutes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    from ds_compress.run import split_arguments

    script, _, arguments = split_arguments(sys.argv[1:])
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
