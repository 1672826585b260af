"""What `ds_compress init` asks at a terminal, where no flag has said it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ds_compress.config.recipes import Recipe

KINDS = ("encoder", "decoder", "mixture")
HARDWARE = ("gpu", "cpu")


@dataclass(frozen=True)
class Answers:
    """recipe: its name. model: a folder, or one of `KINDS`. None: nobody has said."""

    recipe: str | None = None
    model: str | None = None
    hardware: str | None = None
    processes: int | None = None
    zero_stage: int | None = None
    batch_size: int | None = None
    steps: int | None = None

    def with_defaults(self) -> Answers:
        """For flags alone."""
        return replace(
            self,
            hardware=self.hardware or "cpu",
            zero_stage=self.zero_stage or 2,
            batch_size=self.batch_size or 4,
            steps=self.steps or 1000,
        )


def ask(known: Answers, recipes: Sequence[Recipe]) -> Answers:
    """Everything that is not known yet.

    Raises:
        ValueError: an answer is none of those that there are.
    """
    model = known.model or typer.prompt(f"model (a folder, or {', '.join(KINDS)})")
    chosen = _ask_goal([each for each in recipes if kind_of(model) in each.models])
    return Answers(
        chosen.name,
        model,
        known.hardware or _ask_word("hardware", HARDWARE, "gpu"),
        known.processes or _ask_number("processes (GPUs)", max(2, chosen.processes)),
        known.zero_stage or _ask_number("ZeRO stage", 2, most=3),
        known.batch_size or _ask_number("batch size of each process", 4),
        known.steps or _ask_number("optimizer steps", 1000),
    )


def kind_of(model: str) -> str:
    """Which of `KINDS` a model is: itself, or a folder's by its config alone.

    Raises:
        ValueError: it is neither.
    """
    if model in KINDS:
        return model
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(f"model: {model!r} is no folder with a config.json, and none of {', '.join(KINDS)}")
    config = json.loads(path.read_text(encoding="utf-8"))
    if any("expert" in key and isinstance(value, int) and value > 1 for key, value in _items(config)):
        return "mixture"
    names = " ".join(config.get("architectures") or ())
    return "decoder" if "CausalLM" in names or "LMHead" in names else "encoder"


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    """Those of inner configs, too: a model of text and pictures has one for each."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield key, value
            yield from _items(value)


def _ask_goal(fitting: Sequence[Recipe]) -> Recipe:
    """The recipe that somebody chooses by what it is for."""
    for number, each in enumerate(fitting, start=1):
        typer.echo(f"{number:3}  {each.name:12} {each.use}")
    answer: str = typer.prompt("goal (a number, or a name)")
    by_answer = {str(number): each for number, each in enumerate(fitting, start=1)}
    found = by_answer.get(answer) or {each.name: each for each in fitting}.get(answer)
    if found is None:
        raise ValueError(f"goal: {answer!r} is none of the above")
    return found


def _ask_word(what: str, known: Sequence[str], default: str) -> str:
    answer: str = typer.prompt(f"{what} ({', '.join(known)})", default=default)
    if answer not in known:
        raise ValueError(f"{what}: {answer!r} is none of {', '.join(known)}")
    return answer


def _ask_number(what: str, default: int, most: int | None = None) -> int:
    answer: int = typer.prompt(what, default=default, type=int)
    if answer < 1 or (most is not None and answer > most):
        raise ValueError(f"{what}: {answer} is not {f'1 to {most}' if most else 'a number >= 1'}")
    return answer
