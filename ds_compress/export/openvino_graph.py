"""Edits of a converted OpenVINO graph: integers and scales instead of float weights, and rounded inputs.

A weight is Constant (i8, u8, i4, u4) -> Convert -> [Subtract zero point] -> Multiply scale -> [Reshape], the pattern
that OpenVINO's CPU plugin keeps as integers, in compressed products, int8 products and table look-ups alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops

from ds_compress.errors import ExportError
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme, Layer
from ds_compress.quant.qparams import qparams_from_range

_PLACE_OF_WEIGHT = {"MatMul": 1, "Gather": 0, "Convolution": 1, "GroupConvolution": 1}
_ON_THE_WAY = ("Reshape", "Transpose", "Convert")
_INT4_BITS = 4
_WORTHWHILE = 512  # numbers, of which half the bytes are more than what says so
_16_BIT = {torch.float16: openvino.Type.f16, torch.bfloat16: openvino.Type.bf16}


def quantize_graph(
    graph: Any, places: Mapping[str, Iterable[str]], layers: Iterable[Layer], dtype: torch.dtype | None = None
) -> list[str]:
    """Replaces the weights of `layers` in place; returns the names of those whose operation was not found.

    places: of a module, the first parts of the names of its operations. Each product is then named after its module
    (":1", ":2" behind its later calls). dtype: floats that it represents exactly are stored in it.

    Raises:
        ExportError: a weight in the graph is not the one of its layer.
    """
    by_place: dict[str, list[Any]] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() in _PLACE_OF_WEIGHT:
            by_place.setdefault(node.get_friendly_name().split("/")[0], []).append(node)
    quantizers: dict[tuple[str, int, float, float], Any] = {}
    missing = []
    for layer in layers:
        nodes = [node for place in places.get(layer.name, ()) for node in by_place.get(place, ())]
        nodes = [node for node in nodes if _weight_of(node) is not None]
        if not nodes:
            missing.append(layer.name)
        for number, node in enumerate(nodes):
            node.set_friendly_name(layer.name + (f":{number}" if number else ""))
            _replace_weight(node, layer)
            if layer.input is not None and layer.input.input_range is not None:
                _round_input(node, layer.input, quantizers)
    if dtype in _16_BIT:
        _store_in_16_bits(graph, dtype)
    graph.validate_nodes_and_infer_types()
    return missing


def _weight_of(node: Any) -> Any | None:
    """The constant that a product multiplies by, or that a table is."""
    found = node.input_value(_PLACE_OF_WEIGHT[node.get_type_name()]).get_node()
    while found.get_type_name() in _ON_THE_WAY:
        found = found.input_value(0).get_node()
    return found if found.get_type_name() == "Constant" else None


def _replace_weight(node: Any, layer: Layer) -> None:
    """For all operations that read the constant: a tied weight, or one of a module that is called again."""
    assert layer.quantized is not None
    constant = _weight_of(node)
    if constant is None:
        return  # by an operation before, which reads the same one
    trained = layer.quantized.dequantize().numpy()
    if not np.array_equal(constant.data, trained):
        raise ExportError(f"{layer.name}: the converted graph has another weight at its place")
    name = layer.full("weight")
    is_rounded = layer.input is not None and layer.input.input_range is not None
    output = dequantized(layer.quantized, name, in_bytes=is_rounded)
    constant.output(0).replace(output.output(0))


def dequantized(quantized: QuantizedMatrix, name: str, in_bytes: bool = False) -> Any:
    """The operation that gives the weight in its own shape, in fp32; named `name`, its constants after it.

    in_bytes: int4 values become bytes when the model is loaded, for products with rounded inputs.
    """
    values, scale, offset = quantized.values, quantized.scale, quantized.offset
    rows, columns = values.shape
    shape = [*quantized.shape]
    zero = None if offset is None else (-torch.round(offset / scale)).clamp(0, 255)
    if quantized.groups > 1:
        # [out, groups, columns], which a Reshape joins to the weight again.
        shape = [rows, quantized.groups, columns // quantized.groups]
        if quantized.transposed:
            shape = [quantized.groups, columns // quantized.groups, rows]
    of_scale = _scale_shape(quantized, shape)
    if quantized.transposed:
        values, scale = values.t(), scale.t()
        zero = None if zero is None else zero.t()
    kinds = {
        (True, True): openvino.Type.i4,
        (True, False): openvino.Type.i8,
        (False, True): openvino.Type.u4,
        (False, False): openvino.Type.u8,
    }
    stored = kinds[zero is None, quantized.bits <= _INT4_BITS]
    integers = values.contiguous().numpy().reshape(shape)
    codes = _integers(integers, stored, f"{name}_codes")
    if in_bytes and quantized.bits <= _INT4_BITS and quantized.groups == 1:
        codes = ops.convert(codes, "i8" if zero is None else "u8")
    result = _as_float(codes)
    if zero is not None:
        points = zero.to(torch.uint8).contiguous().numpy().reshape(of_scale)
        result = ops.subtract(result, _as_float(_integers(points, stored, f"{name}_zero_point")))
    scales = ops.constant(scale.float().contiguous().numpy().reshape(of_scale))
    scales.set_friendly_name(f"{name}_scale")
    result = ops.multiply(result, scales)
    if [*result.get_output_shape(0)] != [*quantized.shape]:
        result = ops.reshape(result, np.array(quantized.shape, np.int64), special_zero=False)
    result.set_friendly_name(name)
    return result


def _scale_shape(quantized: QuantizedMatrix, shape: list[int]) -> list[int]:
    """In which the scales broadcast over integers of `shape`."""
    if quantized.groups > 1:
        return [shape[0], 1, shape[2]] if quantized.transposed else [shape[0], shape[1], 1]
    if quantized.transposed:
        return [1, shape[1]]
    return [shape[0]] + [1] * (len(shape) - 1)


def _integers(values: np.ndarray[Any, Any], kind: Any, name: str) -> Any:
    constant = ops.constant(values, dtype=kind)
    constant.set_friendly_name(name)
    return constant


def _as_float(constant: Any) -> Any:
    return ops.convert(constant, "f32")


def _round_input(node: Any, used: InputScheme, quantizers: dict[tuple[str, int, float, float], Any]) -> None:
    """One FakeQuantize for all products that read the same values and have the same range."""
    assert used.input_range is not None
    grid = used.grid
    qparams = qparams_from_range(used.input_range[0], used.input_range[1], grid)
    scale = float(qparams.scale)
    offset = 0.0 if qparams.offset is None else float(qparams.offset)
    low, high = grid.quant_min * scale + offset, grid.quant_max * scale + offset
    source = node.input_value(0)
    key = (source.get_node().get_name(), source.get_index(), low, high)
    quantizer = quantizers.get(key)
    if quantizer is None:
        ends = [
            np.array(end, np.float32).reshape([1] * len(source.get_partial_shape())) for end in (low, high)
        ]
        levels = int(grid.quant_max - grid.quant_min) + 1
        quantizer = quantizers[key] = ops.fake_quantize(source, *ends, *ends, levels)
    node.input(0).replace_source_output(quantizer.output(0))


def _store_in_16_bits(graph: Any, dtype: torch.dtype) -> None:
    """Constants that lose nothing by it; those of a FakeQuantize are read before they are converted."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != openvino.Type.f32:
            continue
        values = torch.from_numpy(np.array(node.data))
        readers = {reader.get_node().get_type_name() for reader in node.output(0).get_target_inputs()}
        if (
            values.numel() < 2
            or "FakeQuantize" in readers
            or not torch.equal(values.to(dtype).float(), values)
        ):
            continue
        halved = ops.constant(values.numpy(), dtype=_16_BIT[dtype])
        halved.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(_as_float(halved).output(0))
