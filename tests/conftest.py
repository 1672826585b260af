"""Settings common to all tests: one thread, no model hub, no test that needs a GPU where there is none."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before torch is imported: its thread pools read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from tests.fork_server import fork_server

torch.set_num_threads(1)

# The first example of a property pays for imports and allocations, so a deadline per example is noise here.
settings.register_profile("ds_compress", deadline=None, derandomize=True)
settings.load_profile("ds_compress")


@pytest.fixture(scope="module")
def single_process() -> None:
    """DeepSpeed in this process: `pytestmark = pytest.mark.usefixtures("single_process")`."""
    from tests.single import init_single_process

    init_single_process()


@pytest.fixture(autouse=True)
def no_autocast_of_an_earlier_test() -> Iterator[None]:
    """DeepSpeed keeps the settings of torch_autocast in its module: every later engine would scale its losses."""
    yield
    module = sys.modules.get("deepspeed.runtime.torch_autocast")
    if module is not None:
        module.TORCH_AUTOCAST_INITIALIZED, module.TORCH_AUTOCAST_DTYPE = False, None  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="session")
def exports_are_checked_in_forks() -> Iterator[None]:
    """What loads an export is a process as fresh as ever, but it need not import torch and transformers once more.

    That a new Python process does the same is left to the tests of the launcher, whose scripts know no fixture.
    """
    from ds_compress.export import check

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(check, "fresh_python", _forked(check.fresh_python))
        yield


STOCK = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "compressed_tensors",
)


def _forked(
    fresh_python: Callable[[Sequence[str]], tuple[int, str]],
) -> Callable[[Sequence[str]], tuple[int, str]]:
    def run(arguments: Sequence[str]) -> tuple[int, str]:
        program = arguments[-2]
        if "openvino" in program:  # holds that torch is not there
            return fresh_python(arguments)
        imported = [*STOCK, "ds_compress"] if "ours" in program else STOCK
        with tempfile.NamedTemporaryFile("r") as output:
            process = fork_server(0, *imported).start(
                [argument for argument in arguments if argument != "-P"], Path(output.name)
            )
            return process.wait(), output.read()

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A set has another order in each process of xdist, which refuses to run anything then."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if isinstance(mark.args[1], set | frozenset):
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: sort the values of {mark.args[0]!r}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("DS_COMPRESS_GPU_TESTS_ON") == "cpu":
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports have left behind is no garbage. DeepSpeed collects it several times for every engine."""
    gc.collect()
    gc.freeze()
