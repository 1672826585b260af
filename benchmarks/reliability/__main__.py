"""What survives, in counts: kills, damage, other world sizes, NaN, bad JSON, full disks, tampering, a long run.

    python -m benchmarks.reliability [R1 R2 ...] [--tenth] [--seed 0] [--only WORD] [--record]

Every row is a module of this package; its trials are the same for the same seed. `--tenth` runs a tenth of each row,
chosen by the seed, as the tests do. `--only` runs the trials whose name has the word. `--record` writes
`benchmarks/results/reliability/<row>.json`: counts, every trial that failed, and the versions. The exit status is 1
when a trial failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from benchmarks import record
from benchmarks.reliability.trial import Row, Trial, Verdict
from ds_compress.files import atomic_write

ROWS = {
    "R1": "kills",
    "R2": "damage",
    "R3": "world_sizes",
    "R4": "bad_numbers",
    "R5": "bad_json",
    "R6": "bad_disks",
    "R7": "tampering",
    "R8": "soak",
}
SHARE = 10


def chosen(row: Row, seed: int, tenth: bool = False, only: str = "") -> list[Trial]:
    """The trials of a row, in its own order."""
    rng = random.Random(f"{row.NAME} {seed}")
    if tenth and hasattr(row, "tenth"):
        return list(row.tenth(rng))
    trials = [trial for trial in row.trials(rng) if only in trial.name]
    if not tenth:
        return trials
    places = sorted(rng.sample(range(len(trials)), math.ceil(len(trials) / SHARE)))
    return [trials[place] for place in places]


def run(trials: Sequence[Trial]) -> list[tuple[Trial, Verdict]]:
    """Every trial in a folder of its own, which is removed after it."""
    results = []
    for trial in trials:
        with tempfile.TemporaryDirectory(prefix="reliability-", ignore_cleanup_errors=True) as folder:
            try:
                verdict = trial.run(Path(folder))
            except Exception:
                verdict = Verdict(False, "the trial itself failed", traceback.format_exc(limit=-3))
        results.append((trial, verdict))
        if not verdict.passed:
            print(f"  FAILED  {trial.name}: {verdict.kind} {verdict.detail}", flush=True)
    return results


def load(name: str) -> Row:
    """The module of a row."""
    return cast(Row, importlib.import_module(f"benchmarks.reliability.{ROWS[name]}"))


def _report(row: Row, results: Sequence[tuple[Trial, Verdict]], seconds: float) -> dict[str, object]:
    failed = [(trial, verdict) for trial, verdict in results if not verdict.passed]
    kinds = Counter(verdict.kind for _, verdict in results)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    passed = len(results) - len(failed)
    print(f"{row.NAME}  {passed} of {len(results)} passed in {seconds:.0f} s: {counts}", flush=True)
    return {
        "row": row.NAME,
        "what": row.WHAT,
        "pass": row.PASS,
        "trials": len(results),
        "passed": passed,
        "kinds": dict(kinds),
        "failed": [
            {"name": trial.name, "kind": verdict.kind, "detail": verdict.detail} for trial, verdict in failed
        ],
        "seconds": round(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--tenth", action="store_true", help="a seeded tenth of every row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="WORD", help="trials whose name has the word")
    parser.add_argument("--record", action="store_true", help="write the counts to benchmarks/results")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    if args.record and args.only:
        parser.error("--record is for whole rows: a part would take their place")
    all_passed = True
    for name in args.rows or ROWS:
        row, began = load(name), time.monotonic()
        print(f"{name}  {row.WHAT}", flush=True)
        counts = _report(row, run(chosen(row, args.seed, args.tenth, args.only)), time.monotonic() - began)
        all_passed &= counts["passed"] == counts["trials"]
        if args.record:
            counts |= {"seed": args.seed, "tenth": args.tenth, **record.conditions()}
            path = record.RESULTS / "reliability" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, json.dumps(counts, indent=1) + "\n")
            print(f"written to {path.relative_to(record.HERE.parent)}")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
