"""An Accelerator that leaves DeepSpeed out does not leave a block out in silence."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

from ds_compress import ConfigError
from ds_compress.hf.accelerators import check_every
from tests.multirank.common import ds_config, pruning_block
from tests.unit.hf.test_trainer import fresh_accelerator

__all__ = ["fresh_accelerator"]


def plugin(block: dict[str, Any] | None) -> DeepSpeedPlugin:
    return DeepSpeedPlugin(hf_ds_config=ds_config(2, block))


def test_an_accelerator_on_the_cpu_uses_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with pytest.raises(ConfigError, match="leaves DeepSpeed out") as caught:
        Accelerator(cpu=True, deepspeed_plugin=plugin(pruning_block()))
    assert "cpu=True" in caught.value.problems[0].hint


def test_without_a_block_it_is_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    Accelerator(cpu=True, deepspeed_plugin=plugin(None))
    Accelerator(cpu=True)


def test_one_that_uses_deepspeed_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    made = Accelerator(deepspeed_plugin=plugin(pruning_block()))
    assert made.distributed_type == "DEEPSPEED"


def test_the_check_is_made_once() -> None:
    before = Accelerator.__init__
    check_every(Accelerator)
    assert Accelerator.__init__ is before
