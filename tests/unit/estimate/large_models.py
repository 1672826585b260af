"""The table of large models in `docs/several-machines.md`.

python -m tests.unit.estimate.large_models       # rewrites it if it is not current
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.docs.pages import DOCS
from tests.unit.estimate.test_estimate import BOTH_WAYS, PRUNED, run

PAGE = DOCS / "several-machines.md"
_TABLE = re.compile(r"(<!-- large models -->\n).*?(<!-- end of large models -->)", re.DOTALL)
_NAMES = {
    "llama-70b": "Llama 3, 70 B",
    "dense-405b": "dense, 405 B",
    "mixture-671b": "mixture of experts, 671 B",
}


def with_table(text: str) -> str:
    """`text` of the page with a current table."""
    rows = "\n".join(_lines())
    return _TABLE.sub(lambda found: f"{found[1]}\n{rows}\n\n{found[2]}", text)


def _lines() -> Iterator[str]:
    yield "| model | processes | held by each | masks of it | plain | int8 both ways | hierarchical |"
    yield "|---|---|---|---|---|---|---|"
    for name, words in _NAMES.items():
        for processes in (64, 512, 4096):
            found = run(name, {**PRUNED, **BOTH_WAYS}, processes, zero_stage=3, nodes=processes // 8)
            by_name = {way.name: way.total.leaving / 1e9 for way in found.ways}
            leaving = [
                by_name[way] for way in ("plain DeepSpeed", "this config", "8 bits both ways, hierarchical")
            ]
            cells = " | ".join(f"{size:,.0f} GB" for size in leaving)
            yield (
                f"| {words} | {processes:,} | {found.held.total / 1e9:,.1f} GB | {found.held.masks / 1e9:.3f} GB "
                f"| {cells} |"
            )


def main() -> None:
    text = PAGE.read_text()
    if with_table(text) != text:
        PAGE.write_text(with_table(text))
        print(PAGE)


if __name__ == "__main__":
    main()
