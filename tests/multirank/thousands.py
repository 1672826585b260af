"""What our own collectives cost a process among 64, 512 and 4,096, for test_thousands.py."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from pytest import MonkeyPatch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ds_compress.config.schema.gradient_compression import GradientCompressionConfig
from ds_compress.engine.checkpoint import state
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.checkpoint.stored_parts import StoredParts
from ds_compress.errors import CheckpointError
from ds_compress.ops import bitmask
from ds_compress.reduce.codec import BlockCodec, PlainCodec
from ds_compress.reduce.exchange import QuantizedSum
from ds_compress.reduce.robust import Policy, RobustSum
from ds_compress.reduce.slices import Segment
from ds_compress.select import radix
from ds_compress.select.moving import Candidates, MovingThresholds
from ds_compress.select.radix import SelectionGroup
from ds_compress.sharding.fragment import Fragment
from ds_compress.sharding.shards import Shards
from tests.multirank.simulated import as_threads, cost, one_of

WORLD_SIZES = (64, 512, 4096)
BUCKET = 100_000
THRESHOLDS = (1, 30_185)
"""Of scope "global"; of "layer" in a mixture of 671 B parameters."""
LAYERS_AT_A_TIME = 64
AT_A_TIME = 10 * 24_576
"""Elements of the weights in one pass over block rows."""


def contribution(rank: int, numel: int = 5000) -> torch.Tensor:
    """The gradient of one worker."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


def robust() -> dict[str, Any]:
    """costs: of one bucket, by world size. threads: of 64 workers, what each ends with and decides by."""

    def reduce(x: torch.Tensor, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        grams: list[torch.Tensor] = []
        reduction = RobustSum(
            None, PlainCodec(torch.float32), policy, 1 << 20, lambda gram, _: grams.append(gram)
        )
        reduction.all_reduce([Segment(x, 0)])
        return x, grams[0]

    costs = {}
    for world_size in WORLD_SIZES:
        with one_of(world_size, rank=world_size // 2):
            costs[world_size] = cost(lambda: reduce(torch.ones(BUCKET), Policy("mean")))
            costs[world_size].result = None
    clipped = Policy("centered_clip", neighbor_mixing=False)
    return {"costs": costs, "threads": as_threads(64, lambda rank: reduce(contribution(rank), clipped))}


def compressed(numel: int = 1 << 23) -> dict[int, Any]:
    """One bucket of `gradient_compression` with the defaults, by world size."""
    found = {}
    block = GradientCompressionConfig(enabled=True)
    for world_size in WORLD_SIZES:
        with one_of(world_size, rank=world_size // 2):
            shares = torch.ones(numel).split(numel // world_size)
            reduction = QuantizedSum(None, BlockCodec(8, 512), block.chunk_elements(world_size))
            segments = [Segment(values, owner, str(owner)) for owner, values in enumerate(shares)]
            found[world_size] = cost(partial(reduction.reduce_scatter, segments, lambda part, values: None))
    return found


def slices(weights: dict[str, torch.Tensor], flat: bool = False) -> Shards:
    """This process' equal slice of each weight, as ZeRO-3 cuts them; flat: of all laid end to end. A collective."""
    size, rank, fragments, at = dist.get_world_size(), dist.get_rank(), [], 0
    of_all = -(-sum(weight.numel() for weight in weights.values()) // size)
    for name, weight in weights.items():
        of_each = -(-weight.numel() // size)
        begin, end = (
            (rank * of_all - at, (rank + 1) * of_all - at) if flat else (rank * of_each, (rank + 1) * of_each)
        )
        start, at = min(max(0, begin), weight.numel()), at + weight.numel()
        own = weight.flatten()[start : max(start, end)].clone()
        parameter = nn.Parameter(own, requires_grad=False)
        fragments.append(
            Fragment(name, parameter, tuple(weight.shape), start, own.numel(), parameter, 0, dist.group.WORLD)
        )
    return Shards(fragments, dist.group.WORLD)


def numbered(count: int) -> dict[str, torch.Tensor]:
    """So many weights of 24,576 elements, no two of them alike."""
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(48, 512, generator=generator) for i in range(count)}


def start(weights: int = 200) -> dict[int, Any]:
    """Of learning what a process holds, by world size."""
    found, model = {}, numbered(weights)
    for world_size in WORLD_SIZES:
        with one_of(world_size, rank=world_size // 2):
            found[world_size] = cost(lambda: slices(model))
            found[world_size].result = None
    return found


def halos() -> dict[str, Any]:
    """Block rows of 4 x 512. costs: by world size, of 200 weights in passes of ten. threads: (start, rows) of 64."""
    costs, model = {}, numbered(200)

    def exchange(shards: Shards, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {name: fragment.values for name, fragment in shards.fragments.items()}
        numels = {name: weight.numel() for name, weight in weights.items()}
        return shards.exchange_halos(own, dict.fromkeys(weights, 2048), numels, AT_A_TIME)

    for world_size in WORLD_SIZES:
        # The slice of the process in the middle begins where a block row does.
        with one_of(world_size, rank=world_size // 2 + 1):
            costs[world_size] = cost(partial(exchange, slices(model), model))
            costs[world_size].result = sum(rows.nbytes for rows in costs[world_size].result.values())

    def of_thread(rank: int) -> dict[str, tuple[int, torch.Tensor]]:
        shards = slices(numbered(3))
        rows = exchange(shards, numbered(3))
        return {name: (shards.fragments[name].start, rows[name]) for name in rows}

    return {"costs": costs, "threads": as_threads(64, of_thread)}


def ties() -> dict[str, Any]:
    """How many lie before. costs: by world size and number of thresholds. threads: of 64, (counts, what is before)."""
    costs = {}
    for world_size in WORLD_SIZES:
        with one_of(world_size, rank=world_size // 2):
            shards = slices(numbered(1))
            for thresholds in THRESHOLDS:
                counts = torch.ones(thresholds, dtype=torch.int64)
                costs[world_size, thresholds] = cost(partial(shards.exclusive_prefix_sum, counts))
                costs[world_size, thresholds].result = None

    def of_thread(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shards, generator = slices(numbered(1)), torch.Generator().manual_seed(rank)
        of_all = [torch.randint(0, 1 << 40, (count,), generator=generator) for count in (1, 256, 257, 1000)]
        return [(counts, shards.exclusive_prefix_sum(counts)) for counts in of_all]

    return {"costs": costs, "threads": as_threads(64, of_thread)}


def histograms(groups: int = 300) -> dict[int, Any]:
    """Of the thresholds of so many weights of ten elements, by world size: the first mask and one that guesses.

    `LAYERS_AT_A_TIME` take turns.
    """
    found, scores = dict[int, Any](), torch.arange(10.0)
    names = [f"experts.{i}.weight" for i in range(groups)]
    selected = [SelectionGroup((name,), 5) for name in names]
    candidates = {name: Candidates(lambda: (scores, True), None) for name in names}
    for world_size in WORLD_SIZES[-1:]:
        with one_of(world_size, rank=world_size // 2), MonkeyPatch.context() as patched:
            patched.setattr(radix, "GROUPS_AT_A_TIME", LAYERS_AT_A_TIME)
            shards, thresholds = slices(numbered(1)), MovingThresholds()

            def select(shards: Shards = shards, thresholds: MovingThresholds = thresholds) -> int:
                masks = thresholds.select(candidates, selected, shards)
                return sum(int(bitmask.unpack(mask, 10).sum()) for _, mask in masks)

            found[world_size] = [cost(select), cost(select)]
    return found


@dataclass
class Masks:
    """As much of a run and of its only technique as a checkpoint of fragments asks for."""

    model: nn.Module
    shards: Shards
    names: Collection[str]

    @property
    def techniques(self) -> dict[str, Masks]:
        return {"sparse_pruning": self}

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        fragments = self.shards.select(sorted(self.names))
        masks = {name: fragment.values > 0 for name, fragment in fragments.items()}
        scores = {
            name: fragment.values * 2 for name, fragment in fragments.items() if name.endswith("1.weight")
        }
        return {kind: found for kind, found in {"mask": masks, "score": scores}.items() if found}


def checkpoints() -> dict[str, list[Any]]:
    """What each of 64 processes stores is loaded by 64 and by 48: (files that it has read, {kind: {name: right}}).

    flat: as ZeRO-1 and 2 cut, so that most have no scores. unknown: of a model with a weight less, the error in each.
    """

    def masks_of(count: int, flat: bool = False) -> Masks:
        weights = numbered(count)
        layers = nn.ModuleDict({str(i): nn.Linear(512, 48, bias=False, device="meta") for i in range(count)})
        return Masks(nn.ModuleDict({"layers": layers}), slices(weights, flat), weights)

    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.safetensors" for rank in range(64)]

        def store(rank: int, flat: bool = False) -> None:
            state._write_fragments(files[rank], masks_of(3, flat))  # type: ignore[arg-type]

        def load(rank: int, count: int = 3, flat: bool = False) -> Any:
            masks = masks_of(count, flat)
            try:
                stored = StoredParts(files, masks, Processes(rank, dist.get_world_size()))  # type: ignore[arg-type]
            except CheckpointError as error:
                return str(error)
            expected: dict[str, dict[str, torch.Tensor]] = {"score": {}} | masks.fragment_state()
            return len(stored.opened), {
                kind: {name: torch.equal(values, expected[kind][name]) for name, values in found.items()}
                for kind, found in stored.of_technique("sparse_pruning").items()
            }

        as_threads(64, partial(store, flat=True))
        found: dict[str, list[Any]] = {"flat": as_threads(48, partial(load, flat=True))}
        as_threads(64, store)
        found |= {str(size): as_threads(size, load) for size in (64, 48, 1)}
        found["unknown"] = as_threads(48, partial(load, count=2))
        _without_layout(files)
        found["old"] = as_threads(2, load)
        files[40].unlink()
        found["lost"] = as_threads(64, load)
    return found


def _without_layout(files: Sequence[Path]) -> None:
    """As versions wrote them that did not say what a process owned."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            index = file.metadata()["index"]
        save_file(tensors, path, {"index": index})


def run() -> dict[str, Any]:
    """All of them, in one launch."""
    return {
        "checkpoints": checkpoints(),
        "robust": robust(),
        "compressed": compressed(),
        "start": start(),
        "halos": halos(),
        "ties": ties(),
        "histograms": histograms(),
    }
