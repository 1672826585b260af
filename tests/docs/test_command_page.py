"""The page of commands is what the app says; every command has an example that parses, and keys that are described."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ds_compress.cli import app
from ds_compress.cli.results import RESULTS
from tests.docs.command_page import PAGE, commands, example_of, with_list


def test_the_list_is_current() -> None:
    assert with_list(PAGE.read_text()) == PAGE.read_text(), "run python -m tests.docs.command_page"


def test_the_list_has_every_command() -> None:
    assert set(re.findall(r"^### (\S+)$", PAGE.read_text(), re.MULTILINE)) == set(commands())


@pytest.mark.parametrize("name", commands())
def test_every_command_has_an_example_in_its_help_that_parses(name: str) -> None:
    command = commands()[name]
    example = example_of(command)
    program, called, *arguments = shlex.split(example)
    assert (program, called) == ("ds_compress", name)
    # It raises for an argument that is unknown, missing or of another type.
    command.make_context(name, arguments)
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).stdout
    assert example in [line.strip() for line in shown.splitlines()], "not one line of 80 columns"


def test_an_example_that_does_not_parse_is_found() -> None:
    group: Any = typer.main.get_command(app)
    with pytest.raises(Exception, match="ownr"):
        group.commands["sign"].make_context("sign", ["small", "--ownr", "x"])


def test_results_are_described_for_the_commands_that_print_them() -> None:
    with_json = {
        name for name, command in commands().items() if any("--json" in p.opts for p in command.params)
    }
    assert with_json == set(RESULTS)
    assert set(commands()) - with_json <= {"schema"}, "its result is JSON anyway"
