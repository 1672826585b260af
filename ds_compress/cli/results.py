"""What `--json` prints, by command: key and meaning. The page of commands shows it; tests hold the commands to it."""

from __future__ import annotations

_REPORT = {
    "folder": "the export",
    "format": "hf, compressed-tensors, torch, onnx or openvino",
    "model_class": "class of transformers, or the model's own",
    "source": "what was exported: checkpoint or model",
    "steps": "optimizer steps that the training had applied; null where nobody knows",
    "bytes": "of the weight files",
    "dense_bytes": "of the model that training began with, in fp32",
    "ratio": "dense_bytes / bytes",
    "parameters": "numbers that are left",
    "nonzeros": "of them, those that are not zero",
    "sparsity": "share of zeros",
    "modules": "by module: how it is stored, its bytes, its zeros",
    "attributes": "by module: numbers that changed with pruning",
    "metrics": "last numbers of the techniques",
    "commitments": "hashes of secret seeds",
    "notes": "what is worth knowing of this export",
    "check": "how the folder was loaded in a fresh process, and how far its logits are off; empty without a check",
    "versions": "of the packages that wrote it",
}
_OUT = {"folder": "that was written"}

RESULTS: dict[str, dict[str, str]] = {
    "doctor": {
        "findings": "what will fail or hang, each with section, what and remedy",
        "versions": "by package: installed, supported, fits, import_error, extra",
        "machine": "system, processor, memory, instructions, devices",
        "kernels": "toolchain, library, and on what each op runs",
        "locks": "of torch's extension builder: searched, a folder; locks, each with path, op, age_s and holder",
        "deepspeed_internals": "tested versions, and what differs from them",
    },
    "validate": {
        "config": "the file",
        "model": "the folder, or null",
        "problems": "each with path, got, allowed and hint",
        "enabled_blocks": "names of blocks that do something",
        "notes": "what is worth a look, and what was not checked",
    },
    "init": {
        "out": "the file, or null with --list",
        "recipes": "by name and version, when to take it: the one that was written, or with --list all",
        "notes": "what is said of the file: where it loads, what it needs, how to train with it",
    },
    "bench": {
        "benchmark": "the kernel, or null where they are listed",
        "conditions": "time, commit, cpu, cores and versions",
        "figures": "by shape and contender: figures, whose names end in their units",
        "measures": "where they are listed, by kernel: what is measured",
    },
    "migrate": {
        "config": "the new JSON",
        "notes": "each with path, kind (changed, now, better) and text",
        "written": "the file, or null",
    },
    "cache-teacher": {
        "out": "the folder",
        "bytes": "of it",
        "examples": "that are stored",
        "top_k": "tokens of each position",
        "vocabulary": "of the teacher",
        "temperature": "of the stored predictions",
    },
    "teacher-text": {"out": "the file", "bytes": "of it", "texts": "that were written"},
    "universal": {
        "folder": "of the new checkpoint",
        "load_from": "what `load_checkpoint` takes",
    },
    "keygen": {"private": "file of the key to keep secret", "public": "file of the key to hand out"},
    "sign": {"folder": "that is signed now"},
    "verify": {
        "folder": "that is as it was signed",
        "name": "of the model, or null",
        "version": "of the release, or null",
        "files": "how many are signed",
        "signer": "sha256 of the public key",
        "plaintext": "whether encrypted files were decrypted and checked, too",
    },
    "encrypt": _OUT,
    "decrypt": _OUT,
    "export": _REPORT,
    "inspect": _REPORT,
    "report": {
        "html": "the page",
        "json": "file of the data",
        "runs": (
            "of each run, null or empty where nobody knows: name, run, checkpoint, export, model_class, recipe, "
            "config, steps, processes, zero_stage, kernels, blocks, schedules, history (stride, steps, numbers), "
            "token_shares, flagged_workers, judged_steps, format, bytes, dense_bytes, ratio, parameters, sparsity, "
            "layers with their modules, kept_units, metrics, commitments, check, notes, versions, accuracy, latency_ms"
        ),
        "sensitivity": "the table of --sensitivity, as `ds_compress sensitivity` prints it, or null",
    },
    "sensitivity": {
        "output": "the file, which has all of these keys but this one",
        "version": "of the table",
        "model_class": "class of transformers",
        "metric": "kl (from the model as it is), loss (cross-entropy) or relative_error (models without classes)",
        "unit": "of the numbers under increase",
        "formats": "that were tried",
        "examples": "of the calibration set",
        "predictions": "of which the metric is the mean: tokens, or examples of a classifier",
        "groups": (
            "layers that share a format, by name: modules, parameters (numbers in their weights), and increase: by "
            "format, how much the metric grows when this group alone has it; null: not finite; absent: does not fit"
        ),
        "facts": "model, data, seed, max_length, batch, excluded: how it was measured",
    },
    "plan": {
        "model": "the folder",
        "config": "the file",
        "blocks": "by enabled block: what it does",
        "weights": (
            "for each weight and block that claims it: module, parameter, shape, block, group, treatment, "
            "bytes_before, bytes_after, nonzeros"
        ),
        "structures": "prunable groups, each with structure, block, group and kept",
        "bytes": "of the whole model: before, after, as_bitmask, and the format that after counts",
        "parameters": "of the model",
        "nonzeros": "that are left",
        "training_state_bytes": "masks, latent_weights and scores, in each process",
        "left_out": "what a block without a regex does not reach",
        "notes": "such as the formats that the result can be exported in",
        "run": (
            "null without --world-size; else world_size, nodes, zero_stage; memory_bytes of a process by kind (teacher "
            "null: not known) and in total; passing_bytes, at most, by what comes and goes in a step; wire_bytes of a "
            "process and step by way, each with way, gradients, weights, total, leaving_a_node (of all its processes) "
            "and seconds; breaks, what grows too large; notes, with what is not counted"
        ),
        "compute": (
            "null without --tokens; else, of one process, tokens and sequence; forward_flops of a micro-step; "
            "step_flops of student and teacher (null: not known); moved_bytes of a step by block; saved_bytes, "
            "kept for backward by fake quantization; device; step_seconds, plain and compressed, and step_ratio "
            "(null without --device or with an unknown teacher); latencies, each with tokens, before_s, after_s "
            "and bound_by; notes, with what is not counted"
        ),
        "search": (
            "null without --search; else output (the file), goal, metric, formats (by group of layers, keep where it "
            "stays), and what is predicted: increase of the metric, bytes of the weight files at most, effective_bits, "
            "seconds of a forward at least (null without --latency); uniform, the same with one format for all groups, "
            "by format"
        ),
    },
}
"""All have `ok` before these: true, or false where doctor or validate found something."""
