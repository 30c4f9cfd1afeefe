"""Steps of second order: against diffusers' DPM-Solver++ 2M, and as a decision process."""

import copy
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from gaussian import exact_x_0, gaussian_denoiser
from hypothesis import given
from hypothesis import strategies as st

from redif_env import MSE, ReDiFVectorEnv, TeacherBank, mdp, schedules, transition
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import noise_schedule
from redif_env.noise import FlowSchedule, VESchedule, from_x0
from redif_env.transition import Past

GRID = [850.0, 620.0, 400.0, 130.0, 0.0]
VP = noise_schedule(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
noises = pytest.mark.parametrize(
    "noise", [VP, VESchedule(), FlowSchedule()], ids=["vp", "ve", "flow"]
)
# Float32 through divisions by alpha and by what a step keeps of its prediction.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def full(*times):
    return torch.tensor(times)


def of_order(denoiser: Denoiser, order: int) -> Denoiser:
    stepping = copy.copy(denoiser)
    stepping.set_solver_order(order)
    return stepping


def answers(denoiser, bank, order=2, grid=GRID):
    with torch.no_grad():
        stepping = of_order(denoiser, order)
        return schedules.sample(stepping, bank.x_T, bank.condition, torch.tensor(grid))


def diffusers_answers(teacher, bank, grid=GRID):
    """By the scheduler, which is told to take the same times."""
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    solver = DPMSolverMultistepScheduler.from_config(teacher.make_solver().config, **options)
    solver.set_timesteps(timesteps=[int(t) for t in grid[:-1]])
    x_t = bank.x_T
    for t in solver.timesteps:
        with torch.no_grad():
            prediction = teacher.denoiser.predict(x_t, t.float().expand(len(x_t)), bank.condition)
        x_t = solver.step(prediction, t, x_t).prev_sample
    return x_t


@pytest.mark.parametrize("grid", [GRID, [900.0, 300.0, 20.0, 0.0], [700.0, 300.0, 0.0]], ids=str)
def test_samples_are_those_of_diffusers_multistep_solver(teacher, bank, grid):
    wanted = diffusers_answers(teacher, bank, grid)
    torch.testing.assert_close(answers(teacher.denoiser, bank, 2, grid), wanted, **CLOSE)
    # negative control: DDIM's are others, but for two steps, which are of first order
    same = torch.allclose(answers(teacher.denoiser, bank, 1, grid), wanted, **CLOSE)
    assert same == (len(grid) == 3)


def test_the_error_falls_with_the_square_of_the_steps():
    """Against the exact solution of the probability-flow ODE of Gaussian data.

    The step to the data is of first order, but Karras et al.'s is short.
    """
    denoiser = gaussian_denoiser(VESchedule())
    x_T = 80 * torch.ones(1, *denoiser.latent_shape)

    def error(order, num_steps):
        grid = schedules.karras(denoiser.schedule, num_steps)
        x_0 = schedules.sample(of_order(denoiser, order), x_T, None, grid)
        return float((x_0 - exact_x_0(denoiser.schedule, x_T, float(grid[0]))).abs().mean())

    for order, wanted in ((2, 4), (1, 2)):  # the latter as a negative control
        errors = [error(order, num_steps) for num_steps in (16, 32, 64)]
        assert errors[0] / errors[1] == pytest.approx(wanted, rel=0.2)
        assert errors[1] / errors[2] == pytest.approx(wanted, rel=0.2)


@noises
@given(seed=st.integers(0, 2**31), places=st.permutations([1.0, 130.0, 400.0, 850.0]))
def test_the_inverse_of_a_step_is_its_prediction(noise, seed, places):
    before, t, s = sorted(places[:3], reverse=True)
    generator = torch.Generator().manual_seed(seed)
    x_t, x0_pred, earlier = torch.randn(3, 2, 1, 3, generator=generator)
    past = Past(earlier, full(before, before))
    now, then = full(t, t), full(s, s)
    x_s = transition.step(noise, x_t, x0_pred, now, then, past=past).mean
    found = transition.x0_of_step(noise, x_t, x_s, now, then, past)
    # a step that keeps little of its prediction loses the digits of the rest
    kept = noise.alpha(then) - noise.sigma(then) * noise.alpha(now) / noise.sigma(now)
    tolerance = 1e-5 * float((1 + x_t.abs().max()) / kept.min())
    torch.testing.assert_close(found, x0_pred, rtol=1e-3, atol=tolerance)


@noises
def test_the_first_and_the_last_step_are_of_first_order(noise):
    x_t, x0_pred, earlier = torch.randn(3, 2, 1, 3, generator=torch.Generator().manual_seed(0))
    t, s = full(500.0, 500.0), full(200.0, 0.0)
    plain = transition.step(noise, x_t, x0_pred, t, s).mean
    first = transition.step(noise, x_t, x0_pred, t, s, past=Past(earlier, t)).mean
    assert torch.equal(first, plain)
    later = transition.step(noise, x_t, x0_pred, t, s, past=Past(earlier, t + 300)).mean
    assert torch.equal(later[1], plain[1])  # to the data
    assert not torch.allclose(later[0], plain[0], rtol=1e-2)  # negative control


def play(env, act):
    """The samples of one episode; `act` gives the actions of an observation."""
    observation, _ = env.reset(seed=0)
    for _ in range(env.max_steps):
        observation, *_ = env.step(act(observation))
    return env.last_state.x_t, env.last_state


@pytest.mark.parametrize("action_type", mdp.ACTION_TYPES)
def test_every_action_type_takes_the_step(teacher, bank, action_type):
    """Predictions of any type, and the latents they lead to, give the solver's samples."""
    denoiser = teacher.denoiser
    env = ReDiFVectorEnv(
        8, teacher, bank=bank, schedule=GRID, action_type=action_type, solver_order=2
    )
    seen = []

    def act(observation):
        state = env.state
        with torch.no_grad():
            x0_pred = denoiser(state.x_t, state.t, state.condition)
        seen.append((observation[mdp.PAST], x0_pred))
        noise = denoiser.schedule
        if action_type == "latent":
            past = mdp.past_of(observation[mdp.PAST], env.timesteps, state.step_index)
            s = env.timesteps[state.step_index + 1]
            step = transition.step(noise, state.x_t, x0_pred, state.t, s, past=past)
            return step.mean.flatten(1)
        alpha, sigma = noise.alpha(state.t[:1]), noise.sigma(state.t[:1])
        return from_x0(x0_pred, state.x_t, alpha, sigma, action_type).flatten(1)

    x_0, state = play(env, act)
    tasks = TeacherBank(state.x_T, state.teacher_x_0, state.condition)
    torch.testing.assert_close(x_0, answers(denoiser, tasks), **CLOSE)
    assert not torch.allclose(x_0, answers(denoiser, tasks, 1), **CLOSE)  # negative control
    # what is seen of the step before is what it predicted; of none, zeros
    assert not seen[0][0].any()
    for (_, predicted), (past, _) in itertools.pairwise(seen):
        torch.testing.assert_close(past, predicted, rtol=1e-3, atol=1e-3)


def test_a_residual_of_zero_is_the_solver(teacher, bank):
    options = {"schedule": GRID, "residual": True, "solver_order": 2}
    env = ReDiFVectorEnv(4, teacher, bank=bank, **options)
    zero = torch.zeros(env.action_space.shape)
    x_0, state = play(env, lambda _: zero)
    tasks = TeacherBank(state.x_T, state.teacher_x_0, state.condition)
    torch.testing.assert_close(x_0, answers(teacher.denoiser, tasks), **CLOSE)


def test_what_is_seen_of_the_step_before_follows_the_actions(teacher, bank):
    """Not the network, which the environment does not ask: an explored action has its own past."""
    env = ReDiFVectorEnv(2, teacher, bank=bank, schedule=GRID, solver_order=2, group_size=2)
    env.reset(seed=0)
    actions = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    actions[1] += 0.1
    seen, *_ = env.step(actions)
    noise, (t, s) = env.process.schedule, torch.tensor(GRID[:2])
    gain = noise.alpha(s) - noise.sigma(s) * noise.alpha(t) / noise.sigma(t)
    moved = seen[mdp.PAST][1] - seen[mdp.PAST][0]
    torch.testing.assert_close(moved, torch.full_like(moved, float(0.1 / gain)), rtol=1e-3, atol=0)


def test_a_new_episode_has_no_past(teacher, bank):
    env = ReDiFVectorEnv(2, teacher, bank=bank, schedule=GRID, solver_order=2)
    observation, _ = env.reset(seed=0)
    assert env.single_observation_space[mdp.PAST].shape == (1, 8, 8)
    assert env.observation_space.contains({k: v.numpy() for k, v in observation.items()})
    for index in range(2 * env.max_steps):
        assert bool(observation[mdp.PAST].any()) == (index % env.max_steps > 0)
        observation, *_ = env.step(torch.ones(env.action_space.shape))


def test_order_one_sees_and_steps_as_before(teacher, bank):
    env = ReDiFVectorEnv(2, teacher, bank=bank, schedule=GRID)
    observation, _ = env.reset(seed=0)
    assert env.solver_order == 1
    assert mdp.PAST not in observation
    assert mdp.PAST not in env.single_observation_space.spaces
    process = mdp.Process(teacher.denoiser.schedule, 4, MSE(), torch.tensor(GRID))
    assert mdp.initial(process, bank, torch.tensor([0])).past_x0 is None


def test_an_interrupted_episode_keeps_its_past(teacher, bank):
    make = {"schedule": GRID, "solver_order": 2, "bank": bank, "seed": 3}
    env, other = (ReDiFVectorEnv(2, teacher, **make) for _ in range(2))
    env.reset()
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(3, *env.action_space.shape, generator=generator)
    env.step(actions[0])
    other.load_state_dict(env.state_dict())
    for action in actions[1:]:
        (mine, *_), (theirs, *_) = env.step(action), other.step(action)
        assert torch.equal(mine[mdp.PAST], theirs[mdp.PAST])


@pytest.mark.parametrize("order", [0, 3, "2", None, 1.5, True])
def test_other_orders_are_refused(teacher, bank, order):
    with pytest.raises(InvalidArgumentError, match="solver_order"):
        ReDiFVectorEnv(2, teacher, bank=bank, schedule=GRID, solver_order=order)
    with pytest.raises(InvalidArgumentError, match="solver_order"):
        of_order(teacher.denoiser, order)


def test_a_free_schedule_steps_to_first_order(teacher, bank):
    with pytest.raises(InvalidArgumentError, match="free schedule"):
        ReDiFVectorEnv(2, teacher, bank=bank, solver_order=2)


def test_the_searched_grid_is_that_of_the_steps(teacher, bank):
    """Each is better for its own steps than the other's grid is."""
    stepping = {order: of_order(teacher.denoiser, order) for order in (1, 2)}
    grids = {order: schedules.search(each, bank, 4) for order, each in stepping.items()}
    for order, each in stepping.items():
        own, other = (schedules.paired_mse(each, bank, grids[n]) for n in (order, 3 - order))
        assert own < other
    best = {order: schedules.paired_mse(stepping[order], bank, grids[order]) for order in (1, 2)}
    assert best[2] < 0.7 * best[1]
