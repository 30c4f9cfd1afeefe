"""What the library costs beyond the bare network, and how that grows: `make bench`.

Neighbours in time are compared: bare work before and after the full work, alternating, all in one
run and on the same batches. The table gives medians of ratios: absolute times drift on a shared
machine, ratios do not.

Larger networks, such as a GPU is for, are of random weights:

    python -m benchmarks.overhead --network pixels --no-growth    # 32x32x3, 36 M parameters
    python -m benchmarks.overhead --network latents --no-growth   # 64x64x4

with 256 environments by default; `--width 8 --num-envs 4` shrinks them for a try anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import trange

from agents import ReDiFPPO, StudentPolicy, TorchVecEnv
from agents.memory import PeakMemory
from agents.policies import copy_of_teacher
from agents.sharing import in_rollout
from benchmarks.plain_loop import PlainLoop
from benchmarks.worlds import WIDTH, make_bank, make_teacher, make_trivial
from redif_env import ReDiFVectorEnv, Teacher, TeacherBank
from redif_env.errors import require

Work = Callable[[], Any]
# As in the published recipes: every step explores and is trained on, alone.
EVERY_STEP: dict[str, Any] = {
    "ratio": "mean",
    "advantage": "batch",
    "credit": "global",
    "stochastic_steps": "all",
    "antithetic": False,
    "gap_fraction": None,
    "eta": 1.0,
    "min_std": 0.02,
}
NUM_COSTS = 3
GROWTH: dict[str, tuple[int, ...]] = {
    "num_envs": (64, 256, 1024, 4096),
    "elements": (64, 1024, 16384, 65536),
    "num_steps": (1, 4, 16),
    "group_size": (2, 4, 16),
}
GROWTH_START = {"num_envs": 64, "elements": 64, "num_steps": 4, "group_size": 2}


@dataclasses.dataclass
class Args:
    """Measure rollout, update, bank and their growth against the bare network."""

    network: str = "digits"
    """`digits`, `pixels` or `latents`."""
    width: int = WIDTH
    """Channels of the latter two."""
    precision: str = "float32"
    """Of the student's network, bare or not: `float32` or `bfloat16`."""
    num_envs: int = 256
    """Trajectories of a rollout."""
    num_steps: int = 4
    """Steps of a trajectory."""
    batch_size: int = 256
    """Transitions of a minibatch."""
    micro_batch_size: int | None = None
    """Of them, how many are in the network at once."""
    compared_envs: int = 32
    """Trajectories that other trainers are compared on."""
    bank_size: int = 16
    """Tasks of the bank that is filled."""
    repeats: int = 5
    """Alternations of bare and full work."""
    growth: bool = True
    """Whether to measure growth, around a trivial network."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to measure."""
    out: Path | None = None
    """JSON file to write."""


class Row(NamedTuple):
    """A line of the table: what is measured, against what, seconds of both, and their ratio."""

    name: str
    against: str
    seconds: float
    against_seconds: float
    ratio: float


class NoCallback(BaseCallback):
    """Nothing, so that only the library is measured."""

    def _on_step(self) -> bool:
        return True


def make_model(
    teacher: Teacher,
    num_envs: int,
    args: Args,
    *,
    num_steps: int | None = None,
    group_size: int = 2,
    **options: Any,
) -> ReDiFPPO:
    """A student of the teacher with one rollout behind it."""
    num_steps = num_steps or args.num_steps
    env = ReDiFVectorEnv(
        num_envs,
        teacher,
        num_steps=num_steps,
        schedule="uniform",
        group_size=group_size,
        bank=make_bank(teacher, 256),
    )
    model = ReDiFPPO(
        "StudentPolicy",
        env,
        batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
        n_epochs=1,
        seed=0,
        policy_kwargs={"precision": args.precision},
        **options,
    )
    return started(model, num_envs * num_steps)


def make_stock(teacher: Teacher, args: Args) -> PPO:
    """Stable-Baselines3's own PPO, through numpy, on the same environment and network."""
    env = ReDiFVectorEnv(
        args.compared_envs,
        teacher,
        num_steps=args.num_steps,
        schedule="uniform",
        bank=make_bank(teacher, 256),
    )
    assert env.timesteps is not None
    policy = {
        "student": copy_of_teacher(teacher, teacher.denoiser.guidance_scale),
        "timesteps": env.timesteps.tolist(),
        "precision": args.precision,
    }
    model = PPO(
        StudentPolicy,
        TorchVecEnv(env),
        learning_rate=1e-5,
        n_steps=args.num_steps,
        batch_size=args.batch_size,
        n_epochs=1,
        seed=0,
        policy_kwargs=policy,
        device=args.device,
    )
    return started(model, args.compared_envs * args.num_steps)


def started(model: Any, transitions: int) -> Any:
    """A model after one iteration, which logs nowhere."""
    model.set_logger(configure(None, []))
    return model.learn(transitions)


def plain_iteration(teacher: Teacher, model: ReDiFPPO, args: Args) -> Work:
    """An iteration of the plain loop, on as many trajectories of the same network."""
    policy: Any = model.policy
    own = make_teacher(args.network, args.width, args.device).denoiser
    own.requires_grad_(True)
    own.autocast = policy.denoiser.autocast
    grid, bank = policy.timesteps, make_bank(teacher, args.compared_envs)
    schedule = own.schedule
    loop = PlainLoop(
        network=own.predict,
        parameters=list(own.network.parameters()),
        timesteps=grid,
        alpha=schedule.alpha(grid),
        sigma=schedule.sigma(grid),
        batch_size=args.batch_size,
    )
    return lambda: loop.iterate(bank.x_T, bank.condition, bank.teacher_x_0)


def bare_rollout(model: ReDiFPPO) -> None:
    """The forwards of a rollout, each state once, and nothing else."""
    buffer: Any = model.rollout_buffer
    with torch.no_grad():
        seen = observations(buffer)
        for step in range(model.n_steps):
            obs = {name: rows[step] for name, rows in seen.items()}
            shared = in_rollout(model._turns, step, buffer.same)
            if shared is not None:
                obs = {name: rows[shared.asked] for name, rows in obs.items()}
            call_network(model, obs)


def bare_update(model: ReDiFPPO) -> None:
    """The forwards and backwards of an update, each state once, and nothing else."""
    for batch in model.rollout_buffer.get(model.batch_size):
        obs = {name: rows[:: batch.same] for name, rows in batch.observations.items()}
        rows = len(obs["latents"])
        for part in torch.arange(rows, device=model.device).split(model.micro_batch_size or rows):
            few = {name: tensor[part] for name, tensor in obs.items()}
            call_network(model, few).square().mean().backward()


def call_network(model: ReDiFPPO, obs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The student's network itself, without denoiser, policy or distribution."""
    denoiser: Any = model.policy.denoiser
    times = obs["timestep"].flatten() * 1000
    with torch.autocast(model.device.type, denoiser.autocast, denoiser.autocast is not None):
        return denoiser.call(denoiser.network, obs["latents"], times, obs.get("condition"))


def observations(buffer: Any) -> dict[str, torch.Tensor]:
    """The rollout's observations, `(T, N, ...)` each."""
    names = ["latents", "timestep"]
    names += ["condition"] if "observation/condition" in buffer._store else []
    return {name: buffer[f"observation/{name}"] for name in names}


def rollout(model: Any) -> None:
    """A rollout as `learn` makes it."""
    callback = NoCallback()
    callback.init_callback(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def iteration(model: Any) -> Work:
    """A rollout and its update."""

    def work() -> None:
        rollout(model)
        model.train()

    return work


def bank_works(teacher: Teacher, num_rows: int) -> tuple[Work, Work]:
    """Filling a bank of so many tasks, and the forwards that it takes."""
    bank, denoiser = make_bank(teacher, num_rows), teacher.denoiser
    t = torch.full((num_rows,), 500.0, device=teacher.device)

    def fill() -> None:
        with tempfile.TemporaryDirectory() as folder:
            TeacherBank.build(teacher, num_rows, batch_size=num_rows, cache_dir=folder)

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(teacher.num_steps):
                denoiser.call(denoiser.network, bank.x_T, t, bank.condition)

    return fill, forwards


def seconds(work: Work, device: str) -> float:
    """How long work takes: the processor's time, which other programs on the machine do not add to.

    On CUDA wall-clock time, with the device's queue empty before and after.
    """
    if not device.startswith("cuda"):
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(
    pairs: dict[tuple[str, str], tuple[Work, Work]], repeats: int, device: str
) -> list[Row]:
    """Each pair's work between two runs of what it is compared with."""
    times: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in trange(repeats, desc="measuring"):
        for name, (full, bare) in pairs.items():
            before, middle, after = (seconds(work, device) for work in (bare, full, bare))
            times[name].append((middle, (before + after) / 2))
    rows = []
    for name, measured in times.items():
        columns = (statistics.median(column) for column in zip(*measured, strict=True))
        rows.append(Row(*name, *columns, statistics.median(a / b for a, b in measured)))
    return rows


def peak_memory(work: Work) -> int:
    """Most bytes of tensors that the work adds, on any device."""
    with PeakMemory() as memory:
        work()
    return memory.peak


def memory_rows(model: ReDiFPPO) -> dict[str, float]:
    """Sizes in units of one latent of every trajectory, and peaks against the bare network's."""
    store = model.rollout_buffer._store  # type: ignore[attr-defined]
    latent = store["actions"][0].numel() * store["actions"].element_size()
    kept = {name: t.numel() * t.element_size() for name, t in store.items()}
    path = kept["actions"] + kept["start"]
    works = {"rollout": (lambda: rollout(model), lambda: bare_rollout(model))}
    works["update"] = (model.train, lambda: bare_update(model))
    result = {
        "states and actions, latents": path / latent,
        "all of the rollout, latents": sum(kept.values()) / latent,
    }
    for name, pair in works.items():
        full, bare = map(peak_memory, pair)
        result |= {f"peak of a {name}, MB": full / 1e6, f"peak of a bare {name}, MB": bare / 1e6}
    return result


def time_by_operation(work: Work, device: str) -> Counter[str]:
    """Microseconds that each of torch's operations takes on the device, without those it calls."""
    cuda = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        work()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    return Counter({each.key: int(getattr(each, name)) for each in profiler.key_averages()})


def cost_rows(model: ReDiFPPO, repeats: int, device: str) -> list[dict[str, Any]]:
    """The dearest operations of a rollout and its update, and the dearest around the network."""

    def bare() -> None:
        bare_rollout(model)
        bare_update(model)

    full, less = Counter[str](), Counter[str]()
    for _ in range(repeats):
        full += time_by_operation(iteration(model), device)
        less += time_by_operation(bare, device)
    around = full - less
    return [
        {"where": where, "operation": name, "share": took / full.total()}
        for where, times in (("all", full), ("around the network", around))
        for name, took in times.most_common(NUM_COSTS)
    ]


def measure_growth(args: Args) -> list[dict[str, Any]]:
    """Time around a trivial network, one quantity after the other grown from `GROWTH_START`."""
    rows = []
    for name, values in GROWTH.items():
        for value in values:
            size = {**GROWTH_START, name: value}
            model = make_model(
                make_trivial(size["elements"], args.device),
                size["num_envs"],
                dataclasses.replace(args, micro_batch_size=None, precision="float32"),
                num_steps=size["num_steps"],
                group_size=size["group_size"],
            )
            times = [
                [seconds(work, args.device) for work in (lambda m=model: rollout(m), model.train)]
                for _ in range(3)
            ]
            rollout_s, update_s = (statistics.median(column) for column in zip(*times, strict=True))
            rows.append({"grown": name, **size, "rollout": rollout_s, "update": update_s})
    return rows


def measure(args: Args) -> dict[str, Any]:
    """All figures, as the JSON file holds them."""
    teacher = make_teacher(args.network, args.width, args.device)
    model = make_model(teacher, args.num_envs, args)
    every = make_model(teacher, args.compared_envs, args, group_size=1, **EVERY_STEP)
    stock, plain = make_stock(teacher, args), plain_iteration(teacher, every, args)
    fill, forwards = bank_works(teacher, args.bank_size)
    network = "bare network"
    pairs: dict[tuple[str, str], tuple[Work, Work]] = {
        ("rollout", network): (lambda: rollout(model), lambda: bare_rollout(model)),
        ("update", network): (model.train, lambda: bare_update(model)),
        ("bank", network): (fill, forwards),
        ("Stable-Baselines3's PPO", "ours, every step"): (iteration(stock), iteration(every)),
        ("plain loop", "ours, every step"): (plain, iteration(every)),
    }
    rows = alternate(pairs, args.repeats, args.device)
    # After updates: the buffer holds a rollout, which bare work goes over.
    bank = make_bank(teacher, args.num_envs)
    policy: Any = model.policy
    deployed = [
        seconds(lambda: policy.sample(bank.x_T, bank.condition), args.device)
        for _ in range(args.repeats)
    ]
    transitions = args.num_envs * args.num_steps
    return {
        "ratios": [row._asdict() for row in rows],
        "rates": {
            "environment steps a second": transitions / rows[0].seconds,
            "student's images a second": args.num_envs / statistics.median(deployed),
            "bank's tasks a second": args.bank_size / rows[2].seconds,
        },
        "memory": memory_rows(model),
        "costs": cost_rows(model, args.repeats, args.device),
        "growth": measure_growth(args) if args.growth else [],
        "machine": {
            "device": torch.cuda.get_device_name() if args.device[:4] == "cuda" else "cpu",
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "args": {name: value for name, value in vars(args).items() if name != "out"},
    }


def show(result: dict[str, Any]) -> None:
    """Print all figures as one table."""
    print(f"\n{'':26}{'against':20}{'s':>9}{'against, s':>12}{'ratio':>8}")
    for row in (Row(**row) for row in result["ratios"]):
        print(f"{row.name:26}{row.against:20}{row.seconds:9.3f}", end="")
        print(f"{row.against_seconds:12.3f}{row.ratio:8.3f}")
    for part in ("rates", "memory"):
        for name, value in result[part].items():
            print(f"{name:46}{value:21.2f}")
    for row in result["costs"]:
        name = f"{row['operation']} ({row['where']})"
        print(f"{name:58}{row['share']:9.1%}")
    for row in result["growth"]:
        name = f"trivial network, {row['grown']} {row[row['grown']]}"
        rate = row["num_envs"] * row["num_steps"] / row["rollout"]
        print(
            f"{name:46}{1e3 * row['rollout']:9.1f} ms rollout{1e3 * row['update']:9.1f} ms update"
            f"{rate:12.0f} steps/s"
        )
    print(result["machine"], result["args"])


def main(args: Args) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    result = measure(args)
    show(result)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return result


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
