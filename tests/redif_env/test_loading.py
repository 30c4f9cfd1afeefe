"""Diffusers folders in and out, damaged folders, and no word to the network."""

import json
import shutil
import socket

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from redif_env import load_denoiser, load_teacher
from redif_env.errors import InvalidArgumentError, TeacherFolderError
from redif_env.loading import (
    BUNDLED,
    build_denoiser,
    build_from_description,
    describe,
    find_folder,
    load_scheduler,
    noise_schedule,
    prediction_type,
)
from redif_env.noise import FlowSchedule, VESchedule, VPSchedule

DIGITS = BUNDLED["digits"]
UNET = "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled teacher's folder."""
    return shutil.copytree(DIGITS, tmp_path / "teacher")


def edit(folder, name, **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


def test_the_network_is_the_folders(bank):
    denoiser = load_denoiser("digits")
    network = UNet2DModel.from_pretrained(DIGITS / "unet")
    t = torch.full((3,), 321.0)
    with torch.no_grad():
        wanted = network(bank.x_T[:3], t, bank.condition[:3]).sample
        assert torch.equal(denoiser.predict(bank.x_T[:3], t, bank.condition[:3]), wanted)
    assert not denoiser.network.training


def test_what_the_bundled_folder_says():
    denoiser = load_denoiser("digits")
    assert denoiser.latent_shape == (1, 8, 8)
    assert denoiser.prediction_type == "v_prediction"
    assert (denoiser.num_classes, denoiser.null_class) == (10, 10)
    alpha_bar = DDIMScheduler.from_pretrained(DIGITS / "scheduler").alphas_cumprod
    t = torch.arange(1, 1000)
    torch.testing.assert_close(denoiser.schedule.alpha(t), alpha_bar[1:].sqrt())


def test_a_path_is_as_good_as_a_name(folder):
    teachers = [load_teacher(source, num_steps=3) for source in ("digits", folder, str(folder))]
    assert len({teacher.fingerprint() for teacher in teachers}) == 1
    assert find_folder(folder) == folder


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_description_round_trip(scale, bank):
    """Through JSON, with the weights carried over."""
    one = load_teacher("digits", guidance_scale=scale)
    description = json.loads(json.dumps(describe(one.denoiser, one.make_solver())))
    two = build_from_description(description)
    two.network.load_state_dict(one.denoiser.network.state_dict())
    t = torch.full((3,), 500.0)
    with torch.no_grad():
        wanted = one.denoiser(bank.x_T[:3], t, bank.condition[:3])
        assert torch.equal(two.eval()(bank.x_T[:3], t, bank.condition[:3]), wanted)
    assert two.nfe == one.denoiser.nfe


def test_a_built_denoiser_has_random_weights():
    """The negative control of the round trip."""
    one = load_teacher("digits")
    two = build_from_description(describe(one.denoiser, one.make_solver()))
    first = [next(model.network.parameters()) for model in (one.denoiser, two)]
    assert not torch.equal(*first)


@pytest.mark.parametrize(
    ("scheduler", "kind", "predicts"),
    [
        (DDIMScheduler(), VPSchedule, "epsilon"),
        (DPMSolverMultistepScheduler(prediction_type="sample"), VPSchedule, "sample"),
        (FlowMatchEulerDiscreteScheduler(), FlowSchedule, "flow_prediction"),
        (EDMEulerScheduler(prediction_type="v_prediction"), VESchedule, "v_prediction"),
    ],
)
def test_families_of_schedulers(scheduler, kind, predicts):
    assert type(noise_schedule(scheduler)) is kind
    assert prediction_type(scheduler) == predicts


def test_a_scheduler_of_no_known_family_is_refused():
    scheduler = DDIMScheduler()
    del scheduler.alphas_cumprod
    with pytest.raises(InvalidArgumentError, match="scheduler='DDIMScheduler'"):
        noise_schedule(scheduler)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_load_scheduler_gives_the_class_that_was_saved(tmp_path, kind):
    kind(num_train_timesteps=77).save_pretrained(tmp_path / "scheduler")
    scheduler = load_scheduler(tmp_path)
    assert type(scheduler) is kind
    assert scheduler.config.num_train_timesteps == 77


def test_a_stochastic_ddpm_teacher_becomes_ddim(folder):
    config = load_scheduler(folder).config
    DDPMScheduler.from_config(config).save_pretrained(folder / "scheduler")
    solver = load_teacher(folder).make_solver()
    assert type(solver) is DDIMScheduler
    torch.testing.assert_close(solver.alphas_cumprod, load_scheduler(DIGITS).alphas_cumprod)


def test_every_solver_is_fresh():
    teacher = load_teacher("digits")
    one, two = teacher.make_solver(), teacher.make_solver()
    one.set_timesteps(7)
    assert one is not two
    assert two.num_inference_steps is None


def test_rectangular_images():
    network = UNet2DModel(
        sample_size=(8, 12),
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    denoiser = build_denoiser(network, DDIMScheduler(), {})
    assert denoiser.latent_shape == (2, 8, 12)
    assert denoiser.num_classes is None


def test_nothing_is_downloaded(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_teacher("digits")
    with pytest.raises(TeacherFolderError, match="google/ddpm"):
        load_denoiser("google/ddpm-cifar10-32")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(TeacherFolderError, match="unet"):
        load_denoiser(tmp_path)


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-4])


def rename_weights(folder):
    """Valid safetensors, none of whose tensors the network knows."""
    tensors = load_file(folder / WEIGHTS)
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def drop_a_weight(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("conv_in.weight")
    save_file(tensors, folder / WEIGHTS)


def reshape_a_weight(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1].clone()
    save_file(tensors, folder / WEIGHTS)


DAMAGE = {
    "no network": lambda folder: shutil.rmtree(folder / "unet"),
    "no scheduler": lambda folder: shutil.rmtree(folder / "scheduler"),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "empty weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "truncated weights": truncate,
    "weights of another network": rename_weights,
    "a missing weight": drop_a_weight,
    "a weight of another shape": reshape_a_weight,
    "broken JSON": lambda folder: (folder / UNET).write_text("{"),
    "bytes for JSON": lambda folder: (folder / SCHEDULER).write_bytes(b"\xff\xfe\x00"),
    "a JSON list": lambda folder: (folder / UNET).write_text("[]"),
    "broken metadata": lambda folder: (folder / "redif.json").write_text("{'a'"),
    "another kind of network": lambda folder: edit(folder, UNET, _class_name="AutoencoderKL"),
    "an unknown block": lambda folder: edit(folder, UNET, down_block_types=["No", "DownBlock2D"]),
    "no image size": lambda folder: edit(folder, UNET, sample_size=None),
    "an unknown scheduler": lambda folder: edit(folder, SCHEDULER, _class_name="NoScheduler"),
    "a pipeline for a scheduler": lambda folder: edit(
        folder, SCHEDULER, _class_name="DDIMPipeline"
    ),
    "a number for a scheduler": lambda folder: edit(folder, SCHEDULER, _class_name=5),
    "unknown betas": lambda folder: edit(folder, SCHEDULER, beta_schedule="no such"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused(folder, damage):
    damage(folder)
    with pytest.raises(TeacherFolderError) as caught:
        load_teacher(folder)
    message = str(caught.value)
    assert "teacher=" in message
    assert str(folder) in message
    assert message.endswith(".")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "teacher.ckpt").write_text("")
    with pytest.raises(TeacherFolderError, match=r"teacher\.ckpt.*pass an existing"):
        load_teacher(tmp_path / "teacher.ckpt")


def test_an_impossible_prediction_type_is_refused(folder):
    edit(folder, SCHEDULER, prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(InvalidArgumentError, match="prediction_type='epsilon'"):
        load_denoiser(folder)
