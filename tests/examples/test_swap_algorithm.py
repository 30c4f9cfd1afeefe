"""Unmodified algorithms by name: each runs, starts where it should, and is counted fairly."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN

from agents import make_sb3_env
from benchmarks import algorithms
from examples import swap_algorithm
from examples.swap_algorithm import ALGORITHMS, SCHEDULE, Args
from redif_env import baseline_returns, load_teacher
from redif_env.errors import InvalidArgumentError

NUM_ENVS = 8
PAIRS = [(name, variant) for name, recipe in ALGORITHMS.items() for variant in recipe.variants]
SQUASHED = ["SAC", "TQC", "CrossQ", "TD3", "DDPG"]
TINY = {"n_steps": 4, "batch_size": 16, "n_epochs": 1, "learning_starts": 16, "gradient_steps": 1}


@pytest.fixture
def tiny(monkeypatch, teacher):
    """A fast teacher, and batches as small as they get; nothing else of the table changes."""
    monkeypatch.setattr(swap_algorithm, "load_teacher", lambda *args, **kwargs: teacher)
    for name, recipe in ALGORITHMS.items():
        smaller = {key: TINY.get(key, value) for key, value in recipe.options.items()}
        monkeypatch.setitem(ALGORITHMS, name, dataclasses.replace(recipe, options=smaller))


def small(**changes):
    settings = {"total_timesteps": 64, "num_envs": NUM_ENVS, "width": 8, "bank_size": 32}
    return Args(**{**settings, "num_held_out": 32, **changes})


@pytest.fixture
def make_env(teacher, bank):
    """Makes the environment of an algorithm; any argument can be replaced."""

    def build(name, num_envs=NUM_ENVS, **changes):
        recipe = ALGORITHMS[name]
        variant = recipe.variants[0]
        options = swap_algorithm.env_options(variant, recipe.scale, teacher, Args())
        settings = {**options, "observation": recipe.observation, "bank": bank, **changes}
        return make_sb3_env(num_envs, variant, **settings)

    return build


def make(name, env, **changes):
    return swap_algorithm.make_model(ALGORITHMS[name], env, small(**changes))


# Every algorithm


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_every_algorithm_runs_unmodified(tiny, monkeypatch, capsys, name, variant):
    made = []

    def remember(*arguments):
        model = make_model(*arguments)
        made.append((model, [p.clone() for p in model.policy.parameters()]))
        return model

    make_model = swap_algorithm.make_model
    monkeypatch.setattr(swap_algorithm, "make_model", remember)
    row = swap_algorithm.main(small(algo=name, variant=variant, seed=3))

    assert json.loads(capsys.readouterr().out) == row
    assert (row["algorithm"], row["variant"], row["seed"]) == (name, variant, 3)
    assert row["baseline_return"] < 0
    assert row["final_return"] < 0
    ((model, before),) = made
    module, _, kind = ALGORITHMS[name].path.rpartition(".")
    assert type(model) is getattr(importlib.import_module(module), kind)
    after = list(model.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(bool(p.isfinite().all()) for p in after)


def test_the_table_has_what_was_promised():
    wanted = "PPO A2C SAC TD3 DDPG DQN TRPO RecurrentPPO MaskablePPO TQC CrossQ QR-DQN ARS"
    assert sorted(ALGORITHMS) == sorted(wanted.split())
    assert all(recipe.why for recipe in ALGORITHMS.values())
    plain = [dict(recipe.options) for recipe in ALGORITHMS.values()]
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"algo": "sac"}, "algo='sac'.*'SAC'"),
        ({"algo": "DQN", "variant": "residual"}, "variant='residual'.*'schedule'"),
        ({"algo": "SAC", "variant": "schedule"}, "variant='schedule'.*'residual'"),
        ({"algo": "PPO", "variant": "joint"}, "variant='joint'"),
        ({"algo": "TD3", "total_timesteps": 5000}, "total_timesteps=5000: pass more than the 5000"),
        ({"total_timesteps": 0}, "total_timesteps=0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    monkeypatch, changes, match
):
    monkeypatch.setattr(swap_algorithm, "load_teacher", None)
    with pytest.raises(InvalidArgumentError, match=match):
        swap_algorithm.main(Args(**changes))


@pytest.mark.parametrize(("algo", "match"), [("PPO", "num_steps=0"), ("DQN", "min_steps=0")])
def test_no_steps_are_refused(tiny, algo, match):
    with pytest.raises(InvalidArgumentError, match=match):
        swap_algorithm.main(small(algo=algo, num_steps=0))


# Where they start, and how they explore


@pytest.mark.parametrize("name", [*SQUASHED, "ARS"])
def test_residual_algorithms_start_at_the_baseline(make_env, name):
    env = make_env(name, num_envs=32)
    model = make(name, env)
    wanted = float(baseline_returns(env.env).mean())
    assert swap_algorithm.held_out_return(model, env) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", SQUASHED)
def test_without_our_start_they_would_not(make_env, monkeypatch, name):
    """Negative control."""
    monkeypatch.setattr(swap_algorithm, "start_at_zero", lambda model, std: None)
    env = make_env(name, num_envs=32)
    wanted = float(baseline_returns(env.env).mean())
    assert abs(swap_algorithm.held_out_return(make(name, env), env) - wanted) > 1e-3


@pytest.mark.parametrize("name", ["PPO", "A2C", "TRPO", "RecurrentPPO"])
def test_on_policy_algorithms_start_near_the_baseline(make_env, name):
    """Stable-Baselines3 scales their last layer by 0.01."""
    env = make_env(name, num_envs=32)
    wanted = float(baseline_returns(env.env).mean())
    got = swap_algorithm.held_out_return(make(name, env), env)
    assert got == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", [n for n, recipe in ALGORITHMS.items() if recipe.std])
def test_actions_spread_by_the_std_of_the_table(make_env, name):
    """Of 64 x 64 = 4,096 actions the std is known to 1.1 %; tanh shrinks 0.1 by 1 %."""
    env = make_env(name, num_envs=64)
    model = make(name, env)
    torch.manual_seed(0)
    np.random.seed(0)
    actions, _ = model.predict(env.reset(), deterministic=False)
    if getattr(model, "action_noise", None) is not None:
        actions = actions + np.stack([model.action_noise() for _ in range(64)])
    assert actions.std() == pytest.approx(ALGORITHMS[name].std, rel=0.05)


def test_entropy_of_a_gaussian():
    for std, dim in ((0.1, 64), (2.0, 3)):
        wanted = float(torch.distributions.Normal(0.0, std).entropy()) * dim
        assert swap_algorithm.gaussian_entropy(std, dim) == pytest.approx(wanted, rel=1e-6)
    # what the docstring says of the default target
    assert swap_algorithm.gaussian_entropy(0.089, 64) == pytest.approx(-64, rel=0.005)


def test_the_first_temperature_of_the_table_asks_for_about_its_std():
    """Per element SAC climbs -(scale a)^2 + temperature * entropy over the std of a."""
    recipe = ALGORITHMS["SAC"]
    temperature = float(recipe.options["ent_coef"].removeprefix("auto_"))
    stds = np.linspace(0.01, 1, 1000)
    objective = -((recipe.scale * stds) ** 2) + temperature * np.log(stds)
    assert stds[objective.argmax()] == pytest.approx(recipe.std, rel=0.15)


# Memory


def buffer_nbytes(buffer):
    arrays = []
    for part in (buffer.observations, buffer.next_observations):
        arrays += list(part.values()) if isinstance(part, dict) else [part]
    arrays += [buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts]
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("name", ["SAC", "CrossQ", "DQN"])
def test_the_buffer_fills_the_memory_it_is_given(make_env, name):
    env = make_env(name)
    model = make(name, env, total_timesteps=10**9, replay_gigabytes=1e-3)
    assert 0.98e6 < buffer_nbytes(model.replay_buffer) <= 1e6


def test_a_short_run_gets_a_short_buffer(make_env):
    env = make_env("SAC")
    assert swap_algorithm.replay_size(env, 500, 1.0) == 500
    assert swap_algorithm.replay_size(env, 500, 0.0) == NUM_ENVS


# Judging


class Fixed:
    """A policy whose row i always chooses `actions[i]`."""

    def __init__(self, actions) -> None:
        self.actions = np.asarray(actions)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert deterministic
        return self.actions, state


def test_the_baseline_is_doing_nothing(make_env, bank):
    env = make_env("TD3", num_envs=32, num_steps=2)
    nothing = Fixed(np.zeros((32, 64), np.float32))
    wanted = float(baseline_returns(env.env).mean())
    assert swap_algorithm.held_out_return(nothing, env) == pytest.approx(wanted, rel=1e-6)
    something = Fixed(np.full((32, 64), 0.5, np.float32))
    assert swap_algorithm.held_out_return(something, env) < wanted - 0.1


def test_each_row_counts_its_first_episode_once(make_env, teacher, bank):
    """Rows that end after one, two or three steps, against the single environment."""
    choices = np.array([7, 6, 0, 7, 6, 1])
    steps = {"min_steps": 1, "max_steps": 3}
    env = make_env("DQN", num_envs=6, **steps)
    options = swap_algorithm.env_options(SCHEDULE, 1, teacher, Args())
    single = gym.make("ReDiFSchedule-v0", **{**options, "bank": bank, **steps})
    returns, lengths = [], []
    for task, choice in enumerate(choices):
        single.reset(options={"tasks": [task]})
        ended = False
        while not ended:
            _, reward, ended, _, info = single.step(int(choice))
        returns.append(reward)
        lengths.append(int(info["nfe"]))
    assert len(set(lengths)) == 3
    got = swap_algorithm.held_out_return(Fixed(choices), env)
    assert got == pytest.approx(np.mean(returns), rel=1e-5)


class Masked(Fixed):
    """Takes the last valid time, so that no episode has more than `min_steps` steps."""

    def predict(
        self, observation, state=None, episode_start=None, deterministic=False, action_masks=None
    ):
        self.masks = action_masks
        return action_masks.shape[1] - 1 - action_masks[:, ::-1].argmax(1), state


def test_masks_are_passed_on(make_env):
    env = make_env("MaskablePPO", min_steps=2)
    model = Masked([])
    swap_algorithm.held_out_return(model, env)
    assert model.masks.sum(1).tolist() == [1] * NUM_ENVS


class Remembering(Fixed):
    """Hands its memory on, and notes which rows were told that an episode starts."""

    starts: tuple = ()

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert state == (None if not self.starts else len(self.starts))
        self.starts += (episode_start.tolist(),)
        return self.actions, len(self.starts)


def test_memory_and_starts_are_passed_on(make_env):
    env = make_env("RecurrentPPO", num_steps=3)
    model = Remembering(np.zeros((NUM_ENVS, 64), np.float32))
    swap_algorithm.held_out_return(model, env)
    assert model.starts == ([True] * NUM_ENVS, [False] * NUM_ENVS, [False] * NUM_ENVS)


# Upstream, see docs/upstream.md: when one of these fails, its workaround can go


class Stepped:
    """Counts the rows that an environment was stepped with."""

    def __init__(self, env) -> None:
        self.rows = 0
        self.step_wait = env.step_wait
        env.step_wait = self
        self.num_envs = env.num_envs

    def __call__(self):
        self.rows += self.num_envs
        return self.step_wait()


def test_ars_counts_every_row_once_for_each_row(make_env):
    env = make_env("ARS")
    model = make("ARS", env)
    stepped = Stepped(env)
    candidates = 2 * ALGORITHMS["ARS"].options["n_delta"]
    model.learn(1)
    assert stepped.rows == candidates * NUM_ENVS
    assert model.num_timesteps == stepped.rows * NUM_ENVS


@pytest.mark.parametrize("name", ["ARS", "PPO"])
def test_the_budget_is_what_is_stepped(tiny, make_env, name):
    env = make_env(name)
    model = make(name, env)
    stepped = Stepped(env)
    model.learn(swap_algorithm.budget(model, env, 512))
    assert stepped.rows == 512


def test_dqn_explores_in_all_rows_or_in_none(make_env):
    env = make_env("DQN", num_envs=32)
    model = make("DQN", env)
    assert isinstance(model, DQN)
    model.exploration_rate = 0.5
    np.random.seed(0)
    model.action_space.seed(0)
    observation = env.reset()
    greedy, _ = model.predict(observation, deterministic=True)
    same = [(model.predict(observation)[0] == greedy).mean() for _ in range(40)]
    # An eighth of random choices is greedy too. Row by row, all would be near 9/16.
    assert sum(share == 1 for share in same) > 10
    assert sum(share < 0.5 for share in same) > 10
    assert not [share for share in same if 0.5 <= share < 1]


# Learning


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("PPO", 0.9), ("SAC", 0.9), ("MaskablePPO", 0.83)])
def test_learning(name, most):
    """In 20,000 steps seed 0 gets to 79, 81 and 67 % of the baseline's error; half is asked."""
    args = Args(algo=name, total_timesteps=20_000, bank_size=1024, num_held_out=256)
    row = swap_algorithm.main(args)
    assert row["final_return"] > most * row["baseline_return"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DQN", "QR-DQN"])
def test_q_networks_of_times_find_the_best_fixed_times(name):
    """All 35 grids of 4 out of 8 times are tried; evenly spaced times are 42 % worse."""
    args = Args(algo=name, total_timesteps=20_000, bank_size=1024, num_held_out=256)
    row = swap_algorithm.main(args)
    options = swap_algorithm.env_options(SCHEDULE, 1, load_teacher("digits"), args)
    env = make_sb3_env(256, SCHEDULE, bank_size=256, split="validation", **options)
    returns = []
    for times in itertools.combinations(range(7), 3):
        env.set_options({"tasks": np.arange(256)})
        env.reset()
        for choice in (*times, 7):
            _, rewards, ended, _ = env.step(np.full(256, choice))
        assert ended.all()
        returns.append(rewards.mean())
    assert row["final_return"] == pytest.approx(max(returns), rel=1e-5)
    assert max(returns) > 0.8 * row["baseline_return"]


# The benchmark


def test_the_benchmark_resumes_and_tells_lengths_apart(tiny, tmp_path, capsys):
    args = algorithms.Args(
        algorithms=("A2C", "DQN"),
        seeds=(0, 1),
        total_timesteps=32,
        num_envs=NUM_ENVS,
        bank_size=32,
        num_held_out=32,
        out=tmp_path / "new" / "results.json",
    )
    rows = algorithms.main(args)
    names = [(row["algorithm"], row["variant"], row["seed"]) for row in rows]
    first = [("A2C", "residual"), ("A2C", "schedule"), ("DQN", "schedule")]
    assert names == [(*pair, seed) for seed in (0, 1) for pair in first]
    assert capsys.readouterr().out.count("| A2C | 2 |") == 2
    written = args.out.stat().st_mtime_ns
    assert algorithms.main(args) == rows == json.loads(args.out.read_text())
    assert args.out.stat().st_mtime_ns == written
    longer = algorithms.main(dataclasses.replace(args, algorithms=("DQN",), total_timesteps=40))
    assert [row["total_timesteps"] for row in longer] == [40, 40]


def test_the_table_compares_with_the_baseline():
    rows = [
        {"algorithm": name, "variant": "residual", "baseline_return": -10.0, "final_return": value}
        | {"seconds": 7.0}
        for name, value in (("PPO", -8.0), ("SAC", -5.0), ("SAC", -7.0))
    ]
    lines = algorithms.table(rows).splitlines()[2:]
    assert lines == [
        "| residual | *baseline* | | -10.000 | 100 | |",
        "| residual | SAC | 2 | -6.000 (-7.000..-5.000) | 60.0 (50.0..70.0) | 7 |",
        "| residual | PPO | 1 | -8.000 | 80.0 | 7 |",
    ]


ROOT = Path(algorithms.__file__).parents[1]


def test_the_documented_table_is_that_of_the_runs():
    rows = algorithms.read(ROOT / algorithms.Args().out)
    runs = [(row["algorithm"], row["variant"], row["seed"]) for row in rows]
    assert sorted(runs) == sorted(
        (*pair, seed) for pair in PAIRS for seed in algorithms.Args().seeds
    )
    assert {row["total_timesteps"] for row in rows} == {algorithms.Args().total_timesteps}
    assert algorithms.table(rows) in (ROOT / "docs" / "algorithms.md").read_text()


def test_every_documented_run_beat_its_baseline():
    rows = algorithms.read(ROOT / algorithms.Args().out)
    assert [row for row in rows if not row["final_return"] > row["baseline_return"]] == []


def test_the_table_replaces_that_of_the_page(tiny, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{algorithms.HEADER}\n|---|\n| old |\n\nafter\n")
    args = algorithms.Args(
        algorithms=("A2C",), seeds=(0,), total_timesteps=32, num_envs=NUM_ENVS, bank_size=32
    )
    args = dataclasses.replace(args, num_held_out=32, out=tmp_path / "results.json", docs=page)
    rows = algorithms.main(args)
    assert page.read_text() == f"before\n\n{algorithms.table(rows)}\n\nafter\n"


def test_a_page_without_a_table_is_refused_before_the_first_run(tmp_path):
    (tmp_path / "page.md").write_text("no table")
    args = algorithms.Args(out=tmp_path / "out" / "r.json", docs=tmp_path / "page.md")
    with pytest.raises(InvalidArgumentError, match=r"docs='no table'.*add a line"):
        algorithms.main(args)
    assert not (tmp_path / "out").exists()


def test_unknown_algorithms_are_refused_before_anything_is_written(tmp_path):
    args = algorithms.Args(algorithms=("PPO", "GRPO"), out=tmp_path / "out" / "r.json")
    with pytest.raises(InvalidArgumentError, match="algorithms='GRPO'"):
        algorithms.main(args)
    assert not (tmp_path / "out").exists()
