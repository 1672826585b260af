"""Writes the tables of the docs from `benchmarks/results`, so that no page shows a figure that no run measured.

    python -m benchmarks.figures                  # rewrites docs/*.md and the README between their markers
    python -m benchmarks.figures --check          # changes nothing; fails where a page is behind its results
    python -m benchmarks.figures --list           # every table there is, on standard output

A page names a table and the generator fills in what lies between:

    <!-- figures:step_overhead -->
    <!-- end figures -->

Each table ends in a line that says how it was measured: command, machine, versions, commit and day. A figure that
several runs measured is the newest.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from . import gpu_goals, record
from .figure_rows import AVX2, AVX512, TILES, FigureError, Lines, Results, markdown
from .front_page import front_page, front_page_zh
from .served_tables import (
    attention,
    block_sparse,
    served_formats,
    stored_zeros,
    training_peers,
    weight_only,
    weight_only_decode,
)

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- figures:(?P<name>\w+) -->\n(?P<content>.*?)<!-- end figures -->", flags=re.DOTALL)

# --- one function a table -------------------------------------------------------------------


def compression_curve() -> Lines:
    r = Results("compression_curve")

    def row(variant: str) -> list[str]:
        return [
            variant,
            f"{100 * r.value(variant, 'accuracy'):.1f} %",
            f"{r.value(variant, 'bytes') / 1e6:.1f}",
            f"{r.value(variant, 'times smaller'):.2f}x",
            f"{r.value(variant, 'latency ms'):.0f}",
            f"{r.value(variant, 'times faster'):.1f}x",
            f"{r.value(variant, 'latency ms of the cut alone, fp32'):.0f}",
        ]

    head = ["", "accuracy", "MB", "smaller", "ms", "faster", "pruned only, fp32 ms"]
    return markdown(head, map(row, r.variants()), r.sources)


def demo() -> Lines:
    r = Results("demo")
    models = [v for v in r.variants() if v != "the run" and not v.endswith(", exported")]

    def row(variant: str) -> list[str]:
        exported = f"{variant}, exported"
        cells = [variant, f"{100 * r.value(variant, 'training: accuracy'):.2f} %"]
        cells += [f"{r.value(variant, 'training: sentences'):,.0f}", f"{r.value(variant, 'bytes') / 1e6:.1f}"]
        if exported not in r.variants():
            return [*cells, "", "", ""]
        size, faster = r.value(exported, "bytes") / 1e6, r.value(exported, "times faster")
        bf16 = r.value(exported, "times faster than bf16")
        return [*cells, f"{size:.1f}", f"{faster:.2f}x", f"{bf16:.2f}x"]

    head = ["", "accuracy", "sentences", "MB, fp32", "MB, integers", "faster than fp32", "than bf16"]

    def sources() -> Iterable[str]:
        minutes = r.value("the run", "minutes")
        return [f"{source}; {minutes:.1f} minutes" for source in r.sources()]

    return markdown(head, map(row, models), sources)


EVERY_STEP = ", stride 1"


def step_overhead() -> Lines:
    r = Results("step_overhead", AVX512)
    return _step_ratios(r, [v for v in r.variants() if v != "plain DeepSpeed" and not v.endswith(EVERY_STEP)])


def masks_at_every_step() -> Lines:
    r = Results("step_overhead", AVX512)
    return _step_ratios(r, r.variants(EVERY_STEP))


def int8_backward() -> Lines:
    r = Results("step_overhead", TILES)
    return _step_ratios(r, [v for v in r.variants() if "int8 kernel" in v])


def _step_ratios(r: Results, wanted: Sequence[str]) -> Lines:
    def row(variant: str) -> list[str]:
        low, high = (r.value(variant, f"ratio, {which} quartile") for which in ("lower", "upper"))
        return [variant, f"{r.value(variant, 'ratio'):.2f}", f"{low:.2f} to {high:.2f}"]

    return markdown(["", "CPU time, ratio to plain DeepSpeed", "quartiles"], map(row, wanted), r.sources)


def int8_linear() -> Lines:
    machines = {"AVX-512 VNNI": Results("int8_linear", AVX512), "AVX2": Results("int8_linear", AVX2)}
    peers = {
        "the best 8-bit peer": "the best 8-bit peer, no activation",
        "the same and its GELU, ours fused": "the best 8-bit peer, GELU",
        "oneDNN packed fp32, 64 rows and more": "oneDNN packed fp32",
    }

    def cell(r: Results, peer: str) -> str:
        variant = f"ours against {peer}, 1 thread"
        return f"{r.value(variant, 'geometric mean'):.2f} ({r.value(variant, 'least'):.2f})"

    rows = [[title, *(cell(r, peer) for r in machines.values())] for title, peer in peers.items()]
    head = ["times as fast as", *(f"{name}: mean (least)" for name in machines)]
    return markdown(head, rows, lambda: chain(*(r.sources(f"{name}: ") for name, r in machines.items())))


ELEMENTWISE = {
    "`mask_apply_`": ("mask_apply", "25165824 fp32", "mask_apply_", "mul_ by a float mask"),
    "`fake_quantize`, per channel": (
        "fake_quantize",
        "weight 3072 x 768, float32",
        "fake_quantize",
        "torch per channel, range measured",
    ),
    "`block_quantize`, int8": ("block_quantize", "int8 of fp32", "quantize", "quantize, naive eager"),
    "`block_dequantize`, int8": ("block_quantize", "int8 of fp32", "dequantize", "dequantize, reference"),
    "`block_reduce`, int8": ("block_quantize", "int8 of fp32", "reduce", "reduce, naive eager"),
    "`mask_n_of_m`, 2:4": (
        "mask_apply",
        "selection, 4194304 fp32",
        "mask_n_of_m 2:4",
        "mask_n_of_m 2:4, reference",
    ),
}


def elementwise() -> Lines:
    """On one thread: of a copy's bandwidth, and how many times as fast as what torch offers for it."""
    names = dict.fromkeys(benchmark for benchmark, *_ in ELEMENTWISE.values())
    results = {(name, machine): Results(name, machine) for name in names for machine in (AVX512, AVX2)}
    rows = []
    for title, (benchmark, case, ours, peer) in ELEMENTWISE.items():
        cells = [title, peer.removeprefix(f"{ours}, ")]
        for machine in (AVX512, AVX2):
            r, where = results[benchmark, machine], f"{case}, 1 thread: "
            percent = r.value(where + ours, "percent of copy bandwidth")
            cells += [f"{percent:.0f} %", f"{r.value(where + peer, f'times slower than {ours}'):.1f}x"]
        rows.append(cells)
    head = ["op", "the peer", "AVX-512: of a copy", "to the peer", "AVX2: of a copy", "to the peer"]
    return markdown(head, rows, lambda: chain(*(r.sources() for r in results.values())))


def memory() -> Lines:
    r = Results("memory")

    def row(variant: str) -> list[str]:
        peak, ratio = r.value(variant, "peak MB"), r.value(variant, "peak to plain, without the interpreter")
        return [variant, f"{peak:,.0f}", f"{ratio:.2f}"]

    return markdown(["", "peak MB", "to plain ZeRO-3"], map(row, r.variants()), r.sources)


def experts() -> Lines:
    """SmolLM2-135M as a mixture, and with half of its experts."""
    r = Results("experts")

    def row(variant: str) -> list[str]:
        whole = variant == "whole"
        cells = [variant] if whole else [f"`{variant}`"]
        cells.append("" if whole else f"{r.value(variant, 'perplexity before healing'):.2f}")
        spread = (
            f" +- {r.value(variant, 'perplexity, standard deviation'):.2f}" if variant == "random" else ""
        )
        cells.append(f"{r.value(variant, 'perplexity'):.2f}{spread}")
        cells.append("" if whole else f"{100 * r.value(variant, 'tokens_of_removed'):.0f} %")
        for figure, unit in (("resident parameters", 1e6), ("active parameters", 1e6), ("bytes", 1e6)):
            cells.append(f"{r.value(variant, figure) / unit:.0f}")
        cells += [
            f"{r.value(variant, f'milliseconds of {count}'):.0f}" for count in ("256 tokens", "1 token")
        ]
        return cells

    head = ["", "perplexity, just cut", "healed", "tokens of the removed", "M parameters", "M active"]
    head += ["MB on disk", "ms, 256 tokens", "ms, 1 token"]
    return markdown(head, map(row, r.variants()), r.sources)


def expert_steps() -> Lines:
    r = Results("expert_steps")
    wanted = [v for v in r.variants() if not v.endswith("plain DeepSpeed")]

    def row(variant: str) -> list[str]:
        low, high = (r.value(variant, f"ratio, {which} quartile") for which in ("lower", "upper"))
        return [variant, f"{r.value(variant, 'ratio'):.2f}", f"{low:.2f} to {high:.2f}"]

    return markdown(["", "CPU time, ratio to plain DeepSpeed", "quartiles"], map(row, wanted), r.sources)


def checkpoints() -> Lines:
    r = Results("checkpoints")
    rows = [
        [name, f"{r.value(name, 'wall_s'):.2f} s", f"{r.value(name, 'ratio'):.2f}"] for name in r.variants()
    ]
    return markdown(["109 M parameters, ZeRO-2", "time", "of DeepSpeed's own"], rows, r.sources)


def reliability() -> Lines:
    rows: list[list[str]] = []
    commits: dict[str, list[str]] = {}
    for path in sorted((record.RESULTS / "reliability").glob("*.json")):
        found = json.loads(path.read_text())
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
        rows.append([found["row"], found["what"], f"{found['passed']} of {found['trials']}", kinds])
        where = f"{found['cpu']}, {found['cores']} cores; {found['versions']}"
        day = found["time"].partition("T")[0]
        commits.setdefault(where, []).append(f"{found['commit']} of {day} ({found['row']})")
    sources = [f"{where}; commit {', '.join(named)}" for where, named in commits.items()]
    return markdown(["", "what", "as promised", "how it ended"], rows, lambda: sources)


def shrink() -> Lines:
    r = Results("shrink")

    def row(variant: str) -> list[str]:
        before, after = (r.value(variant, f"tensors MB {when}") for when in ("before", "after"))
        return [
            variant,
            f"{r.value(variant, 'step time to masked only'):.2f}",
            f"{before:,.0f} -> {after:,.0f}",
        ]

    head = ["", "step time to masking only", "MB of tensors in a process"]
    return markdown(head, map(row, r.variants()), r.sources)


def search() -> Lines:
    r = Results("search")
    figure, rows = "divergence, nats", []
    for variant in r.variants():
        model, _, uniform = variant.partition(", all ")
        if not uniform:
            continue
        of_mixes = f"{model}, mix for the bits of {uniform}, seed "
        mixes = [r.value(mix, figure) for mix in r.variants() if mix.startswith(of_mixes)]
        own, middle = r.value(variant, figure), statistics.median(mixes)
        name = {"lm": "language model"}.get(model, model)
        name = f"{name}, {r.value(variant, 'effective bits'):.2f} bits ({uniform})"
        spread = f"{middle:.4g} ({min(mixes):.4g} to {max(mixes):.4g}, {len(mixes)} seeds)"
        rows.append([name, f"{own:.4g}", spread, f"{middle / own:.2f}"])
    head = ["divergence from the model as it is, nats", "one format", "a mix: median", "of the first"]
    return markdown(head, rows, r.sources)


def distillation_quality() -> Lines:
    half, few = (Results("distillation_quality", setting=s) for s in ("half", "few_labels --steps 240"))

    def cell(r: Results, variant: str) -> str:
        mean, spread = r.value(variant, "mean accuracy"), r.value(variant, "standard deviation")
        return f"{100 * mean:.2f} ± {100 * spread:.2f}"

    rows = [[v, cell(half, v), cell(few, v)] for v in half.variants() if v != "teacher"]
    head = ["", "6 -> 3 layers, all labels, %", "6 -> 2 layers, a tenth of the labels, %"]
    return markdown(head, rows, lambda: [*half.sources(), *few.sources()])


def reduction_steps() -> Lines:
    r = Results("reduction")
    rates = {"1gbit": "1 Gbit/s", "200mbit": "200 Mbit/s", "none": "no limit"}
    models = {"minilm": "23 M parameters", "bert-base": "110 M parameters"}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for variant in r.variants():
        found = re.fullmatch(r"step of (\S+), stage 2, (\d nodes), (\w+): (.*)", variant)
        if found and "stock" not in found[4]:
            sent = found[4].replace("auto", "default")
            job = cells.setdefault((f"{models[found[1]]}, {found[2]}", sent), {})
            job[found[3]] = f"{r.value(variant, 'faster_x'):.2f}"
    rows = [[*key, *(by_rate.get(rate, "") for rate in rates)] for key, by_rate in cells.items()]
    return markdown(["times as fast as stock bf16", "sent as", *rates.values()], rows, r.sources)


def reduction_convergence() -> Lines:
    def row(stage: int, steps: int) -> list[str]:
        r = results[f"--stages {stage} --steps {steps}"]
        cells = [
            f"ZeRO-{stage}, {steps} steps",
            f"{100 * r.value(f'stage {stage}, stock bf16', 'mean accuracy'):.2f} %",
        ]
        for sent in ("int8", "int4"):
            mean, spread = (
                r.value(f"stage {stage}, {sent}", f"{what}, points")
                for what in ("mean difference", "spread of differences")
            )
            cells.append(f"{mean:+.2f} ± {spread:.2f}")
        return cells

    jobs = [(2, 500), (3, 200), (2, 120), (3, 120)]
    settings = [f"--stages {stage} --steps {steps}" for stage, steps in jobs]
    results = {setting: Results("reduction_convergence", setting=setting) for setting in settings}
    head = ["", "stock bf16", "int8, points to stock", "int4, points to stock"]
    rows = [row(*job) for job in jobs]
    return markdown(head, rows, lambda: chain(*(r.sources() for r in results.values())))


def float_formats() -> Lines:
    r = Results("float_formats")
    names = r.variants()
    schemes = [v.removesuffix(", ptq") for v in names if v.endswith(", ptq") and v != "unquantized, ptq"]
    alone = [v.removesuffix(", qad") for v in names if v.endswith(", qad")]
    kl = "KL to the unquantized model"
    measured = {(row["variant"], row["figure"]) for row in r.rows}

    def has(variant: str, figure: str) -> bool:
        return (variant, figure) in measured

    def cell(variant: str, figure: str, digits: int) -> str:
        if variant not in names:
            return ""
        spread = f"{figure}, standard deviation"
        error = f" ± {r.value(variant, spread):.{digits}f}" if has(variant, spread) else ""
        return f"{r.value(variant, figure):.{digits}f}" + error

    def recovered(variant: str) -> str:
        figure = "perplexity, percent recovered"
        return f"{r.value(variant, figure):.0f} %" if has(variant, figure) else ""

    def row(scheme: str) -> list[str]:
        variants = [f"{scheme}, {method}" for method in ("ptq", "qat", "qad")]
        cells = [*(cell(v, "perplexity", 2) for v in variants), recovered(variants[-1])]
        return [scheme, *cells, *(cell(v, kl, 3) for v in variants)]

    head = ["", "PTQ: perplexity", "QAT", "QAD", "QAD recovered", "PTQ: KL", "QAT", "QAD"]
    order = ["unquantized", *schemes, *(scheme for scheme in alone if scheme not in schemes)]
    return markdown(head, map(row, order), r.sources)


ATTACKS = {"sign flip": "sign flipped", "sign flip x10": "sign flipped, x 10", "scale x100": "x 100"}
ATTACKS |= {"stale": "gradients of 20 steps ago"}


def robust() -> Lines:
    r = Results("robust", setting="--stages 2")
    jobs = [(n, f, shards) for n, f in ((5, 1), (8, 2)) for shards in ("iid", "skewed")]

    def cell(n: int, f: int, shards: str, attack: str) -> str:
        variant = f"digits, n {n}, f {f}, stage 2, {shards}, {attack}"
        mean, rule = (100 * r.value(f"{variant}, {rule}", "accuracy") for rule in ("mean", "recommended"))
        return f"{mean:.1f} -> {rule:.1f}"

    names = [re.fullmatch(r"digits, n 5, f 1, stage 2, iid, (.*), mean", v) for v in r.variants()]
    attacks = [found[1] for found in names if found]
    rows = [[ATTACKS.get(name, name), *(cell(*job, name) for job in jobs)] for name in attacks]
    head = ["attack", *(f"{n} workers, {f} bad{', skewed shards' * (s == 'skewed')}" for n, f, s in jobs)]
    return markdown(head, rows, r.sources)


def gpu_check() -> Lines:
    """The newest check of a GPU against its goals; see docs/gpu-check.md."""
    checks = [json.loads(path.read_text()) for path in (record.RESULTS / "gpu").glob("*.json")]
    check = max(checks, key=lambda each: str(each["time"]))
    rows = [
        [
            entry["goal"],
            entry["bound"],
            f"{entry['reached']} of {entry['figures']}",
            f"{entry['median']:.3g}",
            f"{entry['worst']:.3g}",
        ]
        for entry in gpu_goals.judge(check["parts"])
        if entry["figures"]
    ]
    day = check["time"].partition("T")[0]
    source = f"`make gpu-check`; {check['device']}; {check['versions']}; commit {check['commit']}, {day}"
    return markdown(["figure", "goal", "reached", "median", "worst"], rows, lambda: [source])


TABLES: dict[str, Callable[[], Lines]] = {
    table.__name__: table
    for table in (
        compression_curve,
        demo,
        front_page,
        front_page_zh,
        step_overhead,
        masks_at_every_step,
        int8_backward,
        int8_linear,
        elementwise,
        memory,
        search,
        experts,
        expert_steps,
        checkpoints,
        reliability,
        shrink,
        distillation_quality,
        reduction_steps,
        reduction_convergence,
        robust,
        float_formats,
        served_formats,
        attention,
        block_sparse,
        stored_zeros,
        weight_only,
        weight_only_decode,
        training_peers,
        gpu_check,
    )
}


# --- pages ----------------------------------------------------------------------------------


def filled(text: str) -> str:
    """`text` with every table between its markers as the results have it now.

    Raises:
        FigureError: no table of that name, or a marker without its end.
    """
    if len(BLOCK.findall(text)) != text.count("<!-- figures:"):
        raise FigureError("a <!-- figures:NAME --> has no <!-- end figures --> behind it")

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise FigureError(f"no table {name!r}: there are {', '.join(TABLES)}")
        return "\n".join([f"<!-- figures:{name} -->", *TABLES[name](), "<!-- end figures -->"])

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """Those of the repository that show figures."""
    found = [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if "<!-- figures:" in path.read_text()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is behind")
    parser.add_argument("--list", action="store_true", help="print every table")
    parser.add_argument("pages", nargs="*", type=Path, help="instead of all pages of the repository")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(line for name, table in TABLES.items() for line in (f"## {name}", "", *table(), "")))
        return
    behind = []
    for path in args.pages or pages():
        before = path.read_text()
        try:
            after = filled(before)
        except FigureError as error:
            raise SystemExit(f"{path}: {error}") from error
        if after == before:
            continue
        behind.append(path)
        if args.check:
            sys.stdout.writelines(
                difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path), "results")
            )
        else:
            path.write_text(after)
            print(f"{path}: written")
    if args.check and behind:
        raise SystemExit("behind benchmarks/results; run `python -m benchmarks.figures`")


if __name__ == "__main__":
    main()
