"""`reload_vanilla_hf`, for `model.xml`: OpenVINO runs it, in a process without torch, ds_compress and transformers.

python -P reload_openvino.py REQUESTS.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import openvino
from safetensors.numpy import load_file, save_file

_WEIGHTS = {"MatMul": 1, "Gather": 0, "Convolution": 1, "GroupConvolution": 1}
_CHUNK = 2**20
_GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


def main() -> None:
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        tensors: dict[str, Any] = {}
        try:
            inputs = load_file(request["inputs"])
            core = openvino.Core()
            model = core.read_model(f"{request['folder']}/model.xml")
            has_size = model.has_rt_info(["runtime_options", _GROUP_SIZE])
            tensors["logits"] = logits(core, model, inputs, {} if has_size else {_GROUP_SIZE: 0})
            found = fingerprints(core, model)
            without_rounding_of_inputs(model)
            tensors["exact_logits"] = logits(core, model, inputs, {_GROUP_SIZE: 0})
            loaded = f"openvino {openvino.__version__.split('-')[0]}"
            metadata = {"loaded": loaded, "fingerprints": json.dumps(found)}
            imported = [name for name in ("torch", "transformers", "ds_compress") if name in sys.modules]
            if imported:
                raise RuntimeError(f"a server needs {imported[0]}")
        except Exception as error:
            metadata = {"error": f"{type(error).__name__}: {error}"}
        save_file(tensors, request["outputs"], metadata=metadata)


def logits(core: Any, model: Any, inputs: dict[str, Any], properties: dict[str, Any]) -> Any:
    """fp32; by default the CPU plugin computes in bfloat16 where it can.

    properties: whether it rounds the inputs of weight-only products to int8, which it does by default, too.
    """
    given = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, **properties}
    compiled = core.compile_model(model, "CPU", given)
    names = {entry.get_any_name() for entry in compiled.inputs}
    output = compiled({name: value for name, value in inputs.items() if name in names})["logits"]
    return np.ascontiguousarray(output, np.float32)


def fingerprints(core: Any, model: Any) -> dict[str, list[float]]:
    """Of the weights that are stored as integers, and of the scales of rounded inputs, by the names of training."""
    found = {}
    for node in model.get_ops():
        place = _WEIGHTS.get(node.get_type_name())
        if place is None:
            continue
        name = node.get_friendly_name()
        weight = dequantized(node.input_value(place).get_node())
        if weight is not None:
            found[f"{name}.weight"] = fingerprint(weight)
        quantizer = node.input_value(0).get_node()
        if quantizer.get_type_name() == "FakeQuantize":
            low, high = (quantizer.input_value(i).get_node().data.item() for i in (3, 4))
            steps = quantizer.get_attributes()["levels"] - 1
            found[f"{name}.input_scale"] = fingerprint(np.array([(high - low) / steps], np.float32))
    return found


def dequantized(node: Any) -> Any | None:
    """The value of the operations that make floats of integers; None where they do not begin with integers."""
    kind = node.get_type_name()
    if kind == "Constant":
        return None if node.get_output_element_type(0).is_real() else integers(node)
    if kind == "Convert":
        value = dequantized(node.input_value(0).get_node())
        return None if value is None else value.astype(np.float32)
    if kind not in ("Subtract", "Multiply", "Reshape"):
        return None
    value = dequantized(node.input_value(0).get_node())
    other = node.input_value(1).get_node()
    if value is None:
        return None
    if kind == "Reshape":
        return value.reshape(other.data)
    number = other.data if other.get_type_name() == "Constant" else dequantized(other)
    return value - number if kind == "Subtract" else value * number


def integers(constant: Any) -> Any:
    """The values of a constant; those of 4 bits lie two in a byte, the lower half first."""
    kind, shape = constant.get_output_element_type(0).get_type_name(), [*constant.get_output_shape(0)]
    data = constant.get_data() if kind not in ("i4", "u4") else constant.data.view(np.uint8).flatten()
    if kind in ("i4", "u4"):
        halves = np.stack([data & 15, data >> 4], 1).flatten()[: int(np.prod(shape))]
        data = (halves ^ 8).astype(np.int8) - 8 if kind == "i4" else halves
    return np.asarray(data).reshape(shape)


def without_rounding_of_inputs(model: Any) -> None:
    """Whoever reads what went through a FakeQuantize reads what came before it."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            node.output(0).replace(node.input_value(0))


def fingerprint(values: Any) -> list[float]:
    """What `fingerprint.fingerprint` gives for a tensor."""
    places = np.arange(min(_CHUNK, values.size), dtype=np.int64)
    signs = (places * 2654435761 % 4294967296).astype(np.float64) / 2147483648 - 1
    flat = values.flatten()
    squares = projection = 0.0
    for number, start in enumerate(range(0, flat.size, _CHUNK)):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        squares += float(chunk @ chunk)
        projection += float(chunk @ signs[: len(chunk)]) * (1 + number % 7)
    return [squares**0.5, projection]


if __name__ == "__main__":
    main()
