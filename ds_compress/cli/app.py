"""Commands; each is one call of the library and prints what it returns."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ds_compress.cli import checkpoints, secure, teachers
from ds_compress.cli.bench import bench
from ds_compress.cli.doctor import doctor
from ds_compress.cli.examples import add
from ds_compress.cli.init import init
from ds_compress.cli.migrate import migrate
from ds_compress.cli.output import AsJson, output
from ds_compress.cli.plan import plan
from ds_compress.cli.report import report as report_command
from ds_compress.cli.schema import schema
from ds_compress.cli.sensitivity import sensitivity
from ds_compress.cli.validate import validate

app = typer.Typer(
    help="Compressed models: check a config and an install, export a model, look at an export, ask a teacher, sign.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
add(app, doctor, "ds_compress doctor")
add(app, schema, "ds_compress schema --out ds_compress.schema.json")
add(app, validate, "ds_compress validate ds_config.json --model path/to/model")
add(app, init, "ds_compress init --recipe w4a16 --model decoder")
add(app, migrate, "ds_compress migrate old.json --output new.json")
add(app, teachers.cache_teacher, "ds_compress cache-teacher path/to/teacher train.jsonl cache --top-k 32")
add(app, teachers.teacher_text, "ds_compress teacher-text path/to/teacher text.jsonl --samples 500")
add(app, checkpoints.universal, "ds_compress universal checkpoints checkpoints")
add(app, secure.keygen, "ds_compress keygen release")
add(app, secure.sign, "ds_compress sign small --key release.key --name encoder")
add(app, secure.verify, "ds_compress verify small --public-key release.pub")
add(app, secure.encrypt, "ds_compress encrypt small sealed --recipient my.recipient --key release.key")
add(app, secure.decrypt, "ds_compress decrypt sealed out --identity my.identity --public-key key.pub")


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
    card: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON for the head of the model card: license, base_model, datasets, ..."),
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="read pickles of SOURCE that can run any code")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Writes a trained model as a folder that other programs load, and checks it."""
    with output(as_json) as printed:
        import torch

        from ds_compress.api import export as run
        from ds_compress.export.model_card import read_fields

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
            card=None if card is None else read_fields(card),
            trust_pickle=trust_pickle,
        )
        printed.say(str(report))
        for note in report.notes:
            printed.say(f"note: {note}")
        if report.check:
            printed.say(f"checked with {report.check['loaded']}: {report.check['verdict']}")
        printed.done(**report.as_data())


def inspect(
    folder: Annotated[Path, typer.Argument(help="an exported folder")], as_json: AsJson = False
) -> None:
    """Verifies that an export is what was written, and prints how every module is stored, its size and its check."""
    with output(as_json) as printed:
        from ds_compress.export.report import ExportReport
        from ds_compress.export.whole import refuse_damaged

        report = ExportReport.read(folder)
        refuse_damaged(folder)
        printed.show(report)
        printed.done(**report.as_data())


add(app, export, "ds_compress export checkpoints/global_step500 small --format torch")
add(app, inspect, "ds_compress inspect small")
add(app, plan, "ds_compress plan path/to/model ds_config.json")
add(app, sensitivity, "ds_compress sensitivity path/to/model --data text.txt")
add(app, bench, "ds_compress bench int8_linear --quick")
add(app, report_command, "ds_compress report checkpoints small --out report.html")
