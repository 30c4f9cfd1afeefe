"""A run that was interrupted ends bit by bit as one that was not."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import small_runs
import torch
from filelock import FileLock
from small_runs import OPTIONS, At, Killed, die
from small_world import ITERATION
from stable_baselines3.common.callbacks import BaseCallback
from test_checkpoints import same

from agents.checkpoints import Checkpoints, pack, unpack
from agents.online import UpdateReward
from agents.resuming import (
    Interrupted,
    RunFolderError,
    agent_state,
    load_agent_state,
    load_random_state,
    postponed_signals,
    random_state,
)
from redif_env import MSE
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import Discriminator, EnergyDistance

# ---- the agent

CASES = {
    "default": {"gap_fraction": 0.5, "n_epochs": 2, "stochastic_steps": "one"},
    "a running mean of tasks": {"advantage": "task", "env": {"group_size": 1}},
    "a critic": {"advantage": "gae", "policy_kwargs": {"learn_std": True}},
    "penalty and adaptive learning rate": {
        "divergence": "kl",
        "divergence_target": 1e-4,
        "target_kl": 1e-3,
        "adaptive_lr": True,
    },
    "learned times": {"gap_fraction": 0.5, "env": {"schedule": "free", "num_steps": 3}},
    "adapters": {"policy_kwargs": {"lora_rank": 2}},
    "rewards that are trained": {
        "env": {
            "reward": lambda: (
                MSE() + Discriminator((1, 8, 8), 10, batch_size=8) + EnergyDistance(memory=24)
            )
        }
    },
}

FAST = ("default", "learned times", "rewards that are trained")


def slow_unless(case, fast):
    return pytest.param(case, marks=() if case in fast else pytest.mark.slow, id=str(case))


def make_agent(make_env, make_model, case, seed=0):
    options = dict(CASES[case])
    changes = dict(options.pop("env", {}))
    if "reward" in changes:
        changes["reward"] = changes["reward"]()
    return make_model(make_env(**changes), seed=seed, learning_rate=1e-3, **options)


def learn(model, iterations, **options):
    callback = UpdateReward() if model.training_state.terms else None
    return model.learn(iterations * ITERATION, callback=callback, **options)


def stored(model):
    """An agent's state as a checkpoint holds it, without the time that episodes took."""
    state = agent_state(model)
    episodes = [{key: e[key] for key in ("r", "l")} for e in state["episodes"]]
    return unpack(*as_a_file({**state, "episodes": episodes}))


@pytest.mark.parametrize("case", [slow_unless(case, FAST) for case in CASES])
def test_an_agent_goes_on_bit_by_bit(make_env, make_model, case):
    straight = learn(make_agent(make_env, make_model, case), 4)
    generator = torch.get_rng_state()

    model = learn(make_agent(make_env, make_model, case), 2)
    saved = unpack(*as_a_file({"agent": agent_state(model), "random": random_state()}))
    stopped = stored(model)

    resumed = make_agent(make_env, make_model, case, seed=5)  # all of it must come from the state
    load_agent_state(resumed, saved["agent"])
    assert same(stored(resumed), stopped)
    load_random_state(saved["random"])
    learn(resumed, 2, reset_num_timesteps=False)
    assert torch.equal(torch.get_rng_state(), generator)
    ours, theirs = stored(resumed), stored(straight)
    ours["counters"].pop("_current_progress_remaining")
    theirs["counters"].pop("_current_progress_remaining")
    for name in theirs:
        assert same(ours[name], theirs[name]), name
    assert not same(ours["policy"], stopped["policy"])


def as_a_file(state):
    """As a file would give it back: JSON, and tensors that share no memory with the agent's."""
    plain, tensors = pack(state)
    return json.loads(json.dumps(plain)), {name: t.clone() for name, t in tensors.items()}


def test_without_the_random_numbers_it_would_be_another_run(make_env, make_model):
    """Negative control: the test above sees what is left out."""
    straight = learn(make_agent(make_env, make_model, "default"), 3)
    model = learn(make_agent(make_env, make_model, "default"), 2)
    resumed = make_agent(make_env, make_model, "default", seed=5)
    load_agent_state(resumed, unpack(*as_a_file(agent_state(model))))
    learn(resumed, 1, reset_num_timesteps=False)
    assert not same(agent_state(resumed)["policy"], agent_state(straight)["policy"])


def test_rows_in_the_middle_of_their_episodes_go_on(make_env):
    """Of a free schedule, where rows end at different times."""
    generator = torch.Generator().manual_seed(0)
    env, other = (make_env(schedule="free", num_steps=3, seed=seed) for seed in (0, 9))
    env.reset()
    low, high = (torch.as_tensor(bound) for bound in (env.action_space.low, env.action_space.high))
    actions = [low + (high - low) * torch.rand(low.shape, generator=generator) for _ in range(9)]
    actions[0][:3, -1] = -1  # straight to the data
    for action in actions[:4]:
        env.step(action)
    assert len(env.state.step_index.unique()) > 1
    other.load_state_dict(unpack(*as_a_file(env.state_dict())))
    for action in actions[4:]:
        assert same(list(env.step(action)), list(other.step(action)))


def test_every_global_generator_goes_on():
    state = as_a_file(random_state())

    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in "123"]

    first = draws()
    assert draws() != first
    load_random_state(unpack(*state))
    assert draws() == first


# ---- whole runs


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return small_runs.write_teacher(tmp_path_factory.mktemp("teachers") / "one")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def straight(teacher_folder, tmp_path_factory):
    """A run that nothing interrupted, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return small_runs.run(teacher_folder, out, warm_up=2), out


def interrupt(teacher_folder, out, rollout, action, expected, **changes):
    callback = At(rollout, action)
    with pytest.raises(expected) as caught:
        small_runs.run(teacher_folder, out, warm_up=2, callback=callback, **changes)
    return caught.value


def resume(teacher_folder, out, **changes):
    # of the same class as the callback that interrupted: a run remembers it
    callback = At(0, die)
    return small_runs.run(
        teacher_folder, out, resume=True, warm_up=2, **{"callback": callback, **changes}
    )


def assert_same_run(run, out, straight):
    """Weights, averages, optimiser, history, report and exported student, bit for bit."""
    expected, folder = straight
    reports = [
        {key: value for key, value in report.items() if "seconds" not in key}
        for report in (run.report, expected.report)
    ]
    assert same(*reports)
    states = [stored(each.model) for each in (run, expected)]
    for name in states[0]:
        assert same(states[0][name], states[1][name]), name
    exported = [(each / "student").rglob("*.safetensors") for each in (out, folder)]
    for ours, theirs in zip(*map(sorted, exported), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_killed_run_goes_on_from_its_last_checkpoint(teacher_folder, straight, tmp_path):
    out = tmp_path / "run"
    interrupt(teacher_folder, out, 4, die, Killed)
    assert Checkpoints(out / "checkpoints").iterations() == [2]
    assert_same_run(resume(teacher_folder, out), out, straight)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    teacher_folder, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    interrupt(teacher_folder, out, 1, die, Killed)
    assert not Checkpoints(out / "checkpoints").iterations()
    # The cache has vanished meanwhile; and the warm-up is not repeated.
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr("agents.distillation.OutputRegression.train", None)
    assert_same_run(resume(teacher_folder, out), out, straight)


@pytest.mark.parametrize(
    "number", [slow_unless(number, [signal.SIGTERM]) for number in (signal.SIGTERM, signal.SIGINT)]
)
def test_a_signal_finishes_the_iteration_saves_and_exits(
    teacher_folder, straight, tmp_path, number
):
    out, before = tmp_path / "run", signal.getsignal(number)
    with pytest.warns(RuntimeWarning, match=f"{number.name}: saved after iteration 3"):
        error = interrupt(teacher_folder, out, 3, lambda: signal.raise_signal(number), Interrupted)
    assert isinstance(error, SystemExit)
    assert error.code == 128 + number
    assert signal.getsignal(number) is before
    assert Checkpoints(out / "checkpoints").iterations() == [2, 3]
    assert not (out / "student").exists()
    result = resume(teacher_folder, out, checkpoint_every=5, progress=True)
    assert_same_run(result, out, straight)


class Stop(BaseCallback):
    """Stops the first `learn` in the last step of the third rollout."""

    def _on_step(self) -> bool:
        return self.n_calls != 3 * OPTIONS["num_steps"]


def test_a_run_that_a_callback_stops_says_so_and_can_be_resumed(teacher_folder, tmp_path):
    out = tmp_path / "run"
    stopped = small_runs.run(teacher_folder, out, callback=Stop())
    assert stopped.report["trajectories"] == 2 * OPTIONS["num_envs"]
    assert [entry["iteration"] for entry in stopped.report["history"]] == [0, 2]
    assert Checkpoints(out / "checkpoints").iterations() == [2]
    again = small_runs.run(teacher_folder, out, callback=Stop(), resume=True)  # in the fifth
    assert again.report["trajectories"] == 4 * OPTIONS["num_envs"]
    whole = small_runs.run(teacher_folder, out, callback=Stop(), resume=True)
    assert whole.report["trajectories"] == 6 * OPTIONS["num_envs"]
    assert [entry["iteration"] for entry in whole.report["history"]] == [0, 2, 4, 6]


@pytest.fixture
def usual_sigint():
    """Python's own handler: a shell's background processes are born ignoring SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_sigint")
def test_a_second_signal_has_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), postponed_signals() as received:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_can_be_resumed(teacher_folder, straight):
    """Nothing is trained: what was lost after the training is made again."""
    _, out = straight
    (out / "summary.json").unlink()
    result = small_runs.run(teacher_folder, out, warm_up=2, resume=True)
    assert_same_run(result, out, straight)
    assert json.loads((out / "summary.json").read_text()) == result.report


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_full_disk_cost_time_only(
    teacher_folder, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    interrupt(teacher_folder, out, 5, die, Killed)
    checkpoints = Checkpoints(out / "checkpoints")
    assert checkpoints.iterations() == [2, 4]
    os.truncate(checkpoints.path(4) / "tensors.safetensors", 1000)
    write = Checkpoints.write

    def full(self, iteration, state):
        if iteration == 4:
            raise OSError(28, "No space left on device")
        write(self, iteration, state)

    monkeypatch.setattr(Checkpoints, "write", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = resume(teacher_folder, out)
    messages = [str(warning.message) for warning in caught]
    assert any("iteration-0000004" in text and "damaged" in text for text in messages)
    assert any("NOT saved after iteration 4" in text for text in messages)
    assert_same_run(result, out, straight)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-3),
        ("iterations", 7),
        ("seed", 1),
        ("callback", None),
        ("changes", {"decay": False}),
    ],
)
def test_another_configuration_is_refused_by_name(teacher_folder, straight, name, value):
    _, out = straight
    changes = {name: At(0, die) if name == "callback" else value}
    with pytest.raises(RunFolderError) as caught:
        small_runs.run(teacher_folder, out, warm_up=2, resume=True, **changes)
    assert caught.value.argument == name


@pytest.mark.slow
def test_another_teacher_is_refused_and_a_moved_one_is_not(straight, tmp_path, teacher_folder):
    _, out = straight
    other = small_runs.write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(RunFolderError) as caught:
        small_runs.run(other, out, warm_up=2, resume=True)
    assert caught.value.argument == "teacher_fingerprint"
    moved = small_runs.write_teacher(tmp_path / "moved")
    assert_same_run(small_runs.run(moved, out, warm_up=2, resume=True), out, straight)


def test_changed_code_is_told(teacher_folder, straight, monkeypatch):
    monkeypatch.setattr("agents.resuming.source_digest", lambda: "another")
    with pytest.warns(RuntimeWarning, match="changed since the checkpoint was written: source"):
        small_runs.run(teacher_folder, straight[1], warm_up=2, resume=True)


def test_one_process_at_a_time(teacher_folder, straight):
    with FileLock(straight[1] / ".lock"), pytest.raises(RunFolderError, match="another process"):
        small_runs.run(teacher_folder, straight[1], warm_up=2, resume=True)


@pytest.mark.parametrize("out", [None, "missing", "."], ids=["none", "missing", "no run"])
def test_only_a_run_can_be_resumed(teacher_folder, tmp_path, out):
    folder = None if out is None else tmp_path / out
    with pytest.raises(InvalidArgumentError) as caught:
        small_runs.run(teacher_folder, folder, resume=True)
    assert caught.value.argument == ("resume" if out is None else "out")
    assert not list(tmp_path.iterdir())


def test_checkpoints_can_be_left_out(teacher_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    small_runs.run(teacher_folder, out, checkpoint_every=None, iterations=1)
    assert not (out / "checkpoints").exists()
    with pytest.raises(InvalidArgumentError, match="checkpoint_every"):
        small_runs.run(teacher_folder, tmp_path / "other", checkpoint_every=0)


@pytest.mark.slow
def test_another_method_starts_anew_after_its_warm_up(teacher_folder, tmp_path, monkeypatch):
    options = {"method": "output_regression", "warm_up": 2, "iterations": 2, "n_epochs": None}
    expected = small_runs.run(teacher_folder, tmp_path / "straight", **options)
    monkeypatch.setattr("agents.distillation._train_other", lambda *_, **__: die())
    with pytest.raises(Killed):
        small_runs.run(teacher_folder, tmp_path / "run", **options)
    monkeypatch.undo()
    result = small_runs.run(teacher_folder, tmp_path / "run", resume=True, **options)
    for name in ("history", "held_out", "ledger"):
        assert same(result.report[name], expected.report[name])


# ---- slow


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_the_same(teacher_folder, tmp_path, monkeypatch):
    """SIGKILL at random moments of a process, every second time while a file is written.

    A run that ends between two kills is compared, and another one begun.
    """
    changes = {"iterations": 40, "warm_up": 2, "checkpoint_every": 1, "eval_every": 10}
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server imports once for all
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])
    draw = random.Random(0)

    def start(out, kill_at_flush=None):
        arguments = (teacher_folder, out, kill_at_flush, changes)
        process = context.Process(target=small_runs.go_on, args=arguments)
        process.start()
        return process

    start(tmp_path / "straight", 1).join()  # dies at once, with the server's imports done
    began = time.monotonic()
    process = start(tmp_path / "straight")
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began
    kills, finished, reached = 0, 0, Counter()
    while kills < 20 or process.exitcode != 0:
        out = tmp_path / f"run-{finished}"
        writing = kills % 2 == 1
        # a checkpoint is flushed eight times: three files, two folders and their parent, best.json
        process = start(out, draw.randrange(1, 60) if writing and kills < 20 else None)
        process.join(None if writing or kills >= 20 else draw.uniform(0, 0.4) * duration)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert_same_files(out, tmp_path / "straight")
            finished += 1
        else:
            kills += 1
            reached[max(Checkpoints(out / "checkpoints").iterations(), default=0)] += 1
    print(f"{kills} kills in {finished} runs, last checkpoints then: {dict(reached)}")
    assert len(reached) > 5  # at many places


def assert_same_files(out, expected):
    """The students that were written, and the reports but for their seconds."""
    students = list((expected / "student").rglob("*.safetensors"))
    assert students
    for path in students:
        assert (out / path.relative_to(expected)).read_bytes() == path.read_bytes()
    reports = [json.loads((folder / "summary.json").read_text()) for folder in (out, expected)]
    for report in reports:
        del report["seconds"], report["training_seconds"]
    assert reports[0] == reports[1]


class Usage(BaseCallback):
    """Memory, open files and time of each iteration."""

    def _on_training_start(self) -> None:
        self.rows, self.began = [], time.process_time()

    def _on_rollout_end(self) -> None:
        now = time.process_time()
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        handles = len(os.listdir("/proc/self/fd"))
        self.rows.append((pages * os.sysconf("SC_PAGE_SIZE"), handles, now - self.began))
        self.began = now

    def _on_step(self) -> bool:
        return True


@pytest.mark.slow
def test_two_thousand_iterations_take_no_more_memory_files_or_time(teacher_folder, tmp_path):
    usage, out = Usage(), tmp_path / "run"
    options = {"iterations": 2000, "eval_every": 100, "checkpoint_every": 100}
    small_runs.run(teacher_folder, out, callback=usage, **options)
    gc.collect()
    rows = np.array(usage.rows)
    early, late = rows[200:600], rows[-400:]
    memory = [np.median(part[:, 0]) for part in (early, late)]
    seconds = [np.median(part[:, 2]) for part in (early, late)]
    events = sum(path.stat().st_size for path in out.glob("events*"))
    print(f"memory {memory}, seconds {seconds}, handles {rows[-1, 1]}, events {events} bytes")
    assert memory[1] < memory[0] + 20e6
    assert late[:, 1].max() <= early[:, 1].max()
    assert seconds[1] < 1.5 * seconds[0]
    assert events < 5000 * 2000  # a few kilobytes an iteration
    assert len(list((out / "checkpoints").iterdir())) <= 5  # two, the best, its name
    assert len(list(out.glob("events*"))) == 1
