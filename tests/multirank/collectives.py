"""Scenarios of the pure collectives of `ds_compress.reduce`, run in several processes by test_collectives.py."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.reduce import nodes as nodes_module
from ds_compress.reduce.bandwidth import compare
from ds_compress.reduce.codec import BlockCodec, PlainCodec
from ds_compress.reduce.exchange import Feedback, QuantizedSum
from ds_compress.reduce.nodes import find_nodes
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.robust import Policy, RobustSum
from ds_compress.reduce.rules import COORDINATES
from ds_compress.reduce.slices import Part, Segment
from ds_compress.reduce.weight_deltas import ReplicatedWeights
from tests.multirank.common import device

LENGTHS = (0, 1, 5, 512, 1000, 12295, 100001)


def run_all() -> dict[str, Any]:
    return {
        "all_reduce": all_reduces(),
        "scatter": scatters(),
        "specials": specials(),
        "feedback": feedback(),
        "weights": replicated_weights(),
        "robust": robust(),
        "link": link(),
    }


def contribution(rank: int, numel: int, seed: int = 0) -> torch.Tensor:
    """What a rank has; every rank can make that of any other."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    # Scales that differ along the tensor, as those of the layers of a model do.
    values = torch.randn(numel, generator=generator) * torch.logspace(-3, 0, max(numel, 1))[:numel]
    return values.to(device())


def error_over_bound(result: torch.Tensor, rows: torch.Tensor, bits: int, block: int, twice: bool) -> float:
    """The largest error of a mean over what the scales of its blocks allow; <= 1 when all is well."""
    if not result.numel():
        return 0.0
    exact = rows.double().mean(0)
    steps = 127 if bits == 8 else 7
    bound = largest_nearby(rows.abs().double(), block).mean(0) / steps * 0.5
    if twice:
        bound = bound + largest_nearby((exact.abs() + bound)[None], block)[0] / steps * 0.5
    slack = 1e-6 * rows.abs().double().sum(0) + 1e-30
    return float(((result.double() - exact).abs() / (bound + slack)).max())


def largest_nearby(rows: torch.Tensor, block: int) -> torch.Tensor:
    """For each element, the largest of its row in any run of `block` elements that it may be encoded with."""
    numel = rows.shape[1]
    whole = torch.nn.functional.pad(rows, (0, -numel % block)).view(len(rows), -1, block).amax(2)
    beside = torch.nn.functional.max_pool1d(whole[:, None], 3, stride=1, padding=1)[:, 0]
    return beside.repeat_interleave(block, 1)[:, :numel]


def all_reduces() -> list[dict[str, Any]]:
    """Every length, bits, with and without chunks and nodes: the result of this rank, and its error."""
    world, rank = dist.get_world_size(), dist.get_rank()
    found = []
    os.environ[nodes_module.NODE_VARIABLE] = f"host{rank % 2}"
    two_nodes = find_nodes(None)
    for bits, block in ((8, 512), (4, 128)):
        for numel in LENGTHS:
            for nodes, chunk in ((None, 1 << 20), (None, 4096), (two_nodes, 4096)):
                if nodes is None and chunk == 4096 and numel < 1000:
                    continue
                x = contribution(rank, numel)
                cut = numel // 3
                segments = [Segment(part, 0) for part in (x[:cut], x[cut:])]
                QuantizedSum(None, BlockCodec(bits, block), chunk, nodes).all_reduce(segments, 1 / world)
                rows = torch.stack([contribution(r, numel) for r in range(world)])
                places = world // 2 if nodes is not None else 1
                sent_rows = (
                    rows.view(places, world // places, numel).sum(0) / places if nodes is not None else rows
                )
                found.append(
                    {
                        "numel": numel,
                        "hosts": nodes is not None,
                        "bits": x.cpu().numpy().tobytes(),
                        "error": error_over_bound(x, sent_rows, bits, block, twice=True),
                    }
                )
    return found


def scatters() -> list[dict[str, Any]]:
    """Uneven slices in any order, empty ones, more owners than elements: error of what this rank got."""
    world, rank = dist.get_world_size(), dist.get_rank()
    os.environ[nodes_module.NODE_VARIABLE] = f"host{rank % 2}"
    two_nodes = find_nodes(None)
    layouts = {
        "uneven": [(0, 7), (world - 1, 5000), (0, 12295), (1, 1), (0, 3)],
        "one owner": [(world - 1, 9000)],
        "few elements": [(0, 1)],
        "nothing": [],
        "interleaved": [(i % world, 100 + 37 * i) for i in range(40)],
    }
    found = []
    for name, layout in layouts.items():
        for dtype in (torch.float32, torch.bfloat16):
            for nodes in (None, two_nodes):
                numel = sum(size for _, size in layout)
                rows = torch.stack([contribution(r, numel).to(dtype) for r in range(world)])
                segments, begin = [], 0
                for owner, size in layout:
                    segments.append(Segment(rows[rank, begin : begin + size].clone(), owner))
                    begin += size
                got = {id(s): torch.full((s.numel,), math.nan, device=device()) for s in segments}

                def deliver(part: Part, values: torch.Tensor, got: dict[int, torch.Tensor] = got) -> None:
                    got[id(part.segment)][part.begin : part.end] = values

                QuantizedSum(None, BlockCodec(8, 512), 4096, nodes).reduce_scatter(
                    segments, deliver, 1 / world
                )
                begin, worst, missing = 0, 0.0, 0
                for (owner, size), segment in zip(layout, segments, strict=True):
                    result = got[id(segment)]
                    if owner == rank:
                        exact = rows[:, begin : begin + size].double().mean(0)
                        largest = float(rows.abs().max())
                        worst = max(worst, float((result.double() - exact).abs().max()) / (largest / 127))
                        missing += int(result.isnan().sum())
                    else:
                        missing += int((~result.isnan()).sum())
                    begin += size
                found.append({"name": name, "hosts": nodes is not None, "error": worst, "missing": missing})
    return found


def specials() -> dict[str, Any]:
    """NaN, Inf, zeros and the ends of the range: what an all-reduce makes of them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sum_of = QuantizedSum(None, BlockCodec(8, 512), 1 << 20)
    found: dict[str, Any] = {}
    for name, value in (("nan", math.nan), ("inf", math.inf), ("tiny", 1e-38), ("huge", 3e38), ("zero", 0.0)):
        x = torch.zeros(4096 * world, device=device())
        if rank == 1:
            x[1000] = value
        sum_of.all_reduce([Segment(x, 0)], 1 / world)
        found[name] = (int(x.isnan().sum()), float(x[1000]), float(x[3000]))
    return found


def feedback() -> dict[str, Any]:
    """The mean of many payloads of one gradient tends to it with error feedback, and a skipped step leaves no trace."""
    world, rank = dist.get_world_size(), dist.get_rank()
    numel, rounds = 5000, 40
    rows = torch.stack([contribution(r, numel) for r in range(world)])
    exact = rows.double().mean(0)
    found: dict[str, Any] = {}
    for kind in ("none", "8", "16"):
        residuals = None if kind == "none" else Feedback(Residuals(int(kind)), Residuals(int(kind)))
        total = torch.zeros(numel, dtype=torch.float64, device=device())
        sums = QuantizedSum(None, BlockCodec(4, 512), 2048)
        for _ in range(rounds):
            x = rows[rank].clone()
            # Another cut every time: residuals belong to elements, not to buckets.
            segments = [Segment(x[:1234], 0, "a", 0), Segment(x[1234:], 0, "a", 1234)]
            sums.all_reduce(segments, 1 / world, residuals)
            total += x.double()
        found[kind] = float((total / rounds - exact).norm() / exact.norm())
    residuals = Feedback(Residuals(8), Residuals(8))
    sums = QuantizedSum(None, BlockCodec(4, 128), 2048)
    for step in range(3):
        x = rows[rank].clone()
        sums.all_reduce([Segment(x, 0, "a", 0)], 1 / world, residuals)
        if step != 1:
            residuals.sent.commit(), residuals.summed.commit()
        else:
            residuals.sent.rollback(), residuals.summed.rollback()
        found[f"step {step}"] = x.cpu().numpy().tobytes()
    replay = Feedback(Residuals(8), Residuals(8))
    for step in range(2):
        x = rows[rank].clone()
        sums.all_reduce([Segment(x, 0, "a", 0)], 1 / world, replay)
        found[f"replayed {step}"] = x.cpu().numpy().tobytes()
    return found


def replicated_weights() -> dict[str, Any]:
    """Copies stay equal, follow the exact weights, and are exact after a refresh; zeros stay zeros."""
    world, rank = dist.get_world_size(), dist.get_rank()
    numel = 3001
    exact = torch.stack([contribution(r, numel, seed=5) for r in range(world)])
    found: dict[str, Any] = {}
    for bits, block in ((8, 512), (4, 128)):
        copies = exact.bfloat16().view(-1).clone()
        weights = ReplicatedWeights(copies, None, BlockCodec(bits, block), 1024)
        masters = exact.clone()
        masters[:, ::7] = 0
        new_zeros = weights.has_new_zeros(masters[rank])
        weights.refresh(masters[rank])
        no_new_zeros = not weights.has_new_zeros(masters[rank])
        errors = []
        for step in range(6):
            change = torch.stack([contribution(r, numel, seed=10 + step) for r in range(world)]) * 1e-3
            change[:, ::7] = 0
            masters += change
            copies.view(world, numel)[rank].copy_(masters[rank])  # as the optimizer does
            weights.update(masters[rank])
            errors.append(float((copies.view(world, numel).float() - masters).abs().max()))
        zeros = int(copies.view(world, numel)[:, ::7].count_nonzero())
        bits_now = copies.view(torch.int16).cpu().numpy().tobytes()
        weights.refresh(masters[rank])
        found[str(bits)] = {
            "new_zeros": new_zeros and no_new_zeros,
            "errors": errors,
            "not zero": zeros,
            "bits": bits_now,
            "refreshed": torch.equal(copies.view(world, numel), masters.bfloat16()),
        }
    return found


def robust() -> list[dict[str, Any]]:
    """Every rule, distributed, against the rule on full vectors; a NaN worker is excluded and flagged."""
    world, rank = dist.get_world_size(), dist.get_rank()
    found = []
    numel = 10007
    for rule in ("mean", "trimmed_mean", "median", "centered_clip", "norm_clip"):
        for codec, mixed in (
            (PlainCodec(torch.float32), False),
            (PlainCodec(torch.float32), True),
            # Independent gradients are about equally far from each other: who is nearest is up to the rounding.
            (BlockCodec(8, 512), False),
        ):
            for bad in ("none", "nan", "large"):
                rows = torch.stack([contribution(r, numel) for r in range(world)])
                if bad == "nan":
                    rows[1, 77] = math.nan
                if bad == "large":
                    rows[1] *= 100
                reports: list[Any] = []
                reduction = RobustSum(
                    None,
                    codec,
                    Policy(rule, max_malicious=1, on_outlier="exclude", neighbor_mixing=mixed),
                    2048,
                    lambda gram, report, reports=reports: reports.append(report),
                )
                x = rows[rank].clone()
                cuts = zip(
                    ("a", "b", "c"), x.split((700, 100, numel - 800)), (False, True, False), strict=True
                )
                reduction.all_reduce([Segment(values, 0, key, exact=e) for key, values, e in cuts], 1 / world)
                honest = [r for r in range(world) if bad == "none" or r != 1]
                expected = whole_rule(rule, rows[honest].double(), 1 if bad == "none" else 0, mixed)
                found.append(
                    {
                        "rule": rule,
                        "bad": bad,
                        "plain": isinstance(codec, PlainCodec),
                        "mixed": mixed,
                        "error": float((x.double() - expected).norm() / expected.norm()),
                        "bits": x.cpu().numpy().tobytes(),
                        "accused": reports[0].flagged,
                    }
                )
    rows = torch.full((world, 300), math.nan, device=device())
    x = rows[rank].clone()
    RobustSum(None, PlainCodec(torch.float32), Policy()).all_reduce([Segment(x, 0)], 1 / world)
    found.append({"rule": "overflow", "all_nan": bool(x.isnan().all())})
    return found


def whole_rule(rule: str, rows: torch.Tensor, f: int, mixed: bool) -> torch.Tensor:
    """Plain fp64, straight from the papers."""
    if rule == "mean":
        return rows.mean(0)
    if mixed and f:
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(len(rows) - f, largest=False).indices
        rows = torch.stack([rows[own].mean(0) for own in nearest])
    if rule in COORDINATES:
        ordered = rows.sort(0).values
        if rule == "trimmed_mean":
            return ordered[f : len(rows) - f].mean(0)
        return rows.quantile(0.5, dim=0)
    centre = torch.zeros_like(rows[0])
    for _ in range(1 if rule == "norm_clip" else 3):
        distances = (rows - centre).norm(dim=1)
        radius = distances.quantile(0.5)
        factors = torch.minimum(torch.ones_like(distances), radius / distances)
        centre = centre + (factors[:, None] * (rows - centre)).mean(0)
    return centre


def link() -> dict[str, Any]:
    """Both sides of the choice, with a slow way on either side; the same answer everywhere."""
    import time

    def slow() -> None:
        time.sleep(0.02)

    def fast() -> None: ...

    return {
        "slow link": compare(slow, fast, None, device(), 10**6).is_worthwhile,
        "fast link": compare(fast, slow, None, device(), 10**6).is_worthwhile,
    }
