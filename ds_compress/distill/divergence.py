"""Divergences between the predictions of a teacher and of a student, row by row.

Both are log-probabilities [rows, categories] in fp32. Where only the teacher's `k` largest are known, both sides are
reduced to `k + 1` categories: those, and one for all others. By the data-processing inequality the divergence then is
a lower bound of the full one, and equal to it for `k` = all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

# The smallest probability that is left for "everything else", so that its logarithm and gradient stay finite.
_LEAST_TAIL = 1e-6
# Of forbidden tokens, whether their logit is -inf or the most negative number: a difference of two stays finite.
_LEAST_LOG_PROBABILITY = torch.finfo(torch.float32).min / 4

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 log-probabilities of softened logits [..., categories]; finite where those are -inf."""
    return F.log_softmax(logits.float() / temperature, dim=-1).clamp_min(_LEAST_LOG_PROBABILITY)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), [rows]: mode-covering (Hinton et al. 2015)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher), [rows]: mode-seeking (Gu et al. 2024, MiniLLM)."""
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, [rows].

    The generalized divergence of Agarwal et al. 2024 (GKD, equation 2); beta = 0.5 is the symmetric one.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(mixture, teacher) + (1.0 - beta) * forward_kl(mixture, student)


def divergence_of(kind: str, beta: float) -> Divergence:
    """The divergence that the JSON names: `forward_kl`, `reverse_kl` or `jsd`."""
    if kind == "jsd":
        return lambda student, teacher: jensen_shannon(student, teacher, beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[kind]


def with_tail(log_probs: torch.Tensor) -> torch.Tensor:
    """[rows, k] log-probabilities of some categories -> [rows, k + 1]: the last is all others together."""
    known = log_probs.exp().sum(-1, keepdim=True)
    tail = (1.0 - known).clamp_min(_LEAST_TAIL).log()
    return torch.cat([log_probs, tail], dim=-1)
