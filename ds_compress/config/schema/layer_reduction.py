"""`layer_reduction`: a student with fewer layers, initialised from chosen layers of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from ds_compress.config.schema.block import Block, plural
from ds_compress.config.schema.fields import Conflict, StrictBool, StrictInt

LayerIndices = Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(min_length=1)]


class LayerReductionConfig(Block):
    """Keeps some layers of the teacher: student layer i starts as teacher layer `teacher_layer[i]`."""

    key = "layer_reduction"
    done_after_shrink = True

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    keep_number_layer: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="How many layers the student has; absent: as many as teacher_layer lists."
    )
    module_name_prefix: str | None = Field(
        default=None,
        description="Module that holds the layers, e.g. bert.encoder.layer; absent: found automatically.",
    )
    teacher_layer: LayerIndices | None = Field(
        default=None, description="For each student layer, the teacher layer (from 0) that it starts from."
    )
    other_module_name: tuple[str, ...] | None = Field(
        default=None, description="Modules that are copied one to one; absent: all that both models have."
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.enabled and self.keep_number_layer is None and self.teacher_layer is None:
            yield Conflict(
                ("teacher_layer",),
                None,
                "a list of teacher layers, or keep_number_layer beside it or instead",
            )
        if (
            self.keep_number_layer is not None
            and self.teacher_layer is not None
            and len(self.teacher_layer) != self.keep_number_layer
        ):
            yield Conflict(
                ("keep_number_layer",),
                self.keep_number_layer,
                f"{len(self.teacher_layer)}, as many as teacher_layer lists",
                "remove one of the two, or make them agree",
            )

    @property
    def kept(self) -> int:
        """How many layers the student has."""
        return self.keep_number_layer or len(self.teacher_layer or ())

    def describe(self, plan: Any = None) -> str:
        where = f" under {self.module_name_prefix}" if self.module_name_prefix else ""
        facts = f"keeps {plural(self.kept, 'layer')}{where}"
        if self.teacher_layer:
            facts = f"{facts}, from teacher layers {', '.join(map(str, self.teacher_layer))}"
        else:
            facts = f"{facts}, spread evenly over the teacher"
        others = self.other_module_name
        return f"{facts}; copies {', '.join(others) if others else 'all other modules that both have'}"
