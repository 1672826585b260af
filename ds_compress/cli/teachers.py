"""Commands that ask a teacher before any student trains: for its predictions, or for text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ds_compress.cli.output import AsJson, output


def cache_teacher(
    teacher: Annotated[str, typer.Argument(help="folder or name of the teacher, a model of transformers")],
    data: Annotated[Path, typer.Argument(help=".txt (a line, an example) or .jsonl")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    top_k: Annotated[int, typer.Option(min=1, help="likeliest tokens that are stored of each position")] = 64,
    temperature: Annotated[float, typer.Option(min=1e-3, help="of the loss that will use them")] = 1.0,
    max_length: Annotated[
        int, typer.Option(min=1, help="tokens after which examples are cut, as in training")
    ] = 512,
    batch: Annotated[int, typer.Option(min=1, help="examples at a time")] = 8,
    column: Annotated[str, typer.Option(help="of a .jsonl: text, or token ids")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="by default the teacher's")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Stores what a teacher predicts of every example, for `distillation.teacher_cache`."""
    with output(as_json) as printed:
        from ds_compress.cli.models import stored_model, tokenizer_of
        from ds_compress.distill.cache_write import cache_teacher as write
        from ds_compress.distill.text_data import read_examples, token_batches

        model, words = stored_model(teacher), tokenizer_of(tokenizer or teacher)
        batches = token_batches(read_examples(data, column), words, max_length, batch)
        made = write(
            model,
            _progress(batches, "examples"),
            out,
            top_k=top_k,
            temperature=temperature,
            tokenizer=words,
            overwrite=overwrite,
        )
        size = _bytes(out)
        printed.say(
            f"{made.examples:,} examples, the {made.top_k} likeliest of {made.vocabulary:,}, at temperature "
            f"{made.temperature:g}: {_size(out, size)}"
        )
        facts = {key: getattr(made, key) for key in ("examples", "top_k", "vocabulary", "temperature")}
        printed.done(out=str(out), bytes=size, **facts)


def teacher_text(
    teacher: Annotated[str, typer.Argument(help="folder or name of a causal language model")],
    out: Annotated[
        Path, typer.Argument(help=".jsonl to write, with columns text and input_ids; must not exist")
    ],
    samples: Annotated[int, typer.Option(min=1, help="how many texts")] = 1000,
    tokens: Annotated[int, typer.Option(min=1, help="at most so many tokens each")] = 256,
    prompts: Annotated[
        Path | None, typer.Option(help=".txt or .jsonl of beginnings; by default the begin token")
    ] = None,
    temperature: Annotated[float, typer.Option(min=1e-3)] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="texts at a time")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Lets a teacher write the text that a student will be distilled on, where there is no data."""
    with output(as_json) as printed:
        from ds_compress.cli.models import tokenizer_of
        from ds_compress.distill.teacher_text import teacher_text as write
        from ds_compress.distill.teacher_text import write_lines
        from ds_compress.distill.text_data import read_examples

        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists: choose another file, or say --overwrite")
        words = tokenizer_of(teacher)
        if prompts is None:
            begin = words.bos_token_id if words.bos_token_id is not None else words.eos_token_id
            if begin is None:
                raise ValueError("this tokenizer has no begin token: give --prompts")
            beginnings = [[begin]]
        else:
            read = read_examples(prompts)
            beginnings = [row if isinstance(row, list) else words(row)["input_ids"] for row in read]
        pad = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
        written = write(
            _causal(teacher),
            beginnings,
            samples,
            tokens,
            pad_id=pad or 0,
            temperature=temperature,
            batch=batch,
            seed=seed,
        )
        rows = ({"text": words.decode(ids, skip_special_tokens=True), "input_ids": ids} for ids in written)
        count = write_lines(out, _progress(rows, "texts"))
        printed.say(f"{count:,} texts: {_size(out, _bytes(out))}")
        printed.done(out=str(out), bytes=_bytes(out), texts=count)


def _causal(name: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(name)


def _progress(items: Any, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, unit=f" batches of {unit}" if unit == "examples" else f" {unit}", disable=None)


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _size(path: Path, size: int) -> str:
    return f"{size / 1e6:.1f} MB in {path}"
