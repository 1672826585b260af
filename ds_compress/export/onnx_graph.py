"""Edits of an exported ONNX graph: integers and scales instead of float weights."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ds_compress.export.onnx import integer_inputs
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme, Layer
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.ops.reference.fake_quantize import SMALLEST_SCALE
from ds_compress.quant.grid import ActivationGrid
from ds_compress.quant.qparams import qparams_from_range

_SCOPES = "pkg.torch.onnx.name_scopes"
_PREFIX = "model."
_INT4_BITS = 4
_WORTHWHILE = 512  # numbers, of which half the bytes are more than what says so
_MIDDLE = 128  # uint8 of an int8 zero: onnxruntime multiplies signed inputs on few CPUs
_16_BIT = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
_KINDS = {
    (True, True): TensorProto.INT4,
    (True, False): TensorProto.INT8,
    (False, True): TensorProto.UINT4,
    (False, False): TensorProto.UINT8,
}
"""By whether it is symmetric, and whether 4 bits suffice."""


def quantize_graph(model: Any, layers: Iterable[Layer], dtype: torch.dtype | None = None) -> list[str]:
    """Replaces the weights of `layers` in place; returns the names of those whose node was not found.

    dtype: floats that it represents exactly are stored in it.
    """
    graph = model.graph
    by_module: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Gather", "Conv"):
            by_module.setdefault(_module_of(node), []).append(node)
    names = {tensor.name for tensor in graph.initializer}
    edits = _Edits(graph)
    missing = []
    for layer in layers:
        # A module that is called again, as ALBERT's layers are, has several.
        nodes = [node for node in by_module.get(layer.name, ()) if names & set(node.input)]
        if not nodes:
            missing.append(layer.name)
        for node in nodes:
            if layer.kind is ModuleKind.EMBEDDING:
                edits.replace_table(node, layer)
            elif integer_inputs(layer):
                edits.integer_product(node, layer)
            else:
                # A product, or a convolution, whose kernels are the rows of a matrix.
                edits.replace_weight(node, layer)
                if layer.input is not None and layer.input.input_range is not None:
                    edits.round_input(node, layer, layer.input)
    if dtype in _16_BIT:
        edits.store_in_16_bits(dtype)
    _drop_unused(graph)
    _sort(graph)
    return missing


def _module_of(node: Any) -> str:
    for property in node.metadata_props:
        if property.key == _SCOPES:
            scopes = ast.literal_eval(property.value)
            return str(scopes[-2]).split("@")[0].removeprefix(_PREFIX) if len(scopes) > 1 else ""
    return ""


class _Edits:
    """Adds what several layers may share once: weights of modules that are called again, and rounded inputs."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._known: set[str] = set()
        self._layouts: dict[str, int] = {}
        self._rounded: dict[tuple[str, int, int], tuple[str, str, str]] = {}

    def replace_weight(self, node: Any, layer: Layer) -> None:
        assert layer.quantized is not None
        quantized = layer.quantized
        name = layer.full("weight")
        if node.op_type == "Conv" and quantized.groups > 1:
            return  # the float values are on the grid
        is_rounded = layer.input is not None and layer.input.input_range is not None
        outputs_first = _outputs_first(node)
        values, scale, zero = _laid_out(quantized, node.op_type == "Conv", outputs_first)
        axis = 0 if outputs_first or node.op_type == "Conv" else 1
        # A tied weight may be read in both layouts.
        suffix = "" if self._layouts.setdefault(name, axis) == axis else "_t"
        packs = quantized.bits <= _INT4_BITS
        kind = _KINDS[zero is None, packs]
        inputs = [self._integers(f"{name}_codes{suffix}", values, kind)]
        if node.op_type != "Conv" and not packs and not is_rounded:
            # onnxruntime makes MatMulNBits of a DequantizeLinear, several times slower than floats with 8 bits; these
            # operations it computes once, when it loads the model.
            self._floats_of(inputs[0], name, suffix, scale, zero)
        else:
            attributes: dict[str, Any] = {"axis": axis}
            if quantized.groups > 1:
                attributes = {"axis": 1 - axis, "block_size": quantized.group_size}
            else:
                scale = scale.flatten()
                zero = None if zero is None else zero.flatten()
            inputs.append(self._floats(f"{name}_scale{suffix}", scale))
            if zero is not None:
                inputs.append(self._integers(f"{name}_zero_point{suffix}", zero, kind))
            self._node("DequantizeLinear", inputs, f"{name}_values{suffix}", **attributes)
        node.input[1] = f"{name}_values{suffix}"

    def _floats_of(
        self, codes: str, name: str, suffix: str, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> None:
        """(codes - zero) * scale, of groups too."""
        values = self._node("Cast", [codes], f"{name}_floats{suffix}", to=TensorProto.FLOAT)
        shape = next(list(t.dims) for t in self.graph.initializer if t.name == codes)
        axis = next((i for i in (0, 1) if scale.shape[i] not in (1, shape[i])), None)
        in_groups = axis is not None
        if axis is not None:
            groups = scale.shape[axis]
            split = [*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]]
            scale = scale.unsqueeze(axis + 1)
            zero = None if zero is None else zero.unsqueeze(axis + 1)
            splits = self._constant(f"{name}_in_groups{suffix}", np.array(split, np.int64))
            values = self._node("Reshape", [values, splits], f"{name}_floats_in_groups{suffix}")
        if zero is not None:
            points = self._floats(f"{name}_zero_point{suffix}", zero)
            values = self._node("Sub", [values, points], f"{name}_from_zero_point{suffix}")
        result = f"{name}_values{suffix}"
        scales = self._floats(f"{name}_scale{suffix}", scale)
        scaled = self._node("Mul", [values, scales], f"{name}_scaled{suffix}" if in_groups else result)
        if in_groups:
            whole = self._constant(f"{name}_shape{suffix}", np.array(shape, np.int64))
            self._node("Reshape", [scaled, whole], result)

    def replace_table(self, node: Any, layer: Layer) -> None:
        """Only the integers and scales of the rows that are looked up are read."""
        assert layer.quantized is not None
        quantized, name = layer.quantized, layer.full("weight")
        if quantized.groups > 1 or quantized.offset is not None:
            return  # the float values are on the grid
        kind = _KINDS[True, quantized.bits <= _INT4_BITS]
        table, indices, output = node.input[0], node.input[1], node.output[0]
        codes = self._integers(f"{name}_codes", quantized.values, kind)
        scale = self._floats(f"{name}_scale", quantized.scale)
        if kind == TensorProto.INT4:
            # onnxruntime looks up no int4: it makes bytes of them when it loads the model.
            codes = self._node("Cast", [codes], f"{name}_bytes", to=TensorProto.INT8)
        rows = self._node("Gather", [codes, indices], f"{output}_row_codes", axis=0)
        floats = self._node("Cast", [rows], f"{output}_row_floats", to=TensorProto.FLOAT)
        scales = self._node("Gather", [scale, indices], f"{output}_row_scale", axis=0)
        self._node("Mul", [floats, scales], output)
        self.graph.node.remove(node)
        self._of_tied_table(table, codes, scale, name)

    def _of_tied_table(self, table: str, codes: str, scale: str, name: str) -> None:
        """Whoever else reads the table reads the same integers."""
        readers = [(n, place) for n in self.graph.node for place, used in enumerate(n.input) if used == table]
        if not readers:
            return
        flat = self._constant(f"{name}_one_axis", np.array([-1], np.int64))
        scales = self._node("Reshape", [scale, flat], f"{name}_scale_of_rows")
        values = self._node("DequantizeLinear", [codes, scales], f"{name}_values", axis=0)
        for reader, place in readers:
            reader.input[place] = values

    def round_input(self, node: Any, layer: Layer, used: InputScheme) -> None:
        assert used.input_range is not None
        name, grid = layer.full("input"), used.grid
        qparams = qparams_from_range(used.input_range[0], used.input_range[1], grid)
        scale = self._floats(f"{name}_scale", qparams.scale.reshape(()))
        if qparams.offset is None:
            zero = self._constant(f"{name}_zero_point", np.array(0, np.int8))
        else:
            point = float((-torch.round(qparams.offset / qparams.scale)).clamp(0, 255))
            zero = self._constant(f"{name}_zero_point", np.array(point, np.uint8))
        # Those of query, key and value are alike, and not one: onnxruntime fuses a pair with one product only.
        name = f"{node.output[0]}_input"
        codes = self._node("QuantizeLinear", [node.input[0], scale, zero], f"{name}_codes")
        if grid.bits < 8:
            dtype = np.int8 if qparams.offset is None else np.uint8
            ends = [
                self._constant(f"{name}_{what}", np.array(value, dtype))
                for what, value in (("lowest", grid.quant_min), ("highest", grid.quant_max))
            ]
            codes = self._node("Clip", [codes, *ends], f"{name}_clipped_codes")
        node.input[0] = self._node("DequantizeLinear", [codes, scale, zero], f"{name}_values")

    def integer_product(self, node: Any, layer: Layer) -> None:
        """x[t, :] = a[t] * q[t, :] and w[:, o] = s[o] * c[:, o]: y[t, o] = a[t] * s[o] * sum of q * c, an integer."""
        assert layer.quantized is not None and layer.input is not None
        name, output = layer.full("weight"), node.output[0]
        values = layer.quantized.values.t()
        packs = layer.quantized.bits <= _INT4_BITS
        codes = self._integers(f"{name}_codes", values, _KINDS[True, packs])
        if packs:
            codes = self._node("Cast", [codes], f"{name}_bytes", to=TensorProto.INT8)
        rows, row_scale, leading = self._rounded_tokens(node.input[0], layer.input.grid)
        middle = self._constant("ds_compress_middle", np.array(_MIDDLE, np.uint8))
        sums = self._node("MatMulInteger", [rows, codes, middle], f"{output}_sums")
        floats = self._node("Cast", [sums], f"{output}_float_sums", to=TensorProto.FLOAT)
        scales = self._floats(f"{name}_scale", layer.quantized.scale.flatten())
        scaled = self._node("Mul", [floats, row_scale], f"{output}_of_rows")
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        flat = self._node("Mul", [scaled, scales], f"{output}_flat")
        width = self._constant(f"{name}_width", np.array([layer.quantized.values.shape[0]], np.int64))
        shape = self._node("Concat", [leading, width], f"{output}_shape", axis=0)
        whole = self._node("Reshape", [flat, shape], f"{output}_product" if bias else output)
        if bias:
            self._node("Add", [whole, bias], output)
        self.graph.node.remove(node)

    def _rounded_tokens(self, source: str, grid: ActivationGrid) -> tuple[str, str, str]:
        """uint8 [tokens, inputs] around 128, fp32 [tokens, 1], and int64: the shape of `source` but for its last axis.

        QuantizeLinear with one scale per row is one pass, and rounds half to even as training does.
        """
        key = (source, grid.scale_divisor, grid.bits)
        if key not in self._rounded:
            name = f"{source}_tokens"
            leading = self._node("Shape", [source], f"{name}_leading_axes", start=0, end=-1)
            last = self._node("Shape", [source], f"{name}_last_axis", start=-1)
            all_rows = self._constant("ds_compress_all", np.array([-1], np.int64))
            matrix = self._node("Concat", [all_rows, last], f"{name}_shape", axis=0)
            flat = self._node("Reshape", [source, matrix], f"{name}_flat")
            size = self._node("Abs", [flat], f"{name}_magnitudes")
            axis = self._constant("ds_compress_columns", np.array([1], np.int64))
            largest = self._node("ReduceMax", [size, axis], f"{name}_largest", keepdims=1)
            divisor = self._constant(
                f"ds_compress_divisor_{grid.scale_divisor}", np.array(grid.scale_divisor, np.float32)
            )
            divided = self._node("Div", [largest, divisor], f"{name}_divided")
            smallest = self._constant("ds_compress_smallest_scale", np.array(SMALLEST_SCALE, np.float32))
            scale = self._node("Max", [divided, smallest], f"{name}_scale")
            of_rows = self._node("Reshape", [scale, all_rows], f"{name}_scale_of_rows")
            count = self._node("Shape", [of_rows], f"{name}_count")
            middle = numpy_helper.from_array(np.array([_MIDDLE], np.uint8))
            middles = self._node("ConstantOfShape", [count], f"{name}_middles", value=middle)
            codes = self._node("QuantizeLinear", [flat, of_rows, middles], f"{name}_codes", axis=0)
            if grid.bits < 8:
                ends = [
                    self._constant(
                        f"ds_compress_{what}_{grid.bits}", np.array(_MIDDLE + value).astype(np.uint8)
                    )
                    for what, value in (("lowest", grid.quant_min), ("highest", grid.quant_max))
                ]
                codes = self._node("Clip", [codes, *ends], f"{name}_clipped_codes")
            self._rounded[key] = (codes, scale, leading)
        return self._rounded[key]

    def store_in_16_bits(self, dtype: torch.dtype) -> None:
        """Initializers that lose nothing by it; the runtime converts them when it loads the model."""
        of_quantizers = {
            name for node in self.graph.node if node.op_type.endswith("uantizeLinear") for name in node.input
        }
        for tensor in list(self.graph.initializer):
            if tensor.data_type != TensorProto.FLOAT or tensor.name in of_quantizers:
                continue
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if values.numel() < _WORTHWHILE or not torch.equal(values.to(dtype).float(), values):
                continue
            raw = values.to(dtype).contiguous().view(torch.int16).numpy().tobytes()
            name = f"{tensor.name}_in_16_bits"
            self.graph.initializer.append(
                helper.make_tensor(name, _16_BIT[dtype], list(values.shape), raw, raw=True)
            )
            self.graph.initializer.remove(tensor)
            self._node("Cast", [name], tensor.name, to=TensorProto.FLOAT)

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        if output not in self._known:
            self._known.add(output)
            self.graph.node.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, values: np.ndarray[Any, Any]) -> str:
        return self._initializer(name, lambda: numpy_helper.from_array(values, name))

    def _floats(self, name: str, values: torch.Tensor) -> str:
        return self._constant(name, values.float().contiguous().numpy())

    def _integers(self, name: str, values: torch.Tensor, kind: int) -> str:
        return self._initializer(name, lambda: _integers(name, values.contiguous(), kind))

    def _initializer(self, name: str, make: Callable[[], Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.graph.initializer.append(make())
        return name


def _outputs_first(node: Any) -> bool:
    """Whether the weight is [outputs, inputs]; a MatMul's is [inputs, outputs]."""
    return any(a.name == "transB" and a.i for a in node.attribute)


def _laid_out(
    quantized: QuantizedMatrix, is_convolution: bool, outputs_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values, scales and zero points as the node has its weight."""
    values, scale, offset = quantized.values, quantized.scale, quantized.offset
    zero = None if offset is None else (-torch.round(offset / scale)).clamp(0, 255).to(torch.uint8)
    if is_convolution:
        values = values.reshape(quantized.shape)
    elif not outputs_first:
        values, scale = values.t(), scale.t()
        zero = None if zero is None else zero.t()
    return values, scale, zero


def _integers(name: str, values: torch.Tensor, kind: int) -> Any:
    if kind not in (TensorProto.INT4, TensorProto.UINT4):
        return numpy_helper.from_array(values.contiguous().numpy(), name)
    nibbles = (values.flatten().to(torch.int16) & 15).to(torch.uint8)
    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    # As raw bytes: in the field for numbers each takes one or two.
    raw = (nibbles[::2] | nibbles[1::2] << 4).numpy().tobytes()
    return helper.make_tensor(name, kind, values.shape, raw, raw=True)


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    # onnxruntime infers shapes, but fuses a residual with its normalization only where the file has theirs.
    summed = {name for node in graph.node if node.op_type == "Add" for name in (*node.input, *node.output)}
    described = [value for value in graph.value_info if value.name in used & summed]
    del graph.value_info[:]
    graph.value_info.extend(described)
    # Where in torch the graph came from.
    graph.ClearField("metadata_props")
    for value in (*graph.input, *graph.output, *graph.initializer):
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
