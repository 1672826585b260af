"""An old script and its JSON, with the one replacement that we promise, through the `deepspeed` launcher."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.test_launcher import launch
from tests.legacy_blocks import ENCODER_BLOCKS
from tests.models import tiny_bert
from tests.multirank.common import ds_config


def test_one_replacement_and_the_old_script_runs(tmp_path: Path) -> None:
    tiny_bert(seed=3, layers=4).save_pretrained(tmp_path / "model")
    old = Path(__file__).with_name("compat_script.py").read_text()
    assert "ds_compress" not in old
    script = tmp_path / "script.py"
    script.write_text(old.replace("deepspeed.compression", "ds_compress.compat"))
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(ds_config(2, ENCODER_BLOCKS["everything"])))
    report = tmp_path / "report.json"
    launch(str(script), "--deepspeed_config", str(config), "--model", str(tmp_path / "model"),
           "--output", str(report))  # fmt: skip
    got = json.loads(report.read_text())
    assert got["world_size"] == 2 and got["steps"] == 6
    assert len(got["prepared"]) == 2 * 6
    assert got["query"] == 16  # two of four heads
    assert got["parameters"][1] < 0.8 * got["parameters"][0]
