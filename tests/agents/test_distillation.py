"""distill, from a teacher to a folder, in the smallest run that has all of its parts."""

from __future__ import annotations

import functools
import inspect
import json
import math

import pytest
import torch
from safetensors.torch import load_model
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import pixel_unet

from agents import distill, distillation
from agents.baselines import METHODS
from agents.distillation import find_judge, last_taken, next_free, versions
from agents.evaluation import compare
from redif_env import Denoiser, KernelSolver, schedules
from redif_env.errors import InvalidArgumentError, TeacherFolderError
from redif_env.loading import load_denoiser, load_teacher
from redif_env.noise import SDESchedule, VPSchedule
from redif_env.rewards import MSE, PSNR
from redif_env.teacher import Teacher, TeacherBank

SMALL = {
    "num_steps": 2,
    "iterations": 2,
    "num_envs": 16,
    "group_size": 4,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "stochastic_steps": "one",
    "antithetic": True,
    "eta": 0.1,
    "min_std": 0.02,
    "ema_decay": 0.5,
    "bank_size": 64,
    "num_held_out": 100,
    "eval_every": 1,
    "seed": 0,
}


NUM_VALIDATION = 64


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of our own, and few enough validation tasks to search a grid in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(distillation, "NUM_VALIDATION", NUM_VALIDATION)
        yield


def new_teacher() -> Teacher:
    return load_teacher("digits", num_steps=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A whole run with a searched grid, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "deep" / "run"
    return distill(new_teacher(), **SMALL, out=out), out


def weights(denoiser) -> torch.Tensor:
    return torch.cat([p.flatten() for p in denoiser.network.parameters()])


def test_the_student_is_ready_to_use(run):
    result, _ = run
    assert result.timesteps.shape == (3,)
    assert result.timesteps[-1] == 0
    assert not result.student.training
    own = result.model.student()
    assert torch.equal(weights(result.student), weights(own))
    # but training on with the agent does not move the result
    ours, theirs = (next(each.network.parameters()) for each in (result.student, own))
    assert ours.data_ptr() != theirs.data_ptr()
    assert not torch.equal(weights(result.student), weights(new_teacher().denoiser))


def test_the_report_has_the_promised_keys(run):
    report = run[0].report
    assert report["num_steps"] == report["nfe"] == 2
    assert report["seed"] == 0
    assert report["trajectories"] == 2 * 16
    assert report["seconds"] >= report["training_seconds"] > 0
    assert report["timesteps"] == run[0].timesteps[:-1].tolist()
    assert report["versions"] == versions()
    assert {"redif", "torch", "diffusers", "stable_baselines3"} <= set(report["versions"])
    figures = {"paired_mse", "frechet", "label_agreement"}
    assert set(report["held_out"]) == {"student", "ddim", "ddim_searched", "teacher_floor"}
    assert all(set(part) == figures for part in report["held_out"].values())
    assert report["held_out"]["teacher_floor"]["paired_mse"] is None
    assert [record["iteration"] for record in report["history"]] == [0, 1, 2]
    json.dumps(report, allow_nan=False)  # plain data


def test_the_figures_are_those_of_the_test_tasks(run):
    """Measured again from the outside, on noise of the test split."""
    result, _ = run
    teacher = new_teacher()
    test = TeacherBank.build(teacher, 100, split="test")
    other = TeacherBank.build(teacher, 100, split="test", seed=1)
    judge = find_judge(teacher)
    denoiser = teacher.denoiser
    uniform = schedules.uniform(denoiser.schedule, 2)
    samplers = {
        "student": (result.student, result.timesteps),
        "ddim": (denoiser, uniform),
        "ddim_searched": (denoiser, result.timesteps),
    }
    for name, (sampler, grid) in samplers.items():
        with torch.no_grad():
            x_0 = schedules.sample(sampler, test.x_T, test.condition, grid)
        assert result.report["held_out"][name] == pytest.approx(compare(x_0, test, other, judge))
    floor = compare(test.teacher_x_0, test, other, judge)
    assert result.report["held_out"]["teacher_floor"]["frechet"] == pytest.approx(floor["frechet"])
    held_out = result.report["held_out"]
    assert held_out["ddim_searched"]["paired_mse"] < held_out["ddim"]["paired_mse"]


def test_no_task_is_in_two_splits():
    teacher = new_teacher()
    banks = [
        TeacherBank.build(teacher, size, split=split, seed=seed)
        for size, split, seed in [
            (SMALL["bank_size"], "train", 0),
            (NUM_VALIDATION, "validation", 0),
            (100, "test", 0),
            (100, "test", 1),
        ]
    ]
    noise = torch.cat([bank.x_T.flatten(1) for bank in banks])
    assert len(noise.unique(dim=0)) == len(noise)


def test_the_folder_holds_the_whole_run(run):
    _, out = run
    names = {path.name for path in out.iterdir() if "tfevents" not in path.name}
    files = {"config.json", "summary.json", "samples.png", ".lock"}
    assert names == {*files, "student", "checkpoints"}
    assert len([path for path in out.iterdir() if "tfevents" in path.name]) == 1
    student = {path.name for path in (out / "student").iterdir()}
    assert student == {"model_index.json", "unet", "scheduler", "redif.json", "README.md"}


def test_the_files_say_what_was_run_and_found(run):
    result, out = run
    assert json.loads((out / "summary.json").read_text()) == result.report
    config = json.loads((out / "config.json").read_text())
    for name, value in SMALL.items():
        assert config[name] == value
    assert config["timesteps"] == result.timesteps.tolist()
    assert set(config) >= set(inspect.signature(distill).parameters) - {"callback"}


def test_the_config_names_the_teacher(run):
    """So that the run can be repeated: no `<object at 0x...>`."""
    config = json.loads((run[1] / "config.json").read_text())
    assert "object at" not in json.dumps(config)
    assert "digits" in json.dumps(config["teacher"])


def test_the_exported_student_is_the_one_that_was_judged(run):
    result, out = run
    exported = load_denoiser(out / "student")
    assert torch.equal(weights(exported), weights(result.student))
    info = json.loads((out / "student" / "redif.json").read_text())
    assert info["timesteps"] == result.timesteps[:-1].tolist()


def test_the_curves_are_in_the_folder(run):
    events = EventAccumulator(str(run[1]))
    events.Reload()
    assert {"eval/paired_mse", "train/kl", "rollout/ep_rew_mean"} <= set(events.Tags()["scalars"])
    assert "eval/samples" in events.Tags()["images"]


def one_step(**changes):
    """The smallest run: one step, whose grid is found at once."""
    return distill(new_teacher(), **{**SMALL, "num_steps": 1, "schedule": [850.0], **changes})


@pytest.fixture(scope="module")
def repeated(run):
    """The same run again, without a folder; now the banks are in the cache."""
    return distill(new_teacher(), **SMALL)


@pytest.fixture(scope="module")
def small(cache):
    return one_step()


def test_the_same_seed_gives_a_bit_identical_student(run, repeated):
    first = run[0]
    assert torch.equal(weights(first.student), weights(repeated.student))
    for name in ("held_out", "history", "timesteps"):
        assert first.report[name] == repeated.report[name], name


def test_another_seed_gives_another_student(small):
    assert not torch.equal(weights(one_step(seed=1).student), weights(small.student))


def test_the_ledger_is_the_same_whether_the_banks_were_cached(run, repeated):
    assert run[0].report["network_evaluations"] == repeated.report["network_evaluations"]


def test_the_ledger_counts_every_forward_once(run):
    ledger = run[0].report["ledger"]
    # training and validation tasks, 5 steps each
    assert ledger["teacher"] == (64 + NUM_VALIDATION) * 5
    # 2 iterations of 4 groups of 4: states of the first and the second step, see test_sharing;
    # and 16 rows of 2 steps to measure the first gap
    assert ledger["rollout"] == 2 * (4 + (2 + 2 * 4)) + 16 * 2
    # 3 epochs of one state of each group; backward counts twice
    assert ledger["update"] == 3 * 3 * 2 * 4
    assert ledger["search"] % (2 * NUM_VALIDATION) == 0  # whole grids of 2 steps
    assert ledger["reward"] == 0
    assert run[0].report["network_evaluations"] == sum(ledger.values())


def test_a_reward_with_networks_is_on_the_ledger():
    reward = MSE()
    reward.nfe = 2
    assert one_step(reward=reward).report["ledger"]["reward"] == 2 * 2 * 16


def test_what_the_teacher_did_before_is_not_on_the_ledger(small):
    teacher = new_teacher()
    teacher.sample(torch.zeros(1000, 1, 8, 8), torch.zeros(1000, dtype=torch.int64))
    options = {**SMALL, "num_steps": 1, "schedule": [850.0]}
    used = distill(teacher, **options).report["ledger"]
    assert used == small.report["ledger"]


def test_guidance_doubles_the_cost():
    teacher = load_teacher("digits", num_steps=5, guidance_scale=2.0)
    options = {"num_steps": 1, "schedule": [850.0], "stochastic_steps": "all"}
    report = distill(teacher, **{**SMALL, **options}).report
    assert (report["num_steps"], report["nfe"]) == (1, 2)
    ledger = report["ledger"]
    assert ledger["teacher"] == 2 * 64 * 5  # a given grid needs no validation tasks
    assert ledger["rollout"] == 2 * 3 * 16
    assert ledger["update"] == 3 * 2 * 2 * 16  # one epoch, as it is one step


def test_training_improves_the_held_out_error():
    """One step, where plain DDIM does badly: 15 iterations take off a third and more."""
    changes = {"iterations": 15, "num_envs": 64, "batch_size": 32, "learning_rate": 3e-4}
    result = one_step(**changes, seed=1)
    start, end = result.report["history"][0], result.report["history"][-1]
    # from 0.064 to 0.033 - 0.037, depending on the seed
    assert end["paired_mse"] < 0.8 * start["paired_mse"]
    held_out = result.report["held_out"]["student"]
    assert held_out["paired_mse"] < 0.8 * result.report["held_out"]["ddim"]["paired_mse"]


def test_a_reward_without_a_map_falls_back_to_global_credit(small):
    assert one_step(reward=PSNR()).model.credit == "global"
    assert small.model.credit == "local"


def test_changes_reach_the_agent_and_are_on_record(tmp_path):
    changes = {"target_kl": 0.05, "adaptive_lr": True, "exploration_unit": "prediction"}
    model = one_step(changes=changes, out=tmp_path / "run").model
    assert (model.target_kl, model.adaptive_lr) == (0.05, True)
    assert model.policy_kwargs["exploration_unit"] == "prediction"
    assert model.policy_kwargs["exploration_noise"] == "rademacher"  # the recipe's
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["changes"] == changes


class CountRollouts(BaseCallback):
    """A callback of one's own."""

    count = 0

    def _on_rollout_end(self) -> None:
        self.count += 1

    def _on_step(self) -> bool:
        return True


def test_without_out_nothing_is_written_and_callbacks_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = CountRollouts()
    result = one_step(callback=callback)
    assert callback.count == SMALL["iterations"]
    assert math.isfinite(result.report["held_out"]["student"]["paired_mse"])
    assert not list(tmp_path.iterdir())


def test_callbacks_may_be_what_stable_baselines_takes_for_one():
    seen = []
    rollouts = CountRollouts()
    one_step(callback=[rollouts, CountRollouts()])
    assert rollouts.count == SMALL["iterations"]
    one_step(callback=lambda variables, _: seen.append(variables["self"].num_timesteps) or True)
    assert seen == [16, 32]


@pytest.mark.parametrize("path", ["file/run", "file/deep/run", "/proc/nowhere/run"])
def test_a_folder_that_can_not_be_made_is_refused_before_anything_is_computed(tmp_path, path):
    (tmp_path / "file").touch()
    teacher = new_teacher()
    with pytest.raises(InvalidArgumentError, match="written to") as caught:
        distill(teacher, **SMALL, out=tmp_path / path)
    assert caught.value.argument == "out"
    assert teacher.denoiser.network_evaluations == 0


def test_an_existing_folder_is_refused_before_anything_is_computed(tmp_path):
    teacher = new_teacher()
    with pytest.raises(InvalidArgumentError, match="exists") as caught:
        distill(teacher, **SMALL, out=tmp_path)
    assert caught.value.argument == "out"
    assert teacher.denoiser.network_evaluations == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("iterations", 0),
        ("num_envs", 0),
        ("group_size", 3),
        ("group_size", 1),
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("eta", 2.0),
        ("min_std", 0.0),
        ("ema_decay", 1.5),
        ("bank_size", 0),
        ("num_held_out", 10),
        ("eval_every", 0),
        ("seed", -1),
        ("schedule", "cubic"),
        ("schedule", [100.0, 800.0]),
        ("schedule", [800.0, 400.0]),
        ("schedule", "free"),
        ("reward", "beauty"),
        ("stochastic_steps", "two"),
        ("callback", 3),
        ("callback", [CountRollouts(), 3]),
        ("min_std", "0.1"),
        ("changes", {"target": 0.05}),
        ("changes", ["target_kl"]),
        ("changes", {"eta": 0.1}),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, name, value):
    with pytest.raises(InvalidArgumentError):
        one_step(**{name: value}, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_refused_schedule_names_those_of_distill():
    names = "one of 'search', 'learned', 'uniform', 'karras'"
    with pytest.raises(InvalidArgumentError, match=names):
        one_step(schedule="free")


@pytest.mark.parametrize(
    ("name", "value"),
    [("group_size", 3), ("group_size", 1), ("eta", 2.0), ("min_std", 0.0), ("eval_every", 0)],
)
def test_bad_arguments_are_refused_before_the_teacher_is_asked(tmp_path, monkeypatch, name, value):
    """With a large teacher and bank, the answers take hours."""
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path))
    teacher = new_teacher()
    with pytest.raises(InvalidArgumentError):
        distill(teacher, **{**SMALL, "num_steps": 1, name: value})
    assert teacher.denoiser.network_evaluations == 0


def test_a_missing_teacher_is_a_typed_error(tmp_path):
    with pytest.raises(TeacherFolderError, match="nowhere"):
        distill(tmp_path / "nowhere", **SMALL, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("teacher", [3, None])
def test_what_is_no_teacher_is_a_typed_error(teacher):
    with pytest.raises(InvalidArgumentError, match="teacher"):
        distill(teacher, **SMALL)


def test_next_free_names_the_first_folder_that_does_not_exist(tmp_path):
    assert next_free(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert next_free(tmp_path / "run") == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-4").mkdir()
    assert next_free(tmp_path / "run") == tmp_path / "run-3"
    assert last_taken(tmp_path / "run") == tmp_path / "run-2"
    assert last_taken(tmp_path / "none") == tmp_path / "none"


def test_a_judge_is_found_beside_the_teacher_or_not_at_all(tmp_path, run):
    assert find_judge(new_teacher()) is not None
    assert find_judge(load_teacher(run[1] / "student", num_steps=5)) is None
    nameless = Teacher(new_teacher().denoiser, new_teacher().make_solver, num_steps=5)
    assert find_judge(nameless) is None


def test_learned_times_start_at_the_searched_grid_and_are_exported(tmp_path):
    """A whole short run: what is reported, exported and judged is the schedule head's grid."""
    out = tmp_path / "run"
    result = distill(**{**SMALL, "schedule": "learned", "iterations": 2, "out": out})
    head = result.model.policy.schedule_head
    assert torch.equal(result.timesteps, head.grid())
    assert result.model.trained == "both"
    searched = result.model.policy.timesteps
    assert not torch.equal(result.timesteps, searched)
    assert (result.timesteps - searched).abs().max() < 100  # two iterations do not go far
    exported = json.loads((out / "student" / "redif.json").read_text())["timesteps"]
    assert exported == result.timesteps[:-1].tolist()
    assert result.report["timesteps"] == exported
    assert result.report["ledger"]["search"] > 0


BLIND = "mse + 0.1*compressed_size"
METHOD = {
    "method": "progressive",
    "num_steps": 1,
    "schedule": [850.0],
    "iterations": 4,
    "num_envs": 32,
    "batch_size": 16,
    "bank_size": 64,
    "num_held_out": 100,
    "eval_every": 2,
}


def test_another_method_has_the_same_report_and_folder(tmp_path, small):
    out = tmp_path / "run"
    result = distill(new_teacher(), **METHOD, out=out)
    assert result.model is None
    assert set(result.report) == set(small.report)
    assert result.report["method"] == "progressive"
    assert [record["iteration"] for record in result.report["history"]] == [0, 2, 4]
    ledger = result.report["ledger"]
    # 4 iterations of 2 updates of 16 tasks; two steps of a teacher for each step of the student
    assert ledger["update"] == 3 * 4 * 2 * 16
    assert ledger["targets"] == 2 * 4 * 2 * 16
    assert ledger["teacher"] == 64 * 5
    exported = load_denoiser(out / "student")
    assert torch.equal(weights(exported), weights(result.student))
    assert not torch.equal(weights(exported), weights(new_teacher().denoiser))
    assert json.loads((out / "student" / "redif.json").read_text())["timesteps"] == [850]
    assert json.loads((out / "summary.json").read_text()) == result.report


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "telepathy"),
        ("preset", "grpo"),
        ("eta", 0.1),
        ("group_size", 4),
        ("n_epochs", 2),
        ("lora_rank", 4),
        ("changes", {"target_kl": 0.05}),
        ("schedule", "learned"),
        ("reward", "ssim"),
        ("callback", CountRollouts()),
        ("callback", CountRollouts),
        ("batch_size", 0),
        ("ema_decay", 2.0),
    ],
)
def test_what_another_method_can_not_use_is_refused(tmp_path, name, value):
    teacher = new_teacher()
    with pytest.raises(InvalidArgumentError) as caught:
        distill(teacher, **{**METHOD, name: value}, out=tmp_path / "run")
    assert caught.value.argument == name
    assert not list(tmp_path.iterdir())


def test_a_surrogate_is_trained_on_a_reward_that_needs_one():
    result = distill(new_teacher(), **{**METHOD, "method": "surrogate"}, reward=BLIND)
    assert result.report["method"] == "surrogate"
    ledger = result.report["ledger"]
    assert ledger["update"] > 0
    start = weights(new_teacher().denoiser)
    assert (weights(result.student) - start).abs().max() > 0


@pytest.mark.parametrize(("method", "reward"), [("surrogate", "mse"), ("backprop", BLIND)])
def test_a_reward_of_the_wrong_kind_for_a_method_is_refused_before_any_work(method, reward):
    teacher = new_teacher()
    with pytest.raises(InvalidArgumentError, match="reward=") as caught:
        distill(teacher, **{**METHOD, "method": method}, reward=reward)
    assert caught.value.argument == "reward"
    assert teacher.denoiser.network_evaluations == 0


class Affine(torch.nn.Module):
    """A network of points that diffusers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x_t, t):
        return self.layer(x_t)


def test_a_module_of_ones_own_leaves_its_weights_in_the_folder(tmp_path):
    """It can be no diffusers folder, and that must not cost the run at its end."""
    torch.manual_seed(0)
    schedule = load_denoiser("digits").schedule
    denoiser = Denoiser(Affine(), schedule, "sample", (2,))
    teacher = Teacher(denoiser, functools.partial(KernelSolver, denoiser), 5)
    out = tmp_path / "run"
    result = distill(teacher, **SMALL, out=out)
    assert {"summary.json", "config.json", "student.safetensors"} <= {p.name for p in out.iterdir()}
    network = Affine()
    assert load_model(network, out / "student.safetensors") == (set(), [])
    for name, weight in result.student.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)
        assert not torch.equal(denoiser.network.state_dict()[name], weight)


def teacher_on(schedule, config=None) -> Teacher:
    """A diffusers network on a noise schedule of one's own."""
    denoiser = Denoiser(pixel_unet(), schedule, "v_prediction", (3, 8, 8))

    def solver():
        made = KernelSolver(denoiser)
        made.config |= config or {}
        return made

    return Teacher(denoiser, solver, 5)


def test_a_network_of_diffusers_on_another_schedule_leaves_its_weights(tmp_path):
    """Diffusers has no scheduler for it: a folder would sample something else."""
    out = tmp_path / "run"
    result = distill(teacher_on(SDESchedule()), **SMALL, out=out)
    assert not (out / "student").exists()
    network = pixel_unet()
    assert load_model(network, out / "student.safetensors") == (set(), [])
    trained = result.student.network.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in network.state_dict().items())


def test_a_solver_that_can_not_be_exported_is_refused_before_training(tmp_path):
    teacher = teacher_on(VPSchedule(torch.linspace(0.999, 0.01, 1000)), {"beta_schedule": "mine"})
    with pytest.raises(InvalidArgumentError, match="scheduler_config="):
        distill(teacher, **SMALL, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


GUIDED = {**SMALL, "num_steps": 1, "schedule": [850.0], "guidance_scale": 1.0, "warm_up": 2}


@pytest.mark.parametrize("student", [None, {"layers_per_block": 1}])
def test_guidance_is_distilled_away_in_smaller_students_and_the_warm_up_too(monkeypatch, student):
    teacher = load_teacher("digits", num_steps=5, guidance_scale=2.0)
    scales = []
    train = distillation.OutputRegression.train

    def watched(*args, **options):
        result = train(*args, **options)
        scales.append(result.student.guidance_scale)
        return result

    monkeypatch.setattr(distillation.OutputRegression, "train", watched)
    result = distill(teacher, student=student, **GUIDED)
    assert scales == [1.0]
    assert (result.student.guidance_scale, result.report["nfe"]) == (1.0, 1)
    assert result.report["ledger"]["update"] == 3 * SMALL["iterations"] * 4  # a group's one state


def test_other_methods_have_no_recipe_of_ppo(monkeypatch):
    """At one step that has minibatches of 64, from six steps on a tenth of the rate."""
    seen = []
    method = METHODS["backprop"]
    train = method.train

    def watched(*args, **options):
        seen.append((options["batch_size"], options["learning_rate"]))
        return train(*args, **options)

    monkeypatch.setattr(method, "train", watched)
    options = {"method": "backprop", "iterations": 1, "num_envs": 256, "bank_size": 64}
    for schedule in ([850.0], [900.0, 700.0, 500.0, 300.0, 200.0, 100.0]):
        few = {**options, "num_steps": len(schedule), "num_held_out": 100, "eval_every": 1}
        distill(new_teacher(), schedule=schedule, **few)
    assert seen == [(256, 2e-4)] * 2


@pytest.mark.parametrize("name", ["n_steps", "tensorboard_log", "rollout_buffer_class"])
def test_what_is_made_for_the_run_is_no_change(tmp_path, name):
    with pytest.raises(InvalidArgumentError, match=name):
        distill(**{**SMALL, "changes": {name: 4}, "out": tmp_path / "run"})
    assert not list(tmp_path.iterdir())
