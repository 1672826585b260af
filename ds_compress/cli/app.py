"""Commands; each is one call of the library and prints what it returns."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ds_compress.cli import checkpoints, secure, teachers
from ds_compress.cli.doctor import doctor
from ds_compress.cli.errors import one_line_errors
from ds_compress.cli.migrate import migrate
from ds_compress.cli.schema import schema
from ds_compress.cli.validate import validate
from ds_compress.sheet import uncut

app = typer.Typer(
    help="Compressed models: export them, look at an export, see what a config would do, ask a teacher ahead, sign.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console() if sys.stdout.isatty() else uncut()
app.command()(doctor)
app.command()(schema)
app.command()(validate)
app.command()(migrate)
app.command()(teachers.cache_teacher)
app.command()(teachers.teacher_text)
app.command()(checkpoints.universal)
for command in (secure.keygen, secure.sign, secure.verify, secure.encrypt, secure.decrypt):
    app.command()(command)


class FormatName(StrEnum):
    """Formats of `ds_compress.export`."""

    HF = "hf"
    COMPRESSED_TENSORS = "compressed-tensors"
    TORCH = "torch"
    ONNX = "onnx"
    OPENVINO = "openvino"


class DtypeName(StrEnum):
    """Of stored floats."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class EmbeddingsName(StrEnum):
    """How tables are stored."""

    INT8 = "int8"
    FLOAT = "float"


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="folder of a DeepSpeed checkpoint, or of a transformers model")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    format: Annotated[
        FormatName | None,
        typer.Option(help="by default hf, or compressed-tensors when something is quantized"),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder to copy the tokenizer from")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="round an unquantized model: FP8_DYNAMIC, NVFP4A16, MXFP4, W4A16, ...")
    ] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="in which tensors that are not quantized are stored")
    ] = None,
    embeddings: Annotated[
        EmbeddingsName | None,
        typer.Option(
            help="tables that were not trained in integers: torch, onnx and openvino round them to int8"
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="load the folder in a fresh process and compare logits")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace OUT, if an export wrote it")
    ] = False,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="read pickles of SOURCE that can run any code")
    ] = False,
) -> None:
    """Writes a trained model as a folder that other programs load, and checks it."""
    with one_line_errors():
        import torch

        from ds_compress.api import export as run

        report = run(
            source,
            out,
            None if format is None else format.value,
            tokenizer=tokenizer,
            scheme=scheme,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            embeddings=None if embeddings is None else embeddings.value,
            check=check,
            overwrite=overwrite,
            trust_pickle=trust_pickle,
        )
        _out.print(str(report))
        for note in report.notes:
            _out.print(f"note: {note}")
        if report.check:
            _out.print(f"checked with {report.check['loaded']}: {report.check['verdict']}")


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="an exported folder")]) -> None:
    """Verifies that an export is what was written, and prints how every module is stored, its size and its check."""
    with one_line_errors():
        from ds_compress.export.report import ExportReport
        from ds_compress.export.whole import refuse_damaged

        report = ExportReport.read(folder)
        refuse_damaged(folder)
        _out.print(report)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="folder of a transformers model")],
    config: Annotated[Path, typer.Argument(help="DeepSpeed JSON, or its compression_training block")],
) -> None:
    """Prints what a config would do to which weight, and the predicted bytes; reads no weights."""
    with one_line_errors():
        from ds_compress.api import plan as make
        from ds_compress.cli.models import skeleton

        _out.print(make(skeleton(model), str(config)))
