"""What the server of forks imports before the first one, kept from the garbage collector: see `tests.frozen`."""

from benchmarks.reliability import killed_writers, runs  # noqa: F401
from tests.frozen import freeze_imports

freeze_imports()
