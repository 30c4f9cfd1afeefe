"""Going on with a run: all that the rest of training depends on, and when it is written down."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from stable_baselines3.common.callbacks import BaseCallback

from redif_env import mdp, parallel
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.files import replacing, write_json

from . import sharding
from .baselines import Result
from .callbacks import HeldOutEvaluation
from .checkpoints import Checkpoints, DamagedCheckpointError, read, write
from .gathering import broadcast_state, divided_again, gather_states
from .ppo import ReDiFPPO

CONFIG, LOCK = "config.json", ".lock"
CHECKPOINTS, WARM_UP = "checkpoints", "warm-up"
# What may differ when a run is resumed: none of it changes the student. The teacher is compared by
# its fingerprint, wherever its folder is.
FREE_TO_CHANGE = frozenset({"out", "progress", "resume", "checkpoint_every", "teacher", "versions"})
COUNTERS = (
    "num_timesteps",
    "_episode_num",
    "_n_updates",
    "_current_progress_remaining",
    "rollouts",
    "updates",
    "updates_skipped",
    "_skipped_in_a_row",
    "rows_trained",
    "divergence_coef",
    "gap",
)
# Of an agent's state, what each of several processes has for itself.
OWN = ("env", "episode_starts", "network_evaluations")
EXIT_CODE = 128  # plus the number of the signal, as in shells: 143 for SIGTERM, 130 for SIGINT


class RunFolderError(InvalidArgumentError):
    """A run's folder is missing, of another run, or in use by another process."""


class Interrupted(SystemExit):
    """A signal ended training, whose state is saved; the process exits with 128 + its number."""


# ---- the agent


def agent_state(model: ReDiFPPO) -> dict[str, Any]:
    """All that an agent's training depends on, between two iterations.

    Tensors are those of the agent, not copies.
    """
    policy: Any = model.policy
    env: Any = model.env
    buffer: Any = model.rollout_buffer
    return {
        "policy": policy.state_dict(),
        "optimizer": policy.optimizer.state_dict(),
        "exploration": {"eta": policy.eta, "min_std": policy.min_std},
        "network_evaluations": [network.network_evaluations for network in _counting(policy)],
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "gap": model._gap,
        "adaptive": [adaptive.state for adaptive in _adaptive(model)],
        "start": sharding.whole(list(model._start)),
        "training": model.training_state.state_dict(),
        "task_means": [means.state_dict() for means in buffer.task_means],
        "env": env.env.unwrapped.state_dict(),
        "episode_starts": model._last_episode_starts,
        "episodes": list(model.ep_info_buffer or []),
    }


def load_agent_state(model: ReDiFPPO, state: Mapping[str, Any]) -> None:
    """Go on from what `agent_state` returned, in an agent that was made with the same arguments.

    `learn(remaining, reset_num_timesteps=False)` then continues. The global random numbers are not
    the agent's: see `load_random_state`.
    """
    policy: Any = model.policy
    env: Any = model.env
    buffer: Any = model.rollout_buffer
    policy.load_state_dict(state["policy"])
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.eta, policy.min_std = state["exploration"]["eta"], state["exploration"]["min_std"]
    for network, count in zip(_counting(policy), state["network_evaluations"], strict=True):
        network.network_evaluations = count
    for name, value in state["counters"].items():
        setattr(model, name, value)
    model._gap = None if state["gap"] is None else state["gap"].to(model.device)
    for adaptive, saved in zip(_adaptive(model), state["adaptive"], strict=True):
        adaptive.state = saved
    model._start = [
        sharding.part_of(tensor.to(model.device), like)
        for tensor, like in zip(state["start"], model._actor_parameters(), strict=False)
    ]
    model.training_state.load_state_dict(state["training"])
    for means, saved in zip(buffer.task_means, state["task_means"], strict=True):
        means.load_state_dict(saved, model.device)
    base = env.env.unwrapped
    base.load_state_dict(state["env"])
    env._reset_seeds()  # what `learn` would otherwise reset with
    starts = state["episode_starts"]
    if starts is not None:  # else training was stopped inside an episode, and `learn` resets
        model._last_obs = mdp.observation(base.process, base.state)  # type: ignore[assignment]
        model._last_episode_starts = starts.to(model.device)
    model.ep_info_buffer = deque(state["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)  # there is no success


def _counting(policy: Any) -> list[Any]:
    """The networks of a policy whose evaluations are counted."""
    networks = (policy.denoiser, policy.ema_denoiser, policy.reference_denoiser)
    return [network for network in networks if network is not None]


def _adaptive(model: ReDiFPPO) -> list[Any]:
    return [each for each in (model.adaptive_coef, model.lr_divisor) if each is not None]


# ---- random numbers that belong to nobody


def random_state() -> dict[str, Any]:
    """The state of the generators of torch (of all devices in use), numpy and Python."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "python": random.getstate(),
    }


def load_random_state(state: Mapping[str, Any]) -> None:
    """Go on from what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    saved = state["numpy"]
    key = np.array(saved["state"]["key"], np.uint32)
    np.random.set_state({**saved, "state": {**saved["state"], "key": key}})
    random.setstate(state["python"])


def seed_again(model: ReDiFPPO) -> None:
    """Give every generator a state that depends on seed, transitions made, and process alone."""
    seed = parallel.own_seed(model.seed or 0, model.num_timesteps)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class GoOnWithRandomNumbers(BaseCallback):
    """Puts the global generators where they were: `learn` of several processes seeds them.

    Args:
        state: Of `random_state`; None for generators that others than these processes had, in
            whose place these get new ones.
    """

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.state = state

    def _on_training_start(self) -> None:
        model: Any = self.model
        if self.state is None:
            seed_again(model)
        else:
            load_random_state(self.state)

    def _on_step(self) -> bool:
        return True


# ---- when to save


@contextlib.contextmanager
def postponed_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted in the list; a second one of a kind has its usual effect.

    Does nothing outside the main thread, where Python allows no handlers, and leaves signals alone
    that are ignored, as SIGINT is in a shell's background.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in map(int, (signal.SIGTERM, signal.SIGINT)):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SaveCheckpoints(BaseCallback):
    """Save a run between two iterations. It must come before the callbacks whose state it saves.

    Of several processes the first one writes what all have.

    Args:
        checkpoints: Where.
        every: Iterations between two.
        held_out: The run's evaluations: their history is saved, and says which checkpoint is best.
        signals: Where signals to this process are noted: the iteration in progress is finished and
            saved, by all processes.
        about: What is saved beside the training itself, when it is.

    Raises:
        Interrupted: from `learn`, after a signal.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every: int,
        held_out: HeldOutEvaluation,
        signals: list[int],
        about: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.every = every
        self.held_out = held_out
        self.signals = signals
        self.about = about

    def _on_rollout_start(self) -> None:
        done = self._agent.rollouts
        signalled = self._signalled()  # asked by all processes, whether or not it is time
        if signalled or (done and done % self.every == 0):
            self._save()

    def _on_training_end(self) -> None:
        self._save()

    def _on_step(self) -> bool:
        return True

    @property
    def _agent(self) -> ReDiFPPO:
        model: Any = self.model
        return model

    def _signalled(self) -> int:
        """Number of a signal that any process has got, or 0."""
        return parallel.largest(self.signals[0] if self.signals else 0)

    def _save(self) -> None:
        """Save and, after a signal, leave; a full disk ends no training."""
        agent = agent_state(self._agent)
        own = {**{name: agent[name] for name in OWN}, "random": random_state()}
        everyone = gather_states(own) if parallel.world_size() > 1 else [own]
        saved = ""
        if parallel.is_main():
            saved = self._write({"agent": agent, "random": own["random"], "others": everyone[1:]})
        number = self._signalled()
        if number:
            if parallel.is_main():
                text = f"{signal.Signals(number).name}: {saved}; go on with resume=True."
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            raise Interrupted(EXIT_CODE + number)

    def _write(self, training: Mapping[str, Any]) -> str:
        """Write a checkpoint; says whether that was possible."""
        done = self._agent.rollouts
        state = {**self.about(), **training, "history": self.held_out.history}
        try:
            self.checkpoints.write(done, state)
            self.checkpoints.prune(errors(self.held_out.history))
        except OSError as error:
            saved = f"NOT saved after iteration {done}, earlier checkpoints are as they were"
            warnings.warn(f"{saved}: {error}", RuntimeWarning, stacklevel=2)
            return saved
        return f"saved after iteration {done}"


def errors(history: list[dict[str, float]]) -> dict[int, float]:
    """Held-out paired error by iteration."""
    return {int(entry["iteration"]): entry["paired_mse"] for entry in history}


def load_training(
    model: ReDiFPPO, held_out: HeldOutEvaluation, iteration: int, state: Mapping[str, Any]
) -> GoOnWithRandomNumbers:
    """Put agent and evaluations where `SaveCheckpoints` saved them.

    Returns:
        What does so with random numbers, in `learn`.
    """
    own = {**{name: state["agent"][name] for name in OWN}, "random": state["random"]}
    everyone = [own, *state.get("others", [])]
    processes = parallel.world_size()
    if len(everyone) == processes:
        own = everyone[parallel.rank()]
    else:
        own = {**divided_again([{n: each[n] for n in OWN} for each in everyone]), "random": None}
        own["network_evaluations"] = [
            sum(counts) // processes
            for counts in zip(*(each["network_evaluations"] for each in everyone), strict=True)
        ]
    agent = {**state["agent"], **{name: own[name] for name in OWN}}
    counters = agent["counters"]
    rows = counters["rows_trained"] * len(everyone) // processes  # all processes train as many
    load_agent_state(model, {**agent, "counters": {**counters, "rows_trained": rows}})
    held_out.history, held_out.iteration = list(state["history"]), iteration
    return GoOnWithRandomNumbers(own["random"])


@contextlib.contextmanager
def saving(
    model: ReDiFPPO,
    held_out: HeldOutEvaluation,
    folder: Path | None,
    every: int | None,
    resume: bool,
    started: dict[str, float],
    about: Mapping[str, Any],
) -> Iterator[tuple[list[BaseCallback], bool]]:
    """Train inside, with these callbacks first; a resumed run has been put where it was.

    The first process decides where to go on from, reads and writes: only there must be the folder.

    Args:
        model: The agent, ready to train from the start.
        held_out: Its evaluations.
        folder: Of the run; None, in all processes, saves nothing.
        every: Iterations between two checkpoints; None writes none.
        resume: Whether to go on from the last checkpoint, if there is one.
        started: Readings of `time.monotonic` by name, from which time is counted; moved back by the
            time that earlier processes took.
        about: Saved too: `"config"`, and `"code"`, which is compared.

    Yields:
        Callbacks, and whether there was a checkpoint.
    """
    if folder is None:
        yield [], False
        return
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    callbacks: list[BaseCallback] = []
    found = _newest(checkpoints) if resume else None
    if found is not None:
        iteration, state = found
        if parallel.is_main():
            warn_of_changes(state["code"], about["code"])
            warn_of_other_processes(1 + len(state.get("others", [])))
        callbacks = [load_training(model, held_out, iteration, state)]
        for name, seconds in state["seconds"].items():
            started[name] -= seconds
    if every is None:
        yield callbacks, found is not None
        return

    def with_time() -> dict[str, Any]:
        seconds = {name: time.monotonic() - since for name, since in started.items()}
        return {**about, "seconds": seconds}

    with postponed_signals() as signals:
        callbacks += [SaveCheckpoints(checkpoints, every, held_out, signals, with_time)]
        yield callbacks, found is not None
    if parallel.is_main():
        with contextlib.suppress(OSError):  # a full disk has been warned of
            checkpoints.prune(errors(held_out.history))


def _newest(checkpoints: Checkpoints) -> tuple[int, dict[str, Any]] | None:
    """The last whole checkpoint that the first process has, in all processes."""
    return broadcast_state(checkpoints.newest() if parallel.is_main() else None)


def warm_up(
    train: Callable[[], Result], start: Denoiser, folder: Path | None
) -> tuple[Denoiser, int]:
    """The student after its warm-up, and what that cost; from the run's folder, if it is there.

    Each of several processes does all of it, and gets the first one's student. One that was cut
    short starts anew, as it repeats itself.

    Args:
        train: Warms up.
        start: The student before; not changed.
        folder: Of the run, or None.
    """
    path = None if folder is None else folder / CHECKPOINTS / WARM_UP
    state = broadcast_state(_read_warm_up(path) if parallel.is_main() else None)
    if state is not None:
        student = copy.deepcopy(start).eval().requires_grad_(False)
        student.network.load_state_dict(state["student"])
        load_random_state(state["random"])
        return student, state["network_evaluations"]
    result = train()
    state = {
        "student": result.student.network.state_dict(),
        "network_evaluations": parallel.world_size() * result.ledger.total,
        "random": random_state(),
    }
    parallel.broadcast(state["student"].values())
    if path is not None and parallel.is_main():
        try:
            path.parent.mkdir(exist_ok=True)
            write(path, state)
        except OSError as error:
            warnings.warn(f"the warm-up is NOT saved: {error}", RuntimeWarning, stacklevel=2)
    return result.student, state["network_evaluations"]


def _read_warm_up(path: Path | None) -> dict[str, Any] | None:
    """What was saved of a warm-up, if that is whole."""
    if path is None or not path.is_dir():
        return None
    try:
        return read(path)
    except DamagedCheckpointError as error:
        warnings.warn(f"{error} The warm-up starts anew.", RuntimeWarning, stacklevel=2)
        return None


# ---- the folder of a run


def source_digest() -> str:
    """SHA-256 of this project's code."""
    digest = hashlib.sha256()
    for package in (Path(mdp.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def warn_of_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of what may keep a run from going on bit by bit, but does not make it another run."""
    changed = [name for name in now if saved.get(name) != now[name]]
    if changed:
        warnings.warn(
            f"changed since the checkpoint was written: {', '.join(changed)}. Training goes on, "
            "but not bit by bit as it would have.",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_of_other_processes(before: int) -> None:
    """Tell that a checkpoint is of another number of processes, if it is."""
    now = parallel.world_size()
    if before != now:
        warnings.warn(
            f"the checkpoint is of {before} process{'es' * (before > 1)}, and now there "
            f"{'are' if now > 1 else 'is'} {now}: training goes on from it, with other exploration "
            "noise than it would have had.",
            RuntimeWarning,
            stacklevel=2,
        )


def check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to go on in the folder of a run with another configuration, as JSON holds it.

    Raises:
        RunFolderError: naming what differs; or if it is no run's folder.
    """
    try:
        saved = json.loads((folder / CONFIG).read_text())
        saved.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise RunFolderError(
            "out", str(folder), f"it is no folder of a run ({error}): leave out resume."
        ) from error
    for name in sorted(config.keys() - FREE_TO_CHANGE):
        if saved.get(name) != config[name]:
            raise RunFolderError(
                name,
                config[name],
                f"the run in {str(folder)!r} has {saved.get(name)!r}: pass that, or another out.",
            )


@contextlib.contextmanager
def claimed(folder: Path | None, config: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Inside, no other process goes on with the run in this folder, which a new run makes.

    Raises:
        RunFolderError: if another process is working there, or it is of another run.
    """
    if folder is None:
        yield
        return
    if not resume:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:  # a run's folder always has its configuration
            temporary.mkdir()
            write_json(temporary / CONFIG, config)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunFolderError(
            "out", str(folder), "another process is working on this run: wait for it, or stop it."
        ) from error
    try:
        if resume:
            check_same(folder, config)
        yield
    finally:
        lock.release()
