"""The picture of `float_formats`: perplexity of each format, rounded and trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .float_formats_runs import METHODS, PLAIN, SCHEMES

LABELS = {"ptq": "rounded (PTQ)", "qat": "trained on the text (QAT)", "qad": "distilled from itself (QAD)"}


def draw(result: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Bars of perplexity, and of KL to the unquantized model; lines where the unquantized model is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    schemes = [s for s in SCHEMES if s != PLAIN and any(f"{s}, {method}" in result for method in METHODS)]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for axis, key in zip(axes, ("perplexity", "KL to the unquantized model"), strict=True):
        for number, method in enumerate(METHODS):
            shown = [(at, result[v]) for at, s in enumerate(schemes) if (v := f"{s}, {method}") in result]
            places = [at + 0.27 * (number - 1) for at, _ in shown]
            error = [figures.get(f"{key}, standard deviation", 0.0) for _, figures in shown]
            bars = axis.bar(
                places, [figures[key] for _, figures in shown], 0.25, yerr=error, label=LABELS[method]
            )
            axis.bar_label(bars, fmt="{:.3g}", fontsize=7)
        axis.set_yscale("log")
        axis.set_xticks(range(len(schemes)), [s.replace(", ", ",\n") for s in schemes], fontsize=8)
        axis.set_ylabel(f"{key}, held out")
        axis.grid(True, axis="y", alpha=0.3)
    for method, label, style in (
        ("ptq", "unquantized", "-"),
        ("qat", "unquantized, trained on the text", ":"),
    ):
        if (variant := f"{PLAIN}, {method}") in result:
            axes[0].axhline(result[variant]["perplexity"], color="black", linestyle=style, label=label)
    axes[0].legend(fontsize=7)
    figure.suptitle("SmolLM2-135M on the Python documentation: number formats, rounded and trained")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path
