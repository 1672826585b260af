"""`compression_scheduler` of the removed library: drives the schedule in a training loop without an engine.

    scheduler = compression_scheduler(model, config)      # after init_compression
    for batch in data:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

Masks, bits and ranges then follow the JSON exactly as under DeepSpeed's engine: the step of a torch optimizer is where
masks are made and applied, `scheduler.step()` is where it is counted. Calls without an optimizer's step between them
(micro-steps, steps that a gradient scaler skipped) count nothing. In several processes each has the whole model and
the same gradients (DistributedDataParallel); each calls `step`. With an engine around the model, which counts its
steps itself, every method is there and `step` does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from ds_compress.compat.compress import unwrapped
from ds_compress.compat.config import block_of_config, enabled_blocks
from ds_compress.config.schema.compression_training import parse_config
from ds_compress.engine.attach import attach_to_loop
from ds_compress.engine.registry import means_the_same, run_of
from ds_compress.engine.run import CompressionRun
from ds_compress.errors import ROOT, ConfigError, Problem


class compression_scheduler:
    """Attributes: `model`, the module that is trained; `training_steps`, applied steps so far.

    Args:
        model: what `init_compression` was given, or a wrapper of it.
        compression_config: the same config, in any form: path, DeepSpeed config, block, `get_compression_config`.

    Raises:
        ConfigError: `init_compression` was not called with this block, or it needs an engine.
    """

    def __init__(self, model: Any, compression_config: Mapping[str, Any] | str | PathLike[str]) -> None:
        self.model = unwrapped(model)
        self.compression_config = compression_config
        self._run = self._of_model()
        if self._run is not None and self._run.engine is None:
            attach_to_loop(self._run)

    def _of_model(self) -> CompressionRun | None:
        block = block_of_config(self.compression_config) or {}
        run = run_of(self.model)
        if not enabled_blocks(block) and run is None:
            return None
        if run is None:
            raise ConfigError(
                [Problem(ROOT, "a model that is not prepared", "one after init_compression(model, config)")]
            )
        if not means_the_same(parse_config(block), run.given):
            got = "another block than init_compression was given"
            raise ConfigError([Problem(ROOT, got, "the same block", "give both the same config")])
        return run

    @property
    def training_steps(self) -> int:
        return 0 if self._run is None else self._run.applied_steps

    def step(self, step_zero_check: bool = False) -> None:
        """The optimizer has stepped. `step_zero_check`: it has not; what starts at step 0 is on already."""
        if self._run is not None and not step_zero_check:
            self._run.end_step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer: counters, ranges, masks, latent weights.

        Empty under an engine, whose checkpoints have it. `torch.load(weights_only=True)` reads it.
        """
        run = self._run
        if run is None or run.engine is not None:
            return {}
        parts = {name: technique.fragment_state() for name, technique in run.techniques.items()}
        return {**run.state_dict(), "fragments": _copied(parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; load model and optimizer as well, in any order.

        Raises:
            ValueError: it is the state of other blocks, or of another model.
        """
        run = self._run
        if run is None or run.engine is not None:
            if state:
                raise ValueError(
                    "this scheduler has no state: the engine's load_checkpoint restores everything"
                )
            return
        if set(state["stages"]) != set(run.techniques):
            raise ValueError(
                f"the state is of {sorted(state['stages'])}, the run has {sorted(run.techniques)}"
            )
        parts = {
            name: {kind: self._own(f"{name}/{kind}", by_name) for kind, by_name in kinds.items()}
            for name, kinds in state["fragments"].items()
        }
        run.load_state_dict(state)
        for name, technique in run.techniques.items():
            technique.load_fragment_state(parts[name])

    def _own(self, what: str, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of stored tensors where this model's parameters are."""
        assert self._run is not None
        fragments = self._run.shards.fragments
        for name, values in stored.items():
            if name not in fragments or fragments[name].numel != values.numel():
                raise ValueError(f"{what}: {values.numel()} values of {name!r}, which this model has not")
        return {name: values.to(fragments[name].values.device, copy=True) for name, values in stored.items()}


def _copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    return {key: _copied(value) for key, value in state.items()}


__all__ = ["compression_scheduler"]
