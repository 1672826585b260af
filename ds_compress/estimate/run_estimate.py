"""What `ds_compress plan --world-size` says of a run: memory of a process, bytes on the wire, what grows too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.report.table import size_in_words
from ds_compress.config.targets import Weight
from ds_compress.estimate import memory, wire
from ds_compress.estimate.breaks import Break, breaks
from ds_compress.estimate.memory import Held, held, passing
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.wire import Way, ways
from ds_compress.sheet import NOTHING, Sheet, folded, width_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WORDS = {
    "weights": "weights as forward reads them",
    "gradients": "gradients",
    "masters": "fp32 weights of the optimizer",
    "moments": "moments of the optimizer",
    "buckets": "bucket of gradients",
    "communication": "residuals and copies of communication",
    "masks": "masks",
    "latent": "latent weights",
    "scores": "scores",
    "teacher": "teacher",
}
_UNKNOWN_TEACHER = "not known: say --teacher FOLDER"


@dataclass(frozen=True)
class RunEstimate:
    """gbit_per_s: of the link of a node to the others, None where nobody has said."""

    layout: RunLayout
    held: Held
    passing: tuple[tuple[str, int], ...]
    ways: tuple[Way, ...]
    breaks: tuple[Break, ...]
    gbit_per_s: float | None = None

    def seconds(self, way: Way) -> float | None:
        """On the link of a node, if it did nothing else and at its full rate."""
        return None if self.gbit_per_s is None else way.total.leaving * 8 / (self.gbit_per_s * 1e9)

    def as_data(self) -> dict[str, Any]:
        """Plain data: the key `run` that `cli.results` describes."""
        return {
            "world_size": self.layout.world_size,
            "nodes": self.layout.nodes,
            "zero_stage": self.layout.stage,
            "memory_bytes": {**self.held.rows(), "total": self.held.total},
            "passing_bytes": dict(self.passing),
            "wire_bytes": [self._way(way) for way in self.ways],
            "breaks": [one.what for one in self.breaks],
            "notes": [*self.layout.notes, memory.NOT_COUNTED, wire.NOT_COUNTED],
        }

    def _way(self, way: Way) -> dict[str, Any]:
        return {
            "way": way.name,
            "gradients": round(way.gradients.sent),
            "weights": round(way.weights.sent),
            "total": round(way.total.sent),
            "leaving_a_node": round(way.total.leaving),
            "seconds": self.seconds(way),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layout, width = self.layout, width_of(options)
        nodes = f" on {layout.nodes:,} nodes" if layout.nodes > 1 else ""
        yield Text(
            f"\npredicted of a run with {layout.world_size:,} processes{nodes}, ZeRO-{layout.stage}", "bold"
        )
        yield Text("\nheld by each process between backward and step", "bold")
        yield self._memory()
        for what, size in self.passing:
            yield from _folded(
                f"for a part of a step, beside these: {what}, up to {size_in_words(size)}", width
            )
        yield from _folded(memory.NOT_COUNTED, width)
        if layout.world_size > 1:
            yield Text("\nsent by each process in a step", "bold")
            yield self._wire()
            yield from _folded(
                "a ring leaves a node once, an all-to-all by each of its processes; after warm-up, on a link on which "
                "quantizing pays",
                width,
            )
            yield from _folded(wire.NOT_COUNTED, width)
        for number, one in enumerate(self.breaks, start=1):
            yield from _folded(f"grows too large, {number}: {one.what}", width)
        for note in layout.notes:
            yield from _folded(f"note: {note}", width)

    def _memory(self) -> Sheet:
        sheet = Sheet(("kind", "bytes"), ("bytes",))
        for key, value in self.held.rows().items():
            if value is None or value:
                sheet.add(_WORDS[key], _UNKNOWN_TEACHER if value is None else size_in_words(value))
        sheet.add(
            "in all" if self.held.teacher is not None else "in all, without the teacher",
            size_in_words(self.held.total),
        )
        return sheet

    def _wire(self) -> Sheet:
        numbers = ("gradients", "weights", "in all", "leave a node", "at least")
        sheet = Sheet(("way", *numbers), numbers)
        for way in self.ways:
            parts = (way.gradients.sent, way.weights.sent, way.total.sent, way.total.leaving)
            seconds = self.seconds(way)
            cells = [size_in_words(round(part)) if part else NOTHING for part in parts]
            sheet.add(way.name, *cells, NOTHING if seconds is None else f"{seconds:.3g} s")
        return sheet


def estimate(
    plan: ResolvedPlan,
    deepspeed: Mapping[str, Any],
    world_size: int,
    *,
    zero_stage: int | None = None,
    nodes: int = 1,
    gbit_per_s: float | None = None,
    teacher: Sequence[Weight] | None = None,
) -> RunEstimate:
    """Of a run of `plan` with the DeepSpeed JSON `deepspeed` ({}: DeepSpeed's defaults).

    Args:
        zero_stage: in place of the JSON's.
        nodes: on which as many processes run each.
        gbit_per_s: between a node and the others.
        teacher: weights of another model that teaches.

    Raises:
        ValueError: processes that do not divide by nodes; or something that these predictions do not know.
    """
    if gbit_per_s is not None and nodes == 1:
        raise ValueError("--bandwidth is that of the link between nodes: say --nodes")
    layout = RunLayout.of(deepspeed, world_size, nodes, zero_stage)
    found = list(ways(plan.weights, layout, plan.config))
    return RunEstimate(
        layout,
        held(plan, layout, teacher),
        tuple(passing(plan, layout)),
        tuple(found),
        tuple(breaks(plan, layout, found)),
        gbit_per_s,
    )


def _folded(text: str, width: int) -> list[Text]:
    return [Text(line, overflow="fold") for line in folded(text, width)]
