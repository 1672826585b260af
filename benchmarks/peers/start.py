"""python -m benchmarks.peers.start PEER FOLDER: the process of a peer. Its answers are taken out of stdout first, for
packages print when they are imported."""

from __future__ import annotations

import importlib
import sys

from benchmarks.peers import worker  # noqa: F401  (before any other)

if __name__ == "__main__":
    del sys.argv[0]
    importlib.import_module(f"benchmarks.peers.{sys.argv[0]}").main()
