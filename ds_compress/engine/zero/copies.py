"""What forward reads, made anew from the fp32 masters.

Masters are the truth about a run; the tensors of the model are copies of them, in 16 bits or sharded. Copies are read
by exports, checkpoints and the rebuilding of an engine, and some may differ from their masters: a restored master has
not reached them yet, or a forward has made weights whole in another precision (`torch_autocast` on ZeRO-3).
"""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.engine.zero import internals
from ds_compress.engine.zero.fragments import all_fragments, check_fragments
from ds_compress.sharding.fragment import Fragment


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Every weight of `engine.module` becomes its rounded master, in every process; a collective.

    Raises RuntimeError where one still is not: the copy is of another layout than we know.
    """
    wrapper = engine.optimizer
    everything = all_fragments(engine, internals.data_parallel_group(engine))
    fragments = [fragment for fragment in everything if fragment.has_optimizer and fragment.numel]
    if internals.flat_16bit_groups(wrapper) is not None:
        wrapper.update_lp_params()
    else:
        internals.release(list(engine.module.parameters()))
        for fragment in fragments:
            copy = _copy(fragment)
            if copy.data_ptr() != fragment.values.data_ptr():
                copy.copy_(fragment.values)
    check_fragments(fragments)


def _copy(fragment: Fragment) -> torch.Tensor:
    """Flat view of what is a copy of the fragment, in the parameter's or its shard's dtype."""
    parameter: Any = fragment.parameter
    if internals.is_zero3_parameter(parameter):
        shard: torch.Tensor = parameter.ds_tensor.data.view(-1)
        return shard[: fragment.numel]
    return parameter.data.view(-1)[fragment.start : fragment.start + fragment.numel]
