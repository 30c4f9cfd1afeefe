"""Students whose steps are of second order: trained, saved, exported, compared."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from small_world import GRID, ITERATION

from agents import ReDiFPPO, baselines, distill, distillation, planning, presets, reinforcement
from agents.baselines import METHODS
from agents.benchmark import students
from agents.export import can_export, export_student, make_scheduler
from agents.sampling import sample
from redif_env import Denoiser, TeacherBank, load_denoiser, load_teacher, mdp, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.loading import find_folder, load_scheduler
from redif_env.noise import FlowSchedule
from redif_env.rewards import MSE, CompressedSize
from redif_env.transition import Past

SAME_SAMPLES = {"rtol": 1e-4, "atol": 1e-4}  # float32 convolutions in another order
TWO = {"solver_order": 2}
ABLE = [name for name, kind in METHODS.items() if 2 in kind.solver_orders]


@pytest.fixture
def env(make_env):
    return make_env(**TWO)


def of_order(denoiser, order):
    stepping = copy.copy(denoiser)
    stepping.set_solver_order(order)
    return stepping


def answers(denoiser, order, tasks, grid=GRID):
    with torch.no_grad():
        times = torch.tensor([*grid, 0.0])
        return schedules.sample(of_order(denoiser, order), tasks.x_T, tasks.condition, times)


def last_tasks(env) -> TeacherBank:
    state = env.last_state
    return TeacherBank(state.x_T, state.teacher_x_0, state.condition)


def test_the_students_order_is_the_environments(env, make_env, make_model):
    assert make_model(env).policy.denoiser.solver_order == 2
    assert make_model(make_env()).policy.denoiser.solver_order == 1
    # whatever it was made from
    student = of_order(load_denoiser("digits"), 2)
    model = make_model(make_env(), policy_kwargs={"student": student})
    assert model.policy.denoiser.solver_order == model.student().solver_order == 1
    assert student.solver_order == 2


def test_the_deployed_steps_are_the_solvers(env, make_model):
    """In the environment, which knows no network, and by `sample`, which knows no environment."""
    model = make_model(env)
    obs, _ = env.reset(seed=2)
    for _ in range(env.max_steps):
        with torch.no_grad():
            obs, *_ = env.step(model.policy.get_distribution(obs).mode())
    tasks, student = last_tasks(env), model.student()
    wanted = answers(student, 2, tasks)
    torch.testing.assert_close(env.last_state.x_t, wanted, **SAME_SAMPLES)
    found, _ = sample(student, model.policy.timesteps, tasks.x_T, tasks.condition)
    torch.testing.assert_close(found, wanted, **SAME_SAMPLES)
    assert not torch.allclose(wanted, answers(student, 1, tasks), **SAME_SAMPLES)  # control


def test_a_policy_without_the_past_is_another(env, make_model):
    """Negative control: what is seen of the step before is made use of, after the first step."""
    policy = make_model(env).policy
    obs, _ = env.reset(seed=2)
    for index in range(env.max_steps):
        with torch.no_grad():
            mode = policy.get_distribution(obs).mode()
            blind = policy.get_distribution({**obs, mdp.PAST: obs[mdp.PAST] + 1}).mode()
            obs, *_ = env.step(mode)
        assert torch.equal(mode, blind) == (index != 1)  # of three steps the second


@pytest.mark.parametrize(
    "options", [{}, {"stochastic_steps": "all", "antithetic": False}, {"divergence": "kl"}], ids=str
)
def test_an_agent_learns_and_is_saved(env, make_model, options, tmp_path):
    """`learn` itself checks that the first update starts at ratio 1."""
    model = make_model(env, **options)
    before = [p.clone() for p in model.policy.denoiser.network.parameters()]
    model.learn(2 * ITERATION)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before, model.policy.denoiser.network.parameters(), strict=True)
    )
    model.save(tmp_path / "model.zip")
    loaded = ReDiFPPO.load(tmp_path / "model.zip", env=env)
    assert loaded.student().solver_order == 2
    obs, _ = env.reset(seed=5)
    assert torch.equal(model.policy.predict_values(obs), loaded.policy.predict_values(obs))
    loaded.learn(ITERATION)


def test_the_readme_of_an_export_needs_no_redif(tmp_path):
    """Lines that are run where this project can not be imported are tested in `test_export`."""
    student = of_order(load_denoiser("digits"), 2)
    with torch.no_grad():
        for weight in student.network.parameters():
            weight.mul_(1.02)
    config = load_scheduler(find_folder("digits")).config
    folder = export_student(student, GRID, config, tmp_path / "student")
    solver = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    solver.set_timesteps(timesteps=json.loads((folder / "redif.json").read_text())["timesteps"])
    labels = torch.arange(10)
    x_T = x_t = student.initial_noise(10, torch.Generator().manual_seed(0))
    for t in solver.timesteps:
        with torch.no_grad():
            x_t = solver.step(student.network(x_t, t, labels).sample, t, x_t).prev_sample
    tasks = TeacherBank(x_T, x_T, labels)
    torch.testing.assert_close(x_t, answers(student, 2, tasks), **SAME_SAMPLES)
    assert not torch.allclose(x_t, answers(student, 1, tasks), **SAME_SAMPLES)  # negative control
    # as a student again it has its order; as a teacher its scheduler, which steps so
    loaded = load_denoiser(folder)
    assert loaded.solver_order == 2
    assert load_teacher(folder, num_steps=3).denoiser.solver_order == 1
    torch.testing.assert_close(answers(loaded, 2, tasks), x_t, **SAME_SAMPLES)


def test_what_diffusers_can_not_step_so_is_not_exported(teacher):
    network = teacher.denoiser.network
    student = Denoiser(network, FlowSchedule(), "flow_prediction", (1, 8, 8), num_classes=10)
    assert can_export(student)
    student.set_solver_order(2)
    assert not can_export(student)
    with pytest.raises(InvalidArgumentError, match="solver_order 2"):
        make_scheduler({}, student)


@pytest.mark.parametrize("name", ABLE)
def test_other_techniques_train_such_students(teacher, bank, name):
    """One update down their own gradient, and a result that steps as it was trained."""
    blind = {"reward": MSE() + 0.001 * CompressedSize()}
    own = {"surrogate": blind}.get(name, {})
    grid = torch.tensor([*GRID, 0.0])
    options = {"iterations": 2, "batch_size": 8, "learning_rate": 1e-5, **own}
    result = baselines.run(name, teacher, bank, grid, **TWO, **options)
    assert result.student.solver_order == 2
    assert teacher.denoiser.solver_order == 1
    x_0 = result.sample(bank.x_T, bank.condition)
    torch.testing.assert_close(x_0, answers(result.student, 2, bank), **SAME_SAMPLES)
    plain = baselines.run(name, teacher, bank, grid, **options)
    assert plain.history != result.history  # negative control: other states, another loss


@pytest.mark.parametrize("name", sorted({*METHODS} - {*ABLE}))
def test_techniques_that_are_about_ddims_steps_refuse(teacher, bank, name):
    with pytest.raises(InvalidArgumentError, match=f"solver_order=2: pass 1: {name}"):
        baselines.run(name, teacher, bank, torch.tensor([*GRID, 0.0]), iterations=1, **TWO)


def test_trajectory_regression_asks_each_step_to_end_at_the_teachers(teacher, bank):
    """With the loss of the start written out: its own states, its own past, the teacher's ends."""
    grid = torch.tensor([*GRID, 0.0])
    options = {"iterations": 1, "batch_size": 1, "learning_rate": 0.0, "teacher_steps": 6}
    one = bank.subset(1)
    result = baselines.run("trajectory_regression", teacher, one, grid, **TWO, **options)
    denoiser, noise = of_order(teacher.denoiser, 2), teacher.denoiser.schedule
    uniform = schedules.uniform(noise, 6)
    ends = []
    for end in (*GRID[1:], 0.0):
        times = torch.cat([uniform, grid[1:]]).unique().flip(0)
        # a grid whose last time is not 0 has no last step of first order
        ends.append(_walk(denoiser, one, times[times >= end].tolist()))
    ends[-1] = one.teacher_x_0
    x_t, past, losses = one.x_T, None, []
    with torch.no_grad():
        for index, end in enumerate(ends):
            t, s = grid[index : index + 1], grid[index + 1 : index + 2]
            x0_pred = denoiser(x_t, t, one.condition)
            x_t = mdp.kernel.step(noise, x_t, x0_pred, t, s, past=past).mean
            losses.append(float((x_t - end).square().mean()))
            past = Past(x0_pred, t)
    assert result.history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


@torch.no_grad()
def _walk(denoiser, tasks, times):
    return schedules.sample(denoiser, tasks.x_T, tasks.condition, torch.tensor(times))


def test_ours_trains_such_students_like_the_others(teacher, bank):
    grid = torch.tensor([*GRID, 0.0])
    options = {"iterations": 1, "num_envs": 8, "batch_size": 8}
    train = functools.partial(reinforcement.train, teacher, bank, grid, **options)
    assert train(**TWO).student.solver_order == 2
    assert train().student.solver_order == 1
    with pytest.raises(InvalidArgumentError, match="free schedule"):
        train(**TWO, learned=True)


def test_a_kept_student_keeps_its_order(teacher, bank, tmp_path):
    grid = torch.tensor([*GRID, 0.0])
    options = {"iterations": 1, "batch_size": 8}
    result = baselines.run("backprop", teacher, bank, grid, **TWO, **options)
    students.save(tmp_path / "kept.safetensors", result, {"a": 1})
    loaded = students.load(tmp_path / "kept.safetensors", teacher.denoiser, {"a": 1})
    assert loaded.student.solver_order == 2
    tasks = bank.x_T, bank.condition
    torch.testing.assert_close(loaded.sample(*tasks), result.sample(*tasks), **SAME_SAMPLES)


SMALL = {
    "num_steps": 3,
    "iterations": 1,
    "num_envs": 16,
    "batch_size": 16,
    "bank_size": 32,
    "num_held_out": 100,
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """`distill` in small, with a cache of its own and few validation tasks."""
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distillation, "NUM_VALIDATION", 32)
    teacher = load_teacher("digits", num_steps=5)
    return lambda **options: distill(teacher, **{**SMALL, **options})


def test_distill_takes_steps_of_second_order(small, tmp_path):
    result = small(**TWO, out=tmp_path / "run")
    report = result.report
    assert result.student.solver_order == report["solver_order"] == 2
    assert set(report["held_out"]) == {"student", "ddim", "dpmpp2m_searched", "teacher_floor"}
    assert load_denoiser(tmp_path / "run" / "student").solver_order == 2
    held_out = {name: figures["paired_mse"] for name, figures in report["held_out"].items()}
    assert held_out["dpmpp2m_searched"] < held_out["ddim"]
    plain = small().report  # negative control
    assert plain["solver_order"] == 1
    assert "ddim_searched" in plain["held_out"]


def test_another_technique_is_distilled_with_so_too(small):
    report = small(**TWO, method="backprop").report
    assert report["solver_order"] == 2


@pytest.mark.parametrize(
    "options", [{"schedule": "learned"}, {"method": "progressive"}, {"solver_order": 3}], ids=str
)
def test_distill_refuses_before_it_asks_the_teacher(small, options, monkeypatch):
    monkeypatch.setattr(TeacherBank, "build", lambda *args, **options: pytest.fail("asked"))
    with pytest.raises(InvalidArgumentError, match="solver_order"):
        small(**{**TWO, **options})


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"num_steps": 4}, 2),
        ({"num_steps": 4, "solver_order": 1}, 1),
        ({"num_steps": 4, "schedule": "learned"}, 1),
        ({"num_steps": 4, "preset": "ddpo"}, 1),
        ({"num_steps": 4, "method": "backprop"}, 1),
        ({"num_steps": 4, "reward": "psnr"}, 1),
    ],
    ids=str,
)
def test_from_four_steps_on_students_step_to_second_order_where_that_can_be_had(
    small, options, order, tmp_path
):
    out = tmp_path / "run"
    report = small(**options, out=out).report
    assert report["solver_order"] == json.loads((out / "config.json").read_text())["solver_order"]
    assert report["solver_order"] == order


def test_no_folder_is_lost_for_an_order_that_nobody_asked_for(teacher):
    recipe, network = presets.preset("default", 4), teacher.denoiser.network
    assert recipe["env"]["solver_order"] == 2

    def order(network, given=None):
        flow = Denoiser(network, FlowSchedule(), "flow_prediction", (1, 8, 8), num_classes=10)
        return planning.choose_order(given, recipe, "ppo", flow)

    assert order(network) == 1
    assert order(network, given=2) == 2
    assert order(torch.nn.Flatten()) == 2  # which is no folder of diffusers with any steps
    assert planning.choose_order(None, recipe, "ppo", teacher.denoiser) == 2


def test_a_warm_up_takes_the_same_steps(small):
    report = small(**TWO, student=0.5, warm_up=2).report
    assert report["solver_order"] == 2
    assert report["held_out"]["warm_up"]["paired_mse"] > 0
