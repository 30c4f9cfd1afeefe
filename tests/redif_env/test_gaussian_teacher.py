"""Everything against the closed form of a teacher whose data is Gaussian; see `gaussian.py`."""

import itertools

import pytest
import torch
from gaussian import (
    MEAN,
    SHAPE,
    STD,
    exact_factor,
    factor,
    gaussian_denoiser,
    gaussian_teacher,
    product,
    scales,
)

from redif_env import (
    KernelSolver,
    ReDiFVectorEnv,
    Teacher,
    TeacherBank,
    check_vector_env,
    schedules,
)
from redif_env.noise import FlowSchedule, VESchedule

TIMES = [850.0, 500.0, 200.0, 0.0]


@pytest.fixture(scope="module")
def gaussian():
    return gaussian_teacher(num_steps=10)


@pytest.fixture(scope="module")
def tasks(gaussian, tmp_path_factory):
    return TeacherBank.build(gaussian, 16, cache_dir=tmp_path_factory.mktemp("bank"))


def affine(schedule, x_t, t, s, gain):
    """M alpha_s + gain (x_t - m alpha_t), in double."""
    (alpha_t, _), (alpha_s, _) = scales(schedule, t), scales(schedule, s)
    return MEAN * alpha_s + gain * (x_t.double() - MEAN * alpha_t)


def assert_equal(x, wanted):
    # float32 against double, through up to ten steps.
    torch.testing.assert_close(x.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_the_denoiser_is_the_posterior_mean():
    """Against a regression of x_0 on x_t."""
    denoiser = gaussian_denoiser()
    generator = torch.Generator().manual_seed(0)
    x_0 = MEAN + STD * torch.randn(100_000, generator=generator)
    alpha, sigma = scales(denoiser.schedule, 500)
    x_t = alpha * x_0 + sigma * torch.randn(100_000, generator=generator)
    pair = torch.stack([x_t, x_0])
    slope = pair.cov()[0, 1] / x_t.var()
    intercept = x_0.mean() - slope * x_t.mean()
    ends = denoiser(torch.tensor([[0.0], [1.0]]), torch.full((2,), 500.0)).flatten()
    # Standard errors of the regression are about 0.001.
    assert float(ends[0]) == pytest.approx(float(intercept), abs=5e-3)
    assert float(ends[1] - ends[0]) == pytest.approx(float(slope), abs=5e-3)


def test_ddim_along_a_grid_is_the_affine_map(gaussian, tasks):
    schedule = gaussian.denoiser.schedule
    x_0 = schedules.sample(gaussian.denoiser, tasks.x_T, None, torch.tensor(TIMES))
    wanted = affine(schedule, tasks.x_T, TIMES[0], 0.0, product(schedule, TIMES))
    assert_equal(x_0, wanted)


def test_the_teachers_answers_are_the_affine_map(gaussian, tasks):
    """The same, through diffusers' own scheduler; its grid is the trailing one."""
    schedule = gaussian.denoiser.schedule
    times = [*range(999, 0, -100), 0]
    wanted = affine(schedule, tasks.x_T, times[0], 0.0, product(schedule, times))
    assert_equal(tasks.teacher_x_0, wanted)


def test_a_wrong_grid_is_noticed(gaussian, tasks):
    schedule = gaussian.denoiser.schedule
    times = [*range(999, 0, -90), 0]
    wanted = affine(schedule, tasks.x_T, times[0], 0.0, product(schedule, times))
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(tasks.teacher_x_0, wanted)


def test_ddim_converges_with_order_one():
    """The error against the ODE's exact solution halves when the steps double."""
    denoiser = gaussian_denoiser()
    exact = exact_factor(denoiser.schedule, 999)
    x_T = torch.ones(1, *SHAPE)
    errors = []
    for num_steps in (25, 50, 100):
        grid = schedules.uniform(denoiser.schedule, num_steps)
        x_0 = schedules.sample(denoiser, x_T, None, grid)
        wanted = affine(denoiser.schedule, x_T, 999, 0.0, exact)
        errors.append(float((x_0 - wanted).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("action_type", ["sample", "latent"])
def test_environment_follows_the_formulas(gaussian, tasks, action_type):
    """Transitions, end and return, with the exact denoiser as the policy."""
    env = ReDiFVectorEnv(
        4, gaussian, schedule=TIMES, action_type=action_type, bank=tasks, step_cost=0.01
    )
    observation, _ = env.reset(options={"tasks": [3, 0, 7, 7]})
    schedule, x_T = gaussian.denoiser.schedule, tasks.x_T[[3, 0, 7, 7]]
    for index, (t, s) in enumerate(itertools.pairwise(TIMES)):
        x_t = observation["latents"]
        wanted = affine(schedule, x_t, t, s, factor(schedule, t, s))
        output = gaussian.denoiser(x_t, torch.full((4,), t)) if action_type == "sample" else wanted
        observation, rewards, terminations, _, infos = env.step(output.flatten(1).float())
        last = index == 2
        x_s = infos["final_obs"]["latents"] if last else observation["latents"]
        assert_equal(x_s, wanted)
        assert terminations.tolist() == [last] * 4
        if not last:
            assert rewards.tolist() == [0.0] * 4
    student = affine(schedule, x_T, TIMES[0], 0.0, product(schedule, TIMES))
    error = (student - tasks.teacher_x_0[[3, 0, 7, 7]]).square().flatten(1).mean(1)
    assert_equal(rewards, -error - 0.01 * 3)


def one_step_return(env, student):
    """Mean return of `x_0 = student(x_T)` on the tasks of a one-step environment."""
    observation, _ = env.reset(options={"tasks": range(env.num_envs)})
    actions = student(observation["latents"]).flatten(1).float()
    return float(env.step(actions)[1].double().mean())


def test_optimum_of_the_one_step_problem(gaussian, tasks):
    """The best affine student is the regression of the teacher's answers on the noise.

    The teacher is affine itself, so the regression is exact; every other student (a, b) loses
    the mean of ((a - a*) + (b - b*) x_T)^2.
    """
    schedule = gaussian.denoiser.schedule
    env = ReDiFVectorEnv(16, gaussian, schedule=[999], bank=tasks)
    x, y = tasks.x_T.double().flatten(), tasks.teacher_x_0.double().flatten()
    design = torch.stack([torch.ones_like(x), x], dim=1)
    a, b = torch.linalg.lstsq(design, y).solution.tolist()
    gain = product(schedule, [*range(999, 0, -100), 0])
    alpha, _ = scales(schedule, 999)
    assert (a, b) == pytest.approx((MEAN * (1 - gain * alpha), gain), abs=1e-5)

    best = one_step_return(env, lambda x_T: a + b * x_T)
    assert best == pytest.approx(0, abs=1e-9)  # squared errors of float32
    for da, db in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1), (0.05, -0.05)):
        other = one_step_return(env, lambda x_T, da=da, db=db: a + da + (b + db) * x_T)
        assert other == pytest.approx(-float((da + db * x).square().mean()), rel=1e-4)
        assert other < best


def test_plain_ddim_is_not_the_optimum(gaussian, tasks):
    """What there is to gain: one DDIM step maps every noise nearly to the mean."""
    schedule = gaussian.denoiser.schedule
    env = ReDiFVectorEnv(16, gaussian, schedule=[999], bank=tasks, action_type="sample")
    loss = factor(schedule, 999, 0) - product(schedule, [*range(999, 0, -100), 0])
    alpha, _ = scales(schedule, 999)
    centred = tasks.x_T.double() - MEAN * alpha
    wanted = -float((loss * centred).square().mean())
    t = torch.full((16,), 999.0)
    assert one_step_return(env, lambda x_T: gaussian.denoiser(x_T, t)) == pytest.approx(
        wanted, rel=1e-4
    )
    assert wanted < -0.4 * STD**2


def test_residual_zero_action_is_one_ddim_step(gaussian, tasks):
    env = ReDiFVectorEnv(16, gaussian, schedule=[999], bank=tasks, residual=True)
    zero = one_step_return(env, torch.zeros_like)
    env = ReDiFVectorEnv(16, gaussian, schedule=[999], bank=tasks, action_type="sample")
    t = torch.full((16,), 999.0)
    assert zero == pytest.approx(one_step_return(env, lambda x_T: gaussian.denoiser(x_T, t)))


@pytest.fixture(params=["flow", "ve"])
def other_family(request):
    """A teacher of another family, and tasks with its exact answers (infinitely many steps)."""
    schedule = FlowSchedule() if request.param == "flow" else VESchedule(sigma_max=20.0)
    denoiser = gaussian_denoiser(schedule)
    x_T = denoiser.initial_noise(16, torch.Generator().manual_seed(0))
    gain = exact_factor(schedule, 1000)
    answers = affine(schedule, x_T, 1000, 0.0, gain).float()
    return Teacher(denoiser, lambda: KernelSolver(denoiser), 1), TeacherBank(x_T, answers)


def test_other_families_in_the_environment(other_family):
    """Free schedule, per-row times, the exact denoiser as policy: the affine map, row by row."""
    teacher, tasks = other_family
    schedule = teacher.denoiser.schedule
    env = ReDiFVectorEnv(3, teacher, bank=tasks, action_type="sample")
    observation, _ = env.reset(options={"tasks": [0, 1, 2]})
    times = [1000.0] * 3
    for choices in ([0.0, 0.5, 0.9], [0.0, -0.5, 0.9], [0.0, 0.0, 0.9], [1.0] * 3):
        output = teacher.denoiser(observation["latents"], torch.tensor(times)).flatten(1)
        actions = torch.cat([output, torch.tensor(choices)[:, None]], dim=1)
        before, (observation, rewards, ends, _, infos) = observation, env.step(actions)
        seen = infos["final_obs"]["latents"]
        for row, (t, choice) in enumerate(zip(times, choices, strict=True)):
            s = 0.0 if ends[row] else t * (choice + 1) / 2
            gain = factor(schedule, t, s)
            assert_equal(seen[row], affine(schedule, before["latents"][row], t, s, gain))
            times[row] = s
    assert ends.tolist() == [True] * 3
    error = (infos["final_obs"]["latents"] - tasks.teacher_x_0[:3]).square().flatten(1).mean(1)
    torch.testing.assert_close(rewards, -error)


def test_other_families_keep_the_contract(other_family):
    teacher, tasks = other_family
    check_vector_env(ReDiFVectorEnv(3, teacher, bank=tasks))


def test_real_latents_fit_the_box(other_family):
    """Noise of the schedule's own size is a legal next latent."""
    teacher, tasks = other_family
    env = ReDiFVectorEnv(16, teacher, bank=tasks)
    env.reset(options={"tasks": range(16)})
    latents = tasks.x_T.flatten(1)
    env.step(torch.cat([latents, torch.zeros(16, 1)], dim=1))
