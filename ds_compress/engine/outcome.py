"""What a run was started for, and where its results lie: what it can say at its end that the techniques do not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ds_compress.config.report import size_estimate
from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.report.table import size_in_words


@dataclass(frozen=True)
class Expected:
    """What a plan promises.

    numbers: {"<technique>/<number>": value at the end of all schedules}, those of `metrics()` that are known before.
    before, after: bytes of the weights now, and in the files of an export.
    format: of that export.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    before: int = 0
    after: int = 0
    format: str = ""

    @classmethod
    def of(cls, plan: ResolvedPlan) -> Expected:
        claims = {**plan.structures, **plan.techniques}
        numbers = {
            f"{key}/{name}": value
            for key, block in plan.config.enabled_blocks().items()
            if key in claims
            for name, value in block.planned(claims[key]).items()
        }
        sizes = size_estimate.total(size_estimate.stored(plan).values())
        return cls(numbers, sizes.before, sizes.after, size_estimate.format_of(plan))

    @property
    def size(self) -> str:
        """E.g. "4.02 MB, predicted 843 kB in format torch"; empty where no block is about it, or nothing changes."""
        if not self.before or (self.before == self.after and not self.numbers):
            return ""
        after = size_in_words(self.after)
        return f"{size_in_words(self.before)}, predicted {after} in format {self.format}"


@dataclass(frozen=True)
class Place:
    """A folder on disk: a checkpoint, or an export; and after how many applied steps it was written."""

    folder: str
    steps: int
    is_export: bool = False


@dataclass
class Outcome:
    """Goes with the model through every rebuild of its run.

    expected: empty on processes that do not log. place: what was written last, or read. told_at: applied steps at which
    the end was told, or at which this process began. told_place: the place that was told then.
    """

    expected: Expected = field(default_factory=Expected)
    place: Place | None = None
    told_at: int = 0
    told_place: Place | None = None

    def read(self, place: Place, is_start: bool) -> None:
        """The run goes on from `place`; is_start: this process has not trained before, and tells no work of others."""
        self.place = place
        if is_start:
            self.told_at, self.told_place = place.steps, place
