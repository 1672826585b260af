"""`ds_compress sensitivity`: what each format would cost each group of layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_compress.cli.output import AsJson, output

if TYPE_CHECKING:
    from ds_compress.sensitivity.table import Sensitivity

_FORMATS = "int2_g64,int3_g64,int4_g64,int6_g64,int8"


class MetricName(StrEnum):
    """What is measured."""

    KL = "kl"
    LOSS = "loss"


def sensitivity(
    model: Annotated[Path, typer.Argument(help="folder of a transformers model")],
    data: Annotated[Path, typer.Option(help="calibration set: .txt (a line, an example) or .jsonl")],
    out: Annotated[Path, typer.Option("--output", help="file to write")] = Path("sensitivity.json"),
    formats: Annotated[
        str, typer.Option(help="by commas: int2 to int8, int4_g64 (a scale for 64 inputs), nvfp4, mxfp4, ...")
    ] = _FORMATS,
    metric: Annotated[
        MetricName,
        typer.Option(help="kl: divergence from the model as it is, without labels; loss: cross-entropy"),
    ] = MetricName.KL,
    labels: Annotated[
        str | None,
        typer.Option(help="column of a .jsonl with classes 0, 1, ..., for the loss of a classifier"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="regex of layers that stay as they are; may be repeated")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="at most so many, drawn from DATA")] = 128,
    max_length: Annotated[int, typer.Option(min=2, help="tokens after which examples are cut")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="examples at a time")] = 8,
    column: Annotated[str, typer.Option(help="of a .jsonl: text, or token ids")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="by default the model's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the draw of examples")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUTPUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Measures by how much the loss grows when one group of layers is in one format, for `plan --search`.

    Layers that servers join (q, k and v; gate and up) are one group; the output head and tables stay as they are.
    Each group is rounded in each format as training would, one forward pass for each batch. Under torchrun the batches
    are shared by the processes, with the same result.
    """
    with _process_group() as (rank, world), output(as_json and rank == 0) as printed:
        from ds_compress.cli.models import stored_model, tokenizer_of
        from ds_compress.sensitivity.calibration import batches, read_calibration
        from ds_compress.sensitivity.formats import formats_named
        from ds_compress.sensitivity.groups import layer_groups
        from ds_compress.sensitivity.measure import measure

        names = [name.strip() for name in formats.split(",") if name.strip()]
        wanted = formats_named(names)
        _refuse_bad_paths(model, data, out, overwrite)
        if labels is not None and metric != MetricName.LOSS:
            raise ValueError("--labels is for --metric loss")
        words = tokenizer_of(tokenizer or str(model))
        rows = read_calibration(
            data,
            words,
            examples=examples,
            max_length=max_length,
            column=column,
            labels=labels,
            seed=seed,
        )
        whole = stored_model(str(model)).float().to(_device())
        if getattr(whole.config, "is_encoder_decoder", False):
            raise ValueError(
                f"a {type(whole).__name__} has an encoder and a decoder, and this measures models of one stack"
            )
        made = measure(
            whole,
            batches(rows, batch, words.pad_token_id),
            wanted,
            layer_groups(whole, exclude or ()),
            wants_loss=metric == MetricName.LOSS,
            facts={
                "model": str(model),
                "data": data.name,
                "seed": seed,
                "max_length": max_length,
                "batch": batch,
                "excluded": list(exclude or ()),
            },
            progress=_bar() if rank == 0 else lambda done, total: None,
        )
        if rank == 0:
            made.write(out)
            _say(printed, made, out, world)
        printed.done(output=str(out), **made.as_data())


def _say(printed: Any, made: Sensitivity, out: Path, world: int) -> None:
    printed.show(made)
    by = f" by {world} processes" if world > 1 else ""
    printed.say(f"{out}: {len(made.groups)} groups of layers, {len(made.formats)} formats{by}")
    printed.say(
        "choose by it: ds_compress plan MODEL CONFIG --search --sensitivity FILE --effective-bits 4.5 --output NEW"
    )


def _refuse_bad_paths(model: Path, data: Path, out: Path, overwrite: bool) -> None:
    """Before anything is loaded."""
    if not (model / "config.json").exists():
        raise ValueError(f"{model} has no config.json")
    if not data.is_file():
        raise ValueError(f"{data}: there is no such file")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out.parent} cannot be written to")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another file by --output, or say --overwrite")


@contextlib.contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """(rank, processes); of gloo, because only numbers of the host are exchanged."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    from ds_compress.run import leave_process_group

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), world
    finally:
        leave_process_group()


def _device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _bar() -> Any:
    from tqdm import tqdm

    bar = tqdm(unit=" passes", disable=None)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return progress
