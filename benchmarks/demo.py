"""The figures that `make demo` measured, as rows beside those of the benchmarks.

    make demo && python -m benchmarks.demo --output demo_result --record

Measures nothing: reads `result.json` of a finished run. Record on the machine and the commit that ran it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import record

_OF_A_MODEL = ("accuracy", "parameters", "non_zeros", "bytes", "latency_ms")
_OF_ITS_TRAINING = ("accuracy", "seconds_per_step", "steps", "sentences")


def figures_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One variant a model, one for its export, and the minutes of the whole run."""
    figures: dict[str, dict[str, float]] = {"the run": {"minutes": result["minutes"]}}
    for name, model in result["models"].items():
        figures[name] = {figure: model[figure] for figure in _OF_A_MODEL}
        figures[name] |= {f"training: {figure}": model["training"][figure] for figure in _OF_ITS_TRAINING}
        if exported := model.get("exported"):
            figures[f"{name}, exported"] = exported
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_result"), help="the folder of the demo")
    record.add_output_arguments(parser)
    args = parser.parse_args()
    result = json.loads((args.output / "result.json").read_text())
    if result["with a given teacher"]:
        parser.error("this run had its teacher from another one: its minutes are not those of the demo")
    figures = figures_of(result)
    for variant, values in figures.items():
        print(f"{variant}: " + ", ".join(f"{figure} {value:.6g}" for figure, value in values.items()))
    record.report("demo", figures, args)


if __name__ == "__main__":
    main()
