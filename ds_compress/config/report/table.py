"""The table of a plan: one line per weight, layers that are treated alike collapsed into one."""

from __future__ import annotations

import io
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from ds_compress.config.report import size_estimate
from ds_compress.config.report.coverage import left_out
from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.report.size_estimate import Stored, format_of
from ds_compress.config.schema.block import WeightBlock
from ds_compress.config.schema.compression_training import block_classes
from ds_compress.config.schema.structured_pruning import StructuredPruningConfig
from ds_compress.config.targets import Target
from ds_compress.sheet import Sheet, folded, uncut, width_of

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class LineItem:
    """What happens to the weight or the input of one module; lines with equal treatments may be collapsed."""

    shape: tuple[int, ...]
    cells: tuple[str, ...]
    tied_to: str


@dataclass(frozen=True)
class Line:
    """One line of the table: the modules it stands for, the first of them, and what they are stored as together."""

    name: str
    first: str
    count: int
    treatment: LineItem
    stored: Stored


def plain_text(plan: ResolvedPlan) -> str:
    """The report without colours, wherever it goes, for the width of the terminal, or 80 columns."""
    paper = io.StringIO()
    console = uncut(paper)
    for part in renderables(plan, width_of(console.options)):
        console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in paper.getvalue().splitlines()).rstrip()


def renderables(plan: ResolvedPlan, width: int) -> Iterator[RenderableType]:
    """The parts of the report, for rich, on a console of `width` columns."""
    blocks = list(describe(plan))
    if not blocks:
        yield Text("compression_training: nothing is enabled")
        return
    for key, what in blocks:
        first, *others = folded(f"{key}: {what}", width)
        yield Text.assemble((key, "bold"), first.removeprefix(key), overflow="fold")
        yield from map(_line, others)
    if plan.structures:
        yield _structure_table(plan)
    if plan.techniques:
        yield _table(plan)
    if plan.techniques or plan.structures:
        yield from _folded(_totals(plan), width)
    yield from _folded(map(str, left_out(plan)), width)
    yield from _folded(plan.notes, width)


def describe(plan: ResolvedPlan) -> Iterator[tuple[str, str]]:
    """(key of the block, what it does) of each enabled block; those that remove structures come first.

    Before them the recipe that the JSON named, if it did.
    """
    if plan.config.applied_recipe is not None:
        yield "recipe", plan.config.applied_recipe.describe()
    claims = {**plan.structures, **plan.techniques}
    enabled = plan.config.enabled_blocks()
    first = [key for key in enabled if key in plan.structures]
    for key in (*first, *(key for key in enabled if key not in first)):
        yield key, enabled[key].describe(claims.get(key))


def _folded(texts: Iterable[str], width: int) -> Iterator[Text]:
    return (_line(line) for text in texts for line in folded(text, width))


def _line(text: str) -> Text:
    return Text(text, overflow="fold")


def lines_of(plan: ResolvedPlan) -> list[Line]:
    """The lines of the table, in model order."""
    treatments = _treatments(plan)
    stored = size_estimate.stored(plan)
    parameter = {
        target.module_name: target.param_name
        for technique in plan.techniques.values()
        for target in technique.targets
    }
    lines = []
    for name, members in collapse(treatments):
        treatment = treatments[members[0]]
        parts = [] if treatment.tied_to else [stored[parameter[member]] for member in members]
        lines.append(Line(name, members[0], len(members), treatment, size_estimate.total(parts)))
    return lines


def collapse(treatments: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """(`encoder.layer.{0-5}.query`, its modules) of all; numbers are joined where they form a grid."""
    alike: dict[tuple[str, Hashable], list[str]] = {}
    for name, treatment in treatments.items():
        alike.setdefault((_NUMBER.sub("#", name), treatment), []).append(name)
    collapsed = []
    for names in alike.values():
        joined = _joined(names)
        collapsed += [(joined, names)] if joined else [(name, [name]) for name in names]
    return collapsed


def _joined(names: Sequence[str]) -> str | None:
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    grid = 1
    for column in columns:
        grid *= len(column)
    if grid != len(names):
        return None
    texts = iter([_ranges(column) for column in columns])
    return _NUMBER.sub(lambda _: next(texts), names[0])


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) + "}"


def _treatments(plan: ResolvedPlan) -> dict[str, LineItem]:
    targets: dict[str, dict[str, Target]] = {}
    for key, technique in plan.techniques.items():
        for target in technique.targets:
            targets.setdefault(target.module_name, {})[key] = target
    position = {weight.name: index for index, weight in enumerate(plan.weights)}
    in_order = sorted(targets.items(), key=lambda item: position[next(iter(item[1].values())).param_name])
    shown: dict[str, str] = {}
    treatments = {}
    for name, by_block in in_order:
        first = next(iter(by_block.values()))
        owner = shown.setdefault(first.param_name, name)
        tied_to = owner if owner != name else ""
        treatments[name] = LineItem(first.shape, _cells(plan, by_block), tied_to)
    return treatments


def _columns(plan: ResolvedPlan) -> list[str]:
    """Those of the blocks that claim weights, in the order of the schema, whether enabled or not."""
    blocks = block_classes().values()
    return list(dict.fromkeys(block.column for block in blocks if issubclass(block, WeightBlock)))


def _cells(plan: ResolvedPlan, by_block: dict[str, Target]) -> tuple[str, ...]:
    cells: dict[str, list[str]] = {column: [] for column in _columns(plan)}
    for key, target in by_block.items():
        block = plan.weight_block(key)
        cells[block.column].append(block.describe_target(target))
    return tuple("; ".join(found) or "-" for found in cells.values())


def _table(plan: ResolvedPlan) -> Sheet:
    sizes_of = ("stored", "after", "non-zeros", "as bitmask")
    table = Sheet(("module", "shape", *_columns(plan), *sizes_of), sizes_of)
    sparse = {t.module_name for key in _removing(plan) for t in plan.techniques[key].targets}
    for line in lines_of(plan):
        treatment, stored = line.treatment, line.stored
        sizes = [size_in_words(stored.before), size_in_words(stored.after), f"{stored.nonzeros:,}"]
        numbers = [*sizes, size_in_words(stored.bitmask) if line.first in sparse else "-"]
        if treatment.tied_to:
            numbers = [f"tied to {treatment.tied_to}", "-", "-", "-"]
        shape = " x ".join(map(str, treatment.shape))
        table.add(line.name, shape, *treatment.cells, *numbers)
    return table


def _structure_table(plan: ResolvedPlan) -> Sheet:
    table = Sheet(("structure", "block", "kept"))
    for key, structures in plan.structures.items():
        block = plan.config.enabled_blocks()[key]
        assert isinstance(block, StructuredPruningConfig)
        kept = {target.structure.name: block.describe_target(target) for target in structures.targets}
        for name, members in collapse(kept):
            table.add(name, key, kept[members[0]])
    return table


def _totals(plan: ResolvedPlan) -> Iterator[str]:
    stored = size_estimate.stored(plan)
    everything = size_estimate.total(stored.values())
    claimed = {target.param_name for technique in plan.techniques.values() for target in technique.targets}
    structures = [target.structure for blocks in plan.structures.values() for target in blocks.targets]
    claimed |= {member.tensor for structure in structures for member in structure.slices}
    layers = tuple(f"{layer}." for structure in structures for layer in structure.layers)
    claimed |= {weight.name for weight in plan.weights if weight.name.startswith(layers)}
    numel = sum(weight.numel for weight in plan.weights)
    claimed_numel = sum(weight.numel for weight in plan.weights if weight.name in claimed)
    yield f"claimed: {claimed_numel:,} of {numel:,} parameters"
    ratio = everything.before / everything.after if everything.after else 1.0
    sizes = f"{size_in_words(everything.before)} -> {size_in_words(everything.after)} ({ratio:.2f}x smaller)"
    sparse = f", {size_in_words(everything.bitmask)} as bitmask and non-zeros" if _removing(plan) else ""
    yield f"stored: {sizes} as {format_of(plan)}, {everything.nonzeros:,} non-zeros{sparse}"
    if any(weight.chosen < weight.experts for weight in plan.weights):
        active = f"{size_in_words(everything.active_before)} -> {size_in_words(everything.active_after)}"
        yield f"active: {active} of it, in the experts that one token sees and in all that is no expert"
    if _removing(plan):
        state = size_estimate.training_state(plan)
        processes = "1 process" if plan.world_size == 1 else f"each of {plan.world_size} processes"
        yield (
            f"training state of pruning in {processes}: masks {size_in_words(state.mask)}, "
            f"latent weights {size_in_words(state.latent)}, scores {size_in_words(state.scores)}"
        )


def _removing(plan: ResolvedPlan) -> list[str]:
    return [key for key in plan.techniques if plan.weight_block(key).removes_weights]


def size_in_words(size: int) -> str:
    """Bytes with a decimal unit, e.g. 1.18 MB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
