"""Draws the pictures of architecture.md: `python docs/pictures/draw.py` writes the SVG files beside this one.

They are SVG and not mermaid, so that a code host, the site and a reader without a network all show them.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
BLUE, GREEN, YELLOW, GREY, RED = "#dbe7ff", "#dcf3e1", "#fff3cf", "#eceff1", "#fde0dc"
LINE = 17


class Picture:
    """Boxes and arrows on a white sheet; coordinates in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = width, height
        self.parts = [
            f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#455a64"/></marker></defs>'
        ]

    def box(self, x: int, y: int, width: int, height: int, title: str, *lines: str, fill: str = GREY) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#90a4ae"/>'
        )
        rows = [(title, "600", 15), *((line, "400", 13) for line in lines)]
        top = y + (height - LINE * (len(rows) - 1)) / 2 + 5
        for number, (text, weight, size) in enumerate(rows):
            self.text(x + width / 2, top + LINE * number, text, weight, size)

    def text(
        self, x: float, y: float, text: str, weight: str = "400", size: int = 13, turned: bool = False
    ) -> None:
        turn = f' transform="rotate(90 {x:g} {y:g})"' if turned else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-weight="{weight}" font-size="{size}" '
            f'fill="#263238"{turn}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[int, int]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="#455a64" stroke-width="1.6" marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        width, height = self.size
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif">\n{body}\n</svg>\n'
        )


CAPTIONS = {
    "cli": "commands",
    "examples": "the demo",
    "compat": "the old deepspeed.compression",
    "hf": "the Trainer's callback",
    "api": "the public names",
    "engine": "the only package that knows DeepSpeed",
    "secure": "signed and encrypted models",
    "export": "folders that other programs load",
    "techniques": "one file for each JSON block",
    "distill": "losses, teachers' caches",
    "config": "schema, resolve, report: from JSON to a plan",
    "select": "scores and masks",
    "quant": "quantization grids",
    "reduce": "payloads and robust rules",
    "structure": "what belongs together",
    "sharding": "fragments: what a technique sees",
    "modelinfo": "kinds of layers, inventory",
    "ops": "kernels, and their twins in torch",
    "errors": "one ConfigError for all problems",
}
"""Of the packages in the picture; those of the contract that are not here are small helpers."""


def floors() -> Picture:
    """The contract of import-linter in pyproject.toml: an import goes down only."""
    contracts = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["name"].startswith("Floors"))
    rows = [[name.strip().removeprefix("ds_compress.") for name in layer.split("|")] for layer in layers]
    rows = [[name for name in row if name in CAPTIONS] for row in rows]
    rows = [row for row in rows if row]
    picture = Picture(760, 24 + 60 * len(rows), "The floors of the package: an import goes down only")
    colours = {"engine": RED, "techniques": GREEN, "config": YELLOW}
    above = True
    for number, row in enumerate(rows):
        above = above and "engine" not in row
        y, gap = 14 + 60 * number, 10
        width = (690 - gap * (len(row) - 1)) // len(row)
        for column, name in enumerate(row):
            fill = colours.get(name, BLUE if above else GREY)
            title = name if name in ("api", "errors") else f"{name}/"
            picture.box(20 + column * (width + gap), y, width, 48, title, CAPTIONS[name], fill=fill)
    picture.arrow((730, 20), (730, 60 * len(rows)))
    picture.text(744, 30 * len(rows), "imports", size=12, turned=True)
    return picture


def step() -> Picture:
    """One optimizer step."""
    picture = Picture(760, 470, "One optimizer step, and where techniques act in it")
    left, right = 30, 400
    theirs = [
        ("engine.forward", "pruned or fake-quantized weights"),
        ("engine.backward", "the distillation losses are added here"),
        ("gradients reduced", "mean, quantized payloads or a robust rule"),
        ("base optimizer, pre-hook", "gradients unscaled and clipped"),
        ("the update", "fp32 masters change"),
        ("base optimizer, post-hook", "16-bit copies are not made yet"),
        ("16-bit copies, all-gather", "forward of the next step sees them"),
    ]
    ours = {
        0: ("before_step", "new masks: all processes find one threshold"),
        3: ("on_gradients", "scores; gradients of masked weights"),
        5: ("on_update", "masks are applied to the masters"),
        6: ("after_step", "only if the step was applied"),
    }
    picture.text(left + 160, 24, "DeepSpeed", "600", 15)
    picture.text(right + 165, 24, "a technique", "600", 15)
    for number, (title, line) in enumerate(theirs):
        y = 40 + 60 * number
        picture.box(left, y, 320, 46, title, line, fill=GREY)
        if number + 1 < len(theirs):
            picture.arrow((left + 160, y + 46), (left + 160, y + 59))
        if number in ours:
            y = 40 + 60 * (2 if number == 0 else number)  # new masks are made when the gradients are there
            picture.box(right, y, 330, 46, *ours[number], fill=GREEN)
            picture.arrow((left + 320, y + 23), (right - 2, y + 23))
    return picture


def weight() -> Picture:
    """From a JSON key to a bit of the mask."""
    picture = Picture(760, 470, "The way of a weight from a JSON key to a mask bit")
    rows = [
        (YELLOW, "ds_config.json", '"sparse_pruning": {"dense_ratio": 0.5, "modules": ["encoder"]}'),
        (YELLOW, "config/schema", "SparsePruning: a validated, frozen object"),
        (YELLOW, "config/resolve", "plan: encoder.layer.0.output.dense.weight keeps 50 %"),
        (
            RED,
            "engine/zero",
            "fragment: elements 0 to 73,727 of that weight are mine, view of the fp32 master",
        ),
        (GREEN, "select", "score |w|; three histograms over all processes give one exact threshold"),
        (GREEN, "techniques/sparse_pruning", "mask: bit i of byte j is element 8 j + i of my fragment"),
        (GREY, "ops: mask_apply_many_", "after the update, masked elements of the master become 0"),
    ]
    for number, (fill, title, line) in enumerate(rows):
        y = 14 + 65 * number
        picture.box(40, y, 680, 50, title, line, fill=fill)
        if number + 1 < len(rows):
            picture.arrow((380, y + 50), (380, y + 64))
    return picture


PICTURES = {"floors.svg": floors, "step.svg": step, "weight.svg": weight}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw().svg())
