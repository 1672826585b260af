"""Tables of what serves a compressed model on a CPU; see `figures`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from .figure_rows import Lines, Results, markdown


def served_formats() -> Lines:
    """The fastest at 32 x 40 first, ours or not."""
    r = Results("served_formats")
    many, one = "32 x 40, ", "1 x 40, "
    names = [v.removeprefix(many) for v in r.variants() if v.startswith(many)]
    names.sort(key=lambda name: r.value(many + name, "ms"))

    def row(name: str) -> list[str]:
        cells = [name]
        for batch in (many, one):
            cells += [f"{r.value(batch + name, 'ms'):.3g}", f"{r.value(batch + name, 'times NNCF'):.2f}"]
        return [*cells, f"{r.value(many + name, 'MB'):.1f}"]

    head = ["", "32 x 40: ms", "NNCF = 1", "1 x 40: ms", "NNCF = 1", "MB"]
    return markdown(head, map(row, names), r.sources)


WEIGHT_ONLY_PEERS = {
    "`F.linear` bf16": ("F.linear bf16", "ours, bf16 rows"),
    "aten int4pack (bf16)": ("aten int4pack, bf16 rows", "ours, bf16 rows"),
    "`F.linear` fp32": ("F.linear fp32", "ours, fp32 rows"),
    "MatMulNBits, fp32": ("MatMulNBits, accuracy_level 1", "ours, fp32 rows"),
    "MatMulNBits, int8": ("MatMulNBits, accuracy_level 4", "ours, fp32 rows"),
}


def weight_only() -> Lines:
    """By rows of x: how many times as long each peer takes, over all shapes and group sizes of int4."""
    r = Results("weight_only_linear")
    found = re.compile(r"(?P<shape>.+, int4 in groups of \d+), (?P<rows>\d+) rows: ")
    cases: dict[int, list[str]] = {}
    for variant in r.variants(": ours, fp32 rows"):
        matched = found.match(variant)
        if matched:
            cases.setdefault(int(matched["rows"]), []).append(matched[0])

    def row(count: int) -> list[str]:
        cells = [str(count)]
        for peer, _ in WEIGHT_ONLY_PEERS.values():
            cells.append(mean_and_least([r.value(case + peer, "times slower") for case in cases[count]]))
        shares = [
            r.value(case + ours, "percent of roofline")
            for case in cases[count]
            for ours in ("ours, fp32 rows", "ours, bf16 rows")
            if count == 1
        ]
        return [*cells, f"{min(shares):.0f} to {max(shares):.0f} %" if shares else ""]

    head = ["rows", *WEIGHT_ONLY_PEERS, "of the bandwidth"]
    return markdown(head, map(row, sorted(cases)), r.sources)


def weight_only_decode() -> Lines:
    r = Results("weight_only_decode")

    def row(variant: str) -> list[str]:
        title, _, name = variant.rpartition(": ")
        low, high = (r.value(variant, f"times slower, {which} quartile") for which in ("lower", "upper"))
        slower = f"{r.value(variant, 'times slower'):.2f} ({low:.2f} to {high:.2f})"
        return [title, name, f"{r.value(variant, 'CPU ms'):.0f}", slower]

    rows = [row(variant) for variant in r.variants()]
    return markdown(["", "", "CPU ms", "times as long as the first"], rows, r.sources)


SHARES = ("50%", "60%", "70%", "80%", "90%")


def block_sparse() -> Lines:
    """By rows of x: time over the dense int8 product, the geometric mean and the most over all layers."""
    r = Results("sparse_linear")
    cases: dict[int, list[str]] = {}
    for variant in r.variants(": int8_linear"):
        cases.setdefault(int(variant.split(",")[0].removeprefix("M ")), []).append(
            variant.removesuffix("int8_linear")
        )

    def row(count: int) -> list[str]:
        cells = [str(count)]
        for share in SHARES:
            over = [
                r.value(f"{case}block_sparse_int8_linear, {share} zeros", "time over int8_linear")
                for case in cases[count]
            ]
            cells.append(f"{statistics.geometric_mean(over):.2f} ({max(over):.2f})")
        return cells

    return markdown(["rows", *(f"{s} zeros" for s in SHARES)], map(row, sorted(cases)), r.sources)


def stored_zeros() -> Lines:
    r = Results("sparse_linear")
    folders = [v for v in r.variants() if v.startswith("folder, ") and "no zeros" not in v]

    def row(variant: str) -> list[str]:
        cells = [variant.removeprefix("folder, "), f"{r.value(variant, 'MB'):.1f}"]
        cells += [
            f"{r.value(variant, f'times smaller, {what}'):.2f}x" for what in ("MB", "MB of linear layers")
        ]
        return [*cells, f"{r.value(variant, 'CPU seconds to load'):.2f}"]

    head = ["", "MB", "smaller", "its linear layers", "CPU seconds to load"]
    return markdown(head, map(row, folders), r.sources)


def mean_and_least(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f})"
