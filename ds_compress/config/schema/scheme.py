"""`scheme`: one line that sets both quantization blocks, by the names that compressed-tensors and vLLM have.

"NVFP4", or {"FP8_DYNAMIC": ["self_attn"], "NVFP4": ["mlp"]}: a scheme for each set of modules. A scheme for everything
leaves the output head alone (see `config.resolve`), as servers and their recipes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_compress.errors import Problem, dotted, listed, nearest, shown
from ds_compress.quant.grid import Granularity
from ds_compress.quant.schemes import SCHEMES, QuantizerSpec, Scheme

KEY = "scheme"
_WEIGHTS, _INPUTS = "weight_quantization", "activation_quantization"
_ONE_GROUP = "scheme"
SCHEMA_OF_SCHEME: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "enum": list(SCHEMES)},
        {
            "type": "object",
            "propertyNames": {"enum": list(SCHEMES)},
            "additionalProperties": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        },
        {"type": "null"},
    ]
}
"""For editors."""


def expanded(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The block in which the two quantization blocks say what its `scheme` means, and what is wrong with that.

    What the JSON says in `shared_parameters` of the two blocks stays, so that a scheme can be given a schedule_offset,
    or modules to leave alone. Without a scheme the block is as it was.
    """
    written = dict(block)
    if written.get(KEY) is None:
        return written, []
    if _is_expanded(written):
        return written, []
    problems = list(_problems(written))
    if problems:
        return _without_blocks(written), problems
    chosen = _by_scheme(written[KEY])
    for key, attribute in ((_WEIGHTS, "weights"), (_INPUTS, "inputs")):
        specs = {
            s.name: (spec, modules) for s, modules in chosen if (spec := getattr(s, attribute)) is not None
        }
        if specs:
            written[key] = _block(key, specs, written.get(key) or {})
        elif written.get(key):
            path = dotted(KEY)
            return _without_blocks(written), [
                Problem(
                    path,
                    shown(written[KEY]),
                    f"a scheme that has {key}, which the JSON has",
                    f'remove "{key}"',
                )
            ]
    return written, []


def _is_expanded(written: Mapping[str, Any]) -> bool:
    """Whether the groups are those that the scheme makes: a checkpoint keeps the block as it was understood."""
    blocks = {key: written[key] for key in (_WEIGHTS, _INPUTS) if isinstance(written.get(key), Mapping)}
    if not any(block.get("different_groups") for block in blocks.values()):
        return False
    bare = {key: {**block, "different_groups": None} for key, block in blocks.items()}
    again, problems = expanded({**written, **bare})
    made = {key: again[key]["different_groups"] for key in (_WEIGHTS, _INPUTS) if again.get(key)}
    return not problems and made == {key: block.get("different_groups") for key, block in blocks.items()}


def _without_blocks(written: Mapping[str, Any]) -> dict[str, Any]:
    """What can still be checked when the scheme is wrong."""
    return {key: value for key, value in written.items() if key not in (KEY, _WEIGHTS, _INPUTS)}


def _by_scheme(value: Any) -> list[tuple[Scheme, list[str] | None]]:
    if isinstance(value, str):
        return [(SCHEMES[value.upper()], None)]
    return [(SCHEMES[name.upper()], list(modules)) for name, modules in value.items()]


def _problems(written: Mapping[str, Any]) -> Iterator[Problem]:
    value: Any = written[KEY]
    is_map = isinstance(value, Mapping)
    allowed = (
        f'a name such as "NVFP4", or {{name: [regexes of modules]}}; names are {listed(list(SCHEMES), "and")}'
    )
    if not isinstance(value, str) and not (is_map and value):
        yield Problem(dotted(KEY), shown(value), allowed)
        return
    by_name: Mapping[Any, Any] = value if isinstance(value, Mapping) else {value: ["every"]}
    for name, modules in by_name.items():
        path = dotted(KEY, name) if is_map else dotted(KEY)
        if not isinstance(name, str) or name.upper() not in SCHEMES:
            close = nearest(str(name).upper(), list(SCHEMES))
            yield Problem(path, shown(name), allowed, f'did you mean "{close}"?' if close else "")
        elif not _is_list_of_regexes(modules):
            yield Problem(path, shown(modules), "a list of regexes of module names, not empty")
    for key in (_WEIGHTS, _INPUTS):
        block = written.get(key)
        if isinstance(block, Mapping) and block.get("different_groups"):
            yield Problem(
                dotted(key, "different_groups"),
                "groups",
                f'nothing beside "{KEY}", which makes the groups',
                f'remove one of the two; {{"{KEY}": {{name: [regexes]}}}} gives modules a scheme of their own',
            )


def _is_list_of_regexes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _block(key: str, specs: Mapping[str, tuple[QuantizerSpec, list[str] | None]], own: Any) -> Any:
    if not isinstance(own, Mapping) or not isinstance(own.get("shared_parameters") or {}, Mapping):
        return own  # the error that follows names it
    shared: dict[str, Any] = {"enabled": True}
    if key == _INPUTS and any(spec.format == "int" for spec, _ in specs.values()):
        shared["narrow_range"] = True  # the grid that reaches +max: nobody asks a scheme for the legacy one
    shared |= own.get("shared_parameters") or {}
    groups = {}
    for name, (spec, modules) in specs.items():
        group: dict[str, Any] = {"params": _params(key, spec)}
        if modules is not None:
            group["modules"] = modules
        groups[_ONE_GROUP if modules is None else name] = group
    return {**own, "shared_parameters": shared, "different_groups": groups}


def _params(key: str, spec: QuantizerSpec) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if spec.format == "int":
        params["target_bits" if key == _WEIGHTS else "bits"] = spec.bits
        params["granularity"] = str(spec.granularity)
        if spec.granularity is Granularity.PER_COLUMN_GROUP:
            params["group_size"] = spec.group_size
        return params
    params["format"] = spec.format
    if spec.static and spec.format.startswith("fp8"):
        params["range_calibration"] = "static"
        return params
    if spec.format.startswith("fp8"):
        params["granularity"] = str(spec.granularity)
        if spec.granularity == "per_token_group":
            params["group_size"] = spec.group_size
    return params
