"""Every architecture in int8 and int4: stock transformers loads the same model, or the export says why not.

One fresh process loads all folders: starting Python costs more than loading any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export import check
from ds_compress.export.inputs import exact_activations, run
from ds_compress.export.load import from_pretrained
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

SCHEMES = {"w8a8": (8, {"range_calibration": "dynamic"}), "w4a16": (4, None)}
CASES = [(name, scheme) for name in ZOO for scheme in SCHEMES]
REFUSED = {"gpt2": "Conv1D", "vit": "Conv2d", "resnet": "Conv2d", "cnn": "no config"}
"""Where compressed-tensors has no words for a quantized layer, and the word that must be in the reason."""


@dataclass
class Outcome:
    refusal: str = ""
    expected: check.Expected | None = None
    answer: check.Answer | None = None
    torch_logits: torch.Tensor | None = None
    unfused_logits: torch.Tensor | None = None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Outcome]:
    root = tmp_path_factory.mktemp("zoo")
    found: dict[tuple[str, str], Outcome] = {}
    requests: dict[tuple[str, str], check.Request] = {}
    for name, scheme in CASES:
        bits, inputs = SCHEMES[scheme]
        model = quantized(ZOO[name](), bits, inputs)
        given = inputs_of(model)
        outcome = found[name, scheme] = Outcome()
        logits = run(model, given)
        with exact_activations(model):
            outcome.expected = check.Expected(given, logits, run(model, given))
        folder = root / f"{name}-{scheme}"
        try:
            export(model, folder, "compressed-tensors", check=False)
            requests[name, scheme] = check.Request(folder, type(model).__name__, given)
        except ExportError as error:
            outcome.refusal = str(error)
        if name != "cnn":
            _own_format(outcome, model, given, root / f"{name}-{scheme}-torch")
    for case, answer in zip(requests, check.reload(list(requests.values())), strict=True):
        found[case].answer = answer
    return found


def _own_format(
    outcome: Outcome, model: torch.nn.Module, given: dict[str, torch.Tensor], folder: Path
) -> None:
    export(model, folder, "torch", check=False, embeddings="float")
    outcome.torch_logits = run(from_pretrained(folder), given)
    outcome.unfused_logits = run(from_pretrained(folder, fused=False), given)


@pytest.mark.parametrize(("name", "scheme"), CASES)
class TestZoo:
    def test_stock_transformers_loads_it_or_the_reason_names_the_module(
        self, outcomes: dict[tuple[str, str], Outcome], name: str, scheme: str
    ) -> None:
        outcome = outcomes[name, scheme]
        if name in REFUSED:
            assert REFUSED[name] in outcome.refusal and 'format="torch"' in outcome.refusal
            return
        assert not outcome.refusal
        assert outcome.expected is not None and outcome.answer is not None
        result = check.verdict(outcome.expected, outcome.answer)
        assert result["max_difference_with_exact_activations"] <= 1e-5 * max(1.0, result["largest_logit"])

    def test_own_format(self, outcomes: dict[tuple[str, str], Outcome], name: str, scheme: str) -> None:
        outcome = outcomes[name, scheme]
        if outcome.torch_logits is None:
            pytest.skip("no config to build it from: see tests/unit/export/test_any_module.py")
        assert outcome.expected is not None
        difference = (outcome.torch_logits - outcome.expected.logits).square().mean().sqrt()
        rounding = (outcome.expected.logits - outcome.expected.exact_logits).square().mean().sqrt()
        # Sums in another order move a few codes, which is at most like rounding all of them anew.
        assert difference <= 1e-5 * outcome.expected.logits.abs().max() + 2 * rounding

    def test_fused_equals_unfused(
        self, outcomes: dict[tuple[str, str], Outcome], name: str, scheme: str
    ) -> None:
        outcome = outcomes[name, scheme]
        if outcome.torch_logits is None or outcome.unfused_logits is None or outcome.expected is None:
            pytest.skip("no config to build it from")
        difference = (outcome.torch_logits - outcome.unfused_logits).square().mean().sqrt()
        rounding = (outcome.expected.logits - outcome.expected.exact_logits).square().mean().sqrt()
        assert difference <= 1e-5 * outcome.expected.logits.abs().max() + 2 * rounding
