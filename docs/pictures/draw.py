"""Draws the pictures of architecture.md: `python docs/pictures/draw.py` writes the SVG files beside this one.

They are SVG and not mermaid, so that a code host, the site and a reader without a network all show them.
"""

from __future__ import annotations

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
        self, x: float, y: float, text: str, weight: str = "400", size: int = 13, at: str = "middle"
    ) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{at}" font-weight="{weight}" font-size="{size}" '
            f'fill="#263238">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[int, int]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="#455a64" stroke-width="1.6" marker-end="url(#tip)"/>'
        )

    def save(self, name: str) -> None:
        width, height = self.size
        body = "\n".join(self.parts)
        (HERE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif">\n{body}\n</svg>\n'
        )


def floors() -> None:
    """An import goes down only."""
    picture = Picture(760, 560, "The floors of the package: an import goes down only")
    functions = [("sharding/", "fragments"), ("select/", "masks"), ("quant/", "grids")]
    functions += [("structure/", "units"), ("distill/", "losses"), ("reduce/", "payloads")]
    base = [("modelinfo/", "layer kinds, inventory"), ("ops/", "kernels and their twins; csrc/")]
    outside = "folders that other programs load"
    rows = [
        (BLUE, [("cli  hf  compat  examples  run.py", "what a person or another library calls")]),
        (BLUE, [("ds_compress, api.py", "the public names: plan, initialize, export, finalize")]),
        (RED, [("engine/", "the only package that knows DeepSpeed"), ("export/", outside)]),
        (GREEN, [("techniques/", "one file for each JSON block")]),
        (YELLOW, [("config/", "schema, resolve, report: from JSON to a plan")]),
        (GREEN, functions),
        (GREY, [*base, ("errors.py", "one ConfigError for all problems")]),
    ]
    for number, (fill, boxes) in enumerate(rows):
        y, gap = 14 + 78 * number, 10
        width = (700 - gap * (len(boxes) - 1)) // len(boxes)
        for column, (title, line) in enumerate(boxes):
            picture.box(20 + column * (width + gap), y, width, 62, title, line, fill=fill)
    picture.arrow((742, 20), (742, 540))
    picture.text(736, 556, "imports", size=12, at="end")
    picture.save("floors.svg")


def step() -> None:
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
    picture.save("step.svg")


def weight() -> None:
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
    picture.save("weight.svg")


if __name__ == "__main__":
    floors()
    step()
    weight()
