"""What `ds_compress sensitivity` measured, in a report."""

from __future__ import annotations

import math
from html.parser import HTMLParser

from ds_compress.report import html
from ds_compress.report.heat import LEVELS, heat
from ds_compress.sensitivity.increase import Metric
from ds_compress.sensitivity.table import GroupSensitivity, Sensitivity

TABLE = Sensitivity(
    "LlamaForCausalLM",
    Metric.KL,
    ("int8", "int4", "int2"),
    {
        "a<b>.{q,k}": GroupSensitivity(("a.q", "a.k"), 128, {"int8": 1e-4, "int4": 1e-2, "int2": 1.0}),
        "c": GroupSensitivity(("c",), 64, {"int8": -1e-6, "int2": None}),
    },
    10,
    70,
)


def test_shades_are_by_the_logarithm() -> None:
    first, second = heat(TABLE)["rows"]
    assert [cell["level"] for cell in first["cells"]] == [0, round(LEVELS / 2), LEVELS]
    assert [cell["level"] for cell in second["cells"]] == [0, 0, LEVELS], "less than none, absent, not finite"
    assert second["cells"][1]["value"] is None and math.isnan(second["cells"][2]["value"])


def test_one_number_has_no_shade() -> None:
    alone = Sensitivity("M", Metric.LOSS, ("int8",), {"c": GroupSensitivity(("c",), 1, {"int8": 0.5})}, 1, 1)
    assert heat(alone)["rows"][0]["cells"] == [{"value": 0.5, "level": 0}]


def test_the_page_has_every_number_and_escapes_names() -> None:
    page = html([], TABLE)
    texts: list[str] = []

    class Texts(HTMLParser):
        def handle_data(self, data: str) -> None:
            texts.append(data.strip())

    Texts().feed(page)
    assert {"a<b>.{q,k}", "0.0001", "0.01", "1", "-1e-06", "-", "not finite", "128"} <= set(texts)
    assert 'class="n heat-5" data-name="int2"' in page and "nats" in page
    assert "Sensitivity of" not in html([])
