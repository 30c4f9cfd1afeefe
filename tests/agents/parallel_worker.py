"""What one of two processes does in `test_parallel.py`: `python parallel_worker.py FOLDER`, and
`python parallel_worker.py FOLDER parts` for students that are held in parts.

Each leaves what it did in the folder, `NAME-RANK.pt`, for the test to compare. At the end the
second one is killed in the middle of a run.
"""

import contextlib
import copy
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_runs
import torch
from small_runs import At, Killed, die
from small_world import GRID, PLAIN_EXPLORATION, OnRolloutEnd
from tiny_models import FAMILIES

from agents import ReDiFPPO
from agents.distillation import Distillation
from agents.policies import enable_gradient_checkpointing
from agents.ppo import RatioError
from agents.resuming import Interrupted, agent_state, random_state
from agents.sharding import is_part, shard, whole
from redif_env import ReDiFVectorEnv, TeacherBank, load_teacher, parallel

NUM_ENVS, GROUP, BANK = 16, 4, 24
IN_PARTS = "parts"
RUN: dict[str, Any] = {"warm_up": 2, "gap_fraction": 0.5, "batch_size": 4}
# Agents of all kinds of advantage, and of parts of a minibatch.
CASES: dict[str, dict[str, Any]] = {
    "group": {},
    "micro": {"micro_batch_size": 3, "divergence": "kl"},
    "batch": {"advantage": "batch", "credit": "global", "local_weight": 1.0, **PLAIN_EXPLORATION},
    "task": {"advantage": "task", "local_weight": 0.5, **PLAIN_EXPLORATION},
    "critic": {"advantage": "gae", "credit": "global", **PLAIN_EXPLORATION},
    "sharded": {
        "micro_batch_size": 3,
        "divergence": "kl",
        "policy_kwargs": {"shard_student": True, "gradient_checkpointing": True},
    },
    "map": {"advantage": "gae", "local_weight": 0.5, **PLAIN_EXPLORATION},
}


def make_env(**changes: Any) -> ReDiFVectorEnv:
    teacher = load_teacher("digits", num_steps=2)
    settings: dict[str, Any] = {"schedule": GRID, "group_size": GROUP, "seed": 0}
    settings |= {"shard": parallel.shard(), "bank": TeacherBank.build(teacher, BANK)}
    return ReDiFVectorEnv(NUM_ENVS, teacher, **{**settings, **changes})


def make_agent(env: ReDiFVectorEnv | None = None, **changes: Any) -> ReDiFPPO:
    """An agent whose update is its plain gradient, of all transitions at once, and moves nothing.

    Exploration is strong: rounding of a mean is divided by its std squared.
    """
    settings: dict[str, Any] = {
        "learning_rate": 0.0,
        "batch_size": 10**6,
        "n_epochs": 1,
        "eta": 0.0,
        "min_std": 0.3,
        "gap_fraction": None,
        "max_grad_norm": 1e9,
        "seed": 0,
    }
    return ReDiFPPO("StudentPolicy", env or make_env(), **{**settings, **changes})


def learn(model: ReDiFPPO, iterations: int, callback: Any = None) -> ReDiFPPO:
    return model.learn(iterations * NUM_ENVS * len(GRID), callback=callback)


def in_double(model: ReDiFPPO) -> ReDiFPPO:
    """The agent with a student that sums gradients in float64: float32 differs by 1e-6 with the
    order of rows.
    """
    policy = model.policy
    for denoiser in (policy.denoiser, policy.ema_denoiser, policy.reference_denoiser):
        if denoiser is not None:
            denoiser.network.double()
    return model


def gradients(model: ReDiFPPO) -> dict[str, torch.Tensor]:
    """Of what the optimiser holds, by name."""
    weights = model.policy.named_parameters()
    return {n: whole(p.grad).clone() for n, p in weights if p.grad is not None}


def elements(model: ReDiFPPO) -> dict[str, int]:
    """How many elements of weights, averages, gradients and moments this process holds."""
    policy = model.policy
    trained = list(policy.denoiser.network.parameters())
    held = {
        "weights": trained,
        "average": list(policy.ema_denoiser.network.parameters()),
        "gradients": [weight.grad for weight in trained],
        "moments": [policy.optimizer.state[weight]["exp_avg"] for weight in trained],
        "start": model._start,
    }
    local = {n: [t.to_local() if is_part(t) else t for t in each] for n, each in held.items()}
    return {name: sum(t.numel() for t in each) for name, each in local.items()}


def keep(folder: Path, name: str, content: Any) -> None:
    torch.save(content, folder / f"{name}-{parallel.rank()}.pt")


def two_rollouts(folder: Path, name: str) -> None:
    """Two rollouts of one student, and the averaged gradient of the second."""
    model = in_double(make_agent(**CASES[name]))
    rollouts = []

    def remember(model: ReDiFPPO) -> None:
        rollouts.append({n: value.clone() for n, value in model.rollout_buffer._store.items()})

    learn(model, 2, OnRolloutEnd(remember))
    last = model._values(model._last_obs).detach(), model._last_episode_starts
    content = {"rollouts": rollouts, "last": last, "gradients": gradients(model)}
    keep(folder, name, {**content, "policy": model.policy.state_dict()})


def tasks(folder: Path) -> None:
    """The tasks of three episodes, of which two end by themselves."""
    env = make_env()
    _, infos = env.reset(seed=3)
    seen = [infos["task"]]
    for step in range(2 * len(GRID)):
        *_, infos = env.step(torch.zeros(env.action_space.shape))
        seen += [infos["task"]] if (step + 1) % len(GRID) == 0 else []
    _, infos = env.reset()
    keep(folder, "tasks", [*seen, infos["task"]])


def train(folder: Path, name: str, env: ReDiFVectorEnv, **options: Any) -> None:
    """Three iterations in minibatches, with everything that is decided from numbers."""
    decides = {"target_kl": 0.02, "adaptive_lr": True, "gap_fraction": 0.5, "min_std": 0.01}
    length = {"learning_rate": 2e-4, "batch_size": 8, "n_epochs": 3, "max_grad_norm": 0.5}
    model = make_agent(env, **{**decides, **length, **options})
    log = folder / f"log-{name}-{parallel.rank()}"
    model.tensorboard_log = str(log) if parallel.is_main() else None
    learn(model, 3)
    model.save(folder / f"{name}-saved.zip")
    keep(
        folder,
        name,
        {
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "updates": model.updates,
            "n_updates": model._n_updates,
            "num_timesteps": model.num_timesteps,
            "lr_divisor": model.lr_divisor.coefficient,
            "gap": float(model._gap),
            "error": model._error,
            "student_rows": model.rollout_buffer.student_rows,
            "noise": model.rollout_buffer["actions"],
            "reward": model.ep_info_buffer[-1]["r"],
            "rewards": model.rollout_buffer.episode_returns(),
            "order": model.rollout_buffer.order.get_state(),
        },
    )


def no_finite_loss(folder: Path) -> None:
    """The second process alone has an advantage of NaN: nobody takes the step."""

    def spoil(model: ReDiFPPO) -> None:
        if parallel.rank() == 1:
            model.rollout_buffer["advantages"][0, 0] = torch.nan

    model = make_agent(learning_rate=1e-3, gap_fraction=None)
    before = model.policy.state_dict()["denoiser.network.conv_in.weight"].clone()
    learn(model, 1, OnRolloutEnd(spoil))
    after = model.policy.state_dict()["denoiser.network.conv_in.weight"]
    moved = not torch.equal(before, after)
    keep(folder, "finite", {"skipped": model.updates_skipped, "moved": moved})


def wrong_ratio(folder: Path) -> None:
    """The second process alone does not see the policy that acted: all stop."""

    def spoil(model: ReDiFPPO) -> None:
        if parallel.rank() == 1:
            model.rollout_buffer["mean"].add_(0.5)

    try:
        learn(make_agent(), 1, OnRolloutEnd(spoil))
        message = ""
    except RatioError as error:
        message = str(error)
    keep(folder, "ratio", message)


def whole_run(
    folder: Path,
    name: str,
    at: int = 0,
    action: Callable[[], Any] = die,
    resume: bool = False,
    **changes: Any,
) -> Distillation:
    """Distil a small teacher, and do something after a rollout; see `small_runs`."""
    callback = At(at, action)
    return small_runs.run(
        folder / "teacher", folder / name, resume=resume, callback=callback, **RUN, **changes
    )


def outcome(run: Distillation) -> dict[str, Any]:
    """All that training has led to in a process, without what depends on the clock."""
    state = agent_state(run.model)
    state["episodes"] = [{key: e[key] for key in ("r", "l")} for e in state["episodes"]]
    report = {key: value for key, value in run.report.items() if "seconds" not in key}
    return {"agent": state, "random": random_state(), "report": report}


def interrupted_runs(folder: Path) -> None:
    """A run that nothing interrupts, and others that go on after what did."""
    keep(folder, "straight", outcome(whole_run(folder, "straight")))

    with contextlib.suppress(Killed):
        whole_run(folder, "died", 4)
    keep(folder, "died", outcome(whole_run(folder, "died", resume=True)))

    def signalled() -> None:
        if parallel.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    try:
        whole_run(folder, "signalled", 3, signalled)
    except Interrupted as error:
        keep(folder, "code", error.code)
    keep(folder, "signalled", outcome(whole_run(folder, "signalled", resume=True)))

    # One that a single process has begun.
    keep(folder, "alone", outcome(whole_run(folder, "alone", resume=True)))


def be_killed(folder: Path) -> None:
    """The second process dies in the fourth iteration of a run that saves every second one."""

    def kill() -> None:
        if parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    whole_run(folder, "killed", 4, kill)


def runs_in_parts(folder: Path) -> None:
    """A run of which each process holds a part of the student, and one that went on."""
    keep(folder, "straight", outcome(whole_run(folder, "straight")))
    run = whole_run(folder, "parts", shard_student=True)
    keep(folder, "parts", outcome(run))
    keep(folder, "elements", elements(run.model))
    run.model.save(folder / "parts.zip")
    with contextlib.suppress(Killed):
        whole_run(folder, "died in parts", 4, shard_student=True)
    resumed = whole_run(folder, "died in parts", resume=True, shard_student=True)
    keep(folder, "died in parts", outcome(resumed))


def families_in_parts(folder: Path) -> None:
    """The averaged gradients of each family's network, whole and in parts."""
    for name, family in FAMILIES.items():
        if parallel.is_main():
            family.make().save_pretrained(folder / name)
        parallel.check_same("family", name)
        options = {"num_steps": family.num_steps, **family.options}
        denoiser = load_teacher(folder / name, **options).denoiser
        denoiser.network.float().requires_grad_(True)
        parts = copy.deepcopy(denoiser)
        enable_gradient_checkpointing(parts.network)
        shard(parts.network)
        noise = torch.Generator().manual_seed(parallel.rank())
        rows = denoiser.initial_noise(3, noise), torch.tensor([100.0, 300.0, 500.0])
        condition = denoiser.initial_condition(3, noise)
        for each in (denoiser, parts):
            each(*rows, condition).square().mean().backward()
        parallel.average_gradients(denoiser.network.parameters(), {})
        found = [
            {n: whole(w.grad) for n, w in each.network.named_parameters() if w.grad is not None}
            for each in (denoiser, parts)
        ]
        keep(folder, f"family {name}", found)


def main(folder: Path, in_parts: bool) -> None:
    torch.set_num_threads(1)
    parallel.start("cpu")
    if in_parts:
        runs_in_parts(folder)
        families_in_parts(folder)
        keep(folder, "done", None)
        return
    keep(folder, "bank", make_env().bank.teacher_x_0)
    tasks(folder)
    for name in CASES:
        two_rollouts(folder, name)
    train(folder, "trained", make_env())
    free = make_env(schedule="free", num_steps=len(GRID), min_steps=len(GRID), group_size=2)
    train(folder, "learned", free)
    no_finite_loss(folder)
    wrong_ratio(folder)
    interrupted_runs(folder)
    keep(folder, "done", None)
    be_killed(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == [IN_PARTS])
