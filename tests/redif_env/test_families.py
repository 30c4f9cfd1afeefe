"""Every family of models: loaded from disk, the teacher is its pipeline, and a student learns."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from tiny_models import BETAS, FAMILIES, PROMPTS, STEPS, pixel_unet, plain_loop, stable_diffusion

import redif_env.prompts
from agents import ReDiFPPO, distill
from redif_env import Conditions, ReDiFVectorEnv, TeacherBank, load_denoiser, load_teacher
from redif_env import transition as kernel
from redif_env.errors import (
    CacheError,
    InvalidArgumentError,
    MissingExtraError,
    TeacherFolderError,
)
from redif_env.loading import build_from_description, can_describe, describe
from redif_env.noise import FlowSchedule, VESchedule

NUM = 4
# A batch of 2 N rows, or rows with times of their own, add up in another order.
SAME = {"rtol": 1e-3, "atol": 1e-4}


@functools.cache
def made(name):
    return FAMILIES[name].make()


@pytest.fixture(scope="module", params=FAMILIES)
def given(request, tmp_path_factory):
    """A family's pipeline, the folder it was saved in, and the teacher that was loaded from it."""
    family, pipeline = FAMILIES[request.param], made(request.param)
    folder = tmp_path_factory.mktemp("family") / "pipeline"
    pipeline.save_pretrained(folder)
    teacher = load_teacher(folder, num_steps=family.num_steps, **family.options)
    generator = torch.Generator().manual_seed(0)
    x_T = teacher.denoiser.initial_noise(NUM, generator)
    condition = teacher.denoiser.initial_condition(NUM, generator)
    return SimpleNamespace(
        family=family, pipeline=pipeline, folder=folder, teacher=teacher, x_T=x_T, c=condition
    )


def test_the_teacher_is_the_pipeline(given):
    """Prompts, negative prompts, guidance, its rescaling and the scheduler, all at once."""
    ours = given.teacher.sample(given.x_T, given.c)
    wanted = given.family.sample(given.pipeline, given.x_T, given.c, given.family.num_steps)
    torch.testing.assert_close(ours, wanted, **SAME)
    # Negative controls: another number of steps, and the conditions of other rows.
    other = given.family.sample(given.pipeline, given.x_T, given.c, given.family.num_steps + 1)
    assert not torch.allclose(ours, other, **SAME)
    if given.c is not None:
        moved = given.teacher.sample(given.x_T, given.c.roll(1))
        changed = given.c != given.c.roll(1)
        assert bool(changed.any())
        assert not torch.allclose(moved[changed], wanted[changed], **SAME)


def test_conditions_are_the_familys(given):
    denoiser = given.teacher.denoiser
    assert denoiser.num_classes == given.family.num_conditions
    assert denoiser.latent_shape == tuple(given.x_T.shape[1:])
    if denoiser.conditions is not None:
        assert denoiser.conditions.texts == PROMPTS


def stock_step(denoiser, config, prediction, x_t, t, s):
    """`x_0` and `x_s` by diffusers' DDIM or flow matching; for EDM, Euler's method by hand."""
    if isinstance(denoiser.schedule, VESchedule):
        sigma_t, sigma_s = denoiser.schedule.sigma(torch.tensor([t, s]))
        return prediction, x_t + (sigma_s - sigma_t) * (x_t - prediction) / sigma_t
    if isinstance(denoiser.schedule, FlowSchedule):
        solver = FlowMatchEulerDiscreteScheduler()
        solver.set_timesteps(sigmas=[t / 1000, s / 1000])
        x_0 = x_t - t / 1000 * prediction
        return x_0, solver.step(prediction, solver.timesteps[0], x_t).prev_sample
    solver = DDIMScheduler.from_config(
        config, clip_sample=False, steps_offset=0, timestep_spacing="leading"
    )
    solver.set_timesteps(1000 // round(t - s))
    done = solver.step(prediction, int(t), x_t)
    return done.pred_original_sample, done.prev_sample


def test_a_transition_is_the_familys_own_step(given):
    denoiser, t, s = given.teacher.denoiser, 500.0, 400.0
    rows = torch.full((NUM,), t)
    with torch.no_grad():
        prediction = denoiser.predict(given.x_T, rows, given.c)
        x0_pred = denoiser(given.x_T, rows, given.c)
    config = given.pipeline.scheduler.config
    x_0, x_s = stock_step(denoiser, config, prediction, given.x_T, t, s)
    torch.testing.assert_close(x0_pred, x_0, **SAME)
    ours = kernel.step(denoiser.schedule, given.x_T, x0_pred, rows, rows + (s - t)).mean
    torch.testing.assert_close(ours, x_s, **SAME)


def test_rows_do_not_mix(given):
    t = torch.tensor([900.0, 500.0, 300.0, 7.0])
    with torch.no_grad():
        together = given.teacher.denoiser(given.x_T, t, given.c)
        for row in range(NUM):
            one = slice(row, row + 1)
            told = None if given.c is None else given.c[one]
            alone = given.teacher.denoiser(given.x_T[one], t[one], told)
            torch.testing.assert_close(together[one], alone, **SAME)


def test_the_live_pipeline_is_as_good_as_the_folder(given):
    live = load_teacher(given.pipeline, num_steps=given.family.num_steps, **given.family.options)
    assert live.fingerprint() == given.teacher.fingerprint()
    assert live.denoiser.network is not given.teacher.denoiser.network


def test_the_description_makes_the_same_denoiser(given):
    denoiser = given.teacher.denoiser
    if not can_describe(denoiser, given.teacher.make_solver()):
        pytest.skip("a network with EDM's preconditioning is copied instead")
    made = build_from_description(describe(denoiser, given.teacher.make_solver()))
    made.network.load_state_dict(denoiser.network.state_dict())
    t = torch.full((NUM,), 500.0)
    with torch.no_grad():
        wanted = denoiser.predict(given.x_T, t, given.c)
        assert torch.equal(made.eval().predict(given.x_T, t, given.c), wanted)


def test_an_episode_in_the_environment(given, tmp_path):
    """Two steps of the deterministic kernel by hand; a perfect answer is rewarded with 0."""
    bank = TeacherBank.build(given.teacher, NUM, cache_dir=tmp_path)
    env = ReDiFVectorEnv(
        NUM, given.teacher, schedule=[800.0, 300.0], bank=bank, render_mode="rgb_array"
    )
    observation, _ = env.reset(seed=0, options={"tasks": range(NUM)})
    torch.testing.assert_close(observation["latents"], bank.x_T)
    observation, *_ = env.step(observation["latents"].flatten(1))
    pictures = env.render()
    _, rewards, terminated, _, _ = env.step(bank.teacher_x_0.flatten(1).clamp(-10, 10))
    assert terminated.all()
    outside = bank.teacher_x_0 - bank.teacher_x_0.clamp(-10, 10)
    torch.testing.assert_close(rewards, -outside.square().flatten(1).mean(1))
    assert len(pictures) == NUM
    side = 2 * 8 if given.teacher.codec is not None else 8
    assert pictures[0].shape[0] % side == 0


# What only text-to-image models have.


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "pipeline"
    made("Stable Diffusion 2").save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_mark_of_byte_order_is_no_part_of_a_prompt(tmp_path):
    """Windows' editors write one at the start of a file."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfdog\r\n\r\n cat \r\n")
    assert redif_env.prompts.read_texts(tmp_path / "prompts.txt") == ["dog", "cat"]


def refuse(*args, **kwargs):
    raise AssertionError("the encoders were loaded")


def test_prompts_are_encoded_once(text_folder, own_cache, monkeypatch):
    first = load_denoiser(text_folder, prompts=PROMPTS)
    assert len(list(own_cache.glob("conditions-*.safetensors"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(redif_env.prompts, "_load_encoders", refuse)
        again = load_denoiser(text_folder, prompts=PROMPTS)
        for prompts, negative in ((PROMPTS[:2], None), (PROMPTS, "ugly")):
            with pytest.raises(AssertionError, match="encoders"):
                load_denoiser(text_folder, prompts=prompts, negative_prompt=negative)
    for name, tensor in first.conditions.tensors().items():
        assert torch.equal(again.conditions.tensors()[name], tensor)
    # Another text encoder is another key.
    encoder = made("Stable Diffusion 2").text_encoder
    weight = next(encoder.parameters()).data
    changed = shutil.copytree(text_folder, own_cache / "changed")
    weight += 1
    encoder.save_pretrained(changed / "text_encoder")
    weight -= 1
    other = load_denoiser(changed, prompts=PROMPTS)
    name = "encoder_hidden_states"
    assert not torch.equal(other.conditions.tensors()[name], first.conditions.tensors()[name])


def test_nothing_damaged_is_left_in_the_cache(text_folder, own_cache, monkeypatch):
    def full(self, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Conditions, "save", full)
    with pytest.raises(CacheError, match="No space left"):
        load_denoiser(text_folder, prompts=PROMPTS)
    assert not list(own_cache.iterdir())


def test_half_precision(text_folder, own_cache):
    """The table and the network are in half; latents, answers and the codec stay in float32."""
    half = load_teacher(text_folder, num_steps=2, prompts=PROMPTS, dtype=torch.bfloat16)
    full = load_teacher(text_folder, num_steps=2, prompts=PROMPTS)
    assert half.denoiser.dtype == torch.bfloat16
    assert half.denoiser.conditions.tensors()["encoder_hidden_states"].dtype == torch.bfloat16
    x_T = full.denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    rows = torch.arange(3)
    ours, wanted = half.sample(x_T, rows), full.sample(x_T, rows)
    assert ours.dtype == half.codec.decode(ours).dtype == torch.float32
    # bfloat16 has eight bits; a wrong cast would be off by the size of the latents.
    assert float((ours - wanted).std() / wanted.std()) < 0.05


def test_a_pipeline_in_memory_stays_as_it_is():
    """It works as before, in its own dtypes; and what it was once saved as is not looked at."""
    pipeline = FAMILIES["Stable Diffusion 2"].make().to(torch.bfloat16)
    teacher = load_teacher(pipeline, num_steps=2, prompts=PROMPTS, dtype=torch.float32)
    assert next(teacher.codec.parameters()).dtype == teacher.denoiser.dtype == torch.float32
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline("dog", num_inference_steps=2, output_type="pt").images) == 1
    # Nothing is copied without need.
    assert load_teacher(pipeline, prompts=PROMPTS).denoiser.network is pipeline.unet


def test_a_pipeline_in_memory_is_not_taken_for_its_folder(text_folder):
    """Its parts may have been replaced."""
    pipeline = DiffusionPipeline.from_pretrained(text_folder, local_files_only=True)
    assert load_teacher(pipeline, prompts=PROMPTS).source is None
    assert load_teacher(text_folder, prompts=PROMPTS).source == str(text_folder)


class HalfAttention(AttnProcessor):
    """Attention that is not diffusers'."""

    def __call__(self, *args, **kwargs):
        return 0.5 * super().__call__(*args, **kwargs)


def add_adapter(pipeline):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipeline.unet.add_adapter(lora, "style")


def weaken_adapter(pipeline):
    pipeline.set_adapters("style", 0.2)


RUN_TIME = {
    "FreeU": lambda pipeline: pipeline.unet.enable_freeu(0.9, 0.2, 1.5, 1.6),
    "attention of one's own": lambda pipeline: pipeline.unet.set_attn_processor(HalfAttention()),
    "an adapter": add_adapter,
}


def pipeline_of_three_blocks():
    """FreeU changes the first two of the upward ones, of skip connections with as many channels."""
    return stable_diffusion(
        DDIMScheduler(clip_sample=False, **BETAS, **STEPS),
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize("change", RUN_TIME.values(), ids=RUN_TIME)
def test_what_was_done_to_a_live_network_is_in_its_student_and_in_the_key(change, tmp_path):
    """Its config does not tell: what is made of it, or was cached before, would be another."""
    pipeline = pipeline_of_three_blocks()
    teacher = load_teacher(pipeline, num_steps=2, prompts=PROMPTS)
    x_T, rows, t = torch.ones(3, 4, 8, 8), torch.arange(3), torch.full((3,), 500.0)
    key, before = teacher.fingerprint(), teacher.denoiser(x_T, t, rows)
    assert can_describe(teacher.denoiser, teacher.make_solver())
    change(pipeline)
    after = teacher.denoiser(x_T, t, rows)
    assert (after - before).abs().max() > 1e-3
    assert teacher.fingerprint() != key
    assert not can_describe(teacher.denoiser, teacher.make_solver())
    bank = TeacherBank.build(teacher, 4, cache_dir=tmp_path)
    env = ReDiFVectorEnv(2, teacher, bank=bank, schedule="uniform", num_steps=2, group_size=2)
    student = ReDiFPPO("StudentPolicy", env, batch_size=4).student()
    torch.testing.assert_close(student(x_T, t, rows), after, **SAME)


def test_the_scale_of_an_adapter_is_in_the_key():
    pipeline = pipeline_of_three_blocks()
    add_adapter(pipeline)
    teacher = load_teacher(pipeline, num_steps=2, prompts=PROMPTS)
    key = teacher.fingerprint()
    weaken_adapter(pipeline)
    assert teacher.fingerprint() != key
    pipeline.set_adapters("style", 1.0)
    assert teacher.fingerprint() == key


def test_other_ways_to_compute_the_same_change_nothing():
    """Negative control: diffusers' own attention in slices, FreeU on and off again."""
    pipeline = pipeline_of_three_blocks()
    teacher = load_teacher(pipeline, num_steps=2, prompts=PROMPTS)
    key = teacher.fingerprint()
    pipeline.enable_attention_slicing(1)
    pipeline.unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    pipeline.unet.disable_freeu()
    assert teacher.fingerprint() == key
    assert can_describe(teacher.denoiser, teacher.make_solver())


ODD_PIXELS = {
    "a table of times": (None, {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
    "betas of a sigmoid": (DDPMScheduler(beta_schedule="sigmoid", clip_sample=False), {}),
    "betas of Laplace's distribution": (
        DDPMScheduler(beta_schedule="laplace", clip_sample=False),
        {},
    ),
}


@pytest.mark.parametrize(("scheduler", "config"), ODD_PIXELS.values(), ids=ODD_PIXELS)
def test_pipelines_of_pixels_with_rare_settings(scheduler, config):
    pipeline = pixels(scheduler, **config)
    teacher = load_teacher(pipeline, num_steps=4)
    x_T = teacher.denoiser.initial_noise(2, torch.Generator().manual_seed(0))
    solver = DDIMScheduler(trained_betas=pipeline.scheduler.betas.tolist(), clip_sample=False)
    stock = DDPMPipeline(pipeline.unet, solver)
    torch.testing.assert_close(teacher.sample(x_T), plain_loop(stock, x_T, None, 4), **SAME)


def test_classes_within_the_embeddings_are_taken(tmp_path):
    """Negative control of those that are refused."""
    denoiser = with_metadata(tmp_path, num_classes=3, null_class=3).denoiser
    assert (denoiser.num_classes, denoiser.null_class) == (3, 3)


def test_without_prompts_the_error_says_where_to_pass_them(text_folder):
    """`distill` and the doctor take a folder, but no prompts."""
    with pytest.raises(InvalidArgumentError, match=r"load_teacher\(\.\.\., prompts="):
        distill(text_folder)


class OwnScheduler(DDIMScheduler):
    """Of no class of diffusers."""


def test_a_scheduler_of_ones_own_class_is_not_described():
    pipeline = FAMILIES["pixels"].make()
    pipeline.register_modules(scheduler=OwnScheduler(clip_sample=False))
    teacher = load_teacher(pipeline, num_steps=2)
    assert not can_describe(teacher.denoiser, teacher.make_solver())
    with pytest.raises(InvalidArgumentError, match="can be described"):
        describe(teacher.denoiser, teacher.make_solver())


def test_a_variant_of_the_files(tmp_path, own_cache):
    """Half-precision files alone: the network has the dtype that is asked for."""
    pipeline = FAMILIES["Stable Diffusion 2"].make().to(torch.float16)
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16")
    options = {"num_steps": 2, "prompts": PROMPTS, "variant": "fp16"}
    teacher = load_teacher(tmp_path / "pipeline", **options)
    assert teacher.denoiser.dtype == torch.float32
    half = load_teacher(tmp_path / "pipeline", dtype=torch.float16, **options)
    assert half.denoiser.dtype == torch.float16
    for loaded in (teacher, half):
        assert next(loaded.codec.parameters()).dtype == torch.float32
    weights = teacher.denoiser.network.state_dict()
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weights[name], weight.float())
    with pytest.raises(TeacherFolderError, match="could not be read"):
        load_teacher(tmp_path / "pipeline", prompts=PROMPTS)


def test_a_damaged_table_is_made_again(text_folder, own_cache):
    first = load_denoiser(text_folder, prompts=PROMPTS)
    (path,) = own_cache.glob("conditions-*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    again = load_denoiser(text_folder, prompts=PROMPTS)
    name = "encoder_hidden_states"
    assert torch.equal(again.conditions.tensors()[name], first.conditions.tensors()[name])
    assert len(Conditions.load(path)) == 3


FLUX_SCHEDULERS = {
    "static shift, as schnell": FlowMatchEulerDiscreteScheduler(shift=1.0),
    "another static shift": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "sigmas of its own": UniPCMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    ),
}


@pytest.mark.parametrize("scheduler", FLUX_SCHEDULERS.values(), ids=FLUX_SCHEDULERS)
def test_flux_has_its_pipelines_times_with_any_scheduler(scheduler):
    family, pipeline = FAMILIES["Flux"], FAMILIES["Flux"].make()
    pipeline.register_modules(scheduler=scheduler)
    teacher = load_teacher(pipeline, num_steps=4, **family.options)
    x_T = teacher.denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    rows = torch.arange(3)
    wanted = family.sample(pipeline, x_T, rows, 4)
    torch.testing.assert_close(teacher.sample(x_T, rows), wanted, **SAME)


@pytest.mark.parametrize("name", ["DiT", "PixArt"])
def test_published_folders_name_a_class_that_has_another_name_now(tmp_path, name):
    """DiT and PixArt are told apart by a setting of their common class."""
    family = FAMILIES[name]
    made(name).save_pretrained(tmp_path / "pipeline")
    now = load_teacher(tmp_path / "pipeline", num_steps=2, **family.options)
    rename(tmp_path / "pipeline", "transformer", "Transformer2DModel", num_vector_embeds=None)
    then = load_teacher(tmp_path / "pipeline", num_steps=2, **family.options)
    for one, two in zip(*(t.denoiser.network.parameters() for t in (now, then)), strict=True):
        assert torch.equal(one, two)
    # Settings that the class has no longer do no harm to what is made of it.
    made_again = build_from_description(describe(then.denoiser, then.make_solver()))
    assert type(made_again.network) is type(now.denoiser.network)
    rename(tmp_path / "pipeline", "transformer", "Transformer3DModel")
    with pytest.raises(TeacherFolderError, match="networks can be"):  # negative control
        load_teacher(tmp_path / "pipeline", num_steps=2, **family.options)


def test_latents_of_another_size(text_folder):
    wide = load_teacher(text_folder, num_steps=2, prompts=PROMPTS, latent_size=(8, 12))
    assert wide.denoiser.latent_shape == (4, 8, 12)
    x_T = wide.denoiser.initial_noise(2, torch.Generator().manual_seed(0))
    x_0 = wide.sample(x_T, torch.tensor([0, 1]))
    assert wide.codec.decode(x_0).shape == (2, 3, 16, 24)


def test_offloaded_teachers_still_answer(text_folder):
    teacher = load_teacher(text_folder, num_steps=2, prompts=PROMPTS)
    x_T = teacher.denoiser.initial_noise(2, torch.Generator().manual_seed(0))
    before = teacher.sample(x_T, torch.tensor([0, 1]))
    assert teacher.offload() is teacher
    assert torch.equal(teacher.sample(x_T, torch.tensor([0, 1])), before)


def test_conditions_of_others_are_refused(text_folder, own_cache):
    """Rows beyond the table would be the negative prompt, or an index error on the device."""
    many = load_teacher(text_folder, num_steps=2, prompts=PROMPTS)
    few = load_teacher(text_folder, num_steps=2, prompts=PROMPTS[:1])
    bank = TeacherBank.build(many, 8)
    assert int(bank.condition.max()) > 0
    with pytest.raises(InvalidArgumentError, match=r"bank=.*which has 1"):
        ReDiFVectorEnv(2, few, bank=bank)
    env = ReDiFVectorEnv(2, many, bank=bank, schedule="uniform", num_steps=2, group_size=2)
    with pytest.raises(InvalidArgumentError, match=r"student=.*table of 1"):
        ReDiFPPO("StudentPolicy", env, policy_kwargs={"student": few.denoiser})


def test_a_name_of_the_hub_is_only_asked_for_on_request(text_folder, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append(name)
        return str(text_folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(TeacherFolderError, match="local_files_only=False"):
        load_teacher("someone/model", prompts=PROMPTS)
    assert asked == []
    teacher = load_teacher("someone/model", prompts=PROMPTS, local_files_only=False)
    assert teacher.source == str(text_folder)  # where the rest of the student's pipeline is
    assert (asked, teacher.denoiser.num_classes) == (["someone/model"], 3)

    def fail(name, **options):
        raise OSError("no connection")

    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    with pytest.raises(TeacherFolderError, match="no connection"):
        load_teacher("someone/model", prompts=PROMPTS, local_files_only=False)


def test_the_lines_of_the_documentation_run(text_folder, own_cache):
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        scope: dict = {"__name__": "documentation"}
        exec(block.replace("path/to/stable-diffusion", str(text_folder)), scope)
        observation, _ = scope["env"].reset(seed=0)
        assert observation["latents"].shape[0] == scope["env"].num_envs


def without(folder, target, *parts):
    copy = shutil.copytree(folder, target / "pipeline")
    for part in parts:
        shutil.rmtree(copy / part)
    return copy


TABLE = Conditions({"encoder_hidden_states": torch.zeros(2, 5, 16)})


def pixels(scheduler=None, **config):
    return DDPMPipeline(pixel_unet(**config), scheduler or DDIMScheduler(clip_sample=False))


def with_metadata(folder, **metadata):
    pixels(num_class_embeds=4).save_pretrained(folder / "pipeline")
    (folder / "pipeline" / "redif.json").write_text(json.dumps(metadata))
    return load_teacher(folder / "pipeline")


def as_control_net(folder):
    """An index as that of an SDXL pipeline with a ControlNet, which would be left out."""
    made("SDXL").save_pretrained(folder / "pipeline")
    path = folder / "pipeline" / "model_index.json"
    changes = {
        "_class_name": "StableDiffusionXLControlNetPipeline",
        "controlnet": ["diffusers", "ControlNetModel"],
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_teacher(folder / "pipeline", prompts=PROMPTS)


BAD = {
    "no prompts": (lambda f, tmp: load_teacher(f), InvalidArgumentError, "prompts"),
    "guidance on a table without null": (
        lambda f, tmp: load_teacher(f, conditions=TABLE, guidance_scale=2.0),
        InvalidArgumentError,
        "guidance_scale",
    ),
    "prompts and a table": (
        lambda f, tmp: load_teacher(f, prompts=PROMPTS, conditions=TABLE),
        InvalidArgumentError,
        "conditions",
    ),
    "no encoders": (
        lambda f, tmp: load_teacher(without(f, tmp, "text_encoder", "tokenizer"), prompts=PROMPTS),
        TeacherFolderError,
        "teacher",
    ),
    "half the encoders": (
        lambda f, tmp: load_teacher(without(f, tmp, "tokenizer"), prompts=PROMPTS),
        TeacherFolderError,
        "teacher",
    ),
    "an unknown autoencoder": (
        lambda f, tmp: edit_class(without(f, tmp), "vae", "AsymmetricAutoencoderKL"),
        TeacherFolderError,
        "teacher",
    ),
    "latents of no size": (
        lambda f, tmp: load_teacher(f, prompts=PROMPTS, latent_size=0),
        InvalidArgumentError,
        "latent_size",
    ),
    "latents that make no whole tokens": (
        lambda f, tmp: load_teacher(made("DiT"), latent_size=7),
        InvalidArgumentError,
        "latent_size",
    ),
    "latents of three sides": (
        lambda f, tmp: load_teacher(made("pixels"), latent_size=(8, 8, 8)),
        InvalidArgumentError,
        "latent_size",
    ),
    "latents of half a side": (
        lambda f, tmp: load_teacher(made("pixels"), latent_size=8.5),
        InvalidArgumentError,
        "latent_size",
    ),
    "latents that can not be halved as often as the network does": (
        lambda f, tmp: load_teacher(made("pixels"), latent_size=(8, 7)),
        InvalidArgumentError,
        "latent_size",
    ),
    "a table of a wrong width": (
        lambda f, tmp: load_teacher(
            f, conditions=Conditions({"encoder_hidden_states": torch.zeros(2, 5, 9)})
        ),
        InvalidArgumentError,
        "conditions",
    ),
    "a table without what SDXL is told beside the text": (
        lambda f, tmp: load_teacher(
            made("SDXL"), conditions=Conditions({"encoder_hidden_states": torch.zeros(2, 5, 32)})
        ),
        InvalidArgumentError,
        "conditions",
    ),
    "latents of DiT that are no square": (
        lambda f, tmp: load_teacher(made("DiT"), latent_size=(8, 16)),
        InvalidArgumentError,
        "latent_size",
    ),
    "classes that are no numbers": (
        lambda f, tmp: load_teacher(pixels(class_embed_type="timestep")),
        InvalidArgumentError,
        "teacher",
    ),
    "more classes than embeddings": (
        lambda f, tmp: with_metadata(tmp, num_classes=10, null_class=3),
        TeacherFolderError,
        "teacher",
    ),
    "a null class beyond the embeddings": (
        lambda f, tmp: with_metadata(tmp, num_classes=4, null_class=4),
        TeacherFolderError,
        "teacher",
    ),
    "prompts of a pipeline that is told of pictures": (
        lambda f, tmp: as_control_net(tmp),
        InvalidArgumentError,
        "source",
    ),
    "a table of wrong names": (
        lambda f, tmp: load_teacher(f, conditions=Conditions({"text": torch.zeros(2, 5, 16)})),
        InvalidArgumentError,
        "conditions",
    ),
    "prompts for a network without": (
        lambda f, tmp: load_teacher("digits", prompts=PROMPTS),
        InvalidArgumentError,
        "prompts",
    ),
    "a negative prompt for a network without": (
        lambda f, tmp: load_teacher("digits", negative_prompt="ugly"),
        InvalidArgumentError,
        "prompts",
    ),
}


def rename(folder, part, name, **changes):
    path = folder / part / "config.json"
    config = {**json.loads(path.read_text()), "_class_name": name, **changes}
    path.write_text(json.dumps(config))


def edit_class(folder, part, name):
    rename(folder, part, name)
    return load_teacher(folder, prompts=PROMPTS)


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_meets_a_typed_error(text_folder, tmp_path, case):
    make, kind, argument = case
    with pytest.raises(kind) as caught:
        make(text_folder, tmp_path)
    assert caught.value.argument == argument


def test_without_transformers_the_error_names_the_extra(text_folder, own_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"redif\[transformers\]"):
        load_teacher(text_folder, prompts=PROMPTS)


def test_a_network_told_by_name_may_have_an_edm_scheduler():
    """Playground 2.5 is an SDXL network with EDM's preconditioning, which diffusers writes out."""
    pipeline = FAMILIES["SDXL"].make()
    pipeline.scheduler = EDMEulerScheduler(prediction_type="v_prediction")
    denoiser = load_teacher(pipeline, prompts=PROMPTS).denoiser
    assert isinstance(denoiser.schedule, VESchedule)
    scheduler, unet = pipeline.scheduler, pipeline.unet
    t, rows = torch.tensor([200.0, 900.0]), torch.tensor([0, 1])
    sigmas = denoiser.schedule.sigma(t)
    noise = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    x_t = noise * sigmas[:, None, None, None]
    told = dict(denoiser.conditions(rows))
    added = {name: told.pop(name) for name in ("text_embeds", "time_ids")}
    got = denoiser(x_t, t, rows)
    for row, sigma in enumerate(sigmas):
        one = slice(row, row + 1)
        raw = unet(
            scheduler.precondition_inputs(x_t[one], sigma),
            scheduler.precondition_noise(sigma),
            added_cond_kwargs={name: tensor[one] for name, tensor in added.items()},
            **{name: tensor[one] for name, tensor in told.items()},
        ).sample
        wanted = scheduler.precondition_outputs(x_t[one], raw, sigma)
        assert torch.allclose(got[one], wanted, **SAME)
