"""Weak and strong scaling of training: `python benchmarks/scaling.py --processes 2`.

Starts `torchrun` with one process and with several, by turns, since absolute times drift on a
shared machine, and prints the medians. Strong scaling shares the same trajectories, weak scaling
gives each process as many as one had.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from stable_baselines3.common.logger import configure
from tqdm.auto import tqdm

from agents import ReDiFPPO
from agents.callbacks import IterationCallback
from redif_env import ReDiFVectorEnv, TeacherBank, load_teacher, parallel
from redif_env.errors import require

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Args:
    """Measure iterations of one process and of several."""

    processes: int = 2
    """How many of several."""
    num_envs: int = 128
    """Trajectories of a rollout of one process; weak scaling multiplies them."""
    num_steps: int = 4
    """Steps of a trajectory."""
    updates: int = 2
    """Minibatches an epoch, of which there is one."""
    iterations: int = 6
    """Iterations of a run; the first one does not count."""
    repeats: int = 3
    """Runs of each kind."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


class Stopwatch(IterationCallback):
    """Seconds of wall clock and of this process's CPU at the start of each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, float]] = []

    def on_iteration(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def medians(self) -> list[float]:
        """Of wall clock and CPU, an iteration."""
        spans = [
            [end - start for start, end in zip(one, other, strict=True)]
            for one, other in zip(self.times[1:], self.times[2:], strict=False)
        ]
        return [statistics.median(column) for column in zip(*spans, strict=True)]


def measure(args: Args, num_envs: int) -> None:
    """Train in this process and the others that torchrun started; the first prints JSON."""
    teacher = load_teacher(device=parallel.start(args.device))
    env = ReDiFVectorEnv(
        num_envs,
        teacher,
        num_steps=args.num_steps,
        schedule="uniform",
        group_size=2,
        bank=TeacherBank.build(teacher, 256),
        shard=parallel.shard(),
        seed=0,
    )
    batch_size = num_envs // args.updates
    model = ReDiFPPO("StudentPolicy", env, batch_size=batch_size, n_epochs=1, seed=0)
    model.set_logger(configure(None, []))
    watch = Stopwatch()
    model.learn(args.iterations * num_envs * args.num_steps, callback=watch)
    weights = sum(weight.numel() for weight in model.policy.optimizer.param_groups[0]["params"])
    if parallel.is_main():
        print(json.dumps([*watch.medians(), weights]))


def run(args: Args, processes: int, num_envs: int) -> list[float]:
    """What `measure` prints when torchrun starts it so many times."""
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(args)]
    values = map(str, dataclasses.astuple(args))
    given = [text for pair in zip(options, values, strict=True) for text in pair]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **os.environ}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *given],
        env={**environment, "REDIF_SCALING_ENVS": str(num_envs)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> dict[str, list[float]]:
    """Measure by turns, print the table, and return the medians."""
    kinds = {
        "one process": (1, args.num_envs),
        "strong": (args.processes, args.num_envs),
        "weak": (args.processes, args.num_envs * args.processes),
    }
    results: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for _ in tqdm(range(args.repeats), desc="measuring"):
        for name, kind in kinds.items():
            results[name].append(run(args, *kind))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    print(f"{'':14}{'processes':>10}{'trajectories':>14}{'s/iteration':>13}{'CPU s':>8}{'rate':>7}")
    for name, (processes, num_envs) in kinds.items():
        seconds, cpu, _ = medians[name]
        rate = num_envs / seconds / (args.num_envs / medians["one process"][0])
        print(f"{name:14}{processes:10}{num_envs:14}{seconds:13.2f}{cpu:8.2f}{rate:7.2f}")
    megabytes = 4e-6 * medians["strong"][2]
    print(f"rate: trajectories a second, in those of one process; {megabytes:.1f} MB of gradients")
    print(f"{args}, {os.cpu_count()} cores, torch {torch.__version__}")
    return medians


if __name__ == "__main__":
    given = require("tyro", "examples").cli(Args)
    if "REDIF_SCALING_ENVS" in os.environ:  # started by `run`
        measure(given, int(os.environ["REDIF_SCALING_ENVS"]))
    else:
        main(given)
