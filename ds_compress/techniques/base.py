"""What every stage is: one block of the JSON, attached to a model and stepped beside its optimizer.

A stage never asks where a tensor lives. It changes modules in `prepare`, before any optimizer exists,
and it reads and writes *fragments* of the fp32 master weights afterwards. Everything that crosses
processes goes through the `Shards` it was given, so the same code runs on every ZeRO stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ds_compress.engine.zero.shards import Fragment, Shards


class Technique:
    """Base class with empty hooks; a stage overrides the ones that it needs.

    `step` is always the number of optimizer steps *applied* so far: 0 before the first one, and it does
    not move on a skipped step or a micro-step.
    """

    name: ClassVar[str]

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        """Swaps module classes in place; returns new trainable parameters by qualified name.

        Runs at the start of the engine's constructor: the optimizer does not exist yet. Inside
        `full_parameters([p, ...])` the data of the parameters is whole (each process must enter alike).
        """
        return {}

    def attach(self, shards: Shards) -> None:
        """The optimizer exists; `shards` gives this process its fragments of the master weights."""

    def before_step(self, step: int) -> None:
        """Before the optimizer step, same order in every process: reductions over `shards` are allowed.

        The step may still be skipped: `on_skipped_step` then puts back all that was changed here.
        """

    def on_gradients(self, fragments: Iterable[Fragment], settings: Mapping[str, Any]) -> None:
        """The gradients of these fragments are final (unscaled, clipped), their weights not yet updated.

        `settings` is the optimizer's parameter group that they belong to: lr, betas, weight_decay, ...
        """

    def on_update(self, fragments: Iterable[Fragment]) -> None:
        """The fp32 masters of these fragments were updated; the 16-bit copies are not yet made."""

    def after_step(self, step: int) -> None:
        """`step` optimizer steps are now applied."""

    def on_skipped_step(self) -> None:
        """The step that `before_step` announced was not applied: nothing that it computed remains. No collectives."""

    @property
    def clears_gradients(self) -> bool:
        """Whether `gradient_mask` may give something in the step now running; the same in every process."""
        return False

    def gradient_mask(self, name: str) -> torch.Tensor | None:
        """Packed mask of what will be applied of the gradient of a fragment, in the step now running; None: all."""
        return None

    def masked_weights(self) -> Collection[str]:
        """Names of all parameters that `on_update` may clear elements of; the same in every process."""
        return ()

    def learning_weights(self) -> Collection[str]:
        """Those whose masks follow their gradients, or come and go while they train."""
        return ()

    @property
    def has_new_masks(self) -> bool:
        """Whether `before_step` of the step now running made masks; the same in every process."""
        return False

    def detach(self) -> None:
        """Gives the model its own classes back; parameters, hooks and flags stay as they are."""

    def state_dict(self) -> dict[str, Any]:
        """Small replicated state: equal in every process, JSON-like values and small tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {parameter name: flat tensor aligned with this process' fragment}}; bool or fp32."""
        return {}

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restores what `fragment_state` returned, for the fragments that this process owns now."""

    def process_state(self) -> dict[str, Any]:
        """State of this process alone, whatever it owns; tensors and plain values. Empty: nothing is stored."""
        return {}

    def load_process_state(self, state: Mapping[str, Any] | None) -> None:
        """Restores what `process_state` returned here; None: nothing that fits was stored, begin anew."""

    def after_shrink(self) -> None:
        """The model was cut, and this stage (of the smaller model) has all state of its predecessor."""

    def renamed_state(self, renamed: Callable[[str], str | None]) -> dict[str, Any]:
        """`state_dict` for a model whose names change by `renamed`; None: the module is gone."""
        return self.state_dict()

    def untouched(self) -> list[str]:
        """Names of targets that stay whole although the JSON asks for less of them, because counts are rounded."""
        return []

    def metrics(self) -> dict[str, float]:
        """Numbers for the log and the monitor, at any time. No collectives: process 0 may be the only one to ask."""
        return {}
