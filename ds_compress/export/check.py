"""The check of an export: a process that has never seen the model loads the folder, and the logits must agree.

Two comparisons:

- with no activation quantized, both compute with the same fp32 weights, so that only the order of sums differs:
  1e-4 of the largest logit, or what 16-bit weights allow. This is where a wrong code or scale shows.
- with quantized activations, where the format's own rounding of them is not quite that of training, the root mean
  square of the difference is at most four times what quantizing the activations changes in the trained model itself:
  two roundings to nearly equal grids (max / 127.5 against max / 127) differ by about sqrt(2) times one rounding, and
  inputs of two dimensions have one scale for all rows in compressed-tensors' emulation. Inputs that were not rounded in
  training but are in fp8 (3 bits behind the point: 3.6 % of a value) may change logits by twice that for each product,
  added in quadrature.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds_compress.export.errors import ExportError

_RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
_TIMES_ROUNDING = 4.0
_TIMES_SAME_ROUNDING = 2.0
_FP8_ROUNDING = 0.036


@dataclass(frozen=True)
class Expected:
    """What the trained model says: logits, and exact_logits with no activation quantized.

    dtype: the least precise dtype on either side. fp8_products: whose inputs are rounded where training's were not.
    same_activations: the format quantizes activations as training did, but for the order of sums: now and then a code
    falls on the other side of a rounding, which is at most like rounding all of them anew.
    """

    inputs: Mapping[str, torch.Tensor]
    logits: torch.Tensor
    exact_logits: torch.Tensor
    dtype: torch.dtype = torch.float32
    fp8_products: int = 0
    same_activations: bool = False


@dataclass(frozen=True)
class Request:
    """A folder to load in a fresh process. loader: "stock" (transformers), "own" (`from_pretrained`), "onnx"."""

    folder: Path
    model_class: str
    inputs: Mapping[str, torch.Tensor]
    loader: str = "stock"


@dataclass(frozen=True)
class Answer:
    """logits, and exact_logits where asked of stock; loaded: by what; error: why not."""

    tensors: dict[str, torch.Tensor]
    loaded: str
    error: str = ""


def reload(requests: Sequence[Request]) -> list[Answer]:
    """Runs all of one loader in one fresh process.

    Raises:
        ExportError: the process died.
    """
    loader = requests[0].loader
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = []
        for number, request in enumerate(requests):
            files = {"inputs": str(folder / f"in{number}"), "outputs": str(folder / f"out{number}")}
            save_file({key: value.contiguous() for key, value in request.inputs.items()}, files["inputs"])
            listed.append({"folder": str(request.folder), "class": request.model_class, **files})
        (folder / "requests.json").write_text(json.dumps(listed))
        # -P: beside the script lie files that are named like the libraries that it imports.
        program = ["-P", str(Path(__file__).with_name(f"reload_{loader}.py"))]
        if loader == "own":
            program = ["-m", "ds_compress.export.reload_own"]
        command = [sys.executable, *program, str(folder / "requests.json")]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise ExportError(f"the process that loads the export died: {process.stderr.strip()[-2000:]}")
        return [_answer(Path(entry["outputs"])) for entry in listed]


def verdict(expected: Expected, answer: Answer) -> dict[str, Any]:
    """The `check` of the report.

    Raises:
        ExportError: the folder did not load, or its logits are others.
    """
    if answer.error:
        raise ExportError(f"the exported folder does not load: {answer.error}")
    logits = answer.tensors["logits"]
    if logits.shape != expected.logits.shape:
        raise ExportError(f"the exported model gives {tuple(logits.shape)}, not {tuple(expected.logits.shape)}")
    relative = _RELATIVE.get(expected.dtype, 1e-4)
    largest = float(expected.logits.abs().max())
    result: dict[str, Any] = {
        "loaded": answer.loaded,
        "max_difference": float((logits - expected.logits).abs().max()),
        "largest_logit": largest,
        "relative_tolerance": relative,
    }
    if "exact_logits" in answer.tensors:
        exact = float((answer.tensors["exact_logits"] - expected.exact_logits).abs().max())
        result["max_difference_with_exact_activations"] = exact
        if not exact <= relative * max(1.0, float(expected.exact_logits.abs().max())):
            raise ExportError(f"with exact activations its logits differ by {exact:.3g}, of {largest:.3g}: {result}")
    own_rounding = _rms(expected.logits - expected.exact_logits)
    if own_rounding == 0 and not expected.fp8_products:
        measured, what = result["max_difference"], "the largest difference"
        allowed = relative * max(1.0, largest)
    else:
        result["rms_difference"] = measured = _rms(logits - expected.logits)
        result["rms_of_activation_rounding"] = own_rounding
        times = _TIMES_SAME_ROUNDING if expected.same_activations else _TIMES_ROUNDING
        allowed = relative * max(1.0, largest) + times * own_rounding
        allowed += 2 * _FP8_ROUNDING * math.sqrt(expected.fp8_products) * _rms(expected.logits)
        what = "the root mean square of the difference"
    result["allowed"] = allowed
    if not measured <= allowed:
        figures = f"{what} is {measured:.3g}, allowed {allowed:.3g}"
        raise ExportError(f"the exported model computes something else: {figures}")
    result["verdict"] = f"logits within {measured:.2g} of the trained model's, of {largest:.3g} at most"
    return result


def _answer(path: Path) -> Answer:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return Answer(load_file(path), metadata.get("loaded", ""), metadata.get("error", ""))


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())
