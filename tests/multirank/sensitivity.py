"""What several processes measure together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_compress.sensitivity.formats import formats_named
from ds_compress.sensitivity.groups import layer_groups
from ds_compress.sensitivity.measure import measure
from tests.models import tiny_bert, tiny_llama
from tests.unit.sensitivity.models import some_batches

FORMATS = ["int3_g16", "nvfp4", "int8"]


def tables() -> list[dict[str, Any]]:
    """Of two models on 3 batches, which no number of processes divides, and of one batch."""
    found = []
    for model in (tiny_llama(), tiny_bert(head="Model")):
        for count in (10, 3):
            made = measure(model, some_batches(count), formats_named(FORMATS), layer_groups(model))
            found.append(made.as_data())
    return found


def run_all() -> dict[str, Any]:
    return {"tables": tables(), "failure": failure_of_the_last()}


def failure_of_the_last() -> str:
    """What every process says when the weights of one are broken."""
    model = tiny_llama()
    if dist.get_rank() == dist.get_world_size() - 1:
        model.get_parameter("model.norm.weight").data.fill_(float("nan"))
    try:
        measure(model, some_batches(), formats_named(FORMATS), layer_groups(model))
    except ValueError as error:
        return str(error)
    return "none"
