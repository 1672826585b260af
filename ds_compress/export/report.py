"""The report of an export and of its check: `ds_compress.json` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_compress.errors import ExportError
from ds_compress.export.read import Layer
from ds_compress.export.sparse_container import dense_name

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FILE_NAME = "ds_compress.json"
_FORMAT_VERSIONS = (1, 2)
"""2: a tensor is in a container (`sparse_container`), which older versions do not know."""
_WEIGHT_FILES = ("*.safetensors", "*.onnx", "*.onnx.data", "model.xml", "model.bin")


@dataclass
class ExportReport:
    """bytes: of the weight files. dense_bytes: of the parameters of the model at the start of training, before any
    pruning, in fp32. ratio: how many times smaller. nonzeros: of the parameters that are left. modules: how each module
    with parameters is stored. steps: optimizer steps that the training had applied, if known. metrics: the last numbers
    of the techniques, such as the load of experts. commitments: hashes of the secret seeds of blocks that choose at
    random. check: how the folder was loaded, and the difference of its logits from the trained model's; empty without a
    check.
    """

    folder: str
    format: str
    model_class: str
    source: str = "model"
    steps: int | None = None
    bytes: int = 0
    dense_bytes: int = 0
    parameters: int = 0
    nonzeros: int = 0
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    commitments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    check: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.dense_bytes / max(1, self.bytes)

    @property
    def sparsity(self) -> float:
        return 1 - self.nonzeros / max(1, self.parameters)

    def count(self, layer: Layer, stored: dict[str, torch.Tensor]) -> None:
        """Adds one layer to the figures."""
        weights = {n: t for n, t in layer.tensors.items() if t.is_floating_point()}
        numbers = sum(t.numel() for t in weights.values())
        nonzeros = sum(int(t.count_nonzero()) for t in weights.values())
        if layer.quantized is not None:
            numbers += layer.quantized.values.numel()
            nonzeros += layer.quantized.count_nonzero()
        for experts in layer.experts.values():
            numbers += experts.numel()
            nonzeros += experts.count_nonzero()
        self.parameters += numbers
        self.nonzeros += nonzeros
        if numbers:
            self.modules[layer.name] = {
                "parameters": numbers,
                "nonzeros": nonzeros,
                "sparsity": round(1 - nonzeros / numbers, 4),
                "bytes": sum(t.nbytes for t in stored.values()),
            }
            containers = sum(
                dense_name(name.rpartition(".")[2], tensor) is not None for name, tensor in stored.items()
            )
            if containers:
                self.modules[layer.name]["containers"] = containers

    def write(self, folder: Path) -> None:
        """`ds_compress.json` in `folder`."""
        self.bytes = sum(file.stat().st_size for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
        version = _FORMAT_VERSIONS[any(module.get("containers") for module in self.modules.values())]
        data = {"format_version": version, **self.as_data()}
        (folder / FILE_NAME).write_text(json.dumps(data, indent=1) + "\n")

    def as_data(self) -> dict[str, Any]:
        """All fields, and the two figures that follow from them."""
        return {**asdict(self), "ratio": round(self.ratio, 3), "sparsity": round(self.sparsity, 4)}

    @classmethod
    def read(cls, folder: str | Path) -> ExportReport:
        """Raises ExportError where there is none, or one of a newer version."""
        path = Path(folder) / FILE_NAME
        try:
            text = path.read_text()
        except OSError as error:
            raise ExportError(f"{path}: there is no such file; ds_compress.export writes it") from error
        except ValueError as error:
            raise ExportError(f"{path} is damaged: {error}") from error
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, path: Path) -> ExportReport:
        """The report that `text` is; path: for messages. Raises ExportError as `read`."""
        try:
            data = json.loads(text)
            if data.pop("format_version") not in _FORMAT_VERSIONS:
                raise ExportError(f"{path} was written by a newer version of ds_compress")
            data.pop("ratio"), data.pop("sparsity")
            return cls(**data)
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{path} is damaged: {error}") from error

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.format}, {self.bytes:,} bytes, {self.ratio:.2f}x smaller than fp32, "
            f"{self.sparsity:.1%} zeros"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        from ds_compress.sheet import Sheet, folded, width_of

        def lines(text: str) -> Iterator[Text]:
            return (Text(line, overflow="fold") for line in folded(text, width_of(options)))

        yield Text(self.folder, overflow="fold")
        for key, value in self._facts():
            yield from lines(f"{key}: {value}")
        numbers = ("parameters", "zeros", "bytes")
        table = Sheet(("module", "stored as", *numbers), numbers)
        for name, module in self.modules.items():
            table.add(
                name,
                stored_as(module),
                f"{module.get('parameters', 0):,}",
                f"{module.get('sparsity', 0):.1%}",
                f"{module.get('bytes', 0):,}",
            )
        yield table
        for note in self.notes:
            yield from lines(f"note: {note}")

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "format", f"{self.format} of a {self.model_class}"
        began_with = f"{self.dense_bytes:,}, the model that training began with in fp32"
        yield "bytes", f"{self.bytes:,} ({self.ratio:.2f}x smaller than {began_with})"
        yield "parameters", f"{self.parameters:,} ({self.sparsity:.1%} zeros)"
        if self.metrics:
            yield "metrics", ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        for seed, commitment in self.commitments.items():
            yield seed, f"secret, commitment {commitment}"
        if self.check:
            yield "check", f"{self.check['loaded']}: {self.check['verdict']}"
        else:
            yield "check", "none"
        yield "versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())


def stored_as(module: dict[str, Any]) -> str:
    """In words, of an entry of `modules`: "int8, inputs int8 dynamic"; "float" where nothing is quantized."""
    stored = module.get("scheme", {})
    weight = stored.get("weight") or stored.get("weights")
    inputs = stored.get("input") or stored.get("input_activations")
    parts = []
    if weight:
        parts.append(_numbers(weight))
    if inputs:
        static = inputs.get("range") is not None or inputs.get("dynamic") in (False, "local")
        parts.append(f"inputs {_numbers(inputs)} {'static' if static else 'dynamic'}")
    words = ", ".join(parts) or "float"
    return f"{words}, without its zeros" if module.get("containers") else words


def _numbers(how: dict[str, Any]) -> str:
    """E.g. "int8", "float4", or the name that `quant.formats` has."""
    return how.get("format") or f"{how.get('type', 'int')}{how.get('bits') or how.get('num_bits')}"
