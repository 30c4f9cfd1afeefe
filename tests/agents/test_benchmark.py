"""The side-by-side benchmark: its tasks, every entrant in small, resuming, and the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch

from agents import presets
from agents.benchmark import (
    ENTRANTS,
    OURS,
    Run,
    Runs,
    Sizes,
    Task,
    make_task,
    plan,
    plan_trials,
    taking_part,
)
from agents.benchmark import entrants as entrants_module
from agents.benchmark import report as report_module
from agents.benchmark import runs as runs_module
from agents.benchmark import settings as settings_module
from agents.benchmark.report import compare, find_finished, report, tuning_table, weigh_standard
from agents.benchmark.runs import STANDARD
from agents.benchmark.tasks import Mixture, unconditional
from agents.comparison import Method, evaluate, measure
from redif_env import load_teacher, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import MSE, PSNR, Reward

SMALL = Sizes(train=64, validation=32, test=48)
BUDGET = 1500
ADAPTIVE = f"{OURS}-adaptive"
SURROGATE = "surrogate"  # has a task of its own
TRAINED = [
    name for name, entrant in ENTRANTS.items() if entrant.train is not None and name != SURROGATE
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_task("mixture", SMALL)


@pytest.fixture
def quick(monkeypatch):
    """Small rollouts and batches, so that every entrant gets several updates of a small budget."""
    train = entrants_module.reinforcement.train
    monkeypatch.setattr(
        entrants_module.reinforcement,
        "train",
        lambda *args, **options: train(*args, **{**options, "num_envs": 8, "batch_size": 8}),
    )
    few = settings_module.CHOICES[None][1]
    small = {name: {**few.get(name, {}), "batch_size": 8} for name in entrants_module.METHODS}
    monkeypatch.setattr(settings_module, "CHOICES", {None: {1: {**few, **small}}})


def make_runs(task, folder, lines="lines"):
    return Runs(task, folder / f"{lines}.jsonl", folder / "samples")


def test_the_mixtures_denoiser_is_the_posterior_mean(task):
    """Against the mean of x_0 drawn from the mixture, weighted by how likely they make x_t."""
    denoiser = task.teacher.denoiser
    network = denoiser.network
    generator = torch.Generator().manual_seed(0)
    means = network.means.repeat_interleave(40_000, 0)
    x_0 = means + network.variance**0.5 * torch.randn(means.shape, generator=generator)
    x_t, t = torch.tensor([[0.4, 0.1], [-0.2, 0.6]]), torch.tensor([400.0, 400.0])
    alpha, sigma = denoiser.schedule.alpha(t)[0], denoiser.schedule.sigma(t)[0]
    away = (x_t[:, None] - alpha * x_0).square().sum(2)
    weights = (-away / (2 * sigma**2)).softmax(1)
    wanted = weights @ x_0
    # the weighted mean of some 10^4 effective draws
    assert torch.allclose(denoiser(x_t, t, None), wanted, atol=0.01)


def test_the_mixtures_teacher_finds_every_mode_alike(task):
    modes = torch.cdist(task.test.teacher_x_0, task.teacher.denoiser.network.means)
    near, which = modes.min(1)
    assert float(near.max()) < 4 * task.teacher.denoiser.network.variance**0.5
    assert len(which.unique()) == len(task.teacher.denoiser.network.means)


def test_the_correction_starts_at_nothing_and_learns():
    schedule = load_teacher("digits").denoiser.schedule
    network = Mixture(schedule)
    x_t, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500.0)
    before = network(x_t, t)
    before.sum().backward()
    assert network.correction[-1].weight.grad.abs().max() > 0
    with torch.no_grad():
        network.correction[-1].bias += 1
    assert torch.allclose(network(x_t, t), before + 1)


def test_the_unconditional_teacher_is_the_null_class_built_in(teacher, bank):
    plain = unconditional(teacher)
    assert plain.denoiser.num_classes is None
    x_t, t = bank.x_T[:5], torch.tensor([999.0, 700.0, 500.0, 100.0, 3.0])
    null = torch.full((5,), teacher.denoiser.null_class)
    wanted = teacher.denoiser(x_t, t, null)
    assert torch.allclose(plain.denoiser(x_t, t, None), wanted, atol=1e-5)
    assert not torch.allclose(teacher.denoiser(x_t, t, null - 1), wanted, atol=1e-2)
    assert teacher.denoiser.num_classes == 10  # the original is left alone


def test_only_a_teacher_with_a_null_class_becomes_unconditional(task):
    with pytest.raises(InvalidArgumentError):
        unconditional(task.teacher)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_entrant_trains_within_its_budget(task, tmp_path, name):
    runs = make_runs(task, tmp_path)
    (run,) = plan([name], [2], [0], BUDGET)
    runs.execute([run])
    (line,) = runs.read()
    spent = sum(line["ledger"].values()) - line["ledger"].get("search", 0)
    # Rivals may exceed it by an iteration of theirs; distribution matching's is the dearest.
    assert BUDGET / 2 < spent <= BUDGET + 400
    if name == ADAPTIVE:  # its student is the start
        return
    assert line["updates"]["student"] > 1
    samples = runs.samples(run)
    assert samples.isfinite().all()
    start = schedules.sample(
        task.teacher.denoiser,
        task.test.x_T,
        None,
        schedules.explicit(line["timesteps"], task.teacher.denoiser.schedule),
    )
    assert not torch.equal(samples, start)
    assert line["paired_mse"] == pytest.approx(
        float((samples - task.test.teacher_x_0).square().mean()), abs=1e-6
    )


def test_solvers_run_once_and_pay_for_their_search(task, tmp_path):
    runs = make_runs(task, tmp_path)
    names = ["ddim", "ddim+search"]
    planned = plan(names, [2], [0, 1], BUDGET)
    assert [(run.method, run.seed, run.budget) for run in planned] == [(n, 0, 0) for n in names]
    runs.execute(planned)
    plain, searched = runs.read()
    assert plain["ledger"] == {}
    assert searched["ledger"]["search"] > 0
    assert searched["nfe"] == plain["nfe"] == 2
    # On validation tasks, where it was searched, it is better by construction; here by much.
    assert searched["paired_mse"] < plain["paired_mse"]


def test_a_plan_ends_a_seed_before_the_next(task):
    planned = plan(["ddim", "backprop", OURS], [1, 2], [3, 4], BUDGET)
    assert [run.seed for run in planned if run.method != "ddim"] == [3] * 4 + [4] * 4
    with pytest.raises(InvalidArgumentError):
        plan(["telepathy"], [1], [0], BUDGET)


@pytest.mark.parametrize(
    ("argument", "asked"),
    [
        ("methods", ([OURS, OURS], [1], [0])),
        ("num_steps", ([OURS], [2, 2], [0])),
        ("num_steps", ([OURS], [0], [0])),
        ("seeds", ([OURS], [2], [1, 1])),  # would pass for two trainings
        ("seeds", ([OURS], [2], [-1])),
    ],
)
def test_what_a_plan_names_makes_sense_and_is_named_once(argument, asked):
    with pytest.raises(InvalidArgumentError, match=f"{argument}="):
        plan(*asked, BUDGET)


def test_figures_on_other_numbers_of_tasks_are_not_replaced(task, tmp_path):
    run = Run("ddim", 2, 0, 0)
    make_runs(task, tmp_path).execute([run])
    fewer = make_runs(dataclasses.replace(task, test=task.test.subset(40)), tmp_path)
    before = fewer.read()
    with pytest.raises(InvalidArgumentError, match=r"num_test=40.*ddim-2.*--num-test"):
        fewer.execute([run])
    assert fewer.read() == before


def test_finished_runs_are_not_redone_and_lost_ones_are(task, tmp_path):
    runs = make_runs(task, tmp_path)
    planned = plan(["ddim", "dpmpp2m"], [2], [0], BUDGET)
    runs.execute(planned)
    before = runs.read()
    kept = [tmp_path / "lines" / f"{run.label}.safetensors" for run in planned]
    written = [path.stat().st_mtime_ns for path in kept]
    runs.execute(planned)
    assert [path.stat().st_mtime_ns for path in kept] == written
    kept[0].unlink()
    assert runs.find(planned[0]) is None
    runs.execute(planned)
    assert sorted(map(str, runs.read())) == sorted(map(str, before))
    other = dataclasses.replace(planned[0], settings={"learning_rate": 1.0})
    assert runs.find(other) is None


def test_a_report_needs_figures_alone_and_only_those_of_its_task(task, tmp_path):
    """What is kept of runs is what their samples give; other tasks do not take it for theirs."""
    runs = make_runs(task, tmp_path)
    planned = plan(["ddim", "dpmpp2m", "ddim+search"], [2], [0], BUDGET)
    runs.execute(planned)
    methods = {
        run.method: Method([runs.samples(run)], task.test.condition, paired=True) for run in planned
    }
    shutil.rmtree(runs.folder)  # on another machine
    finished = find_finished(runs, planned)
    assert len(finished) == 3
    wanted = evaluate(
        methods,
        task.yardstick,
        task.features,
        focus=[],
        figures=task.figures,
        num_resamples=len(task.bench.task_counts),
    )
    found = compare(runs, finished)
    for name, figures in wanted["methods"].items():
        for figure, interval in figures.items():
            excess = interval.pop("excess")
            own = found["methods"][name][figure]
            assert own.pop("excess") == pytest.approx(excess, rel=1e-4, abs=1e-7)
            assert own == pytest.approx(interval, rel=1e-5)
    other = dataclasses.replace(task, test=task.test.subset(40))
    assert other.identity != task.identity
    assert make_runs(other, tmp_path).find(planned[0]) is None


def test_a_run_that_another_process_is_at_is_left_to_it(task, tmp_path):
    from filelock import FileLock

    runs = make_runs(task, tmp_path)
    (run,) = plan(["ddim"], [2], [0], BUDGET)
    (tmp_path / "samples").mkdir()
    with FileLock(tmp_path / "samples" / f"{run.label}.lock"):
        runs.execute([run])
    assert runs.read() == []


def test_trials_are_as_many_for_every_method():
    first, *again = (trials for trials in settings_module.TRIALS if trials.task is None)
    assert {len(trials) for trials in first.settings.values()} == {8}
    assert set(first.settings) == {*entrants_module.METHODS, OURS} - {entrants_module.SURROGATE}
    for trials in again:  # of the closest
        assert all(len(own) >= len(trials.settings[OURS]) for own in trials.settings.values())
    own = 8 + 6 + 4 + 2 + 4 + 4 + 4, 2 + 11 + 11 + 4 + 13 + 3 + 3 * 2  # and remedies, by steps
    assert len(plan_trials([OURS, "ddim"])) == sum(own)
    assert len(plan_trials([OURS, "backprop"], "images")) == 2 + 2 + 2 + 4 + 9 + 7 + 2 + 9
    # Without trials of its own: those of digits, and its remedies.
    assert len(plan_trials([OURS], "digits-unconditional")) == 8 + 6 + 4 + 2 + 4 + 4 + 4 + 1 + 2


# Where settings that are used from so many steps on were tried; for 1 step else at 2.
TRIED_AT = {1: 1, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8}


@pytest.mark.parametrize("task", settings_module.CHOICES)
def test_what_is_used_was_tried(task):
    for fewest, choice in settings_module.CHOICES[task].items():
        name, num_steps = task or "digits", TRIED_AT[fewest]
        trials = plan_trials(choice, name)
        tried = [run for run in trials if run.num_steps == num_steps]
        if num_steps == 1:
            own = {run.method for run in tried}
            tried += [run for run in trials if run.num_steps == 2 and run.method not in own]
        assert tried
        for run in tried:
            settings = settings_module.chosen(run.method, name, run.num_steps)
            assert settings in [each.settings for each in tried if each.method == run.method]


def test_settings_are_those_of_the_task_and_of_the_number_of_steps():
    digits, mixture = (
        plan(["consistency", "ddpo"], [2], [0], BUDGET, name) for name in ("digits", "mixture")
    )
    assert "grid" in digits[0].settings
    assert "grid" not in mixture[0].settings
    assert digits[1] == mixture[1]
    two, three, eight = plan([OURS], [2, 3, 8], [0], BUDGET)
    digits = settings_module.CHOICES[None]
    assert two.settings == digits[2][OURS]
    assert three.settings == digits[3][OURS]
    assert eight.settings == digits[6][OURS]
    assert two.settings["reuse_forward"]
    # A distance of distributions is of a whole rollout, and times that are learned share no states.
    for name in settings_module.OF_DISTRIBUTIONS:
        assert {*two.settings} - {*settings_module.chosen(name, "digits", 2)} == {
            "num_envs",
            "reuse_forward",
        }
    times = settings_module.chosen(entrants_module.TIMES, "digits", 2)
    assert {*two.settings} - {*times} == {"reuse_forward"}
    four, eight = plan([OURS], [4, 8], [0], BUDGET, "images")
    assert four.settings["local_radius"] == [2, 2, 0, 0]
    assert "local_radius" not in eight.settings
    assert eight.settings == settings_module.CHOICES["images"][5][OURS]
    (warm,) = plan([f"progressive+{OURS}"], [2], [0], BUDGET)
    assert warm.settings["first"].items() < digits[1]["progressive"].items()
    assert warm.settings["learning_rate"] == two.settings["learning_rate"]
    assert "first.batch_size-32" in warm.label
    assert "local_radius-2_2_0_0-" in four.label


def test_long_settings_have_names_that_files_can_have():
    method = f"trajectory_regression+{OURS}"
    first, other = plan([method], [4], [0, 1], BUDGET)
    assert len(first.label) == len(other.label) == 200
    assert first.label.startswith(f"{method}-4-0-{BUDGET}-advantage_std-group-")
    assert first.label[-12:] != other.label[-12:]
    settings = {**first.settings, "learning_rate": 1e-3}
    assert dataclasses.replace(first, settings=settings).label[-12:] != first.label[-12:]
    (short,) = plan([OURS], [4], [0], BUDGET)  # as it is, so that files are found
    assert short.label.endswith("-solver_order-2-step_weights-0_0_1_1")


def test_one_order_of_steps_for_both_of_two_in_turn_and_none_for_learned_times():
    names = [f"{name}+{OURS}" for name in ("trajectory_regression", "progressive")]
    both, neither, times = plan([*names, f"{OURS}-times"], [4], [0], BUDGET)
    assert both.settings["solver_order"] == both.settings["first"]["solver_order"] == 2
    assert "solver_order" not in {*neither.settings, *neither.settings["first"]}
    assert times.settings.keys() == {"learning_rate"}


def test_a_solver_that_is_another_one_at_few_steps_takes_no_part_there():
    planned = plan(["dpmpp2m", "dpmpp3m", "dpmpp3m+search"], [4, 5], [0], BUDGET)
    assert [run.num_steps for run in planned] == [4, 5, 5, 5]


def test_training_on_other_tasks_or_by_another_recipe_is_another_run(task, tmp_path, monkeypatch):
    runs = make_runs(task, tmp_path)
    run, solver = Run(OURS, 1, 0, 200, {"num_envs": 16}), Run("ddim", 1, 0, 0)
    runs.execute([run, solver])
    assert runs.find(run) is not None
    fewer = make_runs(dataclasses.replace(task, train=task.train.subset(32)), tmp_path)
    assert fewer.find(run) is None
    assert fewer.find(solver) is not None
    changed = copy.deepcopy(presets.PRESETS)
    changed["default"]["agent"]["clip_range"] = 0.1
    monkeypatch.setattr(presets, "PRESETS", changed)
    assert runs.find(run) is None
    assert runs.find(solver) is not None


def test_a_rivals_defaults_are_part_of_its_recipe(monkeypatch):
    recipe = ENTRANTS["backprop"].recipe
    assert recipe["batch_size"] == 256
    assert recipe["ema_decay"] == ENTRANTS[OURS].recipe["ema_decay"] == 0.95
    assert ENTRANTS[f"progressive+{OURS}"].recipe["first"]["max_grad_norm"] == 0.5
    assert ENTRANTS["ddim"].recipe == {}
    json.dumps({name: entrant.recipe for name, entrant in ENTRANTS.items()})


def test_a_solver_is_judged_on_other_test_tasks_without_another_search(task, tmp_path, monkeypatch):
    run = Run("dpmpp2m+search", 3, 0, 0)
    make_runs(task, tmp_path).execute([run])
    (before,) = make_runs(task, tmp_path).read()
    fewer = make_runs(dataclasses.replace(task, test=task.test.subset(40)), tmp_path, "fewer")
    assert fewer.find(run) is None
    monkeypatch.setattr(Task, "search", None)
    fewer.execute([run])
    after = fewer.find(run)
    assert after["num_test"] == 40
    assert after["timesteps"] == before["timesteps"]
    assert after["ledger"] == before["ledger"]
    assert after["ledger"]["search"] > 0


def test_grids_and_figures_of_another_teacher_or_search_are_not_taken(task, tmp_path):
    runs = make_runs(task, tmp_path)
    searched = Run("ddim+search", 2, 0, 0)
    runs.execute([searched])
    grid, _ = runs.grid("ddim", 2)
    few = make_runs(dataclasses.replace(task, validation=task.validation.subset(3)), tmp_path)
    assert few.find(searched) is None
    assert not torch.equal(few.grid("ddim", 2)[0], grid)
    assert torch.equal(runs.grid("ddim", 2)[0], grid)  # neither takes the other's
    other = copy.deepcopy(task.teacher)
    other.denoiser.network.correction[-1].bias.data += 0.1
    changed = make_runs(dataclasses.replace(task, teacher=other), tmp_path)
    assert changed.find(searched) is None
    changed.execute([searched])
    assert len(changed.read()) == 2  # the first teacher's figures are still there


def test_no_solver_takes_the_grid_of_another(task, tmp_path):
    runs = make_runs(task, tmp_path)
    for _ in range(2):  # searched, then read
        grids = {solver: runs.grid(solver, 3)[0] for solver in ("ddim", "dpmpp2m")}
        assert not torch.equal(grids["ddim"], grids["dpmpp2m"])
        for solver, grid in grids.items():
            assert torch.equal(grid, task.search(solver, 3)[0])


def test_a_training_that_diverges_stops_no_other(task, tmp_path, capsys):
    runs = make_runs(task, tmp_path)
    settings = {"learning_rate": 1e30, "max_grad_norm": 1e30}
    planned = [Run("backprop", 1, 0, 3000, settings), Run("ddim", 1, 0, 0)]
    runs.execute(planned)
    assert [runs.find(run) is None for run in planned] == [True, False]
    assert "failed" in capsys.readouterr().out
    assert not list(runs.folder.glob("*.student.safetensors"))


def test_a_student_is_judged_on_other_tasks_without_training(task, tmp_path, monkeypatch):
    runs = make_runs(task, tmp_path)
    run, rival = Run(OURS, 1, 0, 200, {"num_envs": 16}), Run("backprop", 2, 0, 200)
    runs.execute([run, rival])
    before = {each.method: runs.samples(each) for each in (run, rival)}
    lines = {line["method"]: line for line in runs.read()}

    def refuse(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(entrants_module.reinforcement, "train", refuse)
    monkeypatch.setattr(entrants_module.METHODS["backprop"], "train", refuse)
    other = make_runs(dataclasses.replace(task, test=task.test.subset(40)), tmp_path, "fewer")
    other.execute([run, rival])
    for each in (run, rival):
        assert torch.equal(other.samples(each), before[each.method][:40])
        line = other.find(each)
        assert line["num_test"] == 40
        untrained = ("ledger", "updates", "seconds", "history", "timesteps", "nfe")
        assert {k: line[k] for k in untrained} == {k: lines[each.method][k] for k in untrained}
    fewer = make_runs(dataclasses.replace(task, train=task.train.subset(32)), tmp_path)
    with pytest.raises(AssertionError, match="trained again"):
        fewer.execute([run])


@pytest.mark.usefixtures("quick")
def test_the_report_says_who_is_better(task, tmp_path):
    """Ours, barely trained, against back-propagation and against the teacher's own answers."""
    runs = make_runs(task, tmp_path / "runs")
    planned = plan(["ddim", "dpmpp2m+search", "backprop", OURS], [1, 2], [0, 1], BUDGET)
    assert planned.pop() == STANDARD
    assert report(runs, planned, tmp_path) == "No run is finished."
    runs.execute(planned)
    text = report(runs, planned, tmp_path)
    assert (tmp_path / "mixture.md").read_text() == text
    written = json.loads((tmp_path / "mixture.json").read_text())
    two = written["steps"]["2"]
    for name in ("ddim", "backprop", OURS):
        assert f"| {name} |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| backprop | 0."))
    one, two_steps = (written["steps"][n]["methods"]["backprop"]["paired_mse"] for n in "12")
    cells = [cell.split()[0] for cell in row.strip("| ").split(" | ")[1:]]
    assert [float(c) for c in cells] == pytest.approx(
        [each["estimate"] for each in (one, two_steps)], abs=1e-3
    )
    assert two["methods"][OURS]["runs"]["seeds"] == 2
    assert two["methods"]["ddim"]["runs"]["cost"] == 0
    own = [line for line in runs.read() if line["method"] == OURS and line["num_steps"] == 2]
    mean = sum(line["paired_mse"] for line in own) / 2
    assert two["methods"][OURS]["paired_mse"]["estimate"] == pytest.approx(mean, abs=1e-5)
    words = {
        (row["figure"], row["rival"]): row["verdict"]
        for row in two["comparisons"]
        if row["method"] == OURS
    }
    assert {rival for _, rival in words} == {"ddim", "dpmpp2m+search", "backprop"}
    assert "better" in text or "worse" in text or "not shown" in text
    for name in ("mixture-nfe.png", "mixture-cost.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert not list(tmp_path.glob("*.tmp"))


def test_few_steps_are_weighed_against_many_of_a_solver(task, tmp_path, monkeypatch):
    """Against a stand-in of one step, which is cheap to search and worse than two trained ones."""
    standard = Run("dpmpp2m+search", 1, 0, 0)
    for module in (runs_module, report_module):
        monkeypatch.setattr(module, "STANDARD", standard)
    runs = make_runs(task, tmp_path)
    settings = {"num_envs": 16}
    planned = [Run(OURS, 2, seed, 3000, settings) for seed in (0, 1)]
    runs.execute(planned)
    assert weigh_standard(runs, planned) == {}
    planned += [standard]
    assert weigh_standard(runs, planned) == {}  # not run yet
    runs.execute([standard])
    found = weigh_standard(runs, planned)
    (each,) = found.values()
    assert {row["verdict"] for row in each["comparisons"] if row["figure"] == "paired_mse"} == {
        "better"
    }
    text = report(runs, planned, tmp_path)
    assert "How many steps do for 1 step of `dpmpp2m+search`" in text
    assert "## 1 step\n" not in text  # it is nobody's rival at its own number of steps
    assert json.loads((tmp_path / "mixture.json").read_text())["standard"].keys() == found.keys()


def test_ours_trains_by_the_recipe_of_its_line_and_takes_rewards_without_a_map(task, monkeypatch):
    """One step and no map, for which the default recipe by itself takes other epochs."""
    given, train = {}, entrants_module.reinforcement.train

    def noted(*args, **options):
        given.update(options)
        return train(*args, **options)

    monkeypatch.setattr(entrants_module.reinforcement, "train", noted)
    blind, entrant = dataclasses.replace(task, reward=PSNR()), ENTRANTS[OURS]
    settings = {"num_envs": 16, "batch_size": 8}
    result = entrant.train(blind, torch.tensor([999.0, 0.0]), 200, 0, **settings)
    assert result.ledger.updates["student"] > 0
    assert given["n_epochs"] == entrant.recipe["agent"]["n_epochs"]


def test_ours_takes_from_settings_what_the_recipe_has_for_some_numbers_of_steps(task, monkeypatch):
    made, make = [], entrants_module.reinforcement.make_model

    def noted(*args, **options):
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr(entrants_module.reinforcement, "make_model", noted)
    grid = torch.tensor([999.0, 700.0, 400.0, 200.0, 0.0])
    own = {"step_weights": [0, 0, 1, 1], "advantage_std": "group", "solver_order": 2}
    for settings in ({}, own):
        ENTRANTS[OURS].train(task, grid, 400, 0, num_envs=16, batch_size=8, **settings)
    plain, late = made[0], made[-1]
    assert (plain.step_weights, plain.advantage_std) == (None, "rollout")
    assert plain.env.get_attr("solver_order", [0]) == [1]
    assert (late.step_weights, late.advantage_std) == ([0, 0, 1, 1], "group")
    assert late.env.get_attr("solver_order", [0]) == [2]


@pytest.mark.usefixtures("quick")
def test_on_a_reward_without_a_gradient_methods_are_ranked_by_it(task, tmp_path):
    class Right(Reward):
        """How far to the right a point is."""

        def __call__(self, x_0, teacher_x_0, condition):
            return x_0[:, 0].detach()

    blind = dataclasses.replace(task, reward=MSE() + 0.5 * Right())
    # Heun of diffusers takes no network that predicts the sample, as the mixture's does.
    assert set(taking_part(task)) == {*ENTRANTS} - {SURROGATE, "heun", "heun+search"}
    assert {SURROGATE, OURS, "ddpo"} < set(taking_part(blind))
    runs = make_runs(blind, tmp_path)
    planned = plan(["output_regression", SURROGATE, OURS], [2], [0], BUDGET)
    runs.execute(planned)
    text = report(runs, planned, tmp_path)
    found = json.loads((tmp_path / "mixture.json").read_text())["steps"]["2"]
    for line in runs.read():
        (run,) = (each for each in planned if each.method == line["method"])
        samples, answers = runs.samples(run), task.test.teacher_x_0
        wanted = (0.5 * samples[:, 0] - (samples - answers).square().mean(1)).mean()
        own = found["methods"][line["method"]]["reward"]
        assert own["estimate"] == pytest.approx(float(wanted), abs=1e-5)
        assert line["reward"] == pytest.approx(float(wanted), abs=1e-5)
    assert "`ours`, reward." in text
    figures = {row["figure"] for row in found["comparisons"]}
    assert {"reward", "paired_mse", "sliced_wasserstein"} <= figures


def test_an_adaptive_entrant_counts_the_steps_that_samples_take(task, tmp_path):
    settings = {**settings_module.CHOICES[None][1][ADAPTIVE], "num_envs": 16, "batch_size": 16}
    runs = make_runs(task, tmp_path)
    runs.execute([Run(ADAPTIVE, 2, 0, BUDGET, settings)])
    (line,) = runs.read()
    assert 1 <= line["nfe"] <= 4
    # It is the teacher's network: only the times differ, and the grid has two more than asked for.
    assert len(line["timesteps"]) == 2 + 2 + 1
    assert line["ledger"]["search"] > 2 * 32 * 2
    assert not list(runs.folder.glob("*.student.safetensors"))  # weights alone would not do


def test_measure_is_zero_for_the_answers_themselves(task):
    figures = measure(task.test.teacher_x_0, task.yardstick, task.features)
    assert figures["paired_mse"] == 0
    worse = measure(task.test.teacher_x_0 + 0.3, task.yardstick, task.features)
    assert worse["sliced_wasserstein"] > 2 * figures["sliced_wasserstein"]
    assert worse["coverage"] < figures["coverage"]


def test_the_images_task_needs_a_teacher_and_no_other_takes_one():
    for name, folder in (("images", None), ("digits", "somewhere")):
        with pytest.raises(InvalidArgumentError) as caught:
            make_task(name, SMALL, folder)
        assert caught.value.argument == "teacher"


def test_trials_are_listed_best_first_for_each_budget():
    rows = [
        {
            "method": "backprop",
            "num_steps": 4,
            "settings": {"learning_rate": rate},
            "paired_mse": error,
            "budget": budget,
        }
        for rate, error, budget in ((0.1, 0.5, 1000), (0.2, 0.25, 1000), (0.3, 0.1, 2000))
    ]
    lines = tuning_table(rows).splitlines()
    assert "reward" not in lines[0]
    assert lines[2].startswith("| backprop | 4 | 1 | learning_rate 0.2")
    assert lines[4].startswith("| backprop | 4 | 2 | learning_rate 0.3")
    for row, reward in zip(rows, (-0.1, -0.2, -0.3), strict=True):
        row["reward"] = reward  # where it has no gradient it decides
    assert tuning_table(rows).splitlines()[2].startswith("| backprop | 4 | 1 | learning_rate 0.1")
