"""The list of commands in `docs/commands.md`, written from the typer app and from `cli.results`.

    python -m tests.docs.command_page       # rewrites it if it is not current

The page marks its place with `<!-- commands -->` and `<!-- end of commands -->`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ds_compress.cli import app
from ds_compress.cli.results import RESULTS
from tests.docs.pages import DOCS

PAGE = DOCS / "commands.md"
_LIST = re.compile(r"(<!-- commands -->\n).*?(<!-- end of commands -->)", re.DOTALL)
_JSON = "--json"
_SWITCH = "a switch"
_KINDS = {bool: _SWITCH, Path: "a path", str: "text", int: "a whole number", float: "a number"}


def commands() -> dict[str, Any]:
    """Of the app, by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def example_of(command: Any) -> str:
    """The line of its help that can be pasted, "" where there is none."""
    lines = (command.epilog or "").splitlines()
    return next((line for line in lines if line.startswith("ds_compress ")), "")


def with_list(text: str) -> str:
    """`text` of the page with a current list."""
    made = "\n".join(line for name, command in sorted(commands().items()) for line in _lines(name, command))
    return _LIST.sub(lambda found: f"{found[1]}\n{made}\n{found[2]}", text)


def _lines(name: str, command: Any) -> Iterator[str]:
    yield from (f"### {name}", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield from (_escaped(" ".join(paragraph.split())), "")
    yield from ("```bash", example_of(command), "```", "")
    types = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    taken = [
        parameter for parameter in command.params if parameter.name in types and _JSON not in parameter.opts
    ]
    rows = [_row(parameter, types[parameter.name]) for parameter in taken]
    if rows:
        yield from (
            '<div class="keys" markdown>',
            "",
            "| argument | value | meaning |",
            "|---|---|---|",
            *rows,
            "",
            "</div>",
        )
        yield ""
    if any(_JSON in parameter.opts for parameter in command.params):
        yield from (
            f"`{_JSON}` prints:",
            "",
            '<div class="keys" markdown>',
            "",
            "| key | meaning |",
            "|---|---|",
        )
        yield from (f"| `{key}` | {_escaped(meaning)} |" for key, meaning in RESULTS[name].items())
        yield from ("", "</div>", "")


def _row(parameter: Any, annotation: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    kind, default = _kind(annotation), parameter.default
    parts = [kind]
    if parameter.required:
        parts.append("required")
    elif kind == _SWITCH and parameter.secondary_opts:
        parts.append(f"default `{parameter.opts[0] if default else parameter.secondary_opts[0]}`")
    elif kind != _SWITCH and isinstance(default, str | int | float):
        parts.append(f"default `{_choice(default)}`")
    shown = ", ".join(f"`{name}`" for name in names)
    return f"| {shown} | {_escaped('; '.join(parts))} | {_escaped(parameter.help or '')} |"


def _kind(annotation: Any) -> str:
    """In words, of the type that a command's function declares: `Annotated[list[int] | None, ...]` is a number."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    inner = [argument for argument in get_args(annotation) if argument is not type(None)]
    if inner:
        return _kind(inner[0])
    if issubclass(annotation, Enum):
        return " or ".join(f"`{_choice(member)}`" for member in annotation)
    return _KINDS[annotation]


def _choice(value: Any) -> str:
    return str(getattr(value, "value", value))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    text = PAGE.read_text()
    if with_list(text) != text:
        PAGE.write_text(with_list(text))
        print(PAGE)


if __name__ == "__main__":
    main()
