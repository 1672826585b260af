"""Scores of single weights: one class per pruning method, each a few lines of its paper.

Scores are fp32, one number per weight of the fragment that this process owns, computed from the weight w and its
gradient g at the optimizer step. None of them adds a parameter to the model or work to the forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from ds_compress.ops import counter_rng
from ds_compress.select.score_training import adamw_settings


class ScoredFragment(Protocol):
    """The part of a fragment that a score reads."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def values(self) -> torch.Tensor: ...
    @property
    def gradient(self) -> torch.Tensor | None: ...


class Score:
    """Base: `observe` gets the weights and gradients of each step, `scores_of` scores the weights of a fragment."""

    needs_gradient: ClassVar[bool] = False
    """The first mask waits for a gradient."""
    mask_may_change: ClassVar[bool] = False
    """The order of the weights changes by itself, so a masked weight may be unmasked again."""
    masks_gradient: ClassVar[bool] = False
    """Masked weights get no gradient (their scores do)."""
    is_signed: ClassVar[bool] = False
    """Scores may be negative."""

    def __init__(self, seed: int = 0, momentum: float = 0.9) -> None:
        self.seed = seed
        self.momentum = momentum
        self.tensors: dict[str, torch.Tensor] = {}

    def observe(self, fragment: ScoredFragment, settings: Mapping[str, Any]) -> None:
        """Called before each optimizer step; `settings` is the optimizer's parameter group."""

    def learn(self, settings: Mapping[str, Any]) -> None:
        """Called once all fragments of a parameter group were observed."""

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        """fp32 scores of shape (fragment.numel,), larger is kept; the caller may overwrite them."""
        raise NotImplementedError

    def in_place(self, fragment: ScoredFragment, weights: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """fp32 (fragment.numel,), only to be read, and whether the scores are their absolute values; no copy is made
        where the scores are at hand."""
        return self.scores_of(fragment, weights), False

    def after_selection(self) -> None:
        """A mask was just made from these scores; replaces `tensors`, or leaves them alone, but never changes one."""

    def clear(self) -> None:
        """No mask will be made any more."""
        self.tensors.clear()

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"score": dict(self.tensors)} if self.tensors else {}

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.tensors = dict(state.get("score", {}))

    def _accumulator(self, fragment: ScoredFragment) -> torch.Tensor:
        if fragment.name not in self.tensors:
            self.tensors[fragment.name] = torch.zeros(fragment.numel, device=fragment.values.device)
        return self.tensors[fragment.name]


class Magnitude(Score):
    """|w| (Han et al. 2015)."""

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        return weights.float().abs()

    def in_place(self, fragment: ScoredFragment, weights: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return weights.float(), True


class Random(Score):
    """A number in [0, 1) that depends only on (seed, parameter, element): the control of every pruning paper."""

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        key = counter_rng.stream_key(self.seed, fragment.name)
        return counter_rng.uniform(fragment.numel, key, start=fragment.start, device=weights.device)


class Taylor(Score):
    """Sum of |w * g| since the last mask (Molchanov et al. 2017, first-order Taylor expansion of the loss)."""

    needs_gradient = True

    def observe(self, fragment: ScoredFragment, settings: Mapping[str, Any]) -> None:
        if fragment.gradient is not None:
            self._accumulator(fragment).add_(_saliency(fragment))

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        return self._accumulator(fragment).clone()

    def in_place(self, fragment: ScoredFragment, weights: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return self._accumulator(fragment), False

    def after_selection(self) -> None:
        # Not in place: the step may be skipped, and its mask with it.
        self.tensors = {}


class SnipMomentum(Score):
    """S <- momentum * S + |w * g|: SNIP's saliency (Lee et al. 2019), smoothed over steps."""

    needs_gradient = True

    def observe(self, fragment: ScoredFragment, settings: Mapping[str, Any]) -> None:
        if fragment.gradient is not None:
            self._accumulator(fragment).mul_(self.momentum).add_(_saliency(fragment))

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        return self._accumulator(fragment).clone()

    def in_place(self, fragment: ScoredFragment, weights: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return self._accumulator(fragment), False


class Movement(Score):
    """S <- S - w * g (Sanh et al. 2020, equation 4): weights that move away from zero are kept."""

    needs_gradient = True
    mask_may_change = True
    masks_gradient = True
    is_signed = True

    def observe(self, fragment: ScoredFragment, settings: Mapping[str, Any]) -> None:
        if fragment.gradient is not None:
            self._accumulator(fragment).addcmul_(
                fragment.values.float(), fragment.gradient.float(), value=-1.0
            )

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        return self._accumulator(fragment).clone()

    def in_place(self, fragment: ScoredFragment, weights: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return self._accumulator(fragment), False


_LEARN_TOGETHER = 1 << 24
"""Scores whose gradients exist at a time: small ones share one launch on a GPU, large ones do not need much memory."""


class Learned(Score):
    """`topk`: scores trained by gradient descent with a straight-through top-k (Ramanujan et al. 2020).

    The gradient of the score under the straight-through rule is dL/d(masked weight) * w, and both factors are
    known on the owner's fragment at the step: no trainable parameter is added to the model. The scores start
    Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(fan_in), and are trained by AdamW with the
    learning rate (and weight decay, and an Adam's betas and eps) of the weights' own parameter group.
    A mask is made before its step's gradients are final, so it follows the scores one step behind.
    """

    mask_may_change = True
    masks_gradient = True
    is_signed = True

    def __init__(self, seed: int = 0, momentum: float = 0.9) -> None:
        super().__init__(seed, momentum)
        self._optimizer: torch.optim.AdamW | None = None
        self._learning: list[torch.Tensor] = []
        """Scores that have a gradient."""

    def observe(self, fragment: ScoredFragment, settings: Mapping[str, Any]) -> None:
        if fragment.gradient is None:
            return
        score = self._score(fragment)
        score.grad = fragment.gradient.float() * fragment.values.float()
        self._learning.append(score)
        if sum(score.numel() for score in self._learning) > _LEARN_TOGETHER:
            self.learn(settings)

    def learn(self, settings: Mapping[str, Any]) -> None:
        if not self._learning:
            return
        optimizer = self._optimizer_of(self._learning)
        optimizer.param_groups[0].update(adamw_settings(settings))
        optimizer.step()
        for score in self._learning:
            score.grad = None
        self._learning = []

    def scores_of(self, fragment: ScoredFragment, weights: torch.Tensor) -> torch.Tensor:
        return self._score(fragment).clone()

    def in_place(self, fragment: ScoredFragment, weights: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return self._score(fragment), False

    def clear(self) -> None:
        super().clear()
        self._optimizer = None

    def _score(self, fragment: ScoredFragment) -> torch.Tensor:
        if fragment.name not in self.tensors:
            bound = 1.0 / math.sqrt(math.prod(fragment.shape[1:]))
            key = counter_rng.stream_key(self.seed, fragment.name)
            uniform = counter_rng.uniform(fragment.numel, key, fragment.start, device=fragment.values.device)
            self.tensors[fragment.name] = uniform.mul_(2 * bound).sub_(bound)
        return self.tensors[fragment.name]

    def _optimizer_of(self, scores: Sequence[torch.Tensor]) -> torch.optim.AdamW:
        """The one whose `step` changes these scores, and of others only those that have a gradient."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(scores, fused=True)
        known = self._optimizer.param_groups[0]["params"]
        ids = {id(score) for score in known}
        known += [score for score in scores if id(score) not in ids]
        return self._optimizer

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        state = super().fragment_state()
        for name, score in self.tensors.items():
            moments = {} if self._optimizer is None else self._optimizer.state.get(score, {})
            if not moments:
                continue
            for kind in ("exp_avg", "exp_avg_sq"):
                state.setdefault(kind, {})[name] = moments[kind]
            # Per element, so that it is resharded like everything else; one step count per fragment.
            steps = torch.full_like(moments["exp_avg"], float(moments["step"]))
            state.setdefault("score_steps", {})[name] = steps
        return state

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        super().load_fragment_state(state)
        self._optimizer = None
        for name, exp_avg in state.get("exp_avg", {}).items():
            optimizer = self._optimizer_of([self.tensors[name]])
            optimizer.state[self.tensors[name]] = {
                "step": state["score_steps"][name][0].clone(),
                "exp_avg": exp_avg,
                "exp_avg_sq": state["exp_avg_sq"][name],
            }


def _saliency(fragment: ScoredFragment) -> torch.Tensor:
    assert fragment.gradient is not None
    return (fragment.values.float() * fragment.gradient.float()).abs_()


SCORES: dict[str, type[Score]] = {
    "l1": Magnitude,
    "topk": Learned,
    "taylor": Taylor,
    "movement": Movement,
    "snip_momentum": SnipMomentum,
    "random": Random,
}
