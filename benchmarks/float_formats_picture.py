"""The picture of `float_formats`: perplexity of each format, rounded and trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .float_formats_runs import METHODS, PLAIN, SCHEMES

MARKS = {"ptq": "o", "qat": "s", "qad": "^"}
LABELS = {"ptq": "rounded (PTQ)", "qat": "trained on the text (QAT)", "qad": "distilled from itself (QAD)"}


def draw(result: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Perplexity, and KL to the unquantized model, bars over seeds; lines where the unquantized model is."""
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
            values = [figures[key] for _, figures in shown]
            axis.errorbar(places, values, error, fmt=MARKS[method], capsize=3, label=LABELS[method])
            for place, value in zip(places, values, strict=True):
                axis.annotate(
                    f"{value:.3g}",
                    (place, value),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
        axis.set_yscale("log")
        for which in ("major", "minor"):
            getattr(axis.yaxis, f"set_{which}_formatter")("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.set_xlim(-0.6, len(schemes) - 0.4)
        labels = [s.replace(", ", ",\n") for s in schemes]
        axis.set_xticks(range(len(schemes)), labels, fontsize=8, rotation=30, ha="right")
        axis.set_ylabel(f"{key}, held out")
        axis.grid(True, axis="y", which="both", alpha=0.3)
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
