"""What must agree between files of the repository that no program reads together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from ds_compress.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_pre_commit_runs_the_versions_of_the_dev_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = {word for word in project["optional-dependencies"]["dev"] if "==" in word}
    named = set(re.findall(r'additional_dependencies: \["([^"]+)"\]', hooks))
    assert named and named <= pinned


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
