"""Our kernels among DeepSpeed's ops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.env_report import op_report
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.ops.op_builder.builder import OpBuilder

from ds_compress.engine.op_builder import CompressOpsBuilder, register_builder


def test_importing_the_package_adds_the_builder_once() -> None:
    builder = ALL_OPS["ds_compress"]
    assert isinstance(builder, CompressOpsBuilder) and isinstance(builder, OpBuilder)
    register_builder()
    assert ALL_OPS["ds_compress"] is builder


def test_the_report_of_deepspeed_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    op_report()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ds_compress"))
    assert "OKAY" in line


def test_its_face_is_that_of_a_deepspeed_op() -> None:
    builder = CompressOpsBuilder()
    assert builder.is_compatible()
    assert all(Path(source).is_file() for source in builder.sources())
    assert all(Path(folder).is_dir() for folder in builder.include_paths())
    assert builder.load() is torch.ops.ds_compress


def test_without_a_compiler_it_is_not_compatible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not CompressOpsBuilder().is_compatible(verbose=True)
