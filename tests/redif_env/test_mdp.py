"""The decision process as pure functions."""

import dataclasses

import pytest
import torch

from redif_env import MSE, PSNR, mdp, schedules, transition
from redif_env.noise import from_x0

GRID = torch.tensor([850.0, 500.0, 200.0, 0.0])
ROWS = torch.tensor([4, 0, 9])


def make(teacher, **options):
    options = {"max_steps": 3, "reward": MSE(), **options}
    return mdp.Process(schedule=teacher.denoiser.schedule, **options)


@pytest.fixture
def fixed(teacher):
    return make(teacher, timesteps=GRID)


@pytest.fixture
def free(teacher):
    return make(teacher)


def act(state, process, choice=0.0, seed=0):
    """Actions that say nothing in particular."""
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(state.x_t.flatten(1).shape, generator=generator)
    choices = torch.full((len(state.t), process.choice_dim), choice)
    return torch.cat([output, choices], dim=1)


def snapshot(state):
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value.clone() for name, value in values.items() if value is not None}


def ddim(teacher, state, s):
    """x0_pred and the deterministic step to `s`."""
    with torch.no_grad():
        x0_pred = teacher.denoiser(state.x_t, state.t, state.condition)
    return x0_pred, transition.step(teacher.denoiser.schedule, state.x_t, x0_pred, state.t, s).mean


def test_initial_states_are_the_tasks(fixed, free, bank):
    state = mdp.initial(fixed, bank, ROWS)
    assert torch.equal(state.x_t, bank.x_T[ROWS])
    assert torch.equal(state.x_T, bank.x_T[ROWS])
    assert torch.equal(state.teacher_x_0, bank.teacher_x_0[ROWS])
    assert torch.equal(state.condition, bank.condition[ROWS])
    assert state.step_index.tolist() == [0, 0, 0]
    assert state.t.tolist() == [850.0] * 3
    assert mdp.initial(free, bank, ROWS).t.tolist() == [999.0] * 3


def test_fixed_times_follow_the_grid(fixed, bank):
    state = mdp.initial(fixed, bank, ROWS)
    for index in range(3):
        assert state.t.tolist() == [float(GRID[index])] * 3
        assert not mdp.terminal(fixed, state).any()
        state = mdp.transition(fixed, state, act(state, fixed))
    assert state.t.tolist() == [0.0] * 3
    assert state.step_index.tolist() == [3] * 3
    assert mdp.terminal(fixed, state).all()


def test_free_times_follow_the_choices(free, bank):
    state = mdp.initial(free, bank, ROWS)
    action = act(state, free)
    action[:, -1] = torch.tensor([-1.0, 0.0, 1.0])
    state = mdp.transition(free, state, action)
    assert state.t.tolist() == [0.0, 500.0, 998.0]  # 499.5 rounds to even
    assert mdp.terminal(free, state).tolist() == [True, False, False]


def test_the_last_allowed_step_ends_at_the_data(free, bank):
    state = mdp.initial(free, bank, ROWS)
    for index in range(3):
        assert not mdp.terminal(free, state).any()
        state = mdp.transition(free, state, act(state, free, choice=1.0))
        assert state.t.tolist() == ([998.0] * 3, [997.0] * 3, [0.0] * 3)[index]
    assert mdp.terminal(free, state).all()


def test_a_latent_action_is_the_next_latent(fixed, bank):
    state = mdp.initial(fixed, bank, ROWS)
    action = act(state, fixed)
    assert torch.equal(mdp.transition(fixed, state, action).x_t.flatten(1), action)


@pytest.mark.parametrize("action_type", mdp.ACTION_TYPES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_every_action_type_takes_the_ddim_step(teacher, bank, action_type, steps):
    """The network's output of any type leads where the latent of its DDIM step leads."""
    process = make(teacher, timesteps=GRID, action_type=action_type)
    state = mdp.initial(process, bank, ROWS)
    state = dataclasses.replace(state, t=GRID[steps].expand(3), step_index=torch.full((3,), steps))
    x0_pred, x_s = ddim(teacher, state, GRID[steps + 1].expand(3))
    output = x_s
    if action_type != "latent":
        schedule = teacher.denoiser.schedule
        alpha, sigma = schedule.alpha(state.t[0]), schedule.sigma(state.t[0])
        output = from_x0(x0_pred, state.x_t, alpha, sigma, action_type)
    after = mdp.transition(process, state, output.flatten(1))
    # There and back in float32; epsilon is divided by alpha, 0.2 at t = 850.
    torch.testing.assert_close(after.x_t, x_s, rtol=1e-4, atol=1e-4)


def test_a_wrong_action_type_is_noticed(teacher, bank):
    process = make(teacher, timesteps=GRID, action_type="epsilon")
    state = mdp.initial(process, bank, ROWS)
    x0_pred, x_s = ddim(teacher, state, GRID[1].expand(3))
    after = mdp.transition(process, state, x0_pred.flatten(1))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(after.x_t, x_s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("action_type", mdp.ACTION_TYPES)
@pytest.mark.parametrize("timesteps", [GRID, None], ids=["fixed", "free"])
def test_residual_zero_action_is_ddim(teacher, bank, action_type, timesteps):
    process = make(
        teacher,
        timesteps=timesteps,
        action_type=action_type,
        student=teacher.denoiser,
        residual_scale=0.1,
    )
    state = mdp.initial(process, bank, ROWS)
    times, action = [state.t[0]], torch.zeros_like(act(state, process))
    while not mdp.terminal(process, state).all():
        state = mdp.transition(process, state, action)
        times.append(state.t[0])
    wanted = schedules.sample(
        teacher.denoiser, bank.x_T[ROWS], bank.condition[ROWS], torch.stack(times)
    )
    # epsilon at t = 999 divides by alpha = 5e-5: float32 keeps two digits of x_0 there.
    atol = 5e-2 if action_type == "epsilon" and timesteps is None else 1e-4
    torch.testing.assert_close(state.x_t, wanted, rtol=0, atol=atol)


def test_residual_actions_are_scaled_corrections(teacher, bank):
    process = make(teacher, timesteps=GRID, student=teacher.denoiser, residual_scale=0.25)
    state = mdp.initial(process, bank, ROWS)
    action = act(state, process)
    _, x_s = ddim(teacher, state, GRID[1].expand(3))
    after = mdp.transition(process, state, action)
    torch.testing.assert_close(after.x_t, x_s + 0.25 * action.reshape(x_s.shape))


def test_the_reward_comes_at_the_end(fixed, bank):
    state = mdp.initial(fixed, bank, ROWS)
    for _ in range(2):
        state = mdp.transition(fixed, state, act(state, fixed))
        values, reward_map = mdp.reward(fixed, state)
        assert values.tolist() == [0.0] * 3
        assert not reward_map.any()
    state = mdp.transition(fixed, state, bank.teacher_x_0[ROWS].flatten(1) + 0.5)
    values, reward_map = mdp.reward(fixed, state)
    assert values.tolist() == pytest.approx([-0.25] * 3, rel=1e-5)
    torch.testing.assert_close(reward_map, torch.full((3, 1, 8, 8), -0.25), rtol=1e-5, atol=0)


def test_the_reward_is_per_row(free, bank):
    state = mdp.initial(free, bank, ROWS)
    action = act(state, free)
    action[:, :-1] = bank.teacher_x_0[ROWS].flatten(1) + 1
    action[:, -1] = torch.tensor([-1.0, 0.0, -1.0])
    values, reward_map = mdp.reward(free, mdp.transition(free, state, action))
    assert values.tolist() == pytest.approx([-1.0, 0.0, -1.0], rel=1e-5)
    assert reward_map.flatten(1).mean(1).tolist() == pytest.approx(values.tolist(), rel=1e-5)


@pytest.mark.parametrize(("nfe_per_step", "costs"), [(1, [1, 2, 3]), (2, [2, 4, 6])])
def test_step_cost(teacher, bank, nfe_per_step, costs):
    """Each row pays for the network evaluations of its own episode."""
    process = make(teacher, step_cost=0.125, nfe_per_step=nfe_per_step, reward=MSE())
    state = mdp.initial(process, bank, ROWS)
    state = dataclasses.replace(
        state, x_t=state.teacher_x_0, t=torch.zeros(3), step_index=torch.tensor([1, 2, 3])
    )
    values, reward_map = mdp.reward(process, state)
    assert values.tolist() == [-0.125 * cost for cost in costs]
    # no place is cheaper than another: in the map it counts as a reward without one
    dim = state.x_t[0].numel()
    assert reward_map.flatten(1).tolist() == [[dim * value] * dim for value in values.tolist()]


def test_a_reward_without_map_has_none(teacher, bank):
    process = make(teacher, timesteps=GRID, reward=PSNR())
    state = dataclasses.replace(mdp.initial(process, bank, ROWS), t=torch.zeros(3))
    values, reward_map = mdp.reward(process, state)
    assert reward_map is None
    assert values.shape == (3,)


def test_observation(fixed, bank):
    state = mdp.initial(fixed, bank, ROWS)
    state = mdp.transition(fixed, state, act(state, fixed))
    seen = mdp.observation(fixed, state)
    assert set(seen) == {"latents", "timestep", "steps_left", "condition"}
    assert torch.equal(seen["latents"], state.x_t)
    assert torch.equal(seen["timestep"], torch.full((3, 1), 0.5))
    assert seen["steps_left"].flatten().tolist() == pytest.approx([2 / 3] * 3)
    assert torch.equal(seen["condition"], bank.condition[ROWS])


def test_observations_of_an_unconditional_teacher(fixed, bank):
    state = dataclasses.replace(mdp.initial(fixed, bank, ROWS), condition=None)
    assert "condition" not in mdp.observation(fixed, state)


@pytest.mark.parametrize("name", ["fixed", "free"])
def test_functions_leave_their_arguments_alone(name, bank, request):
    process = request.getfixturevalue(name)
    state = mdp.initial(process, bank, ROWS)
    action = act(state, process)
    before, action_before = snapshot(state), action.clone()
    mdp.transition(process, state, action)
    mdp.reward(process, state)
    mdp.terminal(process, state)
    for value in mdp.observation(process, state).values():
        value.zero_()
    assert all(torch.equal(before[field], getattr(state, field)) for field in before)
    assert torch.equal(action, action_before)


def test_states_do_not_share_memory_with_the_bank(fixed, bank):
    before = bank.x_T.clone()
    mdp.initial(fixed, bank, ROWS).x_t.zero_()
    assert torch.equal(bank.x_T, before)


@pytest.mark.parametrize("name", ["fixed", "free"])
def test_batched_equals_looped(name, bank, request):
    process = request.getfixturevalue(name)
    together = mdp.initial(process, bank, ROWS)
    alone = [mdp.initial(process, bank, ROWS[row : row + 1]) for row in range(3)]
    for seed in range(3):
        action = act(together, process, seed=seed)
        if name == "free":
            action[:, -1] = torch.tensor([-0.9, 0.3, 0.8])
        together = mdp.transition(process, together, action)
        alone = [
            mdp.transition(process, state, action[row : row + 1]) for row, state in enumerate(alone)
        ]
    for field, value in snapshot(together).items():
        assert torch.equal(value, torch.cat([getattr(state, field) for state in alone]))
