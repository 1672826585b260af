"""A checkpoint's folder as a model to export: on one machine, without DeepSpeed's engine or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_compress.config import parse_config
from ds_compress.config.resolve.resolver import resolve
from ds_compress.engine import record
from ds_compress.engine.checkpoint import model_file, origin, tags
from ds_compress.engine.checkpoint import state as checkpoint_state
from ds_compress.engine.checkpoint import weights as fp32
from ds_compress.engine.checkpoint.tags import FOLDER
from ds_compress.errors import CheckpointError, ExportError
from ds_compress.export import run_record
from ds_compress.export.source import ExportSource, of_module
from ds_compress.modelinfo.kinds import STEP_SIZE_SUFFIX
from ds_compress.select.gumbel import commitments
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.given_scales import given_scales
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.techniques import TECHNIQUES
from ds_compress.techniques.base import TechniqueContext

logger = logging.getLogger("ds_compress")


def from_checkpoint(
    path: str | PathLike[str], model: nn.Module | None = None, trust_pickle: bool = False
) -> ExportSource:
    """The trained model: masked structures are cut, and its quantizers attached as they were when it was saved.

    path: what `engine.save_checkpoint` was given, or one tag's folder in it; or a folder of transformers' own.
    model: an instance of the trained class, before compression, for models that transformers does not know.
    trust_pickle: DeepSpeed's pickles may hold more than data, and run it.

    Raises:
        ExportError: a file is missing or damaged, or there is no way to know the model's class.
    """
    root = Path(path)
    if (root / "config.json").exists() and not (root / "latest").exists():
        return _of_transformers(root)
    try:
        folder = tags.verified_folder(root)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if any(folder.glob("*mp_rank_01_model_states.pt")):
        raise ExportError(
            f"{folder} has layers sharded by tensor parallelism: load it into an engine, and export what a model with "
            "the weights of ds_compress.export_state_dict(engine) is"
        )
    try:
        saved = model_file.read(folder / FOLDER)
        state = checkpoint_state.read(folder / FOLDER)
        if state is not None:
            checkpoint_state.files_of(folder / FOLDER, state)
    except (ValueError, CheckpointError) as error:
        raise ExportError(str(error)) from error
    if saved is None and model is None:
        raise ExportError(
            f"{folder} has no ds_compress/{model_file.FILE_NAME} that says which model this is: pass model="
        )
    built = model if model is not None else _skeleton(saved or {})
    try:
        weights = fp32.read(folder, trust_pickle)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    _load(built, weights, getattr(torch, saved["dtype"]) if saved else torch.float32)
    if saved is not None and state is not None:
        _compress(built, saved["compression_training"], state, weights)
    source = of_module(built.eval())
    source.parameters = origin.began_with(built)
    source.steps = None if state is None else state["applied_steps"]
    source.commitments = commitments({} if state is None else state.get("secret_seeds", {}))
    source.run_record = _record(folder)
    source.export_to = None if saved is None else saved["compression_training"].get("export_to")
    source.description = f"checkpoint {folder.name}"
    return source


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return run_record.read(folder / FOLDER / record.FILE_NAME)
    except ValueError as error:
        logger.warning("ds_compress: the export has no record of its training: %s", error)
        return None


def _of_transformers(folder: Path) -> ExportSource:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ExportError(f"{folder}/config.json names no class of transformers: {config.architectures}")
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(f"{folder} is quantized already")
    if blocks := (getattr(config, origin.KEY, None) or {}).get("unfinished"):
        raise ExportError(f"{folder}: {origin.without(blocks)}")
    source = of_module(cls.from_pretrained(folder).eval())
    source.parameters = origin.began_with(source.model)
    source.description = f"folder {folder.name}"
    return source


def _skeleton(saved: Mapping[str, Any]) -> nn.Module:
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    cls = getattr(transformers, saved["class"], None)
    if cls is None or saved["config"] is None:
        raise ExportError(f"transformers cannot build a {saved['class']}: pass model=, an instance of it")
    with init_empty_weights(include_buffers=False), no_init_weights():
        built: nn.Module = cls(cls.config_class.from_dict(saved["config"]))
    return built


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Replaces the parameters, ties kept, one lazy tensor at a time."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if name not in weights:
            raise ExportError(f"the checkpoint has no {name}: it is of another model")
        value = weights[name].contiguous().to("cpu", dtype if parameter.is_floating_point() else None)
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(parameter.shape)} in the model"
            raise ExportError(f"{name} is {shapes}")
        made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for prefix, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = made[id(old)]
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if full in weights:
                module._buffers[name] = weights[full].contiguous().to("cpu", buffer.dtype)


@torch.no_grad()
def _compress(
    model: nn.Module, block: Mapping[str, Any], state: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    """Cuts what is masked, and attaches the quantizers in the state that they were saved in."""
    given = parse_config(block).without("distillation", "layer_reduction")
    config = given.after_shrink() if state["shrunk_units"] else given
    plan = resolve(model, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    structures = [
        target.structure for structured in plan.structures.values() for target in structured.targets
    ]
    kept = {
        name: units
        for key in plan.structures
        for name, units in state["stages"].get(key, {}).get("kept", {}).items()
    }
    pruning_plan = PruningPlan.of(structures, kept, model)
    if pruning_plan.active():
        apply_pruning(model, pruning_plan)
        plan = resolve(model, given.after_shrink())
    context = TechniqueContext(plan.config, plan, model)
    for cls in TECHNIQUES.values():
        technique = cls.of(context) if cls.is_in_forward else None
        if technique is not None:
            technique.prepare(model)
            technique.load_state_dict(_renamed(state["stages"][technique.name], pruning_plan))
    old_names = {renamed: name for name in shapes if (renamed := pruning_plan.renamed(name)) is not None}
    for name, parameter in model.named_parameters():
        if name.endswith(STEP_SIZE_SUFFIX):
            weight = old_names[name.removesuffix(STEP_SIZE_SUFFIX)]
            saved = weights[f"{weight}{STEP_SIZE_SUFFIX}"].contiguous()
            own = replace(given_scales(model)[name], weight=weight, shape=shapes[weight])
            pruning_plan.given_scales[f"{weight}{STEP_SIZE_SUFFIX}"] = own
            parameter.data.copy_(pruning_plan.prune_tensor(f"{weight}{STEP_SIZE_SUFFIX}", saved))


def _renamed(state: Mapping[str, Any], pruning_plan: PruningPlan) -> dict[str, Any]:
    """Ranges and global scales by the names that modules have after the cut."""
    if "largest" in state:
        largest = {
            pruning_plan.renamed(name): pruning_plan.kept_experts(name, value)
            for name, value in state["largest"].items()
        }
        return {**state, "largest": {name: value for name, value in largest.items() if name is not None}}
    if "ranges" not in state:
        return dict(state)
    renamed = {
        # By the name of a layer, or of a stack of experts.
        pruning_plan.renamed(f"{name}.weight"): pruning_plan.kept_experts(name, values)
        for name, values in state["ranges"].items()
    }
    return {**state, "ranges": {n.removesuffix(".weight"): v for n, v in renamed.items() if n is not None}}
