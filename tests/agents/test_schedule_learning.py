"""Times are learned: alone, with the student, or in turn with it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian import MAKE_SOLVER, SHAPE, GaussianNetwork, gaussian_denoiser, gaussian_teacher
from probes import decayed
from scipy import stats
from small_world import ITERATION, NUM_ENVS, OnRolloutEnd, tell_apart, weights
from torch import nn
from tripwire import arm

from agents import ReDiFPPO, ppo
from agents.advantages import group_relative
from agents.schedule_learning import PARTS, choosing_rows
from redif_env import (
    MSE,
    Denoiser,
    ReDiFVectorEnv,
    Teacher,
    TeacherBank,
    mdp,
    schedules,
    transition,
)
from redif_env.errors import InvalidArgumentError
from redif_env.loading import noise_schedule
from redif_env.noise import expand

STEPS = 3
# Choices that are all over the place, so that episodes end at every step.
WILD = {
    "beta": {"kind": "beta", "concentration": 0.5, "adaptive": True, "stop_prob": 0.4},
    "categorical": {"kind": "categorical", "spread": 5.0, "adaptive": True, "candidates": 8},
}


@pytest.fixture
def make_free(make_env, make_model):
    """Makes an agent whose environment leaves the times to it."""

    def make(kind="beta", env_options=None, head=None, **options) -> ReDiFPPO:
        env = make_env(schedule="free", num_steps=STEPS, **(env_options or {}))
        head = WILD[kind] if head is None else head
        return make_model(env, policy_kwargs={"schedule_head": head}, **options)

    return make


def rollout(model: ReDiFPPO, look) -> None:
    """Calls `look(model)` between the first rollout and its update."""
    model.learn(ITERATION, callback=OnRolloutEnd(look))


def test_the_log_prob_of_a_joint_action_by_hand(make_free):
    model = make_free()
    policy, env = model.policy, model.env.env
    obs, _ = env.reset(seed=0)
    with torch.no_grad():
        actions = policy.get_distribution(obs).sample()
        _, log_prob, _ = policy.evaluate_actions(obs, actions)
        x0_pred = policy.denoiser(obs["latents"], env.state.t, obs["condition"])
    raw = policy.schedule_head.table[1].detach()
    mode, k = float(raw[0].sigmoid()), float(torch.nn.functional.softplus(raw[1]))
    choice = actions[:, -1]
    beta = stats.beta(1 + k * mode, 1 + k * (1 - mode), loc=-1, scale=2)
    odds = float(raw[2].sigmoid())
    stops = choice == -1
    assert 0 < stops.sum() < len(stops)
    chosen = np.where(stops, math.log(odds), math.log(1 - odds) + beta.logpdf(choice))
    s = schedules.decode_choice(choice, env.state.t, policy.denoiser.schedule)
    mean, std = transition.exploration(
        policy.denoiser.schedule, obs["latents"], x0_pred, env.state.t, s, 0.1, 0.02
    )
    step = stats.norm(mean.flatten(1), std.flatten(1).expand(-1, 64))
    expected = chosen + step.logpdf(actions[:, :-1]).sum(1)
    torch.testing.assert_close(log_prob.double(), torch.as_tensor(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("trained", PARTS)
@pytest.mark.parametrize("kind", WILD)
def test_every_row_is_credited_with_its_own_first_episode(make_free, kind, trained):
    """Replayed row by row from the stored actions; episodes end at different steps."""

    def look(model) -> None:
        process, bank = model.env.env.process, model.env.env.bank
        buffer = model.rollout_buffer
        returns, running = buffer.episode_returns()[0], buffer["running"]
        lengths.append(running.sum(0))
        for row in range(NUM_ENVS):
            state = mdp.initial(process, bank, torch.tensor([0]))
            x_T, condition = (buffer[f"observation/{n}"][0, row] for n in ("latents", "condition"))
            task = (bank.x_T == x_T).flatten(1).all(1).nonzero()[0]
            state = mdp.initial(process, bank, task)
            first = buffer["observation/timestep"][0, row] * process.schedule.num_train_timesteps
            state = mdp.replace(state, t=process.schedule.snap(first))
            assert state.condition == condition
            for step in range(int(running[:, row].sum())):
                torch.testing.assert_close(buffer["observation/latents"][step, row], state.x_t[0])
                state = mdp.transition(process, state, buffer["actions"][step, row][None])
            assert mdp.terminal(process, state)
            reward, reward_map = mdp.reward(process, state)
            torch.testing.assert_close(returns[row], reward[0])
            if buffer.student_rows:
                stored = buffer["reward_map"][0, row]
                torch.testing.assert_close(stored, reward_map[0], rtol=1e-4, atol=1e-5)

    lengths: list[torch.Tensor] = []
    torch.manual_seed(0)
    model = make_free(kind, {"step_cost": 0.01}, trained=trained)
    model.learn(4 * ITERATION, callback=OnRolloutEnd(look))
    if trained != "student":
        assert len(torch.cat(lengths).unique()) > 1


def test_only_running_rows_that_explored_are_trained_on(make_free):
    """Rows that explore times are not the student's, and the other way round."""

    def look(model) -> None:
        buffer, half = model.rollout_buffer, NUM_ENVS // 2
        assert buffer.student_rows == half
        rows = buffer._stochastic_rows()
        assert (rows % NUM_ENVS < half).all()
        assert buffer["running"].flatten()[rows].all()
        counts = sum(int(r["counts"].sum()) for r in model._choices._records)
        batches = list(model._choices.batches(buffer.episode_returns(), 4, None, 100, buffer.order))
        assert counts == sum(len(batch.choice) for batch in batches)
        own = group_relative(buffer.episode_returns()[:, half:], 4)[0]
        (everything,) = batches
        # the first times, and those of steps that were still to be made and not forced
        assert counts == half + int(buffer["running"][:-1, half:].sum())
        left = everything.observations["steps_left"].flatten()
        torch.testing.assert_close(  # in some order; the first times are chosen in every row
            everything.advantages[left > 1].sort().values, own.sort().values
        )
        assert left.min() > 1.5 / STEPS  # forced last steps are no choices
        checked.append(len(rows))

    checked: list[int] = []
    rollout(make_free(trained="both", stochastic_steps="all", antithetic=False), look)
    assert checked


@pytest.mark.parametrize(
    ("trained", "iteration", "rows"),
    [
        ("student", 1, 0),
        ("schedule", 0, 12),
        ("both", 0, 4),
        ("alternating", 0, 0),
        ("alternating", 1, 12),
    ],
)
def test_how_many_rows_draw_their_times(trained, iteration, rows):
    """Three groups of four: whole groups only."""
    assert choosing_rows(trained, iteration, 12, 4) == rows


@pytest.mark.parametrize(
    ("num_envs", "group_size", "options"),
    [(4, 4, {}), (2, 2, {}), (1, 1, {"advantage": "batch", "antithetic": False})],
)
def test_a_single_group_cannot_explore_both(make_env, make_model, num_envs, group_size, options):
    """No row would be left to draw times: they would stay as they were, without a word."""
    env = make_env(num_envs, schedule="free", num_steps=STEPS, group_size=group_size)
    for trained in ("both", None):  # which is the default
        with pytest.raises(InvalidArgumentError, match=f"both.*num_envs >= {2 * group_size}"):
            make_model(env, trained=trained, **options)
    make_model(env, trained="alternating", **options)
    pair, single = (
        make_env(2 * group_size, schedule="free", num_steps=STEPS, group_size=size)
        for size in (group_size, 2 * group_size)
    )
    model = make_model(pair, trained="both", **options)
    with pytest.raises(InvalidArgumentError, match="both"):
        model.set_env(single)


@pytest.mark.parametrize("trained", PARTS)
def test_only_what_is_trained_changes(make_free, trained):
    model = make_free(trained=trained, head={"kind": "beta"})
    policy = model.policy

    def state():
        head = torch.cat([p.detach().flatten() for p in policy.schedule_head.parameters()])
        network = torch.cat([p.detach().flatten() for p in policy.denoiser.network.parameters()])
        return head.clone(), network.clone()

    before = state()
    model.learn(ITERATION)
    changed = [not torch.equal(a, b) for a, b in zip(before, state(), strict=True)]
    expected = {"student": [False, True], "schedule": [True, False], "both": [True, True]}
    assert changed == expected.get(trained, [False, True])
    if trained == "alternating":
        before = state()
        model.learn(ITERATION, reset_num_timesteps=False)
        changed = [not torch.equal(a, b) for a, b in zip(before, state(), strict=True)]
        assert changed == [True, False]


def test_a_policy_that_does_not_see_what_it_chose_is_refused(make_free):
    def spoil(model) -> None:
        with torch.no_grad():
            model.policy.schedule_head.table += 0.5

    with pytest.raises(ppo.RatioError):
        rollout(make_free(trained="schedule", head={"kind": "beta"}), spoil)


@pytest.mark.parametrize("kind", WILD)
def test_what_is_saved_goes_on_as_what_was_not(make_free, make_env, tmp_path, kind):
    model = make_free(kind, trained="both")
    model.learn(ITERATION)
    model.save(tmp_path / "agent")
    env = make_env(schedule="free", num_steps=STEPS)
    loaded = ReDiFPPO.load(tmp_path / "agent", env=env)
    assert torch.equal(weights(loaded), weights(model))
    x_T = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(5)
    for one, other in zip(
        model.policy.sample(x_T, classes), loaded.policy.sample(x_T, classes), strict=True
    ):
        assert torch.equal(one, other)
    loaded.learn(ITERATION)
    assert loaded.rollouts == 2


@pytest.mark.parametrize("kind", WILD)
def test_deployed_samples_are_those_of_the_environment(make_free, kind):
    """`sample`, which leaves out rows that have arrived, against stepping the environment."""
    torch.manual_seed(0)
    alone = {"advantage": "batch", "antithetic": False}
    model = make_free(kind, {"group_size": 1}, **alone)
    policy, env = model.policy, model.env.env
    head = policy.schedule_head
    tell_apart(head, env.reset(options={"tasks": torch.arange(8)})[0])
    before = policy.ema_denoiser.network_evaluations
    x_0, num_steps = policy.sample(env.bank.x_T[:8], env.bank.condition[:8])
    assert policy.ema_denoiser.network_evaluations - before == num_steps.sum()
    assert len(num_steps.unique()) > 1
    before = head.before(env.bank.x_T[:8], env.bank.condition[:8])
    first = head.next_time(head(before).mode(), before)
    obs, _ = env.reset(options={"tasks": torch.arange(8), "start": first})
    for _ in range(STEPS):
        with torch.no_grad():
            obs, _, ended, _, infos = env.step(policy.get_distribution(obs).mode().clamp(-10, 10))
        arrived = infos["episode"]["l"]
        rows = ended & (arrived == num_steps)
        torch.testing.assert_close(env.last_state.x_t[rows], x_0[rows], rtol=1e-4, atol=1e-4)
        first_ends = ended & (num_steps > 0)
        assert (arrived[first_ends] == num_steps[first_ends]).all()
        num_steps = torch.where(first_ends, 0, num_steps)  # each row once
    assert (num_steps == 0).all()


def test_a_global_schedule_is_plain_ddim_on_its_grid(make_free):
    model = make_free(head={"kind": "beta"})
    policy, bank = model.policy, model.env.env.bank
    x_0, num_steps = policy.sample(bank.x_T, bank.condition)
    grid = policy.schedule_head.grid()
    assert (num_steps == len(grid) - 1).all()
    expected = schedules.sample(policy.ema_denoiser, bank.x_T, bank.condition, grid)
    torch.testing.assert_close(x_0, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_rollout_stays_on_the_device(make_free):
    model = make_free(trained="both")
    model.learn(ITERATION)
    env = model.env.env
    bank = env.bank
    env._bank = TeacherBank(arm(bank.x_T), arm(bank.teacher_x_0), arm(bank.condition))
    step, reset = env.step, env.reset
    env.step = lambda actions: arm(step(actions))
    env.reset = lambda **options: arm(reset(**options))
    model.rollout_buffer._store.clear()
    model.learn(ITERATION, reset_num_timesteps=False)


TEACHER = gaussian_teacher(num_steps=20)


def schedule_agent(bank, num_steps=2, reward="mse", **options) -> ReDiFPPO:
    env = ReDiFVectorEnv(
        128, TEACHER, num_steps=num_steps, bank=bank, group_size=4, seed=0, reward=reward
    )
    settings = {"batch_size": 128, "n_epochs": 5, "seed": 0, "trained": "schedule"}
    head = options.pop("head", {"kind": "beta", "concentration": 100.0})
    return ReDiFPPO(
        "StudentPolicy",
        env,
        decayed(1e-3),
        policy_kwargs={"student": gaussian_denoiser, "schedule_head": head},
        **{**settings, **options},
    )


@pytest.fixture(scope="module")
def gaussian_banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaussian")
    return [
        TeacherBank.build(TEACHER, 512, split=split, cache_dir=folder)
        for split in ("train", "validation")
    ]


def best_of_all(bank: TeacherBank) -> float:
    """The least error of two steps, over a grid of 40 x 40 pairs of times."""
    denoiser = TEACHER.denoiser
    times = range(24, 1000, 25)
    return min(
        schedules.paired_mse(denoiser, bank, torch.tensor([float(t), float(s), 0.0]))
        for t, s in itertools.product(times, times)
        if s < t
    )


@pytest.mark.parametrize(("kind", "tolerance"), [("beta", 0.01), ("categorical", 0.1)])
def test_the_times_of_a_frozen_student_become_the_best_there_are(gaussian_banks, kind, tolerance):
    """An exhaustive search knows the optimum.

    Of the distance from the uniform grid to it, with seeds 0 to 2, at most 0.05 % and 4 % are left.
    """
    train_bank, held_out = gaussian_banks
    head = {"beta": {"concentration": 100.0}, "categorical": {"candidates": 40}}[kind]
    model = schedule_agent(train_bank, head={"kind": kind, **head})
    uniform = schedules.paired_mse(TEACHER.denoiser, held_out, model.policy.timesteps)
    model.learn(60 * 128 * 2)
    learned = schedules.paired_mse(TEACHER.denoiser, held_out, model.policy.schedule_head.grid())
    best = best_of_all(held_out)
    assert learned - best < tolerance * (uniform - best)


def test_a_reward_of_the_wrong_sign_makes_times_worse(gaussian_banks):
    """Negative control of the test above."""
    train_bank, held_out = gaussian_banks
    model = schedule_agent(train_bank, reward=-1.0 * MSE())
    uniform = schedules.paired_mse(TEACHER.denoiser, held_out, model.policy.timesteps)
    model.learn(20 * 128 * 2)
    learned = schedules.paired_mse(TEACHER.denoiser, held_out, model.policy.schedule_head.grid())
    assert learned > 1.5 * uniform


class TwoKinds(nn.Module):
    """The exact denoiser of data that is nearly a point for class 0, and broad for class 1."""

    def __init__(self, schedule) -> None:
        super().__init__()
        self.kinds = nn.ModuleList(GaussianNetwork(schedule, variances=v) for v in (1e-6, 1.0))

    def forward(self, x_t, t, condition):
        point, broad = (kind(x_t, t) for kind in self.kinds)
        return torch.where(expand(condition == 0, x_t), point, broad)


def two_kinds() -> Denoiser:
    schedule = noise_schedule(MAKE_SOLVER())
    return Denoiser(TwoKinds(schedule), schedule, "sample", SHAPE, num_classes=2)


def test_an_adaptive_schedule_spends_its_steps_where_they_help(tmp_path):
    """A point needs one step, a broad Gaussian several: no fixed number is right for both.

    Measured with seeds 0 to 2: 1.01 to 1.09 steps for the point and 5 for the broad one, and less
    than half the error of the best grids at the same mean.
    """
    teacher = Teacher(two_kinds(), MAKE_SOLVER, 20)
    banks = [
        TeacherBank.build(teacher, 512, split=split, cache_dir=tmp_path)
        for split in ("train", "validation")
    ]
    env = ReDiFVectorEnv(
        256, teacher, num_steps=5, bank=banks[0], group_size=4, seed=0, step_cost=0.003
    )
    head = {"adaptive": True, "stop_prob": 0.3, "concentration": 30.0}
    model = ReDiFPPO(
        "StudentPolicy",
        env,
        decayed(1e-3),
        policy_kwargs={"student": two_kinds, "schedule_head": head},
        trained="schedule",
        n_epochs=5,
        seed=0,
    )
    model.learn(60 * 256 * 5)
    held_out = banks[1]
    x_0, num_steps = model.policy.sample(held_out.x_T, held_out.condition)
    error = float((x_0 - held_out.teacher_x_0).square().mean())
    lengths = [float(num_steps[held_out.condition == c].float().mean()) for c in (0, 1)]
    mean = float(num_steps.float().mean())
    fixed = {
        steps: schedules.paired_mse(
            teacher.denoiser, held_out, schedules.search(teacher.denoiser, held_out, steps)
        )
        for steps in (1, 2, 3, 4, 5)
    }
    assert lengths[0] < 1.3
    assert lengths[1] > 4
    assert error < 0.6 * np.interp(mean, list(fixed), list(fixed.values()))
