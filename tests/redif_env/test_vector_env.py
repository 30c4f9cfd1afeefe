"""ReDiFVectorEnv: rows of their own, autoreset, groups, seeds, and what stays on the device."""

import functools
import itertools
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from gymnasium.vector import AutoresetMode, VectorEnv
from tripwire import Tripwire, arm, count_reads

import redif_env
from redif_env import (
    MSE,
    PSNR,
    Denoiser,
    KernelSolver,
    ReDiFVectorEnv,
    Reward,
    Teacher,
    TeacherBank,
    check_vector_env,
    schedules,
)
from redif_env.errors import InvalidActionError, InvalidArgumentError, InvalidRewardError
from redif_env.loading import noise_schedule
from redif_env.noise import FlowSchedule
from redif_env.vector_env import task_hash

DIM = 64
KEEP = 0.0  # the choice that halves the time
END = -1.0  # the choice that goes straight to the data


@pytest.fixture
def make(teacher, bank):
    """Makes environments of the small teacher on its small bank."""

    def build(num_envs=4, **options):
        return ReDiFVectorEnv(num_envs, teacher, **{"bank": bank, "seed": 0, **options})

    return build


def draw(env, generator):
    """Actions in [-1, 1]; the choices of a free schedule are all `KEEP`."""
    actions = torch.zeros(env.action_space.shape)
    actions[:, :DIM] = 2 * torch.rand(env.num_envs, DIM, generator=generator) - 1
    return actions


def choosing(env, choices):
    """Actions that hold nothing but the choices."""
    actions = torch.zeros(env.action_space.shape)
    actions[:, DIM] = torch.tensor(choices)
    return actions


def task_of(env, x_T):
    """The rows of the bank that hold these noises."""
    equal = (env.bank.x_T.flatten(1) == x_T.flatten(1)[:, None]).all(2)
    assert bool((equal.sum(1) == 1).all())
    return equal.long().argmax(1).tolist()


def run(env, actions, **reset):
    """Everything that a reset and the steps return."""
    history = [env.reset(**reset)[0]]
    for action in actions:
        history.append(env.step(action))
    return history


def rows_of(value, rows):
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {name: rows_of(part, rows) for name, part in value.items()}
    return tuple(rows_of(part, rows) for part in value)


def assert_same(one, two):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_same(one[name], two[name])
    else:
        for first, second in zip(one, two, strict=True):
            assert_same(first, second)


# Choices of four rows that end after 1, 2, 3 and 4 steps, and so on: never in step.
STAGGERED = [
    [END, KEEP, KEEP, KEEP],
    [KEEP, END, KEEP, KEEP],
    [END, KEEP, END, KEEP],
    [END, KEEP, KEEP, KEEP],
    [KEEP, END, KEEP, KEEP],
    [END, KEEP, KEEP, END],
    [KEEP, KEEP, END, KEEP],
]
ENDS = [  # row 3 uses its whole budget of 4 once
    [True, False, False, False],
    [False, True, False, False],
    [True, False, True, False],
    [True, False, False, True],
    [False, True, False, False],
    [True, False, False, True],
    [False, False, True, False],
]


def test_spaces(make):
    env = make(3)
    assert isinstance(env, VectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.action_space.shape == (3, DIM + 1)
    assert env.single_action_space.high.tolist() == [10.0] * DIM + [1.0]
    assert env.single_action_space.low.tolist() == [-10.0] * DIM + [-1.0]
    assert set(env.single_observation_space) == {"latents", "timestep", "steps_left", "condition"}
    assert make(3, schedule="uniform").action_space.shape == (3, DIM)
    for residual in (True, np.True_):
        assert make(3, residual=residual).single_action_space.high[0] == 1.0
    assert make(3, action_bound=2.5).single_action_space.high[0] == 2.5


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("schedule", ["free", "uniform"])
def test_neighbours_are_bit_identical(make, generator, schedule, residual):
    """Other actions in row 1 leave rows 0, 2 and 3 as they were, also across episodes."""
    env = make(schedule=schedule, residual=residual, num_steps=4)
    plain = [draw(env, generator) for _ in STAGGERED]
    if schedule == "free":
        for action, choices in zip(plain, STAGGERED, strict=True):
            action[:, DIM] = torch.tensor(choices)
    changed = [action.clone() for action in plain]
    for action in changed:
        action[1] = -action[1]
    one, two = run(env, plain, seed=3), run(env, changed, seed=3)
    others = torch.tensor([0, 2, 3])
    for first, second in zip(one[1:], two[1:], strict=True):
        assert_same(rows_of(first[:4], others), rows_of(second[:4], others))
    assert not torch.equal(one[1][0]["latents"][1], two[1][0]["latents"][1])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("schedule", ["free", [850, 500, 200]])
def test_a_row_is_a_single_environment(make, generator, schedule, residual):
    tasks, options = [5, 0, 31, 5], {"schedule": schedule, "residual": residual, "num_steps": 3}
    env = make(**options)
    actions = [draw(env, generator) for _ in range(3)]
    if schedule == "free":
        for action, choices in zip(actions, STAGGERED, strict=False):
            action[:, DIM] = torch.tensor(choices)
    together = run(env, actions, options={"tasks": tasks})
    for row in range(4):
        one = slice(row, row + 1)
        alone = run(make(1, **options), [a[one] for a in actions], options={"tasks": tasks[one]})
        assert_same(rows_of(together[0], one), alone[0])
        for first, second in zip(together[1:], alone[1:], strict=True):
            _, rewards, terminations, _, infos = first
            assert torch.equal(terminations[one], second[2])
            # The student's convolutions of other batch sizes add up in another order.
            torch.testing.assert_close(rewards[one], second[1], rtol=1e-4, atol=1e-5)
            seen = (infos if terminations[row] else {"final_obs": first[0]})["final_obs"]
            wanted = (second[4] if second[2] else {"final_obs": second[0]})["final_obs"]
            for name in seen:
                torch.testing.assert_close(seen[name][one], wanted[name], rtol=0, atol=1e-5)
            if terminations[row]:
                break  # the next task is drawn by the row's number


def test_autoreset_of_a_fixed_schedule_step_by_step(make):
    env = make(2, schedule=[800, 400], seed=7)
    observation, infos = env.reset()
    assert infos["task"].tolist() == task_of(env, observation["latents"])
    first = task_of(env, observation["latents"])
    assert observation["timestep"].flatten().tolist() == pytest.approx([0.8, 0.8])
    assert observation["steps_left"].flatten().tolist() == [1.0, 1.0]

    observation, rewards, terminations, truncations, infos = env.step(torch.full((2, DIM), 0.5))
    assert torch.equal(observation["latents"], torch.full((2, 1, 8, 8), 0.5))
    assert observation["timestep"].flatten().tolist() == pytest.approx([0.4, 0.4])
    assert observation["steps_left"].flatten().tolist() == [0.5, 0.5]
    assert rewards.tolist() == [0.0, 0.0]
    assert terminations.tolist() == truncations.tolist() == [False, False]
    assert infos == {}

    observation, rewards, terminations, truncations, infos = env.step(torch.full((2, DIM), 0.1))
    # The observation is the next episode's; the last one is in infos.
    second = task_of(env, observation["latents"])
    assert observation["timestep"].flatten().tolist() == pytest.approx([0.8, 0.8])
    assert torch.equal(infos["final_obs"]["latents"], torch.full((2, 1, 8, 8), 0.1))
    assert infos["final_obs"]["timestep"].flatten().tolist() == [0.0, 0.0]
    assert infos["final_obs"]["steps_left"].flatten().tolist() == [0.0, 0.0]
    assert torch.equal(infos["final_obs"]["condition"], env.bank.condition[first])
    assert torch.equal(observation["condition"], env.bank.condition[second])
    wanted = -(0.1 - env.bank.teacher_x_0[first]).square().flatten(1).mean(1)
    torch.testing.assert_close(rewards, wanted)
    assert terminations.tolist() == [True, True]
    assert truncations.tolist() == [False, False]
    assert infos["_final_obs"].tolist() == infos["_episode"].tolist() == [True, True]
    assert torch.equal(infos["episode"]["r"], rewards)
    assert infos["episode"]["l"].tolist() == infos["episode"]["nfe"].tolist() == [2, 2]
    assert infos["reward_map"].shape == (2, 1, 8, 8)

    observation, *_ = env.step(torch.full((2, DIM), 0.3))
    assert observation["timestep"].flatten().tolist() == pytest.approx([0.4, 0.4])


def test_autoreset_of_a_free_schedule_step_by_step(make):
    """Each row starts afresh on its own; its tasks are those of its own episode numbers."""
    env = make(num_steps=4, step_cost=0.5)
    observation, _ = env.reset(seed=11)
    episodes, lengths = [0] * 4, [0] * 4
    times = [999.0] * 4
    for choices, ends in zip(STAGGERED, ENDS, strict=True):
        before = [wanted_task(env, row, episodes[row], 11) for row in range(4)]
        assert task_of(env, env.state.x_T) == before
        observation, rewards, terminations, truncations, infos = env.step(choosing(env, choices))
        assert terminations.tolist() == ends
        assert not truncations.any()
        assert infos["_final_obs"].tolist() == infos["_episode"].tolist() == ends
        assert infos["task"].tolist() == before  # not those that follow
        for row in range(4):
            lengths[row] += 1
            times[row] = float(round(times[row] / 2))  # KEEP, on a whole time
            answer = env.bank.teacher_x_0[before[row]]
            if ends[row]:
                wanted = -float(answer.square().mean()) - 0.5 * lengths[row]
                assert float(rewards[row]) == pytest.approx(wanted, rel=1e-5)
                assert float(infos["episode"]["r"][row]) == float(rewards[row])
                assert int(infos["episode"]["l"][row]) == lengths[row]
                assert not infos["final_obs"]["latents"][row].any()
                assert float(infos["final_obs"]["timestep"][row]) == 0
                episodes[row], lengths[row], times[row] = episodes[row] + 1, 0, 999.0
                task = wanted_task(env, row, episodes[row], 11)
                assert torch.equal(observation["latents"][row], env.bank.x_T[task])
            else:
                assert float(rewards[row]) == 0
                assert not observation["latents"][row].any()
            assert float(observation["timestep"][row]) == pytest.approx(times[row] / 1000)
            assert float(observation["steps_left"][row]) == 1 - lengths[row] / 4


@pytest.mark.parametrize("schedule", ["uniform", "free"])
def test_infos_name_the_task_that_was_chosen(make, schedule):
    """And keep its name when the rows go on with others."""
    env = make(schedule=schedule, num_steps=2)
    env.reset(options={"tasks": [9, 30, 2, 9]})
    *_, infos = choose_to_end(env)
    assert infos["task"].tolist() == [9, 30, 2, 9]
    following = task_of(env, env.state.x_T)
    assert following != [9, 30, 2, 9]
    *_, later = choose_to_end(env)
    assert later["task"].tolist() == following
    assert infos["task"].tolist() == [9, 30, 2, 9]


def choose_to_end(env):
    """What the step returns that ends the episodes of all rows, in one step or in two."""
    if env.timesteps is None:
        return env.step(choosing(env, [END] * env.num_envs))
    env.step(torch.zeros(env.action_space.shape))
    return env.step(torch.zeros(env.action_space.shape))


def wanted_task(env, row, episode, seed):
    """The task of a row's episode: the hash of its number."""
    groups, group = env.num_envs // env.group_size, row // env.group_size
    return int(task_hash(torch.tensor(episode * groups + group), seed)) % len(env.bank)


def splitmix64(number, seed):
    """Steele et al. 2014: the output of the generator in state `number + seed * gamma`."""
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    z = number + seed * gamma + gamma & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_splitmix_has_its_known_outputs():
    """The reference implementation's first outputs for the seed 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, seed) for seed in range(3)] == wanted


def test_task_hash_is_splitmix():
    numbers = [0, 1, 2, 1234567, 2**31, 2**40 + 3]
    for seed in (0, 1, 42, 2**62):
        hashed = task_hash(torch.tensor(numbers), seed).tolist()
        assert hashed == [splitmix64(number, seed) % 2**62 for number in numbers]


def test_task_hash_is_uniform():
    """Chi-squared of 64,000 draws in 64 bins: mean 63, standard deviation 11.2."""
    numbers = torch.arange(64_000)
    for seed in (0, 1, 2, 12345):
        counts = torch.bincount(task_hash(numbers, seed) % 64, minlength=64)
        chi_squared = float(((counts - 1000.0) ** 2 / 1000).sum())
        assert 63 - 4 * 11.2 < chi_squared < 63 + 4 * 11.2


def test_task_hash_of_neighbouring_seeds_is_unrelated():
    """Equal draws are as rare as chance allows: 1,000 of 64,000, standard deviation 31."""
    numbers = torch.arange(64_000)
    draws = [task_hash(numbers, seed) % 64 for seed in range(3)]
    for one, two in itertools.combinations(draws, 2):
        assert abs(int((one == two).sum()) - 1000) < 4 * 32
        assert abs(int((one[1:] == two[:-1]).sum()) - 1000) < 4 * 32


@pytest.mark.parametrize("schedule", ["free", "uniform"])
def test_groups_share_every_task(make, generator, schedule):
    """Slots 2 by 2, whatever the times at which their episodes end."""
    env = make(6, group_size=2, schedule=schedule, num_steps=3)
    env.reset(seed=2)
    played = [[task] for task in task_of(env, env.state.x_T)]
    for _ in range(30):
        actions = draw(env, generator)
        if schedule == "free":
            ends = torch.rand(6, generator=generator) < 0.4
            actions[:, DIM] = torch.where(ends, END, KEEP)
        observation, _, terminations, *_ = env.step(actions)
        tasks = task_of(env, env.state.x_T)
        assert torch.equal(env.state.condition, env.bank.condition[tasks])
        assert torch.equal(observation["condition"], env.bank.condition[tasks])
        for row in terminations.nonzero().flatten().tolist():
            played[row].append(tasks[row])
    for row in (0, 2, 4):
        shared = min(len(played[row]), len(played[row + 1]))
        assert shared >= 10
        assert played[row][:shared] == played[row + 1][:shared]
    assert played[0][:5] != played[2][:5]


def test_a_seed_determines_everything(make, generator):
    env, other = make(seed=1), make(seed=2)
    actions = [draw(env, generator) for _ in range(9)]
    wanted = run(env, actions, seed=5)
    assert_same(run(env, actions, seed=5), wanted)
    assert_same(run(other, actions, seed=5), wanted)
    assert not torch.equal(run(env, actions, seed=6)[0]["latents"], wanted[0]["latents"])


def test_the_constructors_seed_is_that_of_the_first_reset(make):
    assert_same(make(seed=5).reset()[0], make(seed=6).reset(seed=5)[0])


def test_a_reset_without_seed_goes_on(make):
    one, two = make(seed=5), make(seed=5)
    tasks = [task_of(one, one.reset()[0]["latents"]) for _ in range(5)]
    assert len(set(map(tuple, tasks))) == 5
    assert tasks == [task_of(two, two.reset()[0]["latents"]) for _ in range(5)]


def test_environments_without_seed_differ(make):
    drawn = [task_of(env, env.reset()[0]["latents"]) for env in (make(16, seed=None) for _ in "ab")]
    assert drawn[0] != drawn[1]


def test_global_generators_are_left_alone(make, generator):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    env = make()
    run(env, [draw(env, generator) for _ in range(5)], seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize(
    "tasks",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.int32),
        torch.tensor([1, 2, 3]),
    ],
    ids=repr,
)
def test_tasks_can_be_chosen(make, tasks):
    env = make(3)
    observation, _ = env.reset(options={"tasks": tasks})
    assert torch.equal(observation["latents"], env.bank.x_T[1:4])


def test_a_free_schedule_starts_where_it_is_told(make):
    """The constructor's start holds for every episode, `reset`'s for the first of each row."""
    env = make(start=850.0, num_steps=2)
    assert env.reset(seed=0)[0]["timestep"].tolist() == [[pytest.approx(0.85)]] * 4
    starts = [900.0, 700.0, 30.0, 999.0]
    obs, _ = env.reset(options={"start": torch.tensor(starts)})
    assert env.state.t.tolist() == starts
    assert torch.equal(env.state.x_t, env.state.x_T)
    obs, *_ = env.step(choosing(env, [KEEP, END, END, KEEP]))
    assert env.state.t.tolist() == [450.0, 850.0, 850.0, 500.0]
    assert torch.equal(obs["latents"][1], env.state.x_T[1])


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, [900.0, 700.0]),
        ({}, [900.0, 700.0, 30.0, 1000.0]),
        ({}, [900.0, 700.0, 30.0, 0.0]),
        ({}, [900.0, 700.0, 30.0, 0.5]),
        ({}, [900.0, 700.0, 30.0, float("nan")]),
        ({}, "early"),
        ({"min_steps": 3}, [900.0, 700.0, 30.0, 2.0]),
        ({"schedule": "uniform"}, [900.0, 700.0, 30.0, 999.0]),
    ],
)
def test_a_bad_start_is_refused(make, options, start):
    env = make(**options)
    env.reset(seed=0)
    before = env.state
    with pytest.raises(InvalidArgumentError, match="options\\['start'\\]"):
        env.reset(options={"start": start})
    assert env.state is before


class Flaky(MSE):
    """Fails at one call, as a server that is away or a NaN in a network does."""

    def __init__(self, call, fails):
        self.calls, self.call, self.fails = 0, call, fails

    def reward_map(self, x_0, teacher_x_0, condition):
        self.calls += 1
        if self.calls == self.call and self.fails == "raises":
            raise TimeoutError("the server is away")
        values = super().reward_map(x_0, teacher_x_0, condition)
        return values * torch.nan if self.calls == self.call else values


@pytest.mark.parametrize("fails", ["raises", "nan"])
@pytest.mark.parametrize(
    "options", [{"schedule": name, "num_steps": 2} for name in ("uniform", "free")]
)
def test_a_reward_that_fails_leaves_the_environment_where_it_was(make, options, fails):
    """The same step, tried again, goes on as if nothing had been."""
    call = 1 if options["schedule"] == "uniform" else 2
    env, calm = make(reward=Flaky(call, fails), **options), make(**options)
    generator = torch.Generator().manual_seed(0)
    env.reset(seed=1), calm.reset(seed=1)
    refused = 0
    for _ in range(5):
        actions = draw(env, generator)
        wanted = calm.step(actions)
        try:
            found = env.step(actions)
        except (TimeoutError, InvalidRewardError):
            refused += 1
            found = env.step(actions)
        for mine, theirs in zip(found[:4], wanted[:4], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert env.state_dict()["step_count"] == calm.state_dict()["step_count"]
    assert refused == 1


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({"schedule": "uniform"}, 2),
        ({"min_steps": 4}, 2),  # free times, but all episodes of one length
        ({"min_steps": 3}, 8),
    ],
)
def test_rewards_score_only_where_an_episode_can_end(make, options, scored):
    env = make(reward=(reward := Flaky(0, "never")), num_steps=4, **options)
    env.reset(seed=0)
    for _ in range(8):
        env.step(draw(env, torch.Generator().manual_seed(0)))
    assert reward.calls == scored


def test_a_start_may_be_any_time_of_a_continuous_schedule(teacher):
    network = teacher.denoiser.network
    denoiser = Denoiser(network, FlowSchedule(), "flow_prediction", (1, 8, 8), num_classes=10)
    teacher = Teacher(denoiser, FlowMatchEulerDiscreteScheduler, num_steps=2)
    env = ReDiFVectorEnv(2, teacher, start=700.1, bank_size=4)
    assert env.process.first_time == 700.1
    with pytest.raises(InvalidArgumentError, match="start=1000"):
        ReDiFVectorEnv(2, teacher, start=1000.1, bank_size=4)


def test_actions_may_be_read_only_or_run_backwards(make):
    env = make()
    env.reset(seed=0)
    actions = np.zeros(env.action_space.shape, np.float32)
    actions.flags.writeable = False
    env.step(actions)
    env.step(actions[::-1])


def test_a_refused_reset_leaves_no_trace(make):
    env, calm = make(), make()
    env.reset(seed=1), calm.reset(seed=1)
    for options in ({"start": [3.5] * 4}, {"tasks": [99, 0, 0, 0]}):
        with pytest.raises(InvalidArgumentError):
            env.reset(seed=2, options=options)
    assert torch.equal(env.reset()[1]["task"], calm.reset()[1]["task"])


@pytest.mark.parametrize("min_steps", [1, 2, 3, 4])
def test_no_episode_has_fewer_steps(make, min_steps):
    """However eager the choices; rows that follow their neighbours' end included."""
    env = make(num_steps=4, min_steps=min_steps)
    env.reset(seed=0)
    lengths = []
    for _ in range(12):
        *_, ended, _, infos = env.step(choosing(env, [END, END, -0.9, KEEP]))
        lengths += infos["episode"]["l"][ended].tolist() if "episode" in infos else []
    assert min(lengths) == min_steps
    assert max(lengths) == 4


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("start", {"start": 0.0}),
        ("start", {"start": 1000.0}),
        ("start", {"start": 10.5}),
        ("start", {"start": 850.0, "schedule": "uniform"}),
        ("min_steps", {"min_steps": 0}),
        ("min_steps", {"min_steps": 5}),
        ("min_steps", {"min_steps": 3, "start": 2.0}),
        ("min_steps", {"min_steps": 2, "schedule": "uniform"}),
    ],
)
def test_bad_options_of_a_free_schedule_are_refused(make, argument, options):
    with pytest.raises(InvalidArgumentError) as caught:
        make(**options)
    assert caught.value.argument == argument


def test_a_reset_brings_groups_together_again(make):
    """Rows that ended more often than their neighbours had drifted away from their tasks."""
    env = make(4, group_size=2, num_steps=3)
    env.reset(seed=0)
    env.step(choosing(env, [END, KEEP, KEEP, KEEP]))
    assert not torch.equal(env.state.x_T[0], env.state.x_T[1])
    env.reset()
    assert torch.equal(env.state.x_T[0], env.state.x_T[1])
    assert torch.equal(env.state.x_T[2], env.state.x_T[3])
    assert not torch.equal(env.state.x_T[0], env.state.x_T[2])


def test_residual_zero_actions_are_the_few_step_baseline(make, teacher, bank):
    env = make(8, residual=True, schedule=[850, 500, 200])
    env.reset(options={"tasks": range(8)})
    for _ in range(3):
        *_, infos = env.step(torch.zeros(8, DIM))
    grid = torch.tensor([850.0, 500.0, 200.0, 0.0])
    wanted = schedules.sample(teacher.denoiser, bank.x_T[:8], bank.condition[:8], grid)
    assert torch.equal(infos["final_obs"]["latents"], wanted)


def test_guidance_costs_two_evaluations_a_step(bank, teacher):
    guided = redif_env.load_teacher("digits", num_steps=5, guidance_scale=2.0)
    env = ReDiFVectorEnv(2, guided, bank=bank, schedule="uniform", step_cost=1.0)
    env.reset(options={"tasks": [0, 1]})
    for _ in range(4):
        _, rewards, *_, infos = env.step(torch.zeros(2, DIM))
    wanted = -bank.teacher_x_0[:2].square().flatten(1).mean(1) - 8
    torch.testing.assert_close(rewards, wanted)
    assert infos["episode"]["nfe"].tolist() == [8, 8]
    assert infos["episode"]["l"].tolist() == [4, 4]


def test_a_reward_without_map_leaves_none(make):
    env = make(2, reward=PSNR(), schedule=[500])
    env.reset()
    assert "reward_map" not in env.step(torch.zeros(2, DIM))[4]


def test_num_steps_of_a_list_is_its_length(make):
    assert make(schedule=[900, 400, 100]).max_steps == 3
    assert make(schedule=[900, 400, 0], num_steps=2).timesteps.tolist() == [900, 400, 0]
    assert make().max_steps == 4
    assert make().timesteps is None


def test_the_bank_is_built_when_it_is_needed(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    env = ReDiFVectorEnv(2, teacher, bank_size=3, split="validation", bank_seed=4)
    assert not (tmp_path / "cache").exists()
    env.reset()
    wanted = TeacherBank.build(teacher, 3, split="validation", seed=4, cache_dir=tmp_path / "own")
    assert torch.equal(env.bank.x_T, wanted.x_T)


def test_make_vec_gives_tensors():
    env = gym.make_vec("ReDiF-v0", num_envs=64)
    assert isinstance(env.unwrapped, ReDiFVectorEnv)
    observation, _ = env.reset(seed=0)
    *values, infos = env.step(torch.zeros(env.action_space.shape))
    tensors = [*observation.values(), *values[0].values(), *values[1:]]
    assert all(type(tensor) is torch.Tensor for tensor in tensors)
    assert all(len(tensor) == 64 for tensor in tensors)
    assert type(infos["episode"]["r"]) is torch.Tensor
    check_vector_env(env)


@pytest.mark.parametrize(
    "options",
    [
        {"num_envs": 1},
        {"num_envs": 6, "group_size": 3},
        {"num_envs": 4, "schedule": "karras", "residual": True},
        {"num_envs": 3, "action_type": "v_prediction", "reward": "ssim", "step_cost": 0.1},
    ],
    ids=str,
)
def test_conformance(make, options):
    check_vector_env(make(**options))


def test_make_vec_takes_its_spec_again(teacher, bank):
    env = gym.make_vec("ReDiF-v0", num_envs=2, teacher=teacher, bank=bank, schedule="uniform")
    again = gym.make_vec(env.unwrapped.spec, num_envs=2)
    assert torch.equal(again.unwrapped.timesteps, env.unwrapped.timesteps)


def test_importing_is_light():
    code = (
        "import sys, redif_env, gymnasium\n"
        "assert 'ReDiF-v0' in gymnasium.registry\n"
        "assert 'ReDiFVectorEnv' in dir(redif_env)\n"
        "heavy = {'torch', 'diffusers', 'stable_baselines3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    assert all(getattr(redif_env, name) is not None for name in redif_env.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = redif_env.no_such_name


@pytest.mark.parametrize(
    "use", [lambda env: env.step(torch.zeros(4, DIM + 1)), lambda env: env.state]
)
def test_before_the_first_reset(make, use):
    with pytest.raises(gym.error.ResetNeeded):
        use(make())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 11.0])
def test_a_refused_action_changes_nothing(make, generator, value):
    """The state is that before, and a good action is taken next."""
    env, untouched = make(), make()
    good = draw(env, generator)
    for each in (env, untouched):
        each.reset(seed=1)
    bad = good.clone()
    bad[2, 5] = value
    before = env.state
    with pytest.raises(InvalidActionError):
        env.step(bad)
    assert env.state is before
    assert_same(env.step(good), untouched.step(good))


class Fickle(Reward):
    """Not finite in row 1."""

    def __call__(self, x_0, teacher_x_0, condition):
        return torch.tensor([0.0, float("nan")])


def test_a_bad_reward_is_refused(make):
    env = make(2, reward=Fickle(), schedule=[500, 200])
    env.reset()
    env.step(torch.zeros(2, DIM))
    with pytest.raises(InvalidRewardError, match=r"reward 'fickle' returned='NaN or infinity'"):
        env.step(torch.zeros(2, DIM))


class DeferredDevice(str):
    """Is the CPU to torch, and another kind of device to whoever asks for its type."""

    type = "cuda"


@pytest.fixture
def deferred(make):
    """Makes environments that treat the CPU as a device whose values are dear to look at."""

    def build(*args, **options):
        env = make(*args, **options)
        env.device = DeferredDevice("cpu")
        return env

    return build


@pytest.mark.parametrize("action_type", ["latent", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["free", "uniform"])
@pytest.mark.parametrize(
    ("value", "match"), [(float("nan"), "NaN"), (float("inf"), "NaN"), (11.0, "outside")]
)
def test_elsewhere_bad_actions_raise_at_the_end(deferred, action_type, schedule, value, match):
    """A whole row of bad values, its schedule choice too, in the first of four steps."""
    env = deferred(3, action_type=action_type, schedule=schedule, num_steps=4)
    env.reset()
    actions = torch.zeros(env.action_space.shape)
    actions[1] = value
    env.step(actions)
    for _ in range(2):
        env.step(torch.zeros_like(actions))
    with pytest.raises(InvalidActionError, match=match):
        env.step(torch.zeros_like(actions))


def test_elsewhere_a_good_episode_raises_nothing(deferred, generator):
    env = deferred(3, num_steps=4)
    env.reset()
    for _ in range(9):
        env.step(draw(env, generator))


def test_elsewhere_bad_rewards_raise_at_the_end(deferred):
    env = deferred(2, reward=Fickle(), num_steps=3)
    env.reset()
    for _ in range(2):
        env.step(choosing(env, [END, END]))
    with pytest.raises(InvalidRewardError):
        env.step(choosing(env, [END, END]))


def test_elsewhere_a_reset_forgets_bad_actions(deferred):
    env = deferred(2, num_steps=2)
    env.reset()
    env.step(torch.full(env.action_space.shape, float("nan")))
    env.reset()
    for _ in range(4):
        env.step(torch.zeros(env.action_space.shape))


def armed(env):
    """The environment on tensors that raise when they leave the device."""
    bank = env.bank
    env._bank = TeacherBank(*map(arm, (bank.x_T, bank.teacher_x_0, bank.condition)))
    return env


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("schedule", ["free", "uniform"])
def test_steps_stay_on_the_device(deferred, generator, schedule, residual):
    """No conversion ever; no value read, but for the flags at the end of an episode."""
    env = armed(deferred(3, schedule=schedule, residual=residual, num_steps=4))
    observation, _ = env.reset(seed=0)
    for index in range(8):
        assert isinstance(observation["latents"], Tripwire)
        assert isinstance(observation["condition"], Tripwire)
        with count_reads() as reads:
            observation, *_, infos = env.step(arm(draw(env, generator)))
        assert reads == [3 if index % 4 == 3 else 0]
        if infos:
            values = [infos["final_obs"]["latents"], infos["episode"]["r"], infos["reward_map"]]
            assert all(isinstance(value, Tripwire) for value in values)


@pytest.mark.parametrize("as_array", [False, True])
def test_the_callers_buffer_may_be_used_again(make, generator, as_array):
    """The environment keeps no view of the actions."""
    env = make(schedule="uniform")
    env.reset()
    actions = draw(env, generator)
    wanted = actions.clone().reshape(4, 1, 8, 8)
    env.step(actions.numpy() if as_array else actions)
    actions.zero_()
    assert torch.equal(env.state.x_t, wanted)


def storages(value):
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage().data_ptr()]
    parts = value.values() if isinstance(value, dict) else value
    return [pointer for part in parts for pointer in storages(part)]


@pytest.mark.parametrize("schedule", ["free", [500, 200]])
def test_returned_tensors_share_no_memory(make, schedule):
    """With each other, with the state, or with the bank."""
    env = make(schedule=schedule)
    held = [env.reset()[0]]
    for _ in range(4):
        held.append(env.step(torch.zeros(env.action_space.shape)))
    own = [env.state.x_t, env.state.t, env.state.x_T, env.state.condition, env.bank.x_T]
    pointers = storages(held)
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & set(storages(own))


def test_gradients_do_not_pile_up_in_the_state(make):
    """Actions straight from a policy would otherwise keep its graph alive, step after step."""
    env = make(schedule="uniform", residual=True)
    env.reset()
    with pytest.raises(InvalidActionError):
        env.step([torch.zeros(DIM, requires_grad=True)] * 4)
    actions = torch.zeros(4, DIM, requires_grad=True)
    observation, *_ = env.step(actions)
    assert not observation["latents"].requires_grad
    assert not env.state.x_t.requires_grad


def test_reward_objects_and_names_are_the_same(make, generator):
    action = draw(make(schedule=[500]), generator)
    rewards = []
    for reward in ("2*mse", 2 * MSE()):
        env = make(schedule=[500], reward=reward)
        env.reset(seed=0)
        rewards.append(env.step(action)[1])
    assert torch.equal(*rewards)


def ends_in_noise():
    """A teacher with zero terminal SNR."""
    noise = noise_schedule(DDIMScheduler(rescale_betas_zero_snr=True))
    options = {"call": lambda network, x_t, t, told: network(x_t)}
    denoiser = Denoiser(torch.nn.Identity(), noise, "v_prediction", (1, 2, 2), **options)
    return Teacher(denoiser, functools.partial(KernelSolver, denoiser), 2)


@pytest.mark.parametrize("options", [{}, {"residual": True}, {"schedule": "uniform"}], ids=str)
def test_noise_is_no_action_where_there_is_nothing_else(options, tmp_path):
    teacher = ends_in_noise()
    with pytest.raises(InvalidArgumentError, match="alpha is 0 at the noisiest time") as caught:
        ReDiFVectorEnv(2, teacher, num_steps=2, action_type="epsilon", **options)
    assert caught.value.argument == "action_type"
    bank = TeacherBank.build(teacher, 4, cache_dir=tmp_path)
    for kind in ("latent", "sample", "v_prediction", "flow_prediction"):
        env = ReDiFVectorEnv(2, teacher, num_steps=2, action_type=kind, bank=bank, **options)
        env.reset(seed=0)
        for _ in range(2):
            observation, rewards, *_ = env.step(torch.zeros(env.action_space.shape))
            assert observation["latents"].isfinite().all()
            assert rewards.isfinite().all()


def test_noise_is_an_action_after_a_later_start(tmp_path):
    teacher = ends_in_noise()
    bank = TeacherBank.build(teacher, 4, cache_dir=tmp_path)
    options = {"schedule": [998.0, 500.0], "action_type": "epsilon", "residual": True}
    env = ReDiFVectorEnv(2, teacher, bank=bank, **options)
    env.reset(seed=0)
    assert env.step(torch.zeros(2, 4))[0]["latents"].isfinite().all()
