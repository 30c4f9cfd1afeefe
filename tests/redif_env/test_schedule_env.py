"""ReDiFSchedule-v0: which choices are valid, what they do, and that nothing leaves the device."""

import copy
import dataclasses
import functools
import itertools
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gaussian import MEAN, gaussian_teacher, product, scales
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common import env_checker
from tripwire import Tripwire, arm, count_reads

import redif_env
from redif_env import (
    ReDiFScheduleEnv,
    ReDiFScheduleVectorEnv,
    ReDiFVectorEnv,
    TeacherBank,
    check_vector_env,
)
from redif_env import schedules as grids
from redif_env.errors import InvalidActionError, InvalidArgumentError

GRID = [850, 700, 533, 400, 289, 200, 120]  # the start, and with the final 0 seven candidates
ZERO = 6  # the last candidate's index


@pytest.fixture
def make(teacher, bank):
    """Makes environments of the small teacher on its small bank, on `GRID`."""

    def build(num_envs=4, **options):
        settings = {"bank": bank, "seed": 0, "schedule": GRID, **options}
        return ReDiFScheduleVectorEnv(num_envs, teacher, **settings)

    return build


@pytest.fixture
def make_single(teacher, bank):
    def build(**options):
        settings = {"teacher": teacher, "bank": bank, "seed": 0, "schedule": GRID, **options}
        return ReDiFScheduleEnv(**settings)

    return build


@functools.cache
def gaussian_world():
    """A teacher with a closed form, and eight of its tasks."""
    teacher = gaussian_teacher()
    x_T = torch.randn(8, *teacher.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return teacher, TeacherBank(x_T, teacher.sample(x_T), None)


def gaussian_env(num_envs, **options):
    teacher, bank = gaussian_world()
    return ReDiFScheduleVectorEnv(num_envs, teacher, bank=bank, seed=0, **options)


def play(env, choices, **reset):
    """Everything that a reset and the steps return; `choices` holds a list of N for each step."""
    history = [env.reset(**reset)[0]]
    for row in choices:
        history.append(env.step(torch.tensor(row)))
    return history


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


# Four rows that end after 1, 2, 3 and 4 steps, and go on in their next episodes.
STAGGERED = [
    [6, 2, 0, 0],
    [1, 6, 3, 1],
    [6, 0, 6, 4],
    [4, 1, 2, 6],
    [6, 3, 5, 2],
]
ENDS = [
    [True, False, False, False],
    [False, True, False, False],
    [True, False, True, False],
    [False, False, False, True],
    [True, False, False, False],
]


def test_spaces(make):
    env = make(3)
    assert env.single_action_space == spaces.Discrete(7)
    assert env.action_space.shape == (3,)
    assert set(env.single_observation_space) == {"latents", "timestep", "steps_left", "condition"}
    assert env.candidates.tolist() == [*GRID[1:], 0]
    assert (env.max_steps, env.process.min_steps) == (4, 1)
    assert env.reset()[0]["timestep"].flatten().tolist() == pytest.approx([0.85] * 3)


@pytest.mark.parametrize("name", ["uniform", "karras"])
@pytest.mark.parametrize("num", [None, 3])
def test_named_grids(make, teacher, name, num):
    """The start and the candidates are the grid of that many steps."""
    wanted = grids.make_grid(name, teacher.denoiser.schedule, num or 16)
    env = make(1, schedule=name, num_candidates=num)
    assert env.single_action_space.n == (num or 16)
    assert torch.equal(env.candidates, wanted[1:])
    env.reset()
    assert torch.equal(env.state.t, wanted[:1])
    assert env.max_steps == min(4, num or 16)


OPTIONS = [
    {},
    {"schedule": "karras", "num_candidates": 9, "min_steps": 2, "max_steps": 5},
    {"min_steps": 3, "max_steps": 3, "reward": "psnr", "step_cost": 0.1},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@every_option
def test_checkers(make_single, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on infinite bounds and on images
        check_env(make_single(**options), skip_render_check=True)
        env_checker.check_env(make_single(render_mode="rgb_array", **options))


@pytest.mark.parametrize(("num_envs", "group_size"), [(1, 1), (3, 1), (6, 3)])
def test_conformance(make, num_envs, group_size):
    options = OPTIONS[num_envs // 3]
    check_vector_env(make(num_envs, group_size=group_size, **options), num_steps=8)


def test_gymnasium_makes_it(teacher, bank):
    options = {"teacher": teacher, "bank": bank, "num_candidates": 5}
    env = gym.make("redif_env:ReDiFSchedule-v0", **options)
    env.reset(seed=0)
    assert env.get_wrapper_attr("action_masks")().tolist() == [True] * 5
    many = gym.make_vec("ReDiFSchedule-v0", num_envs=3, **options)
    assert isinstance(many.unwrapped, redif_env.ReDiFScheduleVectorEnv)
    assert many.action_space.shape == (3,)


# Which choices are valid


def can_end(index, made, zero, least, most):
    """Whether a trajectory at candidate `index` after `made` steps can still keep the limits."""
    if index == zero:
        return least <= made <= most
    later = range(index + 1, zero + 1)
    return made < most and any(can_end(j, made + 1, zero, least, most) for j in later)


@st.composite
def walks(draw):
    """A grid of 1 to 7 candidates, limits that it allows, and numbers that choose."""
    inner = draw(st.lists(st.integers(1, 998), min_size=1, max_size=7, unique=True))
    grid = [float(t) for t in sorted(inner, reverse=True)]
    most = draw(st.integers(1, len(grid)))
    least = draw(st.integers(1, most))
    return grid, least, most, draw(st.integers(0, 2**32))


@settings(max_examples=40)
@given(walk=walks())
def test_masks_along_random_walks(walk):
    """They are the exhaustive search's; valid choices are taken as they are, and end in time."""
    grid, least, most, seed = walk
    env = gaussian_env(3, schedule=grid, min_steps=least, max_steps=most)
    zero, generator = len(grid) - 1, torch.Generator().manual_seed(seed)
    env.reset(seed=0)
    for _ in range(2 * most):
        before, masks = env.state, env.action_masks()
        assert masks.shape == (3, len(grid))
        assert masks.dtype == torch.bool
        for t, made, mask in zip(before.t, before.step_index, masks, strict=True):
            wanted = [
                float(s) < float(t) and can_end(i, int(made) + 1, zero, least, most)
                for i, s in enumerate(env.candidates)
            ]
            assert mask.tolist() == wanted
            assert any(wanted)
        choice = torch.multinomial(masks.float(), 1, generator=generator)[:, 0]
        *_, ended, _, infos = env.step(choice)
        reached = env.last_state if "episode" in infos else env.state
        assert torch.equal(reached.t, env.candidates[choice])
        assert (reached.t < before.t).all()
        if "episode" not in infos:
            assert least == most
            continue
        lengths = infos["episode"]["l"][ended]
        assert ((lengths >= least) & (lengths <= most)).all()
        assert not infos["episode"]["invalid_actions"].any()


def test_masks_by_hand(make):
    """Row by row, for two to three steps on seven candidates."""
    env = make(3, min_steps=2, max_steps=3)
    env.reset()
    assert env.action_masks().int().tolist() == [[1, 1, 1, 1, 1, 1, 0]] * 3
    env.step(torch.tensor([0, 4, 5]))
    assert env.action_masks().int().tolist() == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    env.step(torch.tensor([3, 5, 6]))
    assert env.action_masks().int().tolist() == [
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [1, 1, 1, 1, 1, 1, 0],  # the next episode's
    ]


def test_masks_share_no_memory(make):
    env = make(2)
    env.reset()
    env.action_masks().zero_()
    assert env.action_masks().all()


@pytest.mark.parametrize("use", [lambda env: env.action_masks(), lambda env: env.step([0] * 4)])
def test_before_the_first_reset(make, use):
    with pytest.raises(gym.error.ResetNeeded):
        use(make())


def test_an_invalid_choice_takes_the_nearest_valid_one(make):
    """Whatever the choice, in states of each kind; the oracle searches the mask."""
    for prefix in ([], [1], [1, 4], [2, 3, 4]):
        env = make(7, min_steps=3, max_steps=4)
        env.reset(seed=1)
        for choice in prefix:
            env.step(torch.full((7,), choice))
        masks = env.action_masks()
        env.step(torch.arange(7))
        for choice in range(7):
            valid = masks[choice].nonzero().flatten()
            nearest = valid[(valid - choice).abs().argmin()]
            assert env.last_state.t[choice] == env.candidates[nearest]


def test_the_last_step_goes_to_the_data_whatever_the_action(make):
    env = make(2, max_steps=2)
    env.reset()
    env.step(torch.tensor([1, 1]))
    *_, terminations, truncations, infos = env.step(torch.tensor([3, ZERO]))
    assert terminations.tolist() == [True, True]
    assert not truncations.any()
    assert torch.equal(*infos["final_obs"]["latents"].chunk(2)) is False  # other tasks
    assert infos["final_obs"]["timestep"].flatten().tolist() == [0.0, 0.0]
    assert infos["episode"]["invalid_actions"].tolist() == [1, 0]


def test_invalid_actions_are_counted_by_row_and_episode(make):
    env = make(3, max_steps=3)
    env.reset()
    counts = []
    for choices in ([2, 2, 0], [2, 6, 0], [3, 4, 0], [5, 5, 5], [5, 5, 6], [0, 0, 0]):
        *_, terminations, _, infos = env.step(torch.tensor(choices))
        counts.append([terminations.tolist(), infos["episode"]["invalid_actions"].tolist()])
    T, F = True, False
    assert counts == [
        [[F, F, F], [0, 0, 0]],
        [[F, T, F], [0, 0, 0]],  # rows 0 and 2 chose where they stand
        [[T, F, T], [2, 0, 2]],  # and on the last step, they chose more than 0
        [[F, F, F], [0, 0, 0]],
        [[T, T, T], [1, 1, 0]],  # below candidate 5 there is only 0
        [[F, F, F], [0, 0, 0]],
    ]


def test_what_is_saved_counts_invalid_actions_on(make):
    env, twin = make(1, max_steps=3), make(1, max_steps=3)
    env.reset(), twin.reset()
    for choice in (2, 1):
        env.step(torch.tensor([choice]))
    twin.load_state_dict(env.state_dict())
    for each in (env, twin):
        *_, infos = each.step(torch.tensor([ZERO]))
        assert infos["episode"]["invalid_actions"].tolist() == [1]


@pytest.mark.parametrize("spoil", ["smaller", "empty", "other kind"])
def test_the_state_of_another_environment_is_refused(make, teacher, bank, spoil):
    env = make(4, max_steps=3)
    env.reset()
    other = ReDiFVectorEnv(4, teacher, bank=bank) if spoil == "other kind" else make(2, max_steps=3)
    other.reset()
    with pytest.raises(InvalidArgumentError, match="state="):
        env.load_state_dict({} if spoil == "empty" else other.state_dict())
    env.step(torch.zeros(4, dtype=torch.int64))  # as it was


def test_a_reset_forgets_invalid_actions(make):
    env = make(1, max_steps=3)
    env.reset()
    for choice in (2, 1):
        env.step(torch.tensor([choice]))
    env.reset()
    *_, infos = env.step(torch.tensor([ZERO]))
    assert infos["episode"]["invalid_actions"].tolist() == [0]


# What a choice does

SEQUENCES = [[6], [2, 6], [0, 3, 6], [1, 3, 5, 6], [0, 1, 2, 6]]


def grid_of(sequence):
    return torch.tensor([GRID[0], *([*GRID[1:], 0][i] for i in sequence)], dtype=torch.float32)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_a_sequence_of_choices_is_ddim_on_its_times(make, teacher, bank, sequence):
    env = make(8)
    history = play(env, [[i] * 8 for i in sequence], options={"tasks": range(8)})
    final = history[-1][4]["final_obs"]["latents"]
    wanted = grids.sample(teacher.denoiser, bank.x_T[:8], bank.condition[:8], grid_of(sequence))
    assert torch.equal(final, wanted)
    # negative control: other times give something else
    other = grids.sample(teacher.denoiser, bank.x_T[:8], bank.condition[:8], grid_of([3, 6]))
    assert not torch.allclose(final, other, atol=1e-3)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_a_sequence_of_choices_has_its_closed_form(sequence):
    """For Gaussian data: x_0 - m is a product of factors times x_T - alpha m."""
    teacher, bank = gaussian_world()
    env = gaussian_env(3, schedule=GRID)
    history = play(env, [[i] * 3 for i in sequence], options={"tasks": [1, 4, 6]})
    x_T, noise = bank.x_T[[1, 4, 6]], teacher.denoiser.schedule
    alpha = scales(noise, GRID[0])[0]
    wanted = MEAN + product(noise, grid_of(sequence).tolist()) * (x_T - alpha * MEAN)
    torch.testing.assert_close(history[-1][4]["final_obs"]["latents"], wanted)


def test_staggered_rows_step_by_step(make, teacher, bank):
    """Each row follows its own times, pays for its own steps, and starts afresh on its own."""
    env = make(4, step_cost=0.5, max_steps=4)
    env.reset(seed=3)
    x_T, chosen = env.state.x_T.clone(), [[] for _ in range(4)]
    for choices, ends in zip(STAGGERED, ENDS, strict=True):
        answers, condition = env.state.teacher_x_0, env.state.condition
        observation, rewards, terminations, truncations, infos = env.step(torch.tensor(choices))
        assert terminations.tolist() == infos["_final_obs"].tolist() == ends
        assert not truncations.any()
        for row in range(4):
            chosen[row].append(choices[row])
            own = slice(row, row + 1)
            if not ends[row]:
                assert float(rewards[row]) == 0
                assert int(infos["episode"]["nfe"][row]) == int(infos["episode"]["l"][row]) == 0
                assert float(observation["timestep"][row]) == pytest.approx(
                    GRID[choices[row] + 1] / 1000
                )
                continue
            wanted = grids.sample(teacher.denoiser, x_T[own], condition[own], grid_of(chosen[row]))
            final = infos["final_obs"]["latents"][own]
            # convolutions of another batch size add up in another order
            torch.testing.assert_close(final, wanted, rtol=0, atol=1e-4)
            steps = len(chosen[row])
            mse = float((final - answers[own]).square().mean())
            assert float(rewards[row]) == pytest.approx(-mse - 0.5 * steps, rel=1e-5)
            assert int(infos["episode"]["nfe"][row]) == int(infos["episode"]["l"][row]) == steps
            assert float(observation["timestep"][row]) == pytest.approx(0.85)
            assert float(observation["steps_left"][row]) == 1
            x_T[row], chosen[row] = env.state.x_T[row], []
            assert torch.equal(observation["latents"][row], x_T[row])


def test_neighbours_are_bit_identical(make):
    """Other choices in row 1 leave rows 0, 2 and 3 as they were, also across episodes."""
    changed = [[a, (b + 3) % 7, c, d] for a, b, c, d in STAGGERED]
    one, two = play(make(), STAGGERED, seed=3), play(make(), changed, seed=3)
    others = torch.tensor([0, 2, 3])
    for first, second in zip(one[1:], two[1:], strict=True):
        for name in first[0]:
            assert torch.equal(first[0][name][others], second[0][name][others])
        assert torch.equal(first[1][others], second[1][others])
        assert torch.equal(first[2][others], second[2][others])
    assert not torch.equal(one[1][0]["latents"][1], two[1][0]["latents"][1])


def test_a_row_is_a_single_environment(make, make_single):
    """Observations, masks, rewards and infos, row by row, until each row's first end."""
    tasks = [5, 0, 31, 5]
    env, ended = make(min_steps=1), [False] * 4
    singles = [make_single() for _ in tasks]
    observation, _ = env.reset(options={"tasks": tasks})
    alone = [s.reset(options={"tasks": [task]})[0] for s, task in zip(singles, tasks, strict=True)]
    for choices in STAGGERED[:4]:
        masks = env.action_masks()
        for row, single in enumerate(singles):
            if not ended[row]:
                assert single.action_masks().tolist() == masks[row].tolist()
                for name, value in alone[row].items():
                    np.testing.assert_allclose(value, observation[name][row].numpy(), atol=1e-5)
        observation, rewards, terminations, _, infos = env.step(torch.tensor(choices))
        for row, single in enumerate(singles):
            if ended[row]:
                continue
            alone[row], reward, ended[row], _, info = single.step(choices[row])
            assert ended[row] == bool(terminations[row])
            assert reward == pytest.approx(float(rewards[row]), rel=1e-4, abs=1e-6)
            if ended[row]:
                final = infos["final_obs"]["latents"][row]
                np.testing.assert_allclose(alone[row]["latents"], final.numpy(), atol=1e-5)
                for name in ("nfe", "invalid_actions"):
                    assert info[name] == int(infos["episode"][name][row])
    assert ended == [True] * 4


def test_the_single_environments_masks(make_single):
    env = make_single(min_steps=2)
    with pytest.raises(gym.error.ResetNeeded):
        env.action_masks()
    env.reset(seed=0)
    masks = env.action_masks()
    assert isinstance(masks, np.ndarray)
    assert (masks.dtype, masks.tolist()) == (np.bool_, [True] * 6 + [False])
    env.step(np.int64(2))
    env.step(6)
    with pytest.raises(gym.error.ResetNeeded):  # a trajectory that has ended has no choice
        env.action_masks()


def test_a_seed_determines_everything(make):
    env, other = make(seed=1), make(seed=2)
    wanted = play(env, STAGGERED, seed=5)
    assert_same(play(env, STAGGERED, seed=5), wanted)
    assert_same(play(other, STAGGERED, seed=5), wanted)
    assert not torch.equal(play(env, STAGGERED, seed=6)[0]["latents"], wanted[0]["latents"])


def test_groups_share_every_task(make):
    env = make(4, group_size=2)
    for observation, *_ in [(env.reset(seed=2)[0],), *play(env, [[ZERO] * 4] * 3)[1:]]:
        one, two, three, four = observation["latents"]
        assert torch.equal(one, two)
        assert torch.equal(three, four)
        assert not torch.equal(one, three)


# The student


def test_the_student_is_a_frozen_copy(make, teacher, bank):
    student = copy.deepcopy(teacher.denoiser)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    env = make(2, student=student.train())
    with torch.no_grad():
        next(student.network.parameters()).zero_()  # later training must not change the dynamics
    history = play(env, [[2, 2], [ZERO, ZERO]], options={"tasks": [0, 1]})
    wanted = grids.sample(teacher.denoiser, bank.x_T[:2], bank.condition[:2], grid_of([2, ZERO]))
    final = history[-1][4]["final_obs"]["latents"]
    assert torch.equal(final, wanted)
    assert not final.requires_grad
    assert not env.process.student.training
    # negative control: a student that is changed before steps elsewhere
    changed = play(make(2, student=student), [[2, 2], [ZERO, ZERO]], options={"tasks": [0, 1]})
    assert not torch.allclose(changed[-1][4]["final_obs"]["latents"], wanted, atol=1e-3)


def test_a_guided_student_costs_two_evaluations_a_step(make):
    guided = redif_env.load_denoiser("digits", guidance_scale=2.0)

    def episode(step_cost):
        env = make(3, student=guided, step_cost=step_cost)
        history = play(env, [[ZERO, 0, 0], [0, ZERO, 1], [0, 0, ZERO]], seed=0)
        assert env.process.student.network_evaluations == 3 * 3 * 2
        return [step[4]["episode"] for step in history[1:]]

    free, priced = episode(0.0), episode(1.0)
    assert [one["l"].tolist() for one in priced] == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    for step, nfe in enumerate(([2, 0, 0], [0, 4, 0], [0, 0, 6])):
        assert priced[step]["nfe"].tolist() == nfe
        torch.testing.assert_close(priced[step]["r"], free[step]["r"] - torch.tensor(nfe))


def test_more_steps_cost_more_than_they_gain_at_a_high_price(make):
    """`step_cost` decides between one step and four; at price 0 four are better."""

    def returns(cost):
        env = make(8, step_cost=cost)
        one = play(env, [[ZERO] * 8], options={"tasks": range(8)})[-1][1].mean()
        four = play(env, [[i] * 8 for i in (1, 3, 5, 6)], options={"tasks": range(8)})[-1][1].mean()
        return float(one), float(four)

    one, four = returns(0.0)
    assert four > one
    one, four = returns(1.0)
    assert four < one


# Actions


@pytest.mark.parametrize("kind", [np.array, list, torch.tensor, functools.partial(np.int32)])
def test_any_integers_are_fine(make, kind):
    env = make()
    env.reset(seed=0)
    env.step(kind([0, 1, 2, 3]))
    assert env.state.t.tolist() == [700, 533, 400, 289]


@pytest.mark.parametrize("value", [-1, 7, 2**40])
def test_a_refused_action_changes_nothing(make, value):
    env, untouched = make(), make()
    for each in (env, untouched):
        each.reset(seed=1)
    before = env.state
    with pytest.raises(InvalidActionError, match="integers from 0 to 6"):
        env.step(torch.tensor([0, 1, value, 2]))
    assert env.state is before
    assert_same(env.step(torch.tensor([0, 1, 2, 3])), untouched.step(torch.tensor([0, 1, 2, 3])))


def test_the_callers_array_may_be_used_again(make):
    env = make(schedule=[500, 200])
    env.reset()
    actions = torch.zeros(4, dtype=torch.int64)
    env.step(actions)
    actions.fill_(9)
    assert env.state.t.tolist() == [200] * 4


class DeferredDevice(str):
    """Is the CPU to torch, and another kind of device to whoever asks for its type."""

    type = "cuda"


@pytest.fixture
def armed(make):
    """An environment on tensors that raise when they leave a device that is dear to look at."""

    def build(*args, **options):
        env = make(*args, **options)
        bank = env.bank
        env._bank = TeacherBank(*map(arm, (bank.x_T, bank.teacher_x_0, bank.condition)))
        env.process = dataclasses.replace(env.process, candidates=arm(env.process.candidates))
        env.device = DeferredDevice("cpu")
        return env

    return build


def test_steps_and_masks_stay_on_the_device(armed):
    """No conversion ever; no value read, but for the flags at the end of an episode."""
    env = armed(3, max_steps=4, min_steps=2)
    observation, _ = env.reset(seed=0)
    for index, choices in enumerate(itertools.islice(itertools.cycle(STAGGERED), 8)):
        assert isinstance(observation["latents"], Tripwire)
        with count_reads() as reads:
            masks = env.action_masks()
            observation, *_, infos = env.step(arm(torch.tensor(choices[:3])))
        assert isinstance(masks, Tripwire)
        assert reads == [3 if index % 4 == 3 else 0]
        values = [infos["final_obs"]["latents"], infos["episode"]["invalid_actions"]]
        assert all(isinstance(value, Tripwire) for value in values)


def test_elsewhere_bad_actions_raise_at_the_end(armed):
    env = armed(2, max_steps=3)
    env.reset()
    env.step(torch.tensor([7, -5]))
    env.step(torch.tensor([1, 1]))
    with pytest.raises(InvalidActionError, match="outside the action space"):
        env.step(torch.tensor([2, 2]))


def test_gradients_do_not_pile_up_in_the_state(make):
    env = make(2)
    env.reset()
    env.step(torch.tensor([0, 0]))
    assert not env.state.x_t.requires_grad
    assert math.isfinite(float(env.state.x_t.sum()))
