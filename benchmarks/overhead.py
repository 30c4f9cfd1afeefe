"""How much rollouts and updates cost beyond the bare network: `make bench`.

Bare and full work alternate in one run, on the same batches, and the table gives the median of the
ratios of neighbouring measurements: absolute times drift on a shared machine, ratios do not.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from tqdm.auto import trange

from agents import ReDiFPPO
from agents.sharing import in_rollout
from redif_env import ReDiFVectorEnv, TeacherBank, load_teacher
from redif_env.errors import require


@dataclasses.dataclass
class Args:
    """Measure rollout and update against the bare network."""

    num_envs: int = 256
    """Trajectories of a rollout."""
    num_steps: int = 4
    """Steps of a trajectory."""
    batch_size: int = 256
    """Transitions of a minibatch."""
    repeats: int = 7
    """Alternations of bare and full work."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to measure."""
    out: Path | None = None
    """JSON file to write."""


class NoCallback(BaseCallback):
    """Nothing, so that only the library is measured."""

    def _on_step(self) -> bool:
        return True


def make_model(args: Args) -> ReDiFPPO:
    """A student of the bundled teacher with one rollout behind it."""
    teacher = load_teacher(device=args.device)
    env = ReDiFVectorEnv(
        args.num_envs,
        teacher,
        num_steps=args.num_steps,
        schedule="uniform",
        group_size=2,
        bank=TeacherBank.build(teacher, 256),
    )
    model = ReDiFPPO("StudentPolicy", env, batch_size=args.batch_size, n_epochs=1, seed=0)
    model.set_logger(configure(None, []))
    model.learn(args.num_envs * args.num_steps)
    return model


def bare_rollout(model: ReDiFPPO) -> None:
    """The forwards of a rollout, each state once, and nothing else."""
    buffer: Any = model.rollout_buffer
    with torch.no_grad():
        for step in range(model.n_steps):
            obs = {name: rows[step] for name, rows in observations(buffer).items()}
            shared = in_rollout(model._turns, step, buffer.same)
            if shared is not None:
                obs = {name: rows[shared.asked] for name, rows in obs.items()}
            call_network(model, obs)


def bare_update(model: ReDiFPPO) -> None:
    """The forwards and backwards of an update, each state once, and nothing else."""
    for batch in model.rollout_buffer.get(model.batch_size):
        obs = {name: rows[:: batch.same] for name, rows in batch.observations.items()}
        call_network(model, obs).square().mean().backward()


def call_network(model: ReDiFPPO, obs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The student's network itself, without denoiser, policy or distribution."""
    times = obs["timestep"].flatten() * 1000
    return model.policy.denoiser.network(obs["latents"], times, obs["condition"]).sample


def observations(buffer: Any) -> dict[str, torch.Tensor]:
    """The rollout's observations, `(T, N, ...)` each."""
    return {name: buffer[f"observation/{name}"] for name in ("latents", "timestep", "condition")}


def rollout(model: ReDiFPPO) -> None:
    """A rollout as `learn` makes it."""
    callback = NoCallback()
    callback.init_callback(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def seconds(work: Callable[[ReDiFPPO], None], model: ReDiFPPO) -> float:
    """Wall-clock time, with the device's queue empty before and after."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work(model)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(args: Args) -> dict[str, float]:
    """Measure, print the table, and return it."""
    model = make_model(args)
    pairs = {"rollout": (rollout, bare_rollout), "update": (ReDiFPPO.train, bare_update)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in trange(args.repeats, desc="measuring"):
        for name, (full, bare) in pairs.items():
            before, middle, after = seconds(bare, model), seconds(full, model), seconds(bare, model)
            times[name].append((middle, (before + after) / 2))
    result = {}
    print(f"{'':10}{'full, s':>10}{'bare, s':>10}{'ratio':>8}   median of {args.repeats}")
    for name, measured in times.items():
        full_s, bare_s = (statistics.median(column) for column in zip(*measured, strict=True))
        ratio = statistics.median(full / bare for full, bare in measured)
        result[name] = ratio
        print(f"{name:10}{full_s:10.3f}{bare_s:10.3f}{ratio:8.3f}")
    print(f"{args}, {model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.out is not None:
        args.out.write_text(json.dumps({"ratios": result, "args": vars(args)}, default=str) + "\n")
    return result


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
