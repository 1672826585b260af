"""What `training_ours` runs, with `engine.compile()`. A peer of its own, for that needs a C++ compiler.

Torch's limit of recompilations is left as it is, unlike in the other peers: at most our own steps get longer by that.
"""

from __future__ import annotations

from benchmarks.engines import start_single_process
from benchmarks.peers import worker
from benchmarks.peers.training_inputs import checked
from benchmarks.peers.training_ours import engines, step_of


def main() -> None:
    start_single_process()
    runs = []
    for name, engine in engines().items():
        engine.compile()
        runs.append(checked(f"{name}, compiled", step_of(engine)))
    worker.serve(dict(runs), ["deepspeed", "torch", "transformers"])
