"""Smaller students: which weights go where, the warm-up, and whole runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from tiny_models import dit

from agents import ReDiFPPO, distill, distillation, smaller
from agents.baselines import OutputRegression
from agents.smaller import copy_weights, describe_smaller, make_smaller, narrower
from redif_env import schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import build_denoiser, describe, load_denoiser, load_teacher
from redif_env.teacher import Teacher, TeacherBank

ITERATIONS = 20  # of a warm-up
ROWS = 64
QUARTER = {"block_out_channels": [16, 28], "norm_num_groups": 4}


@pytest.fixture(scope="module", autouse=True)
def few():
    """Few validation tasks, and few predictions an iteration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "NUM_VALIDATION", 64)
        patch.setattr(smaller, "WARM_UP_ROWS", ROWS)
        yield


def tiny(**changes) -> UNet2DModel:
    """A network whose weights can be looked at: no classes, one group of 2 or 4 channels each."""
    torch.manual_seed(changes.pop("seed", 0))
    config = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        **changes,
    }
    return UNet2DModel(**config).eval()


def copied(large: UNet2DModel, small: UNet2DModel) -> tuple[dict, dict]:
    copy_weights(large, small)
    return large.state_dict(), small.state_dict()


def test_a_network_of_the_same_size_becomes_the_same():
    large, small = tiny(seed=0), tiny(seed=1)
    before, after = copied(large, small)
    assert all(torch.equal(before[name], after[name]) for name in before)
    x_t, t = torch.randn(2, 1, 4, 4), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.equal(large(x_t, t).sample, small(x_t, t).sample)


def test_a_narrower_network_gets_the_leading_channels():
    before, after = copied(tiny(), tiny(seed=1, block_out_channels=(2, 4), norm_num_groups=1))
    for name, rows, columns in [
        ("conv_in.weight", 2, 1),
        ("conv_out.weight", 1, 2),
        ("down_blocks.1.resnets.0.conv1.weight", 4, 2),
        ("mid_block.resnets.1.conv2.weight", 4, 4),
        ("time_embedding.linear_2.weight", 8, 8),
    ]:
        assert torch.equal(after[name], before[name][:rows, :columns]), name
    assert torch.equal(after["conv_norm_out.bias"], before["conv_norm_out.bias"][:2])


def test_a_joined_input_gets_the_leading_channels_of_both_sides():
    """Channels by hand. Teacher: 8 from below + 4 skipped, 8 + 4, 4 + 4; student: half of each."""
    before, after = copied(tiny(), tiny(seed=1, block_out_channels=(2, 4), norm_num_groups=1))
    for block, rows, columns in [
        ("up_blocks.0.resnets.0", 4, [0, 1, 2, 3, 8, 9, 10, 11]),
        ("up_blocks.0.resnets.1", 4, [0, 1, 2, 3, 8, 9]),
        ("up_blocks.1.resnets.0", 2, [0, 1, 2, 3, 8, 9]),
        ("up_blocks.1.resnets.1", 2, [0, 1, 4, 5]),
    ]:
        for layer in ("conv1", "conv_shortcut"):
            wanted = before[f"{block}.{layer}.weight"][:rows][:, columns]
            assert torch.equal(after[f"{block}.{layer}.weight"], wanted), block
            assert torch.equal(
                after[f"{block}.{layer}.bias"], before[f"{block}.{layer}.bias"][:rows]
            )


def test_normalisation_of_a_joined_input_follows_its_channels():
    large = tiny()
    with torch.no_grad():
        large.up_blocks[0].resnets[1].norm1.weight.copy_(torch.arange(12.0))
    _, after = copied(large, tiny(seed=1, block_out_channels=(2, 4), norm_num_groups=1))
    assert after["up_blocks.0.resnets.1.norm1.weight"].tolist() == [0, 1, 2, 3, 8, 9]


def test_sinusoids_of_time_keep_their_frequency():
    """The embedding of a time, through the copied columns, sees the teacher's own sinusoids."""
    large = tiny(block_out_channels=(8, 16))
    small = tiny(seed=1, block_out_channels=(4, 8))
    before, after = copied(large, small)
    name = "time_embedding.linear_1.weight"
    assert torch.equal(after[name], before[name][:16][:, [0, 2, 4, 6]])
    t = torch.tensor([1.0, 77.0, 850.0])
    # cosines of 4 frequencies and their sines in the teacher, of 2 in the student
    assert torch.allclose(small.time_proj(t), large.time_proj(t)[:, [0, 2, 4, 6]], atol=1e-6)


def test_scale_and_shift_of_time_stay_apart():
    options = {"resnet_time_scale_shift": "scale_shift"}
    small = tiny(seed=1, block_out_channels=(2, 4), norm_num_groups=1, **options)
    before, after = copied(tiny(**options), small)
    name = "down_blocks.0.resnets.0.time_emb_proj.weight"
    assert torch.equal(after[name], before[name][[0, 1, 4, 5]][:, :8])


def test_a_shallower_network_gets_the_first_and_the_last_layers():
    """3 of 4 layers up: the last takes another block's skip connection, and must be the last."""
    large = tiny(block_out_channels=(4, 4), layers_per_block=3)
    before, after = copied(large, tiny(seed=1, block_out_channels=(4, 4), layers_per_block=2))
    for layers, pairs in [
        ("down_blocks.0.resnets", {0: 0, 1: 2}),
        ("up_blocks.0.resnets", {0: 0, 1: 2, 2: 3}),
    ]:
        for own, origin in pairs.items():
            name = "conv2.weight"
            assert torch.equal(
                after[f"{layers}.{own}.{name}"], before[f"{layers}.{origin}.{name}"]
            ), (layers, own)


def test_what_has_no_counterpart_stays_as_it_was():
    small = tiny(seed=1, add_attention=True, attention_head_dim=4)
    fresh = {name: weight.clone() for name, weight in small.state_dict().items()}
    _, after = copied(tiny(), small)
    kept = [name for name in fresh if torch.equal(fresh[name], after[name])]
    assert [name for name in kept if "to_q.weight" in name]
    assert "conv_in.weight" not in kept
    wider = tiny(seed=1, block_out_channels=(8, 16))
    start = wider.conv_in.weight.clone()
    copy_weights(tiny(), wider)
    assert torch.equal(wider.conv_in.weight, start)


def test_copying_beats_chance_on_the_bundled_teacher(teacher, bank):
    """Before any training, a half as wide network is nearer to the teacher than a random one."""
    grid = schedules.explicit([850.0, 300.0], teacher.denoiser.schedule)
    student = make_smaller(teacher, describe_smaller(teacher, 0.25))
    torch.manual_seed(0)
    random = build_denoiser(
        UNet2DModel(**{**dict(teacher.denoiser.network.config), **QUARTER}).eval(),
        teacher.make_solver(),
        {"num_classes": 10, "null_class": 10},
    )
    errors = [schedules.paired_mse(denoiser, bank, grid) for denoiser in (student, random)]
    assert errors[0] < 0.7 * errors[1]  # 0.49 against 1.13 on 512 tasks


def test_a_share_of_the_parameters_becomes_a_width(teacher):
    network = teacher.denoiser.network
    assert narrower(network, 0.25) == QUARTER
    assert narrower(network, 1.0) == {"block_out_channels": [32, 56], "norm_num_groups": 8}
    share = 132_557 / 524_633  # counted once, with diffusers alone
    student = make_smaller(teacher, describe_smaller(teacher, 0.25))
    assert smaller.count_parameters(student.network) / 524_633 == pytest.approx(share)


def test_heads_of_attention_are_never_cut():
    """Widths of 4 and 8 and heads of 4: one group of 2 channels is no head."""
    network = tiny(add_attention=True, attention_head_dim=4)
    assert narrower(network, 0.6)["block_out_channels"] == [4, 8]
    assert narrower(tiny(), 0.6)["block_out_channels"] == [2, 4]


def test_the_start_is_the_same_every_time_and_leaves_global_noise_alone(teacher):
    description = describe_smaller(teacher, {"layers_per_block": 1, "add_attention": True})
    torch.manual_seed(3)
    first = make_smaller(teacher, description).network.state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(4)
    second = make_smaller(teacher, description).network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def warm_up(teacher, bank, grid, start, iterations):
    options = smaller.warm_up_options(len(grid) - 1)
    return OutputRegression.train(
        teacher, bank, grid, start=start, iterations=iterations, **options
    )


def warmed(teacher: Teacher, bank: TeacherBank, held_out: TeacherBank, iterations: int):
    grid = schedules.explicit([850.0, 300.0], teacher.denoiser.schedule)
    start = make_smaller(teacher, describe_smaller(teacher, 0.25))
    before = schedules.paired_mse(start, held_out, grid)
    result = warm_up(teacher, bank, grid, start, iterations)
    return before, schedules.paired_mse(result.student, held_out, grid), start, result


@pytest.fixture(scope="module")
def tasks(teacher, tmp_path_factory) -> TeacherBank:
    return TeacherBank.build(teacher, 512, cache_dir=tmp_path_factory.mktemp("tasks"))


def test_the_warm_up_lowers_the_held_out_error(teacher, tasks, held_out):
    before, after, start, result = warmed(teacher, tasks, held_out, ITERATIONS)
    assert after < 0.5 * before
    assert result.ledger.total == 3 * ITERATIONS * ROWS
    assert start.network_evaluations == 2 * len(held_out)  # by this test
    assert not result.student.training


def test_a_warm_up_towards_shuffled_answers_brings_no_paired_error(teacher, tasks, held_out):
    """Negative control: answers of other noise teach at most the mean of all answers."""
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(0))
    shuffled = TeacherBank(tasks.x_T, tasks.teacher_x_0[order], tasks.condition)
    _, after, *_ = warmed(teacher, shuffled, held_out, ITERATIONS)
    mean = tasks.teacher_x_0.mean(0)
    constant = float((held_out.teacher_x_0 - mean).square().mean())
    assert after > 0.9 * constant
    _, paired, *_ = warmed(teacher, tasks, held_out, ITERATIONS)
    assert paired < 0.7 * after


SMALL = {
    "num_steps": 1,
    "schedule": [850.0],
    "iterations": 2,
    "num_envs": 16,
    "batch_size": 16,
    "bank_size": 64,
    "num_held_out": 100,
    "eval_every": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, few):
    """A whole run with a quarter of the parameters, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    teacher = load_teacher("digits", num_steps=5)
    return distill(teacher, **SMALL, student=0.25, warm_up=4, out=out), out


def test_a_run_reports_sizes_costs_and_what_the_warm_up_reached(run):
    report = run[0].report
    assert report["parameters"] == {"teacher": 524_633, "student": 132_557}
    assert report["flops"] == {"teacher": 25_542_656, "student": 6_404_096}
    ledger = report["ledger"]
    assert ledger["warm_up"] == 3 * 4 * ROWS
    assert ledger["teacher"] == 64 * 5
    assert ledger["rollout"] == 2 * 8 + 16  # one state a pair, and every row for the first gap
    assert report["network_evaluations"] == sum(ledger.values())
    warm = report["held_out"]["warm_up"]["paired_mse"]
    student = report["held_out"]["student"]["paired_mse"]
    assert math.isfinite(warm)
    assert warm != student
    assert [record["iteration"] for record in report["history"]] == [0, 1, 2]


def test_training_starts_where_the_warm_up_ended(run):
    """The first entry of the history is the warmed-up student, measured again from the outside."""
    teacher = load_teacher("digits", num_steps=5)
    train = TeacherBank.build(teacher, 64)
    validation = TeacherBank.build(teacher, 64, split="validation")
    grid = torch.tensor([850.0, 0.0])
    start = make_smaller(teacher, describe_smaller(teacher, 0.25))
    student = warm_up(teacher, train, grid, start, 4).student
    error = schedules.paired_mse(student, validation, grid)
    assert run[0].report["history"][0]["paired_mse"] == pytest.approx(error, rel=1e-5)


def test_the_folder_holds_the_smaller_network(run):
    result, out = run
    config = json.loads((out / "student" / "unet" / "config.json").read_text())
    assert config["block_out_channels"] == [16, 28]
    exported = load_denoiser(out / "student")
    pairs = zip(exported.parameters(), result.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (out / "samples.png").exists()
    saved = json.loads((out / "config.json").read_text())
    assert (saved["student"], saved["warm_up"]) == (0.25, 4)


def test_a_student_of_the_teachers_size_is_not_warmed_up_by_default():
    report = distill(load_teacher("digits", num_steps=5), **SMALL).report
    assert "warm_up" not in report["ledger"]
    assert "warm_up" not in report["held_out"]
    assert report["parameters"]["student"] == report["parameters"]["teacher"]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (0.0, "at least"),
        (0.001, "at least"),
        (-0.5, "at least"),
        (1.5, "at most 1"),
        (float("nan"), "finite"),
        ("small", "finite"),
        ({"sample_size": 16}, "teacher's"),
        ({"in_channels": 3}, "teacher's"),
        ({"out_channels": 2}, "teacher's"),
        ({"num_class_embeds": 5}, "teacher's"),
        ({"prediction_type": "epsilon"}, "teacher's"),
        ({"width": 16}, "no setting"),
        ({"block_out_channels": [15, 28]}, "no network"),
        ({"block_out_channels": [16, 32, 64]}, "no network"),
        ({"down_block_types": ["Nothing", "DownBlock2D"]}, "no network"),
    ],
)
def test_impossible_students_are_refused_before_the_teacher_is_asked(tmp_path, student, message):
    teacher = load_teacher("digits", num_steps=5)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        distill(teacher, **SMALL, student=student, out=tmp_path / "run")
    assert caught.value.argument == "student"
    assert teacher.denoiser.network_evaluations == 0
    assert not list(tmp_path.iterdir())


def test_a_share_of_another_kind_of_network_is_refused(tmp_path):
    teacher = load_teacher(dit(), num_steps=2)
    with pytest.raises(InvalidArgumentError, match="only UNet2DModel is narrowed") as caught:
        distill(teacher, **SMALL, student=0.25, out=tmp_path / "run")
    assert caught.value.argument == "student"


@pytest.mark.parametrize("warm_up", [-1, 1.5, True])
def test_impossible_warm_ups_are_refused(warm_up):
    with pytest.raises(InvalidArgumentError) as caught:
        distill(load_teacher("digits", num_steps=5), **SMALL, student=0.25, warm_up=warm_up)
    assert caught.value.argument == "warm_up"


def test_a_student_of_another_kind_of_model_is_refused(teacher, make_env):
    """Other classes or another noise schedule; another prediction type is only another encoding."""

    def make(scheduler=None, **changes):
        description = describe(teacher.denoiser, scheduler or teacher.make_solver())
        return ReDiFPPO(
            "StudentPolicy", make_env(), policy_kwargs={"student": {**description, **changes}}
        )

    with pytest.raises(InvalidArgumentError, match="classes, 10"):
        make(num_classes=5)
    with pytest.raises(InvalidArgumentError, match="noise schedule"):
        make(DDIMScheduler(1000, prediction_type="v_prediction"))
    config = {**dict(teacher.make_solver().config), "prediction_type": "sample"}
    assert make(DDIMScheduler.from_config(config)).policy.denoiser.prediction_type == "sample"


def test_operations_are_counted_by_hand_on_one_convolution():
    """3 x 3, 2 channels in, 5 out, 4 x 4 places: 2 * 9 * 2 * 5 * 16; no evaluation is booked."""

    class Convolution(torch.nn.Conv2d):
        def forward(self, x_t, t):
            return super().forward(x_t)[:, :2]

    schedule = load_denoiser("digits").schedule
    denoiser = Denoiser(Convolution(2, 5, 3, padding=1), schedule, "sample", (2, 4, 4))
    assert smaller.count_flops(denoiser) == 2 * 9 * 2 * 5 * 16
    assert denoiser.network_evaluations == 0
