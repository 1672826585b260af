"""The same script with the one line that we ask for."""

import runpy
from pathlib import Path

import torch

import ds_compress  # noqa: F401

runpy.run_path(str(Path(__file__).with_name("user_script.py")), run_name="__main__")
# Without this a gloo worker thread may outlive the interpreter, which aborts a run that has finished.
torch.distributed.destroy_process_group()
