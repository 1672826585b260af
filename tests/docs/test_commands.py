"""The commands in README and docs exist, with the options that they are given; nothing is run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from ds_compress.cli import app
from tests.docs.pages import ROOT, Block, all_blocks, pages, without_blocks

BASH = all_blocks("bash")
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
_CONTROL = {"|", "&&", ";", "||", "&"}
KNOWN = {
    "cd",
    "export",
    "git",
    "ssh",
    "scp",
    "sbatch",
    "srun",
    "ip",
    "ls",
    "rm",
    "python",
    "deepspeed",
    "mkdir",
    "chmod",
    "docker",
}
"""Programs of others, whose options are not ours to check (python and deepspeed have checks of their own)."""
OF_TORCHRUN = {
    "--nnodes",
    "--nproc_per_node",
    "--node_rank",
    "--master_addr",
    "--master_port",
    "--standalone",
}
OF_PYTEST = {"-k", "-x", "-q", "-n", "-m", "--collect-only", "--durations"}


def commands(text: str) -> list[list[str]]:
    """The commands of a shell snippet as words: comments, prompts and environment assignments are dropped."""
    joined = text.replace("\\\n", " ")
    found: list[list[str]] = []
    for line in joined.splitlines():
        if line.startswith(("#SBATCH", "export ")):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in _CONTROL:
                if words:
                    found.append(words)
                words = []
            elif not (not words and re.fullmatch(r"\w+=.*", word)):
                words.append(word)
    return found


def test_there_are_commands_to_look_at() -> None:
    assert len(BASH) > 15


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.place)
def test_commands_exist(block: Block) -> None:
    for words in commands(block.text):
        problem = problem_of(words)
        assert not problem, f"{block.place}: {' '.join(words)}: {problem}"


INLINE = [
    (str(page.relative_to(ROOT)), found)
    for page in pages()
    for found in re.findall(
        r"`((?:make|deepspeed|ds_compress|torchrun|python3? -m) [^`]+)`", without_blocks(page)
    )
]
"""Commands in the running text and in tables."""


@pytest.mark.parametrize(("page", "text"), INLINE)
def test_commands_in_the_text_exist(page: str, text: str) -> None:
    for words in commands(text.replace("...", "")):
        assert not problem_of(words), f"{page}: {text}: {problem_of(words)}"


def test_wrong_commands_are_found() -> None:
    wrong = [
        "make tset",
        "ds_compress exprot in out",
        "ds_compress export in out --formt hf",
        "ds_compress --instal-completion",
        "python -m benchmarks.nothing",
        "python -m benchmarks.shrink --quik",
        "deepspeed --num_gpu_s 2 train.py",
        "pip install 'ds_compress[prun]'",
        "frobnicate",
    ]
    assert all(problem_of(commands(text)[0]) for text in wrong)


def problem_of(words: list[str]) -> str:
    """What is wrong with a command; empty if nothing is."""
    program, *arguments = words
    options = [word.split("=")[0] for word in arguments if word.startswith("-")]
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        missing = [t for t in targets if not re.search(rf"^{re.escape(t)}:", MAKEFILE, re.MULTILINE)]
        return f"no target {missing}" if missing else ""
    if program in ("pip", "pip3"):
        extras = [e for word in arguments for e in _extras(word)]
        missing = [extra for extra in extras if extra not in EXTRAS]
        return f"no extra {missing}" if missing else ""
    if program == "ds_compress":
        return _of_typer(arguments)
    if program == "torchrun":
        unknown = [option for option in options if option not in OF_TORCHRUN]
        first = next((word for word in arguments if not word.startswith("-")), "")
        before = arguments[: arguments.index(first)] if first else arguments
        return f"unknown {unknown}" if set(unknown) & {w.split("=")[0] for w in before} else ""
    if program == "deepspeed":
        return _of_deepspeed(arguments)
    if program.startswith("python"):
        return _of_python(arguments)
    if program.endswith("pytest"):
        return f"unknown {set(options) - OF_PYTEST}" if set(options) - OF_PYTEST else ""
    if program == "mkdocs":
        return "" if arguments[:1] in (["serve"], ["build"]) else "no such command"
    if program.startswith(("./", ".ci/")):
        return "" if (ROOT / program).is_file() else "no such file"
    return "" if program in KNOWN else "an unknown program"


def _extras(word: str) -> list[str]:
    found = re.search(r"(?:ds_compress|^\.)\[([\w,-]+)\]", word)
    return found[1].split(",") if found else []


def _of_typer(arguments: list[str]) -> str:
    group: Any = typer.main.get_command(app)
    of_all = {option for parameter in group.params for option in parameter.opts}
    if set(arguments) <= of_all:  # none shows the help
        return ""
    command = group.commands.get(arguments[0]) if arguments else None
    if command is None:
        return f"no command {arguments[:1]}"
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    unknown = [word.split("=")[0] for word in arguments if word.startswith("--")]
    return f"unknown {wrong}" if (wrong := [word for word in unknown if word not in known]) else ""


def _of_deepspeed(arguments: list[str]) -> str:
    from deepspeed.launcher import runner

    try:
        parsed = runner.parse_args(arguments)
    except SystemExit:
        return "the launcher refuses it"
    if parsed.user_script.startswith("-"):
        return f"the launcher does not know {parsed.user_script}"
    if parsed.module:
        return _of_module(parsed.user_script, parsed.user_args)
    return ""


def _of_python(arguments: list[str]) -> str:
    if "-m" in arguments:
        at = arguments.index("-m")
        return _of_module(arguments[at + 1], arguments[at + 2 :])
    return ""


def _of_module(name: str, arguments: list[str]) -> str:
    if name == "pytest":
        return ""
    if name == "ds_compress":
        return _of_typer(arguments)
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"there is no module {name}"
    if not name.startswith(("benchmarks", "ds_compress", "tests")):
        return ""
    if name == "ds_compress.run":
        return ""
    known = _options_named_in(Path(spec.origin))
    wrong = [word for word in arguments if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known]
    return f"{name} does not know {wrong}" if wrong else ""


def _options_named_in(path: Path) -> set[str]:
    """Options in a module, its `__main__`, and the benchmarks' modules that it imports."""
    imported = re.findall(r"^from (?:benchmarks)?(?:\.(\w*))? import (.*)$", path.read_text(), re.MULTILINE)
    names = {name for module, things in imported for name in (module, *re.findall(r"\w+", things)) if name}
    files = [path, path.with_name("__main__.py"), *(ROOT / "benchmarks" / f"{name}.py" for name in names)]
    return {o for file in files if file.is_file() for o in re.findall(r'"(--?[\w-]+)"', file.read_text())}
