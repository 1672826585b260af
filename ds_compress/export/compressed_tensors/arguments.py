"""`QuantizationArgs` of compressed-tensors as the JSON that its own schemes serialise to."""

from __future__ import annotations

from typing import Any

from ds_compress.ops.reference.float_formats import ScaleKind
from ds_compress.quant.formats import FORMATS, NumberFormat

_SCALE_DTYPES = {ScaleKind.E8M0: "torch.uint8", ScaleKind.E4M3: "torch.float8_e4m3fn"}


def arguments(
    bits: int,
    strategy: str,
    *,
    format: str = "int",
    group_size: int | None = None,
    dynamic: bool | str = False,
    symmetric: bool = True,
) -> dict[str, Any]:
    """How one tensor of a layer is quantized. strategy: of `compressed_tensors`, `block` for squares of group_size."""
    from compressed_tensors.quantization import QuantizationArgs

    known = FORMATS.get(format)
    given: dict[str, Any] = {"num_bits": bits, "type": "int" if known is None else "float"}
    given |= {"strategy": strategy, "dynamic": dynamic, "symmetric": symmetric}
    if strategy == "block":
        given["block_structure"] = [group_size, group_size]
    elif group_size is not None:
        given["group_size"] = group_size
    if known is not None and known.scale in _SCALE_DTYPES:
        given["scale_dtype"] = _SCALE_DTYPES[known.scale]
    dumped: dict[str, Any] = QuantizationArgs(**given).model_dump(mode="json")
    return dumped


def strategy_of_groups(known: NumberFormat) -> str:
    """Of groups of neighbours: those of nvfp4 have a scale of the tensor, too."""
    return "tensor_group" if known.has_global_scale else "group"


def preset_of(weights: dict[str, Any] | None, inputs: dict[str, Any] | None) -> str | None:
    """The name of the scheme that compressed-tensors has for these, whatever groups integers have."""
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    wanted = _compared(weights), _compared(inputs)
    for name, preset in PRESET_SCHEMES.items():
        theirs = [preset.get(key) for key in ("weights", "input_activations")]
        dumped = [None if one is None else one.model_dump(mode="json") for one in theirs]
        if (_compared(dumped[0]), _compared(dumped[1])) == wanted:
            return str(name)
    return None


def _compared(one: dict[str, Any] | None) -> dict[str, Any] | None:
    if one is None:
        return None
    left_out = {"observer", "group_size", "strategy"} if one["type"] == "int" else {"observer"}
    return {key: value for key, value in one.items() if key not in left_out}
