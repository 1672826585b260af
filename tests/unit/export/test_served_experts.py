"""Exported experts on the grouped integer kernels: what they compute, what they hold, and which are not served."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

import ds_compress
from ds_compress.export import load, serve_experts
from ds_compress.export.quantized_experts import QuantizedExperts
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme
from ds_compress.export.serve_experts import ServedExperts
from ds_compress.modelinfo.experts import follows_registry, fused_experts
from ds_compress.ops.library import Preference, kernel_preference
from ds_compress.ops.reference import linear
from ds_compress.ops.sizes import packed_bytes
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from tests.zoo.expert_reference import blocks, prepared, ranges_from_observed
from tests.zoo.mixtures import ARCHITECTURES, mixture, tokens

NAMES = sorted(set(ARCHITECTURES) - {"llama4"})
"""All whose experts follow transformers' registry."""
_WIDTHS = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
_GROUPS = {"quantize_weight_in_forward": True, "granularity": "per_column_group", "group_size": 32}
_STATIC = {"range_calibration": "static", "quantization_type": "symmetric"}
BLOCKS: dict[str, dict[str, Any]] = {
    "int8": blocks({"start_bits": 8, "target_bits": 8, "granularity": "per_channel"}, {"bits": 8}),
    "int8 static": blocks(
        {"start_bits": 8, "target_bits": 8, "granularity": "per_channel"},
        {"bits": 8},
        activation_quantization=_STATIC,
    ),
    "int4": blocks({"start_bits": 4, "target_bits": 4}, {"bits": 8}, weight_quantization=_GROUPS),
    "int4 static": blocks(
        {"start_bits": 4, "target_bits": 4},
        {"bits": 8},
        weight_quantization=_GROUPS,
        activation_quantization=_STATIC,
    ),
}


def exported(name: str, block: dict[str, Any], folder: Path, **options: Any) -> Path:
    """A folder of a model whose layers and experts were quantized by `block`, with ranges from two batches."""
    model = mixture(name, **_WIDTHS, **({"head_dim": 32} if name == "olmoe" else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    if name == "jamba":  # whose mixer reads the weight of a layer past its kernel
        for technique in (block := copy.deepcopy(block)).values():
            technique["different_groups"]["g"]["modules"] = ["experts"]
    prepared(model, block)
    model.train()
    with torch.no_grad():
        for seed in range(20):  # until every expert has seen a token
            model(tokens(seed=seed))
    ranges_from_observed(model)
    model.eval()
    ds_compress.export(model, folder, format="torch", inputs={"input_ids": tokens()}, **options)
    return folder


def dequantized(folder: Path) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_experts, "_misfit", lambda *args: "this test says so")
        return ds_compress.from_pretrained(folder)


def served_of(model: nn.Module) -> list[ServedExperts]:
    return [module for module in model.modules() if isinstance(module, ServedExperts)]


def spread(wrong: torch.Tensor, right: torch.Tensor) -> float:
    """Root mean square of the difference, of the deviation of what is right."""
    return float((wrong - right).square().mean().sqrt() / right.std())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_as_the_dequantized_experts(name: str, block: str, tmp_path: Path) -> None:
    """On the same inputs the sums differ in their last bits only. Where that moves an input of `down_proj` over the
    middle between two steps, a row differs by a step of 127."""
    folder = exported(name, BLOCKS[block], tmp_path / "x", check=False)
    model, plain = ds_compress.from_pretrained(folder), dequantized(folder)
    fused = {where: module for where, module in plain.named_modules() if fused_experts(module)}
    assert len(served_of(model)) == len(fused) > 0 and not served_of(plain)
    seen: dict[str, tuple[Any, torch.Tensor]] = {}
    for where, module in fused.items():
        module.register_forward_hook(lambda _, given, y, where=where: seen.update({where: (given, y)}))
    with torch.no_grad():
        mine, theirs = (each(tokens()).logits for each in (model, plain))
        assert spread(mine, theirs) < 0.05
        for where, (given, y) in seen.items():
            off = (model.get_submodule(where)(*given) - y).abs().amax(1) / y.std()
            assert (off > 1e-5).sum() <= 2 and off.max() < 0.1, where


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("block", ["int8 static", "int4"])
def test_the_export_checks_what_is_served_in_a_fresh_process(block: str, tmp_path: Path) -> None:
    folder = exported("qwen3_moe", BLOCKS[block], tmp_path / "x")
    report = load.ExportReport.read(folder)
    assert report.check["max_difference"] < 1e-2 * report.check["largest_logit"]
    assert not [note for note in report.notes if "dequantized" in note]


def looped(module: ServedExperts, parts: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The outputs of the chosen experts (tokens, chosen, hidden), one token and expert at a time, by the reference of
    a single layer."""
    base: Any = module
    rows = []
    for token, experts in enumerate(index.tolist()):
        for expert in experts:
            inner = parts("up", expert, x[token : token + 1])
            inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)
            y = parts("down", expert, inner)
            rows.append(base.post_expert_norm(y) if base.has_post_expert_norm else y)
    return torch.cat(rows).view(*index.shape, -1)


class Plain(nn.Module):
    """Experts without a gate, with biases and a norm, in either layout."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, hidden, wide = 5, 32, 64
        swapped = config.transposed
        self.up_proj = nn.Parameter(torch.randn(5, *((hidden, wide) if swapped else (wide, hidden))))
        self.down_proj = nn.Parameter(torch.randn(5, *((wide, hidden) if swapped else (hidden, wide))))
        self.up_proj_bias = nn.Parameter(torch.randn(5, wide))
        self.down_proj_bias = nn.Parameter(torch.randn(5, hidden))
        self.act_fn, self.post_expert_norm = nn.GELU(), nn.LayerNorm(hidden)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise AssertionError("another implementation is chosen")


STRAIGHT = use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)(
    type("Straight", (Plain,), {"forward": Plain.forward, "__init__": Plain.__init__})
)
SWAPPED = use_experts_implementation(
    has_gate=False, has_bias=True, has_post_expert_norm=True, is_transposed=True
)(type("Swapped", (Plain,), {"forward": Plain.forward, "__init__": Plain.__init__}))


def stack_of(shape: tuple[int, int, int], transposed: bool, group: int) -> QuantizedExperts:
    experts, rows, columns = shape
    low, high = (-8, 8) if group else (-127, 128)
    return QuantizedExperts(
        tuple(
            QuantizedMatrix(
                torch.randint(low, high, (rows, columns), dtype=torch.int8),
                torch.rand(rows, columns // group if group else 1) / 50,
                None,
                4 if group else 8,
                group or columns,
                (columns, rows) if transposed else (rows, columns),
                transposed,
            )
            for _ in range(experts)
        )
    )


def plain_experts(transposed: bool, group: int, static: bool) -> tuple[Any, Any, Any]:
    """A module, its quantized stacks by "up" and "down", and how its inputs are rounded."""
    torch.manual_seed(3)
    config = SimpleNamespace(transposed=transposed, _experts_implementation="grouped_mm")
    module: Any = (SWAPPED if transposed else STRAIGHT)(config)
    stacks = {
        "up_proj": stack_of((5, 64, 32), transposed, group),
        "down_proj": stack_of((5, 32, 64), transposed, group),
    }
    granularity = TokenGranularity.PER_TENSOR if static else TokenGranularity.PER_TOKEN
    grid = ActivationGrid(bits=8, symmetric=True, granularity=granularity, static=static)
    ranges = torch.rand(5, 1) * torch.tensor([-3.0, 3.0]) if static else None
    return module, stacks, {name: InputScheme(grid, ranges) for name in stacks}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_flag_of_the_decorator(transposed: bool, group: int, static: bool) -> None:
    """No gate, biases, a norm; against one token and expert at a time, and the decorated forward on floats."""
    module, stacks, inputs = plain_experts(transposed, group, static)
    plain = copy.deepcopy(module)
    assert serve_experts.serve_experts(module, stacks, inputs) is None
    x, weights = torch.randn(9, 32), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])  # nobody chooses the last

    def product(which: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        name = f"{which}_proj"
        matrix, used = stacks[name].matrices[expert], module.__dict__[serve_experts.STACKS][name]
        bias = getattr(module, f"{name}_bias").detach()[expert]
        given = None if used.input_scale is None else used.input_scale[expert : expert + 1]
        if group:
            packed = linear.int4_linear_pack(matrix.values, matrix.scale)
            return linear.int4_linear(rows, packed, len(matrix.values), group, bias, given, steps=used.steps)
        packed = linear.int8_linear_pack(matrix.values)
        return linear.int8_linear(
            rows, packed, matrix.scale[:, 0].contiguous(), bias, given, steps=used.steps
        )

    with torch.no_grad():
        mine = module(x, index, weights)
        expected = (looped(module, product, x, index) * weights.unsqueeze(2)).sum(1)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        serve_experts._misfit, kept = (lambda *args: "no"), serve_experts._misfit
        try:
            assert serve_experts.serve_experts(plain, stacks, inputs) == "no"
        finally:
            serve_experts._misfit = kept
        assert spread(mine, plain(x, index, weights)) < 1e-2
        assert module(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_experts_of_other_processes_give_zero() -> None:
    module, stacks, inputs = plain_experts(False, 0, False)
    module.post_expert_norm = nn.Identity()
    assert serve_experts.serve_experts(module, stacks, inputs) is None
    x, weights = torch.randn(3, 32), torch.ones(3, 2)
    index = torch.tensor([[0, 5], [5, 5], [2, 1]])
    with torch.no_grad():
        y = module(x, index, weights)
        assert not y[1].any() and torch.equal(y[0], module(x[:1], index[:1, :1], weights[:1, :1])[0])


def test_plain_torch_serves_them_too() -> None:
    with kernel_preference(Preference.REFERENCE):
        module, stacks, inputs = plain_experts(True, 0, True)
        assert serve_experts.serve_experts(module, stacks, inputs) is None
        x, index, weights = (
            torch.randn(4, 32),
            torch.tensor([[0, 1], [2, 4], [4, 0], [1, 3]]),
            torch.rand(4, 2),
        )
        slow = module(x, index, weights)
    native, stacks, inputs = plain_experts(True, 0, True)
    serve_experts.serve_experts(native, stacks, inputs)
    torch.testing.assert_close(native(x, index, weights), slow, rtol=0, atol=0)


def bytes_of(*stacks: serve_experts.PackedStack) -> int:
    held = [t for stack in stacks for t in vars(stack).values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("group", [0, 32])
def test_they_compile_without_a_graph_break(group: int) -> None:
    module, stacks, inputs = plain_experts(False, group, True)
    assert serve_experts.serve_experts(module, stacks, inputs) is None
    module.requires_grad_(False)
    x, index, weights = torch.randn(9, 32), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index, weights), module(x, index, weights))


@pytest.mark.parametrize(("block", "bits"), [("int8", 8), ("int4", 4)])
def test_they_hold_integers_and_nothing_else(block: str, bits: int, tmp_path: Path) -> None:
    """Resident bytes: packed integers with their scales; neither floats nor a second copy."""
    model = ds_compress.from_pretrained(exported("mixtral", BLOCKS[block], tmp_path / "x", check=False))
    [first, _] = served_of(model)
    stacks = first.__dict__[serve_experts.STACKS]
    groups = 0 if bits == 8 else 2
    assert stacks["gate_up_proj"].packed.numel() == 4 * packed_bytes(128, 64, bits, groups)
    rows = 4 * (128 + 64)
    scales = 4 * rows if bits == 8 else 0
    assert (
        bytes_of(*stacks.values()) == sum(4 * packed_bytes(n, 64, bits, groups) for n in (128, 64)) + scales
    )
    wide = stack_of((4, 192, 512), False, 0 if bits == 8 else 128)
    grid = ActivationGrid(bits=8, symmetric=True, granularity=TokenGranularity.PER_TOKEN)
    per_weight = bytes_of(serve_experts.PackedStack.of(wide, InputScheme(grid))) / (4 * 192 * 512)
    assert per_weight < 1.03 * bits / 8 + 0.08 * (bits == 4)
    assert not dict(first.named_parameters()) and not first.state_dict()
    with pytest.raises(AttributeError, match="gate_up_proj"):
        first.gate_up_proj  # noqa: B018
    assert ("int8" if bits == 8 else "int4 in groups of 32") in repr(first)


def test_a_copy_and_a_pickle_compute_the_same(tmp_path: Path) -> None:
    model = ds_compress.from_pretrained(exported("gpt_oss", BLOCKS["int8"], tmp_path / "x", check=False))
    with torch.no_grad():
        expected = model(tokens()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(served_of(other)) == 2 and torch.equal(other(tokens()).logits, expected)


def test_the_auto_class_serves_them_too(tmp_path: Path) -> None:
    import transformers

    folder = exported("mixtral", BLOCKS["int4"], tmp_path / "x", check=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert len(served_of(loaded)) == 2
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tokens()).logits, ds_compress.from_pretrained(folder)(tokens()).logits
        )


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_chosen_implementation_does_not_matter(implementation: str, tmp_path: Path) -> None:
    model: Any = ds_compress.from_pretrained(exported("mixtral", BLOCKS["int8"], tmp_path / "x", check=False))
    with torch.no_grad():
        expected = model(tokens()).logits
        model.config._experts_implementation = implementation
        assert torch.equal(model(tokens()).logits, expected)


# --- experts that the kernels do not fit -------------------------------------------------------------------------


_PER_CHANNEL = {"start_bits": 8, "target_bits": 8, "granularity": "per_channel"}


@pytest.mark.parametrize(
    ("name", "block", "reason"),
    [
        ("mixtral", blocks(_PER_CHANNEL), "inputs are not quantized"),
        ("llama4", BLOCKS["int8"], "Llama4TextExperts does not multiply as transformers' registry"),
        (
            "mixtral",
            blocks(
                {"start_bits": 4, "target_bits": 4},
                {"bits": 8},
                weight_quantization={**_GROUPS, "group_size": 8},
            ),
            "groups of 8, no multiple of 32",
        ),
        (
            "mixtral",
            blocks(_PER_CHANNEL, {"bits": 8}, activation_quantization={"quantization_type": "asymmetric"}),
            "not symmetric int8",
        ),
        ("mixtral", {"scheme": {"FP8_DYNAMIC": ["experts"]}}, "weights are fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_dequantized_and_one_line_says_why(
    name: str, block: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = exported(name, block, tmp_path / "x", check=False)
    caplog.set_level(logging.INFO, "ds_compress")
    caplog.clear()
    model = ds_compress.from_pretrained(folder)
    lines = [record.getMessage() for record in caplog.records if "dequantized" in record.getMessage()]
    assert len(lines) == 1 and reason in lines[0] and "layers." in lines[0], lines
    assert not served_of(model) and model(tokens()).logits.isfinite().all()
    report = load.ExportReport.read(folder)
    assert any("dequantized" in note for note in report.notes)
    caplog.clear()
    ds_compress.from_pretrained(folder, activations=False)
    assert not caplog.records


def test_a_range_that_an_expert_lacks_keeps_all_of_them_floats() -> None:
    module, stacks, inputs = plain_experts(False, 0, True)
    inputs["down_proj"].input_range[3] = torch.nan
    reason = serve_experts.serve_experts(module, stacks, inputs)
    assert reason is not None and "no range" in reason
    assert module.down_proj.shape == (5, 32, 64)


def test_half_of_the_matrices_is_not_served() -> None:
    module, stacks, inputs = plain_experts(False, 0, False)
    del stacks["up_proj"], inputs["up_proj"]
    reason = serve_experts.serve_experts(module, stacks, inputs)
    assert reason == "of up_proj and down_proj only down_proj is quantized"


def test_only_the_forward_of_the_decorator_follows_the_registry() -> None:
    module, _, _ = plain_experts(False, 0, False)
    assert follows_registry(module)
    other: Any = type("Other", (STRAIGHT,), {"forward": lambda self, *args: args[0]})(module.config)
    assert not follows_registry(other)
    module.forward = lambda *args: args[0]
    assert not follows_registry(module)
