"""What the server of forks imports before the first one, and keeps the collector of garbage out of: see `tests.frozen`."""

from benchmarks.reliability import killed_writers, runs  # noqa: F401
from tests.frozen import freeze_imports

freeze_imports()
