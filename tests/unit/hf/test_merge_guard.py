"""Adapters are not merged into layers that tensor parallelism has sharded: a process would take its share for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.engine.zero import internals
from ds_compress.hf.merge import merge_and_unload


class Adapted(nn.Module):
    """Says whether anybody has merged it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.merged = False

    def merge_and_unload(self, **_: Any) -> nn.Module:
        self.merged = True
        return self


@pytest.mark.parametrize(
    ("what", "has_session"), [("merge_and_unload", True), ("merge_and_unload", False), ("finalize", True)]
)
def test_sharded_layers_are_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch, what: str, has_session: bool
) -> None:
    model = Adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = SimpleNamespace(module=model, autotp_size=lambda: 2)
    if has_session:
        engine.compression = SimpleNamespace(end=lambda: pytest.fail("the session was ended"))
    monkeypatch.setattr(internals, "tensor_parallel_group", lambda engine: object())
    run = merge_and_unload if what == "merge_and_unload" else ds_compress.finalize
    with pytest.raises(ValueError, match=f"{what}: AutoTP has sharded the layers of this engine"):
        run(engine)
    assert not model.merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
