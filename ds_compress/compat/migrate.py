"""From a JSON of the removed library to one of this: the same meaning, with every difference said.

`migrate(config)` takes a DeepSpeed config, or a `compression_training` block by itself, and returns the new one with
`Note`s: what was changed in the JSON, what the same key does otherwise now, and what this library could do better if
it were asked. A config that is migrated already comes back as it is. What cannot be kept is refused, never dropped.

Where the old code and its documentation disagreed, the documentation holds here; the note says how to get the other.
Blocks that use keys which the old library did not have are taken as written for this one, and left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ds_compress.compat.config import SHARED_KEYS
from ds_compress.compat.removed import without_removed_keys
from ds_compress.config.schema.compression_training import CompressionConfig, parse_config
from ds_compress.errors import ROOT, ConfigError, Problem, nearest, shown

Json = dict[str, Any]

_GROUP_KEYS = ("params", "modules", "related_modules")
_PARAM_KEYS = {
    "weight_quantization": ("start_bits", "target_bits", "quantization_period"),
    "activation_quantization": ("bits",),
}
_SNIP_KEYS = (
    "block_pattern",
    "dense_ratio",
    "schedule_offset_stride",
    "schedule_offset_end",
    "excluded_modules",
)
_LONGEST_KEPT_BITS = 8


class NoteKind(StrEnum):
    """What a note is about."""

    CHANGED = "changed"
    """The JSON was changed here."""
    NOW = "now"
    """The JSON is the same, what happens is not."""
    BETTER = "better"
    """Nothing is different; this library has something better on request."""


@dataclass(frozen=True)
class Note:
    """path: JSON path; kind: see `NoteKind`; text: what is, or happens, and why."""

    path: str
    kind: NoteKind
    text: str


@dataclass
class Migration:
    """config: the new JSON; notes: in the order of the file."""

    config: Json
    notes: list[Note] = field(default_factory=list)


def migrate(config: Mapping[str, Any]) -> Migration:
    """The config for this library, and what there is to know about it.

    Raises:
        ConfigError: what has no counterpart here, and everything that is wrong with the block.
    """
    if not isinstance(config, Mapping):
        raise ConfigError([Problem("the file", shown(config), "a JSON object")])
    made = copy.deepcopy(dict(config))
    is_block = ROOT not in made and bool(made.keys() & {*SHARED_KEYS, "layer_reduction"})
    notes: list[Note] = []
    if not is_block:
        notes += [Note(path, NoteKind.CHANGED, text) for path, text in without_removed_keys(made)]
    block = made if is_block else made.get(ROOT)
    if block is None:
        return Migration(made, notes)
    if not isinstance(block, dict):
        raise ConfigError([Problem(ROOT, shown(block), "an object")])
    notes += _Migrated(block).notes()
    parse_config(block)
    return Migration(made, notes)


class _Migrated:
    """Edits a block in place; one method per technique, each yields its notes."""

    def __init__(self, block: Json) -> None:
        self.block = block
        self.enabled = [key for key in SHARED_KEYS if _shared(block.get(key)).get("enabled") is True]

    def notes(self) -> Iterator[Note]:
        for key in SHARED_KEYS:
            technique = self.block.get(key)
            if isinstance(technique, dict) and _is_legacy(key, technique):
                yield from self._technique(key, technique)
        reduction = self.block.get("layer_reduction")
        if isinstance(reduction, dict):
            yield from self._layer_reduction(reduction)
        yield from self._together()

    def _technique(self, key: str, technique: Json) -> Iterator[Note]:
        yield from self._groups(key, technique)
        shared = _shared(technique)
        if shared.get("enabled") is not True:
            return
        groups: Json = technique.get("different_groups") or {}
        is_snip = key == "sparse_pruning" and shared.get("method") == "snip_momentum"
        if not groups and not is_snip:
            shared["enabled"] = False
            text = "set to false: without groups the old library did nothing; here the block would take all layers"
            yield Note(_path(key, "shared_parameters.enabled"), NoteKind.CHANGED, text)
            return
        if key == "weight_quantization":
            yield from self._weight_quantization(shared, groups)
        elif key == "activation_quantization":
            yield from self._activation_quantization(shared)
        elif key == "sparse_pruning":
            yield from self._sparse_pruning(shared, groups)
        else:
            yield from self._structured(key, shared, groups)

    # -- all techniques --------------------------------------------------------------------------------

    def _groups(self, key: str, technique: Json) -> Iterator[Note]:
        groups = technique.get("different_groups")
        for name, group in groups.items() if isinstance(groups, dict) else ():
            path = _path(key, f"different_groups.{name}")
            if not isinstance(group, dict):
                continue
            if isinstance(group.get("modules"), str):
                whole = group.pop("modules")
                if whole != "*":
                    group["modules"] = [whole]
                text = "a list now: the old library read a string letter by letter, each letter as a regex"
                yield Note(f"{path}.modules", NoteKind.CHANGED, text)
            elif "modules" not in group:
                text = "absent means every Linear, Conv1D and Conv2d; the old library stopped with re.error"
                yield Note(f"{path}.modules", NoteKind.NOW, text)
            if "related_modules" in group and group["related_modules"] is None:
                del group["related_modules"]
                yield Note(f"{path}.related_modules", NoteKind.CHANGED, "null removed: absent means the same")
            yield from _unread(group, _GROUP_KEYS, path)
            params = group.get("params")
            if isinstance(params, dict):
                yield from _unread(params, _PARAM_KEYS.get(key, ("dense_ratio",)), f"{path}.params")

    def _documented_offset(self, key: str, shared: Json) -> Iterator[Note]:
        if "schedule_offset" in shared:
            return
        shared["schedule_offset"] = 0
        text = (
            "0 written: documented so, while the old code waited for 1000 steps; write 1000 to go on waiting"
        )
        yield Note(_path(key, "shared_parameters.schedule_offset"), NoteKind.CHANGED, text)

    # -- one method per block --------------------------------------------------------------------------

    def _weight_quantization(self, shared: Json, groups: Json) -> Iterator[Note]:
        path = _path("weight_quantization", "shared_parameters")
        in_forward = shared.get("quantize_weight_in_forward", False)
        ladders = [g.get("params", {}) for g in groups.values() if isinstance(g, dict)]
        falls = any(p.get("start_bits", 0) != p.get("target_bits", 0) for p in ladders)
        if in_forward and falls:
            text = (
                "bits fall from start_bits to target_bits as documented; with quantize_weight_in_forward the old code "
                "used target_bits at once: quantization_period 0 does that"
            )
            yield Note(_path("weight_quantization", "different_groups"), NoteKind.NOW, text)
        if any(p.get("start_bits", 0) > _LONGEST_KEPT_BITS for p in ladders):
            text = "weights are not quantized while their bits are above 8"
            yield Note(_path("weight_quantization", "different_groups"), NoteKind.NOW, text)
        if not in_forward:
            text = (
                "false (MoQ) works in fp32, bf16 and fp16 on every ZeRO stage: forward computes with the rounded "
                "weight, the fp32 master stays exact; the old code needed an fp16 optimizer at stage 0 or 2"
            )
            yield Note(f"{path}.quantize_weight_in_forward", NoteKind.NOW, text)
        if in_forward and shared.get("rounding") == "stochastic":
            text = "stochastic rounding also holds in forward, where the old code rounded to nearest"
            yield Note(f"{path}.rounding", NoteKind.NOW, text)
        mixed = shared.get("fp16_mixed_quantize")
        if in_forward and isinstance(mixed, dict) and mixed.get("enabled") is True:
            text = "weights are blended in forward too, where the old code never read this key"
            yield Note(f"{path}.fp16_mixed_quantize", NoteKind.NOW, text)
        if shared.get("quantizer_kernel") is True:
            text = (
                "true insists on compiled kernels (CPU or CUDA): without them the run does not start; rounding follows "
                "`rounding`, while the old kernel always rounded stochastically"
            )
            yield Note(f"{path}.quantizer_kernel", NoteKind.NOW, text)
        if in_forward:
            text = (
                "values that clip get no gradient; the old straight-through gradient pushed them further out"
            )
            yield Note(f"{path}.quantize_weight_in_forward", NoteKind.NOW, text)
        if shared.get("quantization_type", "symmetric") == "symmetric":
            text = (
                '"narrow_range": true gives the largest weight a code (1.0 comes back as 0.992 on the old 8-bit grid), '
                'and "granularity": "per_channel" each output its own scale; kept as it was'
            )
            yield Note(f"{path}.quantization_type", NoteKind.BETTER, text)

    def _activation_quantization(self, shared: Json) -> Iterator[Note]:
        yield from self._documented_offset("activation_quantization", shared)
        path = _path("activation_quantization", "shared_parameters")
        if shared.get("range_calibration") == "static":
            text = (
                "ranges are those of all processes, averaged once per optimizer step and saved in checkpoints; the old "
                "code averaged at each forward, in each process by itself"
            )
            yield Note(f"{path}.range_calibration", NoteKind.NOW, text)

    def _sparse_pruning(self, shared: Json, groups: Any) -> Iterator[Note]:
        yield from self._documented_offset("sparse_pruning", shared)
        path = _path("sparse_pruning", "shared_parameters")
        method = shared.get("method", "l1")
        if method == "snip_momentum":
            text = "runs by itself, without neural_compressor, which the old code could not import"
            if groups:
                text += (
                    "; different_groups say which layers and how dense, while the old code took all layers"
                )
            yield Note(f"{path}.method", NoteKind.NOW, text)
            return
        once = method != "topk" and shared.get("schedule_offset_end") is None
        if once and shared.get("schedule_offset_stride", 1) != 1:
            del shared["schedule_offset_stride"]
            text = "removed: without an end one mask is made, and stays; the old code read it for snip_momentum only"
            yield Note(f"{path}.schedule_offset_stride", NoteKind.CHANGED, text)
        for key in _SNIP_KEYS:
            if key in shared and key != "dense_ratio":
                text = f"read for {method} as well; the old code read it for snip_momentum only"
                yield Note(f"{path}.{key}", NoteKind.NOW, text)
        text = "weights are masked once, after the optimizer's step; the old code raised KeyError at schedule_offset"
        if method == "topk":
            text = "scores are no parameters of the model any more; the old code raised KeyError at schedule_offset"
        yield Note(f"{path}.method", NoteKind.NOW, text)

    def _structured(self, key: str, shared: Json, groups: Json) -> Iterator[Note]:
        path = _path(key, "shared_parameters")
        if key in ("row_pruning", "channel_pruning"):
            shared["round_to"] = 1
            text = (
                "1 written: ceil(dense_ratio * n) units stay, as before; without it counts are multiples of 8, which "
                "matrix kernels like better"
            )
            yield Note(f"{path}.round_to", NoteKind.CHANGED, text)
        if key == "head_pruning" and shared.get("method") == "l1":
            yield Note(f"{path}.method", NoteKind.NOW, "l1 is built; the old code raised NotImplementedError")
        for name, group in groups.items():
            modules = group.get("modules", ()) if isinstance(group, dict) else ()
            if isinstance(group, dict) and group.get("related_modules") and len(modules) > 1:
                text = "each regex is cut with its own mask; the old code cut all with the first one's"
                yield Note(_path(key, f"different_groups.{name}.related_modules"), NoteKind.NOW, text)
            if isinstance(group, dict) and not group.get("related_modules"):
                text = (
                    "absent: layers that go together are found from the model and become smaller; the old code only "
                    "zeroed"
                )
                yield Note(_path(key, f"different_groups.{name}.related_modules"), NoteKind.NOW, text)

    def _layer_reduction(self, reduction: Json) -> Iterator[Note]:
        if reduction.get("enabled") is not True:
            return
        path = _path("layer_reduction")
        chosen, number = reduction.get("teacher_layer"), reduction.get("keep_number_layer")
        if isinstance(chosen, list) and number is not None and number != len(chosen):
            reduction["keep_number_layer"] = len(chosen)
            text = f"{len(chosen)}, as many as teacher_layer lists; the old code never read it"
            yield Note(f"{path}.keep_number_layer", NoteKind.CHANGED, text)
        text = (
            "a model that still has all layers is cut, and needs no teacher object; the old code filled the first "
            "layers of a model that was built small, and asserted a teacher"
        )
        yield Note(path, NoteKind.NOW, text)

    def _together(self) -> Iterator[Note]:
        prunes = [key for key in self.enabled if key.endswith("pruning")]
        if "weight_quantization" in self.enabled and prunes:
            text = "weights are pruned first and quantized then, as they will be stored; the old code did it in reverse"
            yield Note(_path("weight_quantization"), NoteKind.NOW, text)


def _shared(technique: Any) -> Json:
    shared = technique.get("shared_parameters") if isinstance(technique, dict) else None
    return shared if isinstance(shared, dict) else {}


def _is_legacy(key: str, technique: Json) -> bool:
    """Whether the technique uses no key of this library that the old one did not have."""
    schema = _keys_of_shared(CompressionConfig.model_fields[key].annotation)
    newer = schema - {*SHARED_KEYS[key], *(_SNIP_KEYS if key == "sparse_pruning" else ())}
    top = technique.keys() - {"shared_parameters", "different_groups"}
    return not (_shared(technique).keys() & newer) and not top & {"dense_ratio"}


def _keys_of_shared(annotation: Any) -> set[str]:
    model = next(part for part in annotation.__args__ if hasattr(part, "model_fields"))
    shared: Any = model.model_fields["shared_parameters"].annotation
    return set(shared.model_fields)


def _unread(own: Json, known: tuple[str, ...], path: str) -> Iterator[Note]:
    """Keys that nothing reads are taken out; what looks like a slip of a known one stays, for the parser to name."""
    for key in [key for key in own if key not in known]:
        if nearest(str(key), [other for other in known if other not in own]) is None:
            del own[key]
            yield Note(f"{path}.{key}", NoteKind.CHANGED, "removed: no version ever read it")


def _path(*steps: str) -> str:
    return ".".join((ROOT, *steps))
