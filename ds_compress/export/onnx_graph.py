"""Edits of an exported ONNX graph: integers and scales instead of float weights."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ds_compress.export.read import InputScheme, Layer
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.qparams import qparams_from_range

_SCOPES = "pkg.torch.onnx.name_scopes"
_PREFIX = "model."
_INT4_BITS = 4


def quantize_graph(model: Any, layers: Iterable[Layer], dtype: torch.dtype | None = None) -> list[str]:
    """Replaces the weights of `layers` in place; returns the names of those whose node was not found."""
    graph = model.graph
    by_module: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Gather", "Conv"):
            by_module.setdefault(_module_of(node), node)
    missing = []
    for layer in layers:
        node = by_module.get(layer.name)
        if node is None:
            missing.append(layer.name)
        elif layer.kind is ModuleKind.EMBEDDING:
            _replace_table(graph, node, layer)
        else:
            # A product, or a convolution, whose kernels are the rows of a matrix.
            _replace_weight(graph, node, layer)
            if layer.input is not None and layer.input.input_range is not None:
                _round_input(graph, node, layer, layer.input)
    _drop_unused(graph)
    _sort(graph)
    return missing


def _module_of(node: Any) -> str:
    for property in node.metadata_props:
        if property.key == _SCOPES:
            scopes = ast.literal_eval(property.value)
            return str(scopes[-2]).removeprefix(_PREFIX) if len(scopes) > 1 else ""
    return ""


def _replace_weight(graph: Any, node: Any, layer: Layer) -> None:
    assert layer.quantized is not None
    quantized, name = layer.quantized, layer.full("weight")
    outputs_first = any(
        a.name == "transB" and a.i for a in node.attribute
    )  # [out, in]; a MatMul's is [in, out]
    values, scale, offset = quantized.values, quantized.scale, quantized.offset
    zero = None
    if offset is not None:
        zero = -torch.round(offset / scale)
    is_convolution = node.op_type == "Conv"
    if is_convolution and quantized.groups > 1:
        return  # the float values are on the grid
    if is_convolution:
        values = values.reshape(quantized.shape)
    elif not outputs_first:
        values, scale = values.t(), scale.t()
        zero = None if zero is None else zero.t()
    axis = 0 if outputs_first or is_convolution else 1
    attributes: dict[str, Any] = {"axis": axis}
    if quantized.groups > 1:
        attributes = {"axis": 1 - axis, "block_size": quantized.group_size}
    else:
        scale = scale.flatten()
        zero = None if zero is None else zero.flatten()
    signed = zero is None
    packs = quantized.bits <= _INT4_BITS
    kind = {
        (True, True): TensorProto.INT4,
        (True, False): TensorProto.INT8,
        (False, True): TensorProto.UINT4,
        (False, False): TensorProto.UINT8,
    }[signed, packs]
    inputs = [f"{name}_codes", f"{name}_scale"]
    graph.initializer.append(_integers(inputs[0], values.contiguous(), kind))
    graph.initializer.append(_floats(inputs[1], scale))
    if zero is not None:
        inputs.append(f"{name}_zero_point")
        graph.initializer.append(_integers(inputs[2], zero.clamp(0, 255).to(torch.uint8).contiguous(), kind))
    graph.node.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_values"], **attributes))
    node.input[1] = f"{name}_values"


def _replace_table(graph: Any, node: Any, layer: Layer) -> None:
    """Only the integers and scales of the rows that are looked up are read."""
    assert layer.quantized is not None
    quantized, name = layer.quantized, layer.full("weight")
    if quantized.groups > 1 or quantized.offset is not None:
        return  # the float values are on the grid
    graph.initializer.append(_integers(f"{name}_codes", quantized.values, TensorProto.INT8))
    graph.initializer.append(_floats(f"{name}_scale", quantized.scale))
    indices, output = node.input[1], node.output[0]
    graph.node.extend(
        [
            helper.make_node("Gather", [f"{name}_codes", indices], [f"{name}_row_codes"], axis=0),
            helper.make_node("Cast", [f"{name}_row_codes"], [f"{name}_row_floats"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}_scale", indices], [f"{name}_row_scale"], axis=0),
            helper.make_node("Mul", [f"{name}_row_floats", f"{name}_row_scale"], [output]),
        ]
    )
    graph.node.remove(node)


def _round_input(graph: Any, node: Any, layer: Layer, used: InputScheme) -> None:
    assert used.input_range is not None
    name, grid = layer.full("input"), used.grid
    qparams = qparams_from_range(used.input_range[0], used.input_range[1], grid)
    graph.initializer.append(_floats(f"{name}_scale", qparams.scale.reshape(())))
    if qparams.offset is None:
        zero = numpy_helper.from_array(np.array(0, np.int8), f"{name}_zero_point")
    else:
        point = float((-torch.round(qparams.offset / qparams.scale)).clamp(0, 255))
        zero = numpy_helper.from_array(np.array(point, np.uint8), f"{name}_zero_point")
    graph.initializer.append(zero)
    scale_and_zero = [f"{name}_scale", f"{name}_zero_point"]
    graph.node.append(helper.make_node("QuantizeLinear", [node.input[0], *scale_and_zero], [f"{name}_codes"]))
    graph.node.append(
        helper.make_node("DequantizeLinear", [f"{name}_codes", *scale_and_zero], [f"{name}_values"])
    )
    node.input[0] = f"{name}_values"


def _integers(name: str, values: torch.Tensor, kind: int) -> Any:
    if kind not in (TensorProto.INT4, TensorProto.UINT4):
        return numpy_helper.from_array(values.contiguous().numpy(), name)
    nibbles = (values.flatten().to(torch.int16) & 15).to(torch.uint8)
    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    # As raw bytes: in the field for numbers each takes one or two.
    raw = (nibbles[::2] | nibbles[1::2] << 4).numpy().tobytes()
    return helper.make_tensor(name, kind, values.shape, raw, raw=True)


def _floats(name: str, values: torch.Tensor) -> Any:
    return numpy_helper.from_array(values.float().contiguous().numpy(), name)


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    described = [value for value in graph.value_info if value.name in used]
    del graph.value_info[:]
    graph.value_info.extend(described)
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        if hasattr(value, "metadata_props"):
            value.ClearField("metadata_props")


def _sort(graph: Any) -> None:
    """Nodes after those that they read from."""
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if all(name in known for name in node.input)]
        if not ready:
            raise ValueError("the exported graph has a cycle")
        for node in ready:
            known.update(node.output)
        ordered += ready
        done = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in done]
    for node in ordered:
        # Where in the Python source a node came from, several times the size of a small model.
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)
