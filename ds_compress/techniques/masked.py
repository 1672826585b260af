"""What techniques that mask weights share: schedule, packed masks on fragments, and latent weights under them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ds_compress.config.schema.randomize import SECRET
from ds_compress.ops import bitmask
from ds_compress.select.gumbel import GumbelNoise
from ds_compress.select.schedules import DensitySchedule
from ds_compress.techniques.base import Technique

if TYPE_CHECKING:
    import torch

    from ds_compress.sharding.fragment import Fragment
    from ds_compress.sharding.shards import Shards

_LATENT = "hidden"
"""Kind of the latent weights in checkpoints, where they have had this name since the first."""


def schedule_of(shared: Any, needs_gradient: bool) -> DensitySchedule:
    """The schedule that `shared_parameters` ask for; scores that need a gradient have none before the second step."""
    first, end = max(shared.schedule_offset, 2 if needs_gradient else 1), shared.schedule_offset_end
    return DensitySchedule(
        shared.effective_schedule,
        first,
        None if end is None else max(end, first),
        shared.schedule_offset_stride,
    )


def noise_of(block: str, shared: Any, seed: int) -> GumbelNoise | None:
    """What `shared_parameters.randomize` adds to log-scores; None: nothing. `seed`: that of the whole config."""
    randomize = shared.randomize
    if randomize is None or not randomize.temperature:
        return None
    given = seed if randomize.seed is None else randomize.seed
    return GumbelNoise(block, randomize.temperature, None if given == SECRET else given)


class MaskedTechnique(Technique):
    """Keeps one packed bit per weight of this process' fragments, and applies them to the masters after each update.

    A mask whose mind may change keeps the *latent* weights that it covers: they are put back before an update, train
    on, and are saved before the mask is applied again.
    """

    schedule: DensitySchedule

    def __init__(self, names: Collection[str], noise: GumbelNoise | None = None) -> None:
        """`names`: of all weights that may be masked; `noise`: of a random choice."""
        self._masked_names = names
        self.noise = noise
        self._fragments: dict[str, Fragment] = {}
        self.masks: dict[str, torch.Tensor] = {}
        """Packed masks of this process' fragments (`ops.bitmask`), by name."""
        self.latent: dict[str, torch.Tensor] = {}
        """fp32 values under the masks, aligned with this process' fragments."""
        self._step = 0

    def attach(self, shards: Shards) -> None:
        if self.noise is not None:
            self.noise.draw(shards.from_first_process)
        self._shards = shards
        self._fragments = shards.select(list(self._masked_names))

    @property
    def masks_may_change(self) -> bool:
        """Whether a masked weight may come back, and keeps its latent value until then."""
        raise NotImplementedError

    @property
    def is_over(self) -> bool:
        """No mask will be made after the one that the step now running applies."""
        return self.schedule.is_over(self._step + 1, self.masks_may_change)

    def masked_weights(self) -> Collection[str]:
        return self._masked_names

    def _own(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        return (fragment for fragment in fragments if fragment.name in self._fragments)

    def _restore_latent(self, fragment: Fragment) -> None:
        if fragment.name in self.latent:
            fragment.values.copy_(self.latent[fragment.name])

    def _save_latent(self, fragment: Fragment) -> None:
        """Keeps the values that the mask is about to clear (the master itself shows zeros)."""
        if fragment.name in self.latent:
            self.latent[fragment.name].copy_(fragment.values)
        else:
            self.latent[fragment.name] = fragment.values.clone()

    def on_update(self, fragments: Iterable[Fragment]) -> None:
        masked = []
        for fragment in self._own(fragments):
            mask = self.masks.get(fragment.name)
            if mask is None:
                continue
            if self.masks_may_change and not self.is_over:
                self._save_latent(fragment)
            masked.append((fragment.values, mask))
        bitmask.apply_many_(masked)

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {_LATENT: self.latent} if self.latent else {}

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.latent = dict(state.get(_LATENT, {}))

    @property
    def secret_seed(self) -> str | None:
        return None if self.noise is None else self.noise.secret_seed

    def state_dict(self) -> dict[str, Any]:
        secret = self.secret_seed
        return {} if secret is None else {"secret_seed": secret}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.noise is not None:
            self.noise.restore(state)

    def mask_bytes(self) -> int:
        """Bytes of masks that this process holds."""
        return sum(mask.numel() for mask in self.masks.values())
