"""Bad workers against robust rules: final accuracy on digits, who was flagged, and who was flagged wrongly.

    python -m benchmarks.robust [--quick] [--json] [--task digits|encoder] [--workers "5,1;8,2"] [--stages 0,2]
                                [--seeds 2] [--steps 200]

A small network on scikit-learn's 8x8 digits, n real processes under DeepSpeed, the last f of them bad from the first
step on: they replace what they have just before it is sent. Shards are alike (iid), or each class is spread over the
workers as a Dirichlet distribution with alpha 1 says (skewed). "mean" is what stock DeepSpeed computes; rules stand by
themselves unless the name says more; "recommended" is trimmed_mean with neighbor_mixing and worker_momentum 0.9.

Attacks: the gradient's sign flipped (x 1, x 10), scale x 100, noise of ten times its length, ALIE (Baruch et al. 2019:
1.5 standard deviations of the others off their mean), IPM (Xie et al. 2019: half their mean, negative), NaN, and
gradients of twenty steps ago. ALIE and IPM see all honest gradients.

With --task encoder: MiniLM on the movie sentences with AdamW, which takes far longer: choose few
cases.

Every line: mean accuracy on what was held out; the share of steps in which a bad worker was flagged, and the share of
honest workers' steps in which one was flagged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.reduce.robust import RobustSum

from . import record

MOMENTUM = 0.9
SETUPS: dict[str, dict[str, Any]] = {
    "mean": {"rule": "mean", "max_malicious": 0},
    "trimmed_mean": {"rule": "trimmed_mean", "neighbor_mixing": False},
    "median": {"rule": "median", "neighbor_mixing": False},
    "centered_clip": {"rule": "centered_clip", "neighbor_mixing": False},
    "norm_clip": {"rule": "norm_clip", "neighbor_mixing": False},
    "trimmed_mean, mixing": {"rule": "trimmed_mean"},
    "centered_clip, mixing": {"rule": "centered_clip"},
    "recommended": {"rule": "trimmed_mean", "worker_momentum": MOMENTUM},
}
ATTACKS = ("none", "sign flip", "sign flip x10", "scale x100", "noise", "ALIE", "IPM", "NaN", "stale")
OMNISCIENT = ("ALIE", "IPM")
BATCH, STALE_STEPS = 16, 20

Figures = dict[str, dict[str, float]]


def attack(name: str, own: torch.Tensor, honest: torch.Tensor, past: deque[torch.Tensor]) -> torch.Tensor:
    """What a bad worker sends instead of `own` (m,); `honest` (n - f, m): what the others send."""
    if name == "sign flip":
        return -own
    if name == "sign flip x10":
        return -10 * own
    if name == "scale x100":
        return 100 * own
    if name == "noise":
        noise = torch.randn_like(own)
        return noise * (10 * own.norm() / noise.norm())
    if name == "ALIE":
        return honest.mean(0) - 1.5 * honest.std(0)
    if name == "IPM":
        return -0.5 * honest.mean(0)
    if name == "NaN":
        return torch.full_like(own, torch.nan)
    if name == "stale":
        return past[0]
    return own


@contextlib.contextmanager
def corrupted(name: str, bad: int) -> Iterator[None]:
    """The last `bad` processes send what `attack` makes of their gradients, or of their momenta."""
    world, rank = dist.get_world_size(), dist.get_rank()
    past: deque[torch.Tensor] = deque(maxlen=STALE_STEPS + 1)

    def replaced(segments: Sequence[Any]) -> None:
        own = torch.cat([segment.values.float() for segment in segments])
        if name == "stale":
            past.append(own)
        honest = own[None]
        if name in OMNISCIENT:
            everyones = [torch.empty_like(own) for _ in range(world)]
            dist.all_gather(everyones, own)
            honest = torch.stack(everyones[: world - bad])
        if rank >= world - bad:
            sent = attack(name, own, honest, past)
            for segment, values in zip(segments, sent.split([s.numel for s in segments]), strict=True):
                segment.values.copy_(values)

    original = RobustSum.reduce_scatter

    def reduce_scatter(self: RobustSum, segments: Sequence[Any], *rest: Any) -> None:
        replaced(segments)
        original(self, segments, *rest)

    if bad and name != "none":
        RobustSum.reduce_scatter = reduce_scatter  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        RobustSum.reduce_scatter = original  # type: ignore[method-assign]


def shards(workers: int, skewed: bool, seed: int) -> tuple[list[Any], Any]:
    """One (x, y) per worker, and the held-out one."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:360], order[360:]
    parts = dirichlet_shards(rest, y, workers, seed) if skewed else list(rest.tensor_split(workers))
    return [(x[part], y[part]) for part in parts], (x[held_out], y[held_out])


def dirichlet_shards(rows: torch.Tensor, labels: torch.Tensor, workers: int, seed: int) -> list[torch.Tensor]:
    """Rows of each class in shares drawn from Dirichlet(1, ..., 1) (Hsu et al. 2019), per worker."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[torch.Tensor]] = [[] for _ in range(workers)]
    for label in labels.unique().tolist():
        of_class = rows[labels[rows] == label]
        # Shares of sorted uniform cuts are Dirichlet(1, ..., 1).
        cuts = torch.rand(workers - 1, generator=generator).sort().values * len(of_class)
        for part, own in zip(parts, of_class.tensor_split(cuts.long()), strict=True):
            part.append(own)
    return [torch.cat(part) for part in parts]


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.layers(x)
        return logits if y is None else torch.nn.functional.cross_entropy(logits, y)


Batches = Callable[[torch.Generator], dict[str, torch.Tensor]]


def digits(skewed: bool, seed: int) -> tuple[torch.nn.Module, Batches, Callable[[Any], float]]:
    """A network, this process' batches, and the accuracy of an engine on what was held out."""
    own, (held_out, labels) = shards(dist.get_world_size(), skewed, seed)
    x, y = own[dist.get_rank()]

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        return {"x": x[rows], "y": y[rows]}

    return Classifier(), batch, lambda engine: float((engine(held_out).argmax(1) == labels).float().mean())


def sentences(skewed: bool, seed: int) -> tuple[torch.nn.Module, Batches, Callable[[Any], float]]:
    """The same of the real encoder on movie sentences; skewed: nine tenths of a worker's sentences have one label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ds_compress.examples import assets, movie_reviews

    folder = assets.fetch(assets.MINILM)
    training, held_out = movie_reviews.load(AutoTokenizer.from_pretrained(folder))
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = list(range(rank, len(training), world))
    liked = [row for row in mine if training.labels[row] == rank % 2]
    others = [row for row in mine if training.labels[row] != rank % 2]
    rows = torch.tensor(liked + others[: len(liked) // 9] if skewed else mine)

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return training.batch(rows[torch.randint(len(rows), (BATCH,), generator=generator)].tolist())

    def accuracy(engine: Any) -> float:
        correct = 0
        for chosen in movie_reviews.evaluation_batches(held_out, 64):
            inputs = held_out.batch(chosen)
            predicted = engine(**{k: v for k, v in inputs.items() if k != "labels"}).logits.argmax(1)
            correct += int((predicted == inputs["labels"]).sum())
        return correct / len(held_out)

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), batch, accuracy


def run(
    task: str, stage: int, rule: str, name: str, bad: int, skewed: bool, seed: int, steps: int
) -> dict[str, float]:
    """One training run in all processes."""
    import deepspeed

    torch.manual_seed(seed)
    model, batch, accuracy = (digits if task == "digits" else sentences)(skewed, seed)
    at_workers = "worker_momentum" in SETUPS[rule]
    optimizer: dict[str, Any] = {"type": "SGD", "params": {"lr": 0.2, "momentum": MOMENTUM}}
    if at_workers:
        optimizer["params"] = {"lr": 0.2 / (1 - MOMENTUM)}
    if task != "digits":
        betas = [0.0 if at_workers else 0.9, 0.999]
        optimizer = {"type": "AdamW", "params": {"lr": 1e-4, "betas": betas, "torch_adam": True}}
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "compression_training": {"robust_reduction": {"enabled": True, "max_malicious": bad, **SETUPS[rule]}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    reduction = engine.compression.techniques["gradient_reduction"]
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    with corrupted(name, bad):
        for _ in range(steps):
            output = engine(**batch(generator))
            engine.backward(output if task == "digits" else output.loss)
            engine.step()
    engine.eval()
    with torch.no_grad():
        correct = accuracy(engine)
    flag_counts, world = reduction.flag_counts, dist.get_world_size()
    first_bad = world - bad if name != "none" else world
    share = [flag_counts.counts.get(worker, 0) / max(1, flag_counts.steps) for worker in range(world)]
    engine.destroy()
    return {
        "accuracy": correct,
        "flagged": statistics.mean(share[first_bad:]) if first_bad < world else 0.0,
        "flagged honest": statistics.mean(share[:first_bad]),
    }


def worker(arguments: argparse.Namespace) -> None:
    import deepspeed

    from ds_compress.examples.cpu import skip_shared_memory_build

    from .engines import quiet

    torch.set_num_threads(1)
    quiet()
    skip_shared_memory_build()
    figures: Figures = {}
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        deepspeed.init_distributed("gloo")
        for stage in map(int, arguments.stages.split(",")):
            for distribution in arguments.distributions.split(","):
                for name in arguments.attacks.split(","):
                    for rule in arguments.rules.split(";"):
                        where = (arguments.task, stage, rule, name, arguments.bad, distribution == "skewed")
                        runs = [run(*where, seed, arguments.steps) for seed in range(arguments.seeds)]
                        line = f"stage {stage}, {distribution}, {name}, {rule}"
                        figures[line] = {key: statistics.mean(r[key] for r in runs) for key in runs[0]}
                        if dist.get_rank() == 0:
                            print(line, figures[line], file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        Path(arguments.result).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps, few cases")
    record.add_output_arguments(parser)
    parser.add_argument("--task", choices=["digits", "encoder"], default="digits")
    parser.add_argument("--workers", default="5,1;8,2", help="n,f;n,f")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--distributions", default="iid,skewed")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--rules", default=";".join(SETUPS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bad", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result:
        worker(arguments)
        return
    if arguments.quick:
        arguments.workers, arguments.distributions, arguments.seeds, arguments.steps = "5,1", "iid", 1, 60
        arguments.attacks, arguments.rules = "none,scale x100,ALIE,NaN", "mean;centered_clip;recommended"
        if arguments.task == "encoder":
            arguments.workers, arguments.distributions, arguments.steps = "3,1", "skewed", 3
            arguments.attacks, arguments.rules = "scale x100", "centered_clip"
    figures: Figures = {}
    for pair in arguments.workers.split(";"):
        n, f = map(int, pair.split(","))
        figures |= {
            f"{arguments.task}, n {n}, f {f}, {key}": values
            for key, values in launched(n, f, arguments).items()
        }
    for key, values in figures.items():
        print(
            f"{key:64s} {100 * values['accuracy']:6.1f} %  flagged {100 * values['flagged']:5.1f} %  "
            f"honest flagged {100 * values['flagged honest']:4.1f} %"
        )
    record.report("robust", figures, arguments)


def launched(n: int, f: int, arguments: argparse.Namespace) -> Figures:
    """The figures of one job of n processes."""
    names = ("task", "stages", "distributions", "attacks", "rules", "seeds", "steps")
    options = [word for name in names for word in (f"--{name}", str(getattr(arguments, name)))]
    with tempfile.TemporaryDirectory() as folder:
        result = f"{folder}/figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        command += ["-m", f"{__package__}.robust", *options, "--bad", str(f), "--result", result]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONWARNINGS": "ignore",
        }
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found: Figures = json.loads(Path(result).read_text())
    return found


if __name__ == "__main__":
    main()
