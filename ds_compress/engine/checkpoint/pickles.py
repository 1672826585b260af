"""DeepSpeed's checkpoints are pickles: read without running what is hidden in one.

Whatever is loaded inside of `only_data()` goes through torch's restricted unpickler, DeepSpeed's own calls with
`weights_only=False` included. It builds tensors, plain values, and the classes of the list below, which DeepSpeed's
states hold and which only store what they are given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_compress.errors import CheckpointError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def only_data(folder: Path, trusted: bool = False) -> Iterator[None]:
    """Inside, `torch.load` of what is in `folder` builds nothing but data; with `trusted` it does what its caller says.

    Raises:
        CheckpointError: a file holds something else.
    """
    if trusted:
        yield
        return
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_allowed()):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "an operation that data does not need"
        raise CheckpointError(
            f"{folder} holds a pickle with more than data, which could run any code, and is not loaded: {what}. If you "
            'trust whoever wrote it: "trust_pickle": true in compression_training.security, or trust_pickle=True '
            "(--trust-pickle) of an export"
        ) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _allowed() -> list[Any]:
    """Classes in the states of DeepSpeed's optimizers and schedules."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    deepspeeds = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    return [*deepspeeds, *_of_client_states()]


def _of_client_states() -> list[Any]:
    """What scripts put beside: states of random generators, numbers of numpy, their arguments."""
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}
    # Where these two functions lie depends on the version of numpy.
    builders = [np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    return [*builders, np.ndarray, np.dtype, *dtypes, argparse.Namespace]
