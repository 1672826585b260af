"""Tables of models and kernels that are served on a CPU, and of a training step beside its peers; see `figures`."""

from __future__ import annotations

import statistics

from .figure_rows import Lines, Results, markdown

MANY, ONE = "32 x 40, ", "1 x 40, "


def served_formats() -> Lines:
    """The fastest at 32 x 40 first, ours or not."""
    r = Results("served_formats")
    names = [v.removeprefix(MANY) for v in r.variants() if v.startswith(MANY)]
    names.sort(key=lambda name: r.value(MANY + name, "ms"))

    def row(name: str) -> list[str]:
        cells = [name]
        for batch in (MANY, ONE):
            low, high = (r.value(batch + name, f"{which} quartile ms") for which in ("lower", "upper"))
            cells += [f"{r.value(batch + name, 'ms'):.3g} ({low:.3g} to {high:.3g})"]
            cells += [f"{r.value(batch + name, 'times NNCF'):.2f}"]
        return [*cells, f"{r.value(MANY + name, 'MB'):.1f}"]

    head = ["", "32 x 40: ms (quartiles)", "NNCF = 1", "1 x 40: ms (quartiles)", "NNCF = 1", "MB"]
    return markdown(head, map(row, names), r.sources)


def attention() -> Lines:
    """Times over torch's, of each dtype."""
    r = Results("attention")
    shapes = dict.fromkeys(variant.split(": ")[0] for variant in r.variants())
    kinds = ("float32", "float32, masked", "bfloat16", "bfloat16, masked")

    def cell(variant: str) -> str:
        low, high = (r.value(variant, f"{which} quartile") for which in ("lower", "upper"))
        return f"{r.value(variant, 'time over torch'):.2f} ({low:.2f} to {high:.2f})"

    rows = [[shape, *(cell(f"{shape}: {kind}") for kind in kinds)] for shape in shapes]
    return markdown(["", "fp32", "fp32, masked", "bf16", "bf16, masked"], rows, r.sources)


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
    """Of int8 weights with zeros in linear layers; the results have fp32 and all matrices, too."""
    r = Results("sparse_linear")
    start, end = "folder, int8, ", " of linear layers"
    folders = [v for v in r.variants() if v.startswith(start) and end in v]

    def row(variant: str) -> list[str]:
        cells = [variant.removeprefix(start).replace(end, ""), f"{r.value(variant, 'MB'):.1f}"]
        cells += [
            f"{r.value(variant, f'times smaller, {what}'):.2f}x" for what in ("MB", "MB of linear layers")
        ]
        return [*cells, f"{r.value(variant, 'CPU seconds to load'):.2f}"]

    head = ["", "MB", "smaller", "its linear layers", "CPU seconds to load"]
    return markdown(head, map(row, folders), r.sources)


PEERS_OF_WEIGHTS = {
    "`F.linear` fp32": "F.linear fp32",
    "bf16": "F.linear bf16",
    "aten int4pack": "aten int4pack, bf16 rows",
    "MatMulNBits": "MatMulNBits, accuracy_level 1",
    "the same, rows in int8": "MatMulNBits, accuracy_level 4",
}


def weight_only() -> Lines:
    """How many times as long a peer takes, the geometric mean and the least over the shapes."""
    r = Results("weight_only_linear")
    cases: dict[tuple[str, int], list[str]] = {}
    for variant in r.variants(": F.linear fp32"):
        shape, kind, rows = variant.removesuffix(": F.linear fp32").split(", ")
        cases.setdefault((kind, int(rows.removesuffix(" rows"))), []).append(f"{shape}, {kind}, {rows}")

    def row(case: tuple[str, int]) -> list[str]:
        kind, count = case
        cells = [f"{kind}, {count}"]
        for peer in PEERS_OF_WEIGHTS.values():
            there = [title for title in cases[case] if f"{title}: {peer}" in r.variants()]
            slower = [r.value(f"{title}: {peer}", "times slower") for title in there]
            cells.append(f"{statistics.geometric_mean(slower):.2f} ({min(slower):.2f})" if slower else "")
        if count > 1:
            return [*cells, ""]
        shares = [r.value(f"{title}: ours, bf16 rows", "percent of roofline") for title in cases[case]]
        return [*cells, f"{min(shares):.0f} % and more"]

    return markdown(["weights, rows", *PEERS_OF_WEIGHTS, "of the bandwidth"], map(row, cases), r.sources)


def weight_only_decode() -> Lines:
    r = Results("weight_only_decode")
    names = sorted(r.variants(), key=lambda variant: r.value(variant, "CPU ms"))

    def row(variant: str) -> list[str]:
        low, high = (r.value(variant, f"times slower, {which} quartile") for which in ("lower", "upper"))
        cells = [variant.split(": ", 1)[1], f"{r.value(variant, 'CPU ms'):.0f}"]
        return [*cells, f"{r.value(variant, 'times slower'):.2f} ({low:.2f} to {high:.2f})"]

    head = ["", "CPU ms for 16 tokens", "ours in groups of 32 = 1 (quartiles)"]
    return markdown(head, map(row, names), r.sources)


STEP = ", a step of 32 x 40"


def training_peers() -> Lines:
    """The slowest last, ours or not."""
    r = Results("peers")
    names = sorted(r.variants(STEP), key=lambda variant: r.value(variant, "CPU ms"))
    times = "times as long"

    def row(variant: str) -> list[str]:
        low, high = (r.value(variant, f"{times}, {which} quartile") for which in ("lower", "upper"))
        found = r.value(variant, f"{times} as the fastest unquantized in fp32")
        return [
            variant.removesuffix(STEP),
            f"{r.value(variant, 'CPU ms'):.0f}",
            f"{found:.2f} ({low:.2f} to {high:.2f})",
        ]

    head = ["a step of 32 x 40", "CPU ms", "the fastest unquantized in fp32 = 1 (quartiles)"]
    return markdown(head, map(row, names), r.sources)
