"""Cuts as JSON: what a loader needs to shrink a freshly built model like one that was cut before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_compress.structure.cut import Cuts
from ds_compress.structure.structure import Member, Structure, StructureKind

_FORMAT = 1


def describe(cuts: Cuts) -> dict[str, Any]:
    """`{"format": 1, "tied": {...}, "structures": [...]}` of the structures that lose something; see `rebuild`."""
    return {
        "format": _FORMAT,
        "tied": cuts.aliases,
        "structures": [
            {
                "name": structure.name,
                "kind": structure.kind.value,
                "modules": list(structure.modules),
                "units": structure.units,
                "kept": cuts.kept[structure.name].tolist(),
                "layers": list(structure.layers),
                "members": [_described(member) for member in structure.members],
            }
            for structure in cuts.active()
        ],
    }


def cuts_described(description: dict[str, Any]) -> Cuts:
    """The cuts of a `description()`, without a model at hand.

    Raises:
        ValueError: written by a newer version.
    """
    if description["format"] != _FORMAT:
        raise ValueError(f"cuts of format {description['format']}; this version reads format {_FORMAT}")
    structures = [
        Structure(
            name=entry["name"],
            kind=StructureKind(entry["kind"]),
            modules=tuple(entry["modules"]),
            units=entry["units"],
            members=tuple(_member(member, entry["units"]) for member in entry["members"]),
            layers=tuple(entry["layers"]),
        )
        for entry in description["structures"]
    ]
    kept = {entry["name"]: torch.tensor(entry["kept"]) for entry in description["structures"]}
    return Cuts.of(structures, kept, aliases=description["tied"])


def rebuild(model: nn.Module, description: dict[str, Any]) -> None:
    """Shrinks `model`, built full-size from the config before the cut, as described; on the meta device or not.

    Raises:
        ValueError: the model has not the tensors or sizes of the one that was cut.
    """
    cuts_described(description).rewrite(model, skeleton=True)


def _described(member: Member) -> dict[str, Any]:
    return {
        "tensor": member.tensor,
        "dim": member.dim,
        "index": _packed(member.index),
        "rescale": member.rescale,
    }


def _member(entry: dict[str, Any], units: int) -> Member:
    return Member(entry["tensor"], entry["dim"], _unpacked(entry["index"], units), rescale=entry["rescale"])


def _packed(index: torch.Tensor) -> Any:
    """{start, unit, entry, width} when entries are evenly spaced in both directions, as they mostly are."""
    units, width = index.shape
    start = int(index[0, 0])
    packed = {
        "start": start,
        "unit": int(index[1, 0]) - start if units > 1 else 0,
        "entry": int(index[0, 1]) - start if width > 1 else 0,
        "width": width,
    }
    return packed if torch.equal(_unpacked(packed, units), index) else index.tolist()


def _unpacked(packed: Any, units: int) -> torch.Tensor:
    if isinstance(packed, list):
        return torch.tensor(packed)
    across = torch.arange(packed["width"]) * packed["entry"]
    return packed["start"] + torch.arange(units).view(-1, 1) * packed["unit"] + across
