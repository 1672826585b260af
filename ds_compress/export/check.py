"""The check of an export: a fresh process loads the folder, and the model that it gets must be the trained one.

Three comparisons, the first two without any rounding between the two sides. What was trained in 16 bits runs in fp32
with its weights, see `exact`, and so does what was loaded.

- tensor by tensor: the weights and static input scales that the loader holds, after dequantizing them, are those of
  training, by their fingerprints. This detects a wrong value or scale, also one that no input of the check uses.
- with no activation quantized, both compute with the same weights, so that only the order of sums differs: 1e-4 of the
  largest logit. This detects a layer that is loaded and used differently.
- with quantized activations, where the format's own rounding of them is not quite that of training, the root mean
  square of the difference is at most four times what quantizing the activations changes in the trained model itself:
  two roundings to nearly equal grids (max / 127.5 against max / 127) differ by about sqrt(2) times one rounding, and
  inputs of two dimensions have one scale for all rows in compressed-tensors' emulation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds_compress.errors import ExportError
from ds_compress.export.fingerprint import Fingerprint, same

_RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
_SMALLEST = 1e-6
_TIMES_ROUNDING = 4.0
_TIMES_SAME_ROUNDING = 2.0


@dataclass(frozen=True)
class Expected:
    """The trained model's logits, and exact_logits with no activation quantized.

    rounding_cost: the largest change of a logit by what only the export rounds; None: it rounds nothing.
    dtype: fp32, or the one to which values are rounded where the trained model cannot compute with the rounded ones.
    rounding: the largest change of a logit by computing in 16 bits, where the trained model could not compute in fp32.
    same_activations: the format quantizes activations as training did, but for the order of sums: a value may be
    rounded to the other side now and then, which changes at most as much as rounding all of them anew.
    fingerprints: of what is stored, by its name when it is loaded.
    """

    inputs: Mapping[str, torch.Tensor]
    logits: torch.Tensor
    exact_logits: torch.Tensor
    dtype: torch.dtype = torch.float32
    rounding: float = 0.0
    same_activations: bool = False
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    rounding_cost: float | None = None


@dataclass(frozen=True)
class Request:
    """A folder to load in a fresh process. loader: "vanilla_hf" (transformers), "ours" (`from_pretrained`), "onnx",
    "openvino".

    unread: tensors that the loader may leave unread.
    """

    folder: Path
    model_class: str
    inputs: Mapping[str, torch.Tensor]
    loader: str = "vanilla_hf"
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """logits, and exact_logits of a process that can compute them. loaded: by what. error: why not.

    fingerprints: of all loaded tensors that have a name in the format.
    """

    tensors: dict[str, torch.Tensor]
    loaded: str
    error: str = ""
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)


def reload(requests: Sequence[Request]) -> list[Answer]:
    """Runs all of one loader in one fresh process.

    Raises:
        ExportError: the process died.
    """
    loader = requests[0].loader
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed: list[dict[str, Any]] = []
        for number, request in enumerate(requests):
            files = {"inputs": str(folder / f"in{number}"), "outputs": str(folder / f"out{number}")}
            save_file({key: value.contiguous() for key, value in request.inputs.items()}, files["inputs"])
            what = {"folder": str(request.folder), "class": request.model_class, **files}
            listed.append({**what, "unread": request.unread})
        (folder / "requests.json").write_text(json.dumps(listed))
        # -P: files beside the script have names of libraries that it imports.
        program = ["-P", str(Path(__file__).with_name(f"reload_{loader}.py"))]
        if loader == "ours":
            program = ["-m", "ds_compress.export.reload_ours"]
        code, output = fresh_python([*program, str(folder / "requests.json")])
        if code:
            raise ExportError(f"the process that loads the export died: {output.strip()[-2000:]}")
        return [_answer(Path(entry["outputs"])) for entry in listed]


def fresh_python(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of `python ARGUMENTS`, which has imported nothing that this process has."""
    command = [sys.executable, *arguments]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process.returncode, process.stdout


def verdict(expected: Expected, answer: Answer) -> dict[str, Any]:
    """The `check` of the report.

    Raises:
        ExportError: the folder did not load, or its logits differ.
    """
    if answer.error:
        raise ExportError(f"the exported folder does not load: {answer.error}")
    _same_tensors(expected, answer)
    logits = answer.tensors["logits"]
    if logits.shape != expected.logits.shape:
        raise ExportError(
            f"the exported model gives {tuple(logits.shape)}, not {tuple(expected.logits.shape)}"
        )
    relative = _RELATIVE.get(expected.dtype, 1e-4)
    largest = float(expected.logits.abs().max())
    result: dict[str, Any] = {
        "loaded": answer.loaded,
        "max_difference": float((logits - expected.logits).abs().max()),
        "largest_logit": largest,
        "relative_tolerance": relative,
        "tensors_compared": len(expected.fingerprints.keys() & answer.fingerprints.keys()),
    }
    if "loaded_logits" in answer.tensors:
        result["max_difference_in_16_bits"] = float((answer.tensors["loaded_logits"] - logits).abs().max())
    if "exact_logits" in answer.tensors:
        exact = float((answer.tensors["exact_logits"] - expected.exact_logits).abs().max())
        result["max_difference_with_exact_activations"] = exact
        if not exact <= relative * float(expected.exact_logits.abs().max()) + _SMALLEST + expected.rounding:
            raise ExportError(
                f"with exact activations its logits differ by {exact:.3g}, of {largest:.3g}: {result}"
            )
    own_rounding = _rms(expected.logits - expected.exact_logits)
    if own_rounding == 0:
        measured, what = result["max_difference"], "the largest difference"
        allowed = relative * largest + _SMALLEST + expected.rounding
    else:
        result["rms_difference"] = measured = _rms(logits - expected.logits)
        result["rms_of_activation_rounding"] = own_rounding
        times = _TIMES_SAME_ROUNDING if expected.same_activations else _TIMES_ROUNDING
        allowed = relative * largest + _SMALLEST + expected.rounding + times * own_rounding
        what = "the root mean square of the difference"
    result["allowed"] = allowed
    if not measured <= allowed:
        figures = f"{what} is {measured:.3g}, allowed {allowed:.3g}"
        raise ExportError(f"the exported model computes something else: {figures}")
    rms = _rms(logits - expected.logits)
    result["verdict"] = (
        f"logits differ from the trained model's by {rms:.2g} (root mean square) and by {result['max_difference']:.2g} "
        f"at most; the largest is {largest:.3g}"
    )
    return result


def _same_tensors(expected: Expected, answer: Answer) -> None:
    for name, wanted in expected.fingerprints.items():
        found = answer.fingerprints.get(name)
        if found is not None and not same(wanted, found):
            raise ExportError(
                f"{name} is loaded with other values than were trained: norm {found[0]:.6g}, trained {wanted[0]:.6g}"
            )


def _answer(path: Path) -> Answer:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    fingerprints = json.loads(metadata.get("fingerprints", "{}"))
    return Answer(load_file(path), metadata.get("loaded", ""), metadata.get("error", ""), fingerprints)


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())
