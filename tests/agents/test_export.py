"""An exported student is an ordinary diffusers folder that gives the student's own samples."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import AttnProcessor
from gymnasium import spaces
from small_world import lines_of, tell_apart
from tiny_models import FAMILIES, pixel_unet
from torch import nn

from agents.choices import make_head
from agents.export import (
    can_export,
    export_adaptive,
    export_student,
    load_adaptive,
    make_scheduler,
    snippet,
)
from agents.sampling import sample
from redif_env import mdp, schedules
from redif_env.denoiser import Denoiser, call_network
from redif_env.errors import InvalidArgumentError
from redif_env.loading import build_denoiser, find_folder, load_denoiser, load_scheduler
from redif_env.noise import FlowSchedule, SDESchedule, VESchedule, VPSchedule

GRIDS = [
    (850.0,),
    (999.0, 1.0),
    (850.0, 300.0),
    (849.0, 533.0, 289.0, 120.0),
    (999.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0),
]
# Ours takes square roots of float64 products, diffusers' logarithms of float32 ones.
SAME_SAMPLES = {"rtol": 0, "atol": 1e-4}

BLOCKER = """\
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("redif_env", "agents"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
for name in ("redif_env", "agents"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
"""


def scheduler_config():
    return load_scheduler(find_folder("digits")).config


def run_in_a_clean_process(folder: Path, lines: str) -> torch.Tensor:
    """What `x` is after the lines, run in the folder where this project cannot be imported."""
    out = folder.parent / "x.pt"
    program = f"{BLOCKER}\n{lines}\ntorch.save(x, {str(out)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def expected_samples(student: Denoiser, grid, labels) -> torch.Tensor:
    x_T = student.initial_noise(10, torch.Generator().manual_seed(0))
    times = schedules.explicit(grid, student.schedule)
    with torch.no_grad():
        return schedules.sample(student, x_T, labels, times)


@pytest.mark.parametrize(("guidance_scale", "order"), [(1.0, 1), (2.0, 1), (1.0, 2)])
def test_the_readme_gives_the_students_own_samples_without_this_project(
    tmp_path, guidance_scale, order
):
    student, grid = load_denoiser("digits", guidance_scale=guidance_scale), (850.0, 533.0, 120.0)
    student.set_solver_order(order)
    with torch.no_grad():  # a student of its own, not the teacher
        for weight in student.network.parameters():
            weight.mul_(1.02)
    folder = export_student(student, grid, scheduler_config(), tmp_path / "student")
    lines = lines_of(folder)
    assert len(lines.strip().splitlines()) <= 12  # "ten lines"
    x = run_in_a_clean_process(folder, lines)
    torch.testing.assert_close(x, expected_samples(student, grid, torch.arange(10)), **SAME_SAMPLES)
    # negative control: the teacher's own samples are others
    teacher = load_denoiser("digits", guidance_scale=guidance_scale)
    assert (x - expected_samples(teacher, grid, torch.arange(10))).abs().max() > 0.05


def test_the_readme_rescales_guidance(tmp_path, monkeypatch):
    student = load_denoiser("digits", guidance_scale=4.0, guidance_rescale=0.7)
    grid, labels = (850.0, 300.0), torch.arange(10)
    folder = export_student(student, grid, scheduler_config(), tmp_path / "student")
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(lines_of(folder), scope)
    expected = expected_samples(student, grid, labels)
    torch.testing.assert_close(scope["x"], expected, **SAME_SAMPLES)
    student.set_guidance(4.0)  # negative control
    assert (expected - expected_samples(student, grid, labels)).abs().max() > 0.05


def make_unconditional_student() -> Denoiser:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
    )
    return build_denoiser(network.eval(), load_scheduler(find_folder("digits")), {})


def test_the_readme_of_an_unconditional_student_works(tmp_path):
    student, grid = make_unconditional_student(), (850.0, 300.0)
    folder = export_student(student, grid, scheduler_config(), tmp_path / "student")
    x = run_in_a_clean_process(folder, lines_of(folder))
    assert x.shape == (10, 2, 4, 4)
    torch.testing.assert_close(x, expected_samples(student, grid, None), **SAME_SAMPLES)


EDM = {
    "as published": EDMEulerScheduler(),
    "v_prediction": EDMEulerScheduler(prediction_type="v_prediction", sigma_max=10.0, rho=5.0),
    "of second order": EDMDPMSolverMultistepScheduler(sigma_data=1.0),
}


def make_edm_student(scheduler, **options) -> Denoiser:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=4,
    )
    metadata = {"num_classes": 3, "null_class": 3}
    return build_denoiser(network.eval(), scheduler, metadata, **options)


@pytest.mark.parametrize("scheduler", EDM.values(), ids=EDM)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_edm_student_is_sampled_by_the_edm_scheduler(tmp_path, scheduler, guidance_scale):
    """Its times need not be whole; where the steps end is not the scheduler's to say."""
    student, grid = make_edm_student(scheduler, guidance_scale=guidance_scale), (910.5, 533.0, 120)
    labels = torch.arange(10) % 3
    folder = export_student(student, grid, scheduler.config, tmp_path / "student")
    x = run_in_a_clean_process(folder, lines_of(folder))
    torch.testing.assert_close(x, expected_samples(student, grid, labels), rtol=1e-4, atol=1e-4)
    # negative control: another grid has other samples
    other = expected_samples(student, (900.0, 533.0, 120.0), labels)
    assert (x - other).abs().max() > 0.01
    # and the folder is a teacher again, with the same preconditioning
    again = load_denoiser(folder, guidance_scale=guidance_scale)
    assert repr(again.network) == repr(student.network)
    x_t, t = torch.ones(3, 2, 4, 4), torch.tensor([1000.0, 300.0, 1.0])
    with torch.no_grad():
        ours, theirs = student(x_t, t, labels[:3]), again(x_t, t, labels[:3])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)} steps")
def test_the_exported_scheduler_is_ddim_along_any_grid(grid):
    student, config = load_denoiser("digits"), scheduler_config()
    solver = make_scheduler(config, student)
    solver.set_timesteps(timesteps=[int(t) for t in grid])
    x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10)
    for t in solver.timesteps:
        with torch.no_grad():
            x = solver.step(student.network(x, t, labels).sample, t, x).prev_sample
    torch.testing.assert_close(x, expected_samples(student, grid, labels), **SAME_SAMPLES)


def test_a_scheduler_of_second_order_is_not_ddim():
    """Negative control: the order matters at these numbers of steps."""
    student, grid, labels = load_denoiser("digits"), GRIDS[3], torch.arange(10)
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    solver = DPMSolverMultistepScheduler.from_config(scheduler_config(), **options)
    solver.set_timesteps(timesteps=[int(t) for t in grid])
    x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in solver.timesteps:
        with torch.no_grad():
            x = solver.step(student.network(x, t, labels).sample, t, x).prev_sample
    assert (x - expected_samples(student, grid, labels)).abs().max() > 0.01


def make_vp_student(schedule, predicts="v_prediction") -> Denoiser:
    """A diffusers network on a noise schedule that no config told it of."""
    return Denoiser(make_unconditional_student().network, schedule, predicts, (2, 4, 4)).eval()


COSINE = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
ZERO_SNR = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.clone()
OTHER_TABLES = {
    "a stock schedule": COSINE.alphas_cumprod,
    "of another length": torch.linspace(0.9999, 0.97, 600).cumprod(0),
    "in float64, and steep": torch.linspace(0.999, 0.9, 1000, dtype=torch.float64).cumprod(0),
    "that ends at 0": ZERO_SNR.index_fill(0, torch.tensor([999]), 0.0),
}
CONFIGS = {
    "of one's own solver": {"num_train_timesteps": 1000, "prediction_type": "v_prediction"},
    "of another schedule": DDIMScheduler(beta_schedule="scaled_linear").config,
    "with clipped data": DDIMScheduler(thresholding=True, rescale_betas_zero_snr=True).config,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("table", OTHER_TABLES.values(), ids=OTHER_TABLES)
def test_the_noise_schedule_is_the_students_whatever_the_config_says(tmp_path, table, config):
    student = make_vp_student(VPSchedule(table))
    last = len(table) - 1
    grid = (float(last), last // 2, 60.0, 1.0)
    folder = export_student(student, grid, config, tmp_path / "student")
    x = sample_stock(folder)
    torch.testing.assert_close(x, expected_samples(student, grid, None), rtol=1e-3, atol=1e-3)
    # and what is loaded again has it too, but for an alpha of 0, which is 2^-12 in diffusers
    again = load_denoiser(folder).schedule
    t = torch.arange(last + 1.0)
    torch.testing.assert_close(again.alpha(t), student.schedule.alpha(t), rtol=1e-4, atol=2.5e-4)
    torch.testing.assert_close(again.sigma(t), student.schedule.sigma(t), rtol=1e-3, atol=1e-7)
    # negative control: the schedule that the config means is another
    linear = VPSchedule(DDIMScheduler(num_train_timesteps=len(table)).alphas_cumprod)
    assert (linear.alpha(t) - student.schedule.alpha(t)).abs().max() > 1e-3


def sample_stock(folder: Path) -> torch.Tensor:
    """What `lines_of` compute, with diffusers alone, in this process."""
    network = UNet2DModel.from_pretrained(folder / "unet")
    solver = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    solver.set_timesteps(timesteps=json.loads((folder / "redif.json").read_text())["timesteps"])
    x = torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in solver.timesteps:
        with torch.no_grad():
            x = solver.step(network(x, t).sample, t, x).prev_sample
    return x


def test_a_config_of_the_students_own_schedule_is_written_as_it_is():
    student = make_vp_student(VPSchedule(COSINE.alphas_cumprod))
    assert make_scheduler(COSINE.config, student).config.trained_betas is None
    assert make_scheduler(DDIMScheduler().config, student).config.trained_betas is not None


OTHER_SCHEDULES = {
    "an SDE": (SDESchedule(), "epsilon"),
    "VE without preconditioning": (VESchedule(), "sample"),
    "flow matching, predicting data": (FlowSchedule(), "sample"),
    "VP, predicting flow": (VPSchedule(COSINE.alphas_cumprod), "flow_prediction"),
}


@pytest.mark.parametrize("kind", OTHER_SCHEDULES.values(), ids=OTHER_SCHEDULES)
def test_what_diffusers_can_not_sample_is_refused(tmp_path, kind):
    student = make_vp_student(*kind)
    with pytest.raises(InvalidArgumentError, match=rf"student='{kind[1]} on .*no scheduler for it"):
        export_student(student, (800.0, 300.0), COSINE.config, tmp_path / "deep" / "student")
    assert not list(tmp_path.iterdir())


NO_CONFIGS = {
    "None": None,
    "the scheduler itself": COSINE,
    "a folder": "scheduler",
    "impossible settings": {"beta_schedule": "none of diffusers'"},
}


@pytest.mark.parametrize("config", NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_what_is_no_schedulers_config_is_refused(tmp_path, config):
    with pytest.raises(InvalidArgumentError, match="scheduler_config="):
        export_student(load_denoiser("digits"), (850.0,), config, tmp_path / "deep" / "student")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    student = load_denoiser("digits", guidance_scale=2.0)
    out = tmp_path_factory.mktemp("runs") / "deep" / "student"
    return export_student(student, (850.0, 300.0, 0.0), scheduler_config(), out)


def test_the_folder_holds_what_samplers_need(folder):
    assert {path.name for path in folder.iterdir()} == {
        "unet",
        "scheduler",
        "redif.json",
        "model_index.json",
        "README.md",
    }
    assert json.loads((folder / "redif.json").read_text()) == {
        "num_steps": 2,
        "solver_order": 1,
        "timesteps": [850, 300],
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "num_classes": 10,
        "null_class": 10,
    }
    assert [path.name for path in folder.parent.iterdir()] == ["student"]  # nothing temporary


def test_the_folder_is_a_teacher_again(folder):
    loaded, original = load_denoiser(folder), load_denoiser("digits")
    for name, weight in original.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], weight)
    assert loaded.prediction_type == original.prediction_type
    assert (loaded.num_classes, loaded.null_class) == (10, 10)
    assert torch.equal(loaded.schedule.alpha_table, original.schedule.alpha_table)


def test_the_folder_is_a_diffusers_pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipeline.unet, UNet2DModel)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.solver_order == 1


def test_guidance_is_in_the_lines_only_where_it_is_used():
    assert "null" not in snippet(load_denoiser("digits"), {})
    assert "null" in snippet(load_denoiser("digits", guidance_scale=2.0), {})
    assert "class_labels" not in snippet(make_unconditional_student(), {})


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine").touch()
    with pytest.raises(InvalidArgumentError, match="exists"):
        export_student(load_denoiser("digits"), (850.0,), scheduler_config(), tmp_path / "student")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["mine"]


def test_a_network_of_another_library_is_refused(tmp_path):
    schedule = load_denoiser("digits").schedule
    student = Denoiser(nn.Identity(), schedule, "sample", (1, 8, 8))
    with pytest.raises(InvalidArgumentError, match="only diffusers models"):
        export_student(student, (850.0,), scheduler_config(), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def reversed_time(network, x_t, t, told):
    return -network(x_t, 1000 - t).sample


class OwnNetwork(ModelMixin, ConfigMixin):
    """It can be saved, but diffusers alone can not load it."""

    @register_to_config
    def __init__(self, out_channels: int = 2) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, out_channels, 1)

    def forward(self, x_t, t):
        return self.body(x_t)


class OwnUNet(UNet2DModel):
    """Not what diffusers makes of its folder."""

    def forward(self, *args, **kwargs):
        return (0.5 * super().forward(*args, **kwargs).sample,)


def with_own_call() -> Denoiser:
    student = make_unconditional_student()
    student.call = reversed_time
    return student


def with_own_call_inside() -> Denoiser:
    student = make_edm_student(EDM["as published"])
    student.network.call = reversed_time
    return student


def with_own_class(kind: type) -> Denoiser:
    like = make_unconditional_student()
    return Denoiser(kind.from_config(like.network.config), like.schedule, "epsilon", (2, 4, 4))


class OwnAttention(AttnProcessor):
    """Attention that is not diffusers'."""


def with_own_attention() -> Denoiser:
    network = pixel_unet(add_attention=True, attention_head_dim=4)
    network.mid_block.attentions[0].set_processor(OwnAttention())
    return build_denoiser(network, COSINE, {})


STRANGERS = {
    "an own call": with_own_call,
    "an own call of EDM's network": with_own_call_inside,
    "own attention": with_own_attention,
    "an own model": functools.partial(with_own_class, OwnNetwork),
    "an own subclass": functools.partial(with_own_class, OwnUNet),
}


@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS)
def test_what_diffusers_would_not_compute_is_not_exported(tmp_path, make):
    """Its folder would load, and give other samples."""
    student = make()
    assert not can_export(student)
    with pytest.raises(InvalidArgumentError, match=r"of one's own.*state_dict"):
        export_student(student, (800.0, 300.0), COSINE.config, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_a_diffusers_network_called_plainly_is_exported():
    """Negative control: by either of the ways that give the same."""
    student = make_unconditional_student()
    assert can_export(student)
    student.call = call_network
    assert can_export(student)
    assert can_export(make_edm_student(EDM["as published"]))


def test_a_grid_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="strictly decreasing"):
        export_student(load_denoiser("digits"), (300.0, 850.0), scheduler_config(), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_failing_export_leaves_nothing(tmp_path, monkeypatch):
    student, save = load_denoiser("digits"), UNet2DModel.save_pretrained

    def fill_the_disk(network, folder) -> None:
        save(network, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        export_student(student, (850.0,), scheduler_config(), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def make_adaptive_head(student: Denoiser, kind: str):
    seen: dict = {
        "latents": spaces.Box(-np.inf, np.inf, student.latent_shape, np.float32),
        "timestep": spaces.Box(0, 1, (1,), np.float32),
        "steps_left": spaces.Box(0, 1, (1,), np.float32),
    }
    if student.num_classes is not None:
        seen["condition"] = spaces.Discrete(student.num_classes)
    torch.manual_seed(0)
    grid = schedules.uniform(student.schedule, 5)
    options = {"kind": kind, "adaptive": True, "min_steps": 2}
    return make_head(spaces.Dict(seen), student.schedule, grid, **options)


def adaptive_head(student: Denoiser, kind: str):
    """A head that stops after two steps in half of the samples."""
    head = make_adaptive_head(student, kind)
    x_T = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    once = torch.ones(10, dtype=torch.int64)
    tell_apart(head, mdp.observe(x_T, 799.0 * once, once, torch.arange(10), student.schedule, 5))
    return head


@pytest.mark.parametrize("kind", ["beta", "categorical"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_adaptive_student_samples_without_this_project(tmp_path, kind, guidance_scale):
    student = load_denoiser("digits", guidance_scale=guidance_scale)
    head = adaptive_head(student, kind)
    folder = export_adaptive(student, head, scheduler_config(), tmp_path / "student")
    x = run_in_a_clean_process(folder, lines_of(folder))
    x_T = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, num_steps = sample(student, head, x_T, torch.arange(10))
    torch.testing.assert_close(x, expected, **SAME_SAMPLES)
    assert len(num_steps.unique()) > 1
    assert num_steps.min() >= 2
    # and through this project
    pipeline = load_adaptive(folder)
    again, steps = pipeline(class_labels=torch.arange(10), latents=x_T)
    torch.testing.assert_close(again, expected, **SAME_SAMPLES)
    assert torch.equal(steps, num_steps)
    # negative control: the times matter
    fixed = schedules.sample(student, x_T, torch.arange(10), schedules.uniform(student.schedule, 5))
    assert (x - fixed).abs().max() > 0.05


def test_an_adaptive_student_rescales_guidance(tmp_path):
    student = load_denoiser("digits", guidance_scale=4.0, guidance_rescale=0.7)
    head = adaptive_head(student, "beta")
    folder = export_adaptive(student, head, scheduler_config(), tmp_path / "student")
    x_T = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x, _ = load_adaptive(folder)(class_labels=torch.arange(10), latents=x_T)
    expected, _ = sample(student, head, x_T, torch.arange(10))
    torch.testing.assert_close(x, expected, **SAME_SAMPLES)
    student.set_guidance(4.0)  # negative control
    assert (x - sample(student, head, x_T, torch.arange(10))[0]).abs().max() > 0.05


def test_an_adaptive_student_leaves_predicted_variances_out(tmp_path):
    student = load_denoiser(FAMILIES["learned variances in pixels"].make())
    head = make_adaptive_head(student, "beta")
    folder = export_adaptive(student, head, scheduler_config(), tmp_path / "student")
    x_T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x, _ = load_adaptive(folder)(latents=x_T)
    expected, _ = sample(student, head, x_T, None)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def test_a_global_schedule_is_exported_as_its_times(tmp_path):
    student = load_denoiser("digits")
    head = make_head(spaces.Dict({}), student.schedule, torch.tensor([850.0, 533.0, 120.0, 0.0]))
    with torch.no_grad():
        head.table += 0.1
    grid = head.grid()
    with pytest.raises(InvalidArgumentError, match=r"head\.grid"):
        export_adaptive(student, head, scheduler_config(), tmp_path / "student")
    folder = export_student(student, grid, scheduler_config(), tmp_path / "student")
    assert json.loads((folder / "redif.json").read_text())["timesteps"] == grid[:-1].tolist()
    x = run_in_a_clean_process(folder, lines_of(folder))
    expected = expected_samples(student, grid, torch.arange(10))
    torch.testing.assert_close(x, expected, **SAME_SAMPLES)


def test_an_adaptive_schedule_of_another_kind_is_refused(tmp_path):
    student = load_denoiser("digits")
    student.schedule, student.prediction_type = FlowSchedule(1000), "flow_prediction"
    with pytest.raises(InvalidArgumentError, match="alphas_cumprod"):
        export_adaptive(student, adaptive_head(student, "beta"), {}, tmp_path / "student")
    assert not list(tmp_path.iterdir())
