"""`ds_compress plan`: what a config would do to a model and to a run, and a search for one within a goal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_compress.cli.output import AsJson, output


def plan(
    model: Annotated[Path, typer.Argument(help="folder of a transformers model")],
    config: Annotated[Path, typer.Argument(help="DeepSpeed JSON, or its compression_training block")],
    world_size: Annotated[
        int | None, typer.Option(min=1, help="processes: also predicts memory and bytes on the wire")
    ] = None,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="in place of the JSON's")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="with as many processes each")] = 1,
    bandwidth: Annotated[
        float | None, typer.Option(min=1e-3, help="Gbit/s between a node and the others")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="folder of the model that teaches, for its memory and work")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="of a micro-step of one process: also predicts what it computes")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="tokens of a text; by default 2048, or as many as --tokens")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="such as h100-sxm: also the least time of a step and of a forward")
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="choose a format for each group of layers, and write such a config"),
    ] = False,
    sensitivity: Annotated[
        Path | None, typer.Option(help="for --search: what `ds_compress sensitivity` wrote")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="goal of --search: largest size of the weight files, e.g. 20MB")
    ] = None,
    effective_bits: Annotated[
        float | None,
        typer.Option(min=1.0, help="goal of --search: most bits of a weight of the layers, scales included"),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            help="goal of --search: longest forward of --tokens on --device, e.g. 10ms, by its peaks"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--output", help="for --search: file to write")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUTPUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Prints what a config would do to which weight, and the predicted bytes; reads no weights.

    With --world-size also what each process of a run will hold and send, and what grows too large with so many of them.
    With --tokens also what a step computes and, with --device, how long it and a forward take at least.
    With --search the layers get the formats that add least to the loss within a goal, and CONFIG says everything else.
    """
    with output(as_json) as printed:
        from ds_compress.api import plan as make
        from ds_compress.cli import search as searching
        from ds_compress.cli.models import skeleton
        from ds_compress.cli.runs import run_estimate
        from ds_compress.cli.work import compute_estimate
        from ds_compress.config.report.data import as_data
        from ds_compress.config.schema.source import read_json
        from ds_compress.estimate.compute_table import ComputeTable

        asked = searching.request(
            search, sensitivity, size, effective_bits, latency, device, tokens, out, overwrite
        )
        found = None if asked is None else searching.answer(asked, model, config)
        empty = skeleton(model)
        content = read_json(str(config)) if found is None else found.content
        made = make(empty, str(config) if found is None else content)
        of_run = teacher if world_size is not None or tokens is None else None
        run = run_estimate(made, config, content, world_size, zero_stage, nodes, bandwidth, of_run)
        layout = (world_size or 1, nodes, zero_stage)
        work = compute_estimate(empty, made, content, tokens, sequence, device, layout, teacher)
        printed.show(made)
        if run is not None:
            printed.show(run)
        if work is not None:
            printed.show(ComputeTable(work))
        chosen = None
        if asked is not None and found is not None:
            chosen = searching.report(asked, found)
            for line in searching.write(asked, found):
                printed.say(line)
        printed.done(
            model=str(model),
            config=str(config),
            **as_data(made),
            run=None if run is None else run.as_data(),
            compute=None if work is None else work.as_data(),
            search=chosen,
        )
