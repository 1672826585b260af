"""Checkpoints under `security` in several processes: what the first one refuses, all refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_compress import secure
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, pruning_block

KINDS = ("signed", "unsigned", "changed", "another's", "added")


def loads(folder: str, public: str, private: str, other: str) -> dict[tuple[str, int], Any]:
    """By kind of checkpoint and ZeRO stage: the steps after loading it, or the error's class and first words."""
    results: dict[tuple[str, int], Any] = {}
    for stage in (0, 3):
        root = Path(folder) / f"stage{stage}"
        with engine_of(tiny_bert(), ds_config(stage, pruning_block())) as engine:
            for batch in batches(2):
                engine.backward(engine(**batch).loss)
                engine.step()
            engine.save_checkpoint(str(root), "tag")
        block = pruning_block() | {"security": {"verify": "require", "public_key": public}}
        for kind in KINDS:
            if dist.get_rank() == 0:
                _prepare(root / "tag", kind, private, other)
            dist.barrier()
            with engine_of(tiny_bert(1), ds_config(stage, block)) as engine:
                before = full_weights(engine.module)
                try:
                    engine.load_checkpoint(str(root))
                    results[kind, stage] = engine.compression.applied_steps
                except secure.SecurityError as error:
                    after = full_weights(engine.module)
                    untouched = all(torch.equal(weight, after[name]) for name, weight in before.items())
                    results[kind, stage] = type(error).__name__, untouched
            dist.barrier()
    return results


def _prepare(tag: Path, kind: str, private: str, other: str) -> None:
    extra, signature, state = tag / "more.txt", tag / "model.sig", tag / "ds_compress" / "model.json"
    if kind == "unsigned":
        signature.unlink()
    elif kind == "added":
        secure.sign(tag, private)
        extra.write_text("")
    else:
        secure.sign(tag, other if kind == "another's" else private)
        if kind == "changed":
            state.write_text(state.read_text() + " ")
