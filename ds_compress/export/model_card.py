"""README.md of an export: the model card that a hub shows, with what was done and how each tool loads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ds_compress.errors import ExportError
from ds_compress.export.report import ExportReport, stored_as

FILE_NAME = "README.md"
"""Not in the manifest of an export: whoever publishes a model edits its card."""
_LIBRARIES = {
    "hf": "transformers",
    "compressed-tensors": "transformers",
    "torch": "ds_compress",
    "onnx": "onnx",
    "openvino": "openvino",
}
_TASKS = {
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}
_SHOWN_NOTES = 20


def card_data(given: Mapping[str, Any] | None, format: str, model_class: str, name: str) -> ModelCardData:
    """The head of the card: `given` over what is known.

    given: fields of `huggingface_hub.ModelCardData` (license, base_model, datasets, language, tags, ...), where
        `eval_results` may hold mappings of the fields of `EvalResult` instead of objects.
    name: of the model, for its results.

    Raises:
        ExportError: a field is not of the type that the hub reads; names it.
    """
    import yaml

    fields = dict(given or {})
    tags = fields.pop("tags", None) or []
    known = {"library_name": _LIBRARIES.get(format), "pipeline_tag": _task(model_class)}
    try:
        if results := fields.get("eval_results"):
            fields["eval_results"] = [r if isinstance(r, EvalResult) else EvalResult(**r) for r in results]
            fields.setdefault("model_name", name)
        data = ModelCardData(**{**known, **fields}, tags=[*tags, "ds_compress", format])
        yaml.safe_dump(data.to_dict())  # refuses objects, which `to_yaml` would write as Python's own
    except Exception as error:
        raise ExportError(
            f"card: {error}; its keys are those of huggingface_hub.ModelCardData, and eval_results needs task_type, "
            "dataset_type, dataset_name, metric_type and metric_value"
        ) from error
    return data


def read_fields(path: Path) -> dict[str, Any]:
    """The `given` of `card_data` from a YAML or JSON file.

    Raises:
        ExportError: it holds no mapping.
    """
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ExportError(f"card: {path} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ExportError(f"card: {path} holds {fields!r}, and needs lines such as `license: mit`")
    return fields


def write_card(folder: Path, report: ExportReport, data: ModelCardData, name: str) -> None:
    """`README.md` in `folder`; name: its headline."""
    text = "\n".join(_lines(report, data, name))
    (folder / FILE_NAME).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _task(model_class: str) -> str | None:
    return next((task for ending, task in _TASKS.items() if model_class.endswith(ending)), None)


def _lines(report: ExportReport, data: ModelCardData, name: str) -> Iterator[str]:
    yield f"# {name}"
    yield ""
    yield f"A {report.model_class}, compressed by ds_compress."
    yield ""
    yield "| | |"
    yield "|---|---|"
    for key, value in _facts(report):
        yield f"| {key} | {value} |"
    if data.eval_results:
        yield from ("", "## Results", "", "| metric | value | data |", "|---|---|---|")
        for result in data.eval_results:
            metric = result.metric_name or result.metric_type
            yield f"| {metric} | {result.metric_value} | {result.dataset_name} |"
    yield from ("", "## How to load it", "")
    yield from _loading(report)
    if report.notes:
        yield from ("", "## Notes", "")
        yield from (f"- {note}" for note in report.notes[:_SHOWN_NOTES])
        if len(report.notes) > _SHOWN_NOTES:
            yield f"- and {len(report.notes) - _SHOWN_NOTES} more in `ds_compress.json`"
    yield from ("", "How each module is stored is in `ds_compress.json`: `ds_compress inspect` prints it.")


def _facts(report: ExportReport) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "weights on disk", f"{report.bytes:,} bytes, {report.ratio:.2f} times smaller than in fp32 before"
    yield "parameters", f"{report.parameters:,}, of which {report.sparsity:.1%} are zero"
    kinds = Counter[str]()
    for module in report.modules.values():
        kinds[stored_as(module)] += module.get("parameters", 0)
    yield "stored as", ", ".join(f"{words} ({count:,} parameters)" for words, count in kinds.most_common())
    if report.steps is not None:
        yield "optimizer steps", f"{report.steps:,}"
    if report.check:
        yield "checked", f"{report.check['loaded']}: {report.check['verdict']}"
    yield "written with", ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _loading(report: ExportReport) -> Iterator[str]:
    """Code for each tool that reads the format."""
    name = report.model_class
    if report.format == "torch":
        yield from _python(
            "import ds_compress", "", 'model = ds_compress.from_pretrained("path/of/this/folder")'
        )
    elif report.format == "onnx":
        yield from _python("import onnxruntime", "", 'session = onnxruntime.InferenceSession("model.onnx")')
    elif report.format == "openvino":
        yield from _python("import openvino", "", 'model = openvino.Core().compile_model("model.xml", "CPU")')
    else:
        yield from _python(
            f"from transformers import {name}", "", f'model = {name}.from_pretrained("path/of/this/folder")'
        )
        if report.format == "compressed-tensors":
            yield from ("", "transformers needs the package `compressed-tensors` for it.")
            if name.endswith("ForCausalLM"):
                yield from ("", "```bash", "vllm serve path/of/this/folder", "```")


def _python(*lines: str) -> Iterator[str]:
    yield from ("```python", *lines, "```")
