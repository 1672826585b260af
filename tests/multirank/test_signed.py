"""A refused checkpoint is refused in every process, on every stage, and no weight has moved."""

from __future__ import annotations

from pathlib import Path

from tests.multirank.launch import run_ranks
from tests.multirank.signed import KINDS
from tests.secure_folders import keys


def test_all_processes_refuse_alike(tmp_path: Path) -> None:
    results = run_ranks(
        2,
        "tests.multirank.signed:loads",
        folder=str(tmp_path),
        public=str(keys().signing.public),
        private=str(keys().signing.private),
        other=str(keys().other.private),
    )
    refused = ("TamperedError", True)
    expected = {(kind, stage): 2 if kind == "signed" else refused for kind in KINDS for stage in (0, 3)}
    assert results == [expected, expected]
