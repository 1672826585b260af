"""The section on kernels in fresh processes: whether a library is there is a matter of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ds_compress.ops import schemas

PROGRAM = """
import json
from ds_compress.cli.diagnosis import kernels
from ds_compress.cli.diagnosis.section import Section
section = Section("kernels")
kernels.look(section)
print(json.dumps([section.data(), [[f.what, f.remedy] for f in section.findings]]))
"""


def look(**environment: str) -> tuple[dict[str, Any], list[list[str]]]:
    settings = {k: v for k, v in os.environ.items() if k not in ("DS_COMPRESS_KERNELS", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=settings | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    facts, findings = json.loads(done.stdout.splitlines()[-1])
    return facts, findings


def test_every_op_is_told_once() -> None:
    subprocess.run([sys.executable, "-m", "ds_compress.ops"], check=True, capture_output=True)
    facts, findings = look()
    assert findings == [] and facts["library"]["state"] == "loaded"
    ops = facts["ops on CPU"]
    assert sorted(ops["compiled"] + ops["plain_torch"]) == sorted(schemas.SCHEMAS)
    assert "int8_linear" in ops["compiled"]
    assert look(DS_COMPRESS_KERNELS="reference")[0]["ops on CPU"]["compiled"] == []


def test_nothing_is_built_or_created(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    facts, findings = look(DS_COMPRESS_CACHE=str(cache))
    if facts["library"]["state"] == "loaded":  # one that came with the package
        return
    assert facts["library"]["state"] == "not built" and findings == []
    assert not cache.exists() and facts["ops on CPU"]["compiled"] == []


def test_without_a_compiler(tmp_path: Path) -> None:
    without = {"PATH": "", "DS_COMPRESS_CACHE": str(tmp_path)}
    facts, findings = look(**without)
    assert facts["library"]["state"] in ("cannot be built", "loaded") and findings == []
    assert facts["C++ compiler"].startswith("none: no C++ compiler")
    if facts["library"]["state"] != "loaded":
        _, findings = look(**without, DS_COMPRESS_KERNELS="native")
        assert "native kernels are asked for" in findings[0][0]


def test_a_library_that_others_can_write_and_a_wrong_word(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    facts, findings = look(DS_COMPRESS_CACHE=str(tmp_path))
    assert facts["library"]["state"] in ("refused", "loaded")
    if facts["library"]["state"] == "refused":
        assert "may be written by everybody" in findings[0][0]
    _, findings = look(DS_COMPRESS_KERNELS="fast")
    assert "DS_COMPRESS_KERNELS=fast" in findings[0][0]
