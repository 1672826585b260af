"""Short trainings in forked processes, and the trace that each leaves: what kills, disks and soaks are tried on.

A process costs little because it is forked from a server that has imported everything. Every process writes its own
trace, flushed line by line, so it is there whatever kills the process: what was computed in each step (the loss and
the masks, bit for bit), which saves began and ended, and the final weights.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import BertConfig, BertForSequenceClassification

import ds_compress
from benchmarks.reliability.trial import Verdict
from ds_compress.examples.launch import free_port

PROCESSES = 2
VOCABULARY = 128
PRELOADED = ["benchmarks.reliability.preloaded"]


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    """Two layers of 32; without dropout, so that a run is the same whenever it begins."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def _group(**params: Any) -> dict[str, Any]:
    return {"encoder": {"params": params, "modules": [r"encoder\.layer"]}}


def block(name: str, folder: Path) -> dict[str, Any]:
    """ "ramp": sparsity that still grows at most steps. "QAT": learned scales and calibrated ranges. "KD": a teacher,
    whose weights are saved in `folder`, and two losses."""
    if name == "ramp":
        shared = {"enabled": True, "method": "topk", "schedule": "cubic", "schedule_offset": 1}
        shared |= {"schedule_offset_end": 10, "schedule_offset_stride": 1}
        return {"sparse_pruning": {"shared_parameters": shared, "different_groups": _group(dense_ratio=0.3)}}
    if name == "QAT":
        weights = {"enabled": True, "quantize_weight_in_forward": True, "learned_scale": True}
        inputs = {"enabled": True, "range_calibration": "static"}
        return {
            "weight_quantization": {
                "shared_parameters": weights,
                "different_groups": _group(start_bits=8, target_bits=4),
            },
            "activation_quantization": {"shared_parameters": inputs, "different_groups": _group(bits=8)},
        }
    teacher = folder / "teacher"
    if not teacher.exists():
        tiny_bert(3).save_pretrained(teacher)
    losses = {"logits": {"temperature": 2.0}, "hidden": {"weight": 0.5}}
    return {"distillation": {"enabled": True, "teacher": str(teacher), "losses": losses}}


@dataclass(frozen=True)
class Run:
    """What one training is told.

    folder: of checkpoints. tag: None for a new one at every save. resumes: from what is there, if anything is.
    pause_s: after every step, so that a kill can meet a moment. prepare: called in the process with the engine, this
    and the rank; plants a fault. goes_on: the script catches the error of a save that failed. asks_accuracy: at the
    end, which takes longer than 12 steps.
    """

    name: str
    stage: int
    folder: Path
    traces: Path
    block: dict[str, Any]
    steps: int = 12
    every: int = 3
    tag: str | None = None
    resumes: bool = False
    pause_s: float = 0.0
    prepare: Callable[[Any, Run, int], None] | None = None
    goes_on: bool = False
    asks_accuracy: bool = False


def config_of(run: Run) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": run.stage}
    if run.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": zero,
        "compression_training": run.block,
    }


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    """[4, 12] tokens of one step and process; whether the first token is in the upper half is the label."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(0, VOCABULARY, (4, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] >= 64).long()}


def train(run: Run, rank: int, trace: Callable[[str], None]) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    model = tiny_bert()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of(run))[0]
    if run.resumes:
        engine.load_checkpoint(str(run.folder))
    trace(f"start {engine.global_steps} {engine.compression.applied_steps}")
    if run.prepare is not None:
        run.prepare(engine, run, rank)
    for step in range(engine.global_steps, run.steps):
        loss = engine(**batch(step, rank)).loss
        engine.backward(loss)
        engine.step()
        trace(f"step {step} {loss.item().hex()} {_hash_of_masks(engine)}")
        time.sleep(run.pause_s)
        if (step + 1) % run.every == 0:
            trace(f"memory {step + 1} {_resident_bytes()}")
            trace(f"saving {step + 1}")
            try:
                engine.save_checkpoint(str(run.folder), tag=run.tag)
            except ds_compress.CheckpointError as error:
                trace(f"failed {error}".replace("\n", " "))
                if not run.goes_on:
                    raise
            else:
                trace(f"saved {step + 1}")
    if run.asks_accuracy:
        trace(f"accuracy {_accuracy(engine)}")
    trace(
        f"final {_hash_of_weights(engine.module)} {_hash_of_masks(engine)}"
    )  # the last line of a whole trace


def _accuracy(engine: Any) -> float:
    """The share of 400 examples of no step that the model gets right."""
    right = 0
    with torch.no_grad():
        for number in range(100):
            examples = batch(10**6 + number, 0)
            right += int((engine(**examples).logits.argmax(-1) == examples["labels"]).sum())
    return right / 400


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash_of_masks(engine: Any) -> str:
    states = {
        f"{name} {kind} {parameter}": values
        for name, technique in engine.compression.techniques.items()
        for kind, by_parameter in technique.fragment_state().items()
        for parameter, values in by_parameter.items()
    }
    return _hash(states)


def _hash_of_weights(model: torch.nn.Module) -> str:
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            weights[name] = parameter.detach().float().clone()
    return _hash(weights)


# -- processes ------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What one process did. steps: {step: (loss, masks)}; saved: steps of the saves that ended; memory: {step: bytes
    resident}; failed: what saves raised that failed."""

    start: tuple[int, int] | None = None
    steps: dict[int, tuple[str, str]] = field(default_factory=dict)
    saving: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    memory: dict[int, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    final: str | None = None
    accuracy: float | None = None
    error: str = ""

    @classmethod
    def read(cls, path: Path) -> Trace:
        trace = cls()
        for line in path.read_text().splitlines() if path.exists() else ():
            match line.split():
                case ["start", global_steps, applied]:
                    trace.start = int(global_steps), int(applied)
                case ["step", step, loss, masks]:
                    trace.steps[int(step)] = loss, masks
                case ["saving", step]:
                    trace.saving.append(int(step))
                case ["saved", step]:
                    trace.saved.append(int(step))
                case ["final", *hashes]:
                    trace.final = " ".join(hashes)
                case ["memory", step, count]:
                    trace.memory[int(step)] = int(count)
                case ["failed", *words]:
                    trace.failed.append(" ".join(words))
                case ["accuracy", share]:
                    trace.accuracy = float(share)
                case ["error", *words]:
                    trace.error = " ".join(words)
        return trace


class Launch:
    """The processes of a run, started; a context that leaves none behind."""

    def __init__(self, run: Run, processes: int = PROCESSES) -> None:
        self.run = run
        run.traces.mkdir(parents=True, exist_ok=True)
        for old in run.traces.iterdir():
            old.unlink()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.processes: list[BaseProcess] = [
            context.Process(target=_process, args=(run, rank, processes, port)) for rank in range(processes)
        ]

    def __enter__(self) -> Launch:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self, timeout_s: float) -> list[int | None]:
        """Exit codes, negative for signals; None for a process that still runs at the end of the time."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def has_ended(self) -> bool:
        """Whether one of them has."""
        return not all(process.is_alive() for process in self.processes)

    def traces(self) -> list[Trace]:
        return [Trace.read(self.run.traces / str(rank)) for rank in range(len(self.processes))]

    def log(self, rank: int = 0, lines: int = 3) -> str:
        """The last lines that a process printed."""
        return " | ".join((self.run.traces / f"{rank}.log").read_text().strip().splitlines()[-lines:])


def finished(
    run: Run, timeout_s: float = 120, processes: int = PROCESSES
) -> tuple[list[int | None], list[Trace], str]:
    """Exit codes, traces, and what the first process that failed printed last."""
    with Launch(run, processes) as launch:
        codes = launch.wait(timeout_s)
        failed = next((rank for rank, code in enumerate(codes) if code != 0), None)
        return codes, launch.traces(), "" if failed is None else launch.log(failed)


@functools.cache
def unbroken(name: str, stage: int, steps: int = 12, asks_accuracy: bool = False) -> tuple[Trace, ...]:
    """The traces of a run that nobody disturbed and that saved nothing."""
    import tempfile

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reliability-")))
        run = Run(
            name,
            stage,
            folder / "checkpoints",
            folder / "traces",
            block(name, folder),
            steps,
            every=10**9,
            asks_accuracy=asks_accuracy,
        )
        codes, traces, log = finished(run)
        if any(codes):
            raise RuntimeError(f"the unbroken run of {name} on stage {stage} failed: {log}")
        return tuple(traces)


def differences(traces: Sequence[Trace], reference: Sequence[Trace]) -> str:
    """Where traces differ from those of the unbroken run; empty where they do not."""
    for rank, (trace, other) in enumerate(zip(traces, reference, strict=True)):
        if trace.start is None or trace.start[0] != trace.start[1]:
            return f"process {rank} started at {trace.start}"
        for step, found in trace.steps.items():
            if found != other.steps[step]:
                return f"process {rank} differs in step {step}"
        if trace.final != other.final:
            return f"the final weights of process {rank} differ"
    return ""


def resumed(run: Run, before: Sequence[Trace], reference: Sequence[Trace]) -> Verdict:
    """Whether a run that was stopped goes on from its last save, as the unbroken one, to the end."""
    again = replace(run, traces=run.folder.parent / "resumed", resumes=True, prepare=None, pause_s=0.0)
    codes, traces, log = finished(again)
    if any(codes):
        return Verdict(False, "did not resume", log)
    started = traces[0].start
    confirmed = max(step for trace in before for step in (0, *trace.saved))
    if started is None or started[0] < confirmed:
        return Verdict(False, "lost", f"saved at step {confirmed}, resumed at {started}")
    if difference := differences(traces, reference):
        return Verdict(False, "silently different", difference)
    if rubbish := [path.name for path in run.folder.glob(".*")]:
        return Verdict(False, "left rubbish", ", ".join(rubbish))
    return Verdict(True, "bit-equal")


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Returns when it is true, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


def _process(run: Run, rank: int, processes: int, port: int) -> None:
    """The main of a forked process."""
    log = os.open(run.traces / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a build of minutes
    code = 1
    with open(run.traces / str(rank), "w", buffering=1) as file:

        def trace(line: str) -> None:
            file.write(line + "\n")

        try:
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
            train(run, rank, trace)
            code = 0
        except BaseException as error:
            traceback.print_exc()
            trace(f"error {type(error).__name__}: {error}".replace("\n", " "))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
