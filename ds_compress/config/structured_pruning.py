"""`row_pruning`, `head_pruning`, `channel_pruning`: the legacy schema of what removes whole rows or heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.fields import Conflict, Flag, Group, Groups, Ratio, Section, Step, Whole


class StructuredPruningParams(Section):
    """`params` of one group."""

    dense_ratio: Ratio = Field(
        description="Fraction of the rows, heads or channels that is kept, 0 < r <= 1."
    )


class StructuredPruningGroup(Group):
    """Layers that lose the same share of rows, heads or channels."""

    params: StructuredPruningParams = Field(description="What differs between groups.")


class RowPruningShared(Section):
    """What holds for all groups of `row_pruning` or `channel_pruning`."""

    enabled: Flag = Field(default=False, description="Whether this block does anything.")
    method: Literal["l1", "topk"] = Field(default="l1", description="Score of a row or channel.")
    schedule_offset: Step = Field(default=1000, description="Applied optimizer steps before the first mask.")


class HeadPruningShared(Section):
    """What holds for all groups of `head_pruning`."""

    enabled: Flag = Field(default=False, description="Whether this block does anything.")
    method: Literal["topk", "l1"] = Field(default="topk", description="Score of a head.")
    schedule_offset: Step = Field(default=1000, description="Applied optimizer steps before the first mask.")
    num_heads: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Attention heads of a layer; required when enabled."
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.enabled and self.num_heads is None:
            yield Conflict(("num_heads",), None, "a whole number >= 1, because head_pruning is enabled")


class RowPruning(Section):
    """Removes output rows of Linear layers."""

    shared_parameters: RowPruningShared = Field(
        default_factory=RowPruningShared, description="What holds for all groups."
    )
    different_groups: Groups[StructuredPruningGroup] = Field(default_factory=dict)


class ChannelPruning(Section):
    """Removes output channels of Conv2d layers."""

    shared_parameters: RowPruningShared = Field(
        default_factory=RowPruningShared, description="What holds for all groups."
    )
    different_groups: Groups[StructuredPruningGroup] = Field(default_factory=dict)


class HeadPruning(Section):
    """Removes attention heads, through the columns of the attention's output projection."""

    shared_parameters: HeadPruningShared = Field(
        default_factory=HeadPruningShared, description="What holds for all groups."
    )
    different_groups: Groups[StructuredPruningGroup] = Field(default_factory=dict)
