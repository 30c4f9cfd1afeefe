"""Every family of models: PPO trains a student of it, and its folder is an ordinary pipeline."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from small_world import lines_of
from tiny_models import FAMILIES, PROMPTS

from agents import ReDiFPPO, distill, run_folder
from agents.distillation import find_base
from agents.export import export_student
from redif_env import (
    Conditions,
    Decoded,
    EDMNetwork,
    ReDiFVectorEnv,
    TeacherBank,
    load_teacher,
    schedules,
)
from redif_env.errors import InvalidArgumentError

GRID = [800.0, 300.0]
NUM_ENVS = 4
SAME = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def given(request, tmp_path_factory):
    """A family's teacher, loaded from disk, and an agent after one iteration."""
    family, tmp = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    family.make().save_pretrained(tmp / "pipeline")
    teacher = load_teacher(tmp / "pipeline", num_steps=family.num_steps, **family.options)
    bank = TeacherBank.build(teacher, 8, cache_dir=tmp)
    env = ReDiFVectorEnv(NUM_ENVS, teacher, schedule=GRID, bank=bank, group_size=2, seed=0)
    before = copy.deepcopy(teacher.denoiser.network.state_dict())
    model = ReDiFPPO("StudentPolicy", env, learning_rate=1e-3, batch_size=4, seed=0)
    start = copy.deepcopy(model.policy.denoiser.network.state_dict())
    model.learn(NUM_ENVS * len(GRID))
    return SimpleNamespace(
        family=family, teacher=teacher, bank=bank, model=model, before=before, start=start, tmp=tmp
    )


def test_one_iteration_changes_the_student_and_not_the_teacher(given):
    own, trained = given.teacher.denoiser.network.state_dict(), given.model.policy.denoiser
    for name, weight in trained.network.state_dict().items():
        assert torch.equal(given.start[name], own[name])
        assert torch.equal(given.before[name], own[name])
        assert weight.isfinite().all()
    changed = [n for n, w in trained.network.state_dict().items() if not torch.equal(w, own[n])]
    assert len(changed) > len(own) / 2
    # The table is one, in whatever copies there are; and costs are counted.
    assert trained.conditions is given.teacher.denoiser.conditions
    assert trained.nfe == given.teacher.denoiser.nfe


def test_a_saved_agent_is_the_same(given):
    given.model.save(given.tmp / "agent")
    loaded = ReDiFPPO.load(given.tmp / "agent")
    grid, bank = given.model.policy.timesteps, given.bank
    with torch.no_grad():
        ours, theirs = (
            schedules.sample(m.student(), bank.x_T, bank.condition, grid)
            for m in (given.model, loaded)
        )
    assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def exported(given):
    config = given.teacher.make_solver().config
    folder = given.tmp / "student"
    return export_student(given.model.student(), GRID, config, folder, find_base(given.teacher))


def test_plain_diffusers_loads_the_folder(given, exported):
    index = json.loads((exported / "model_index.json").read_text())
    # As for the pipeline that it was made of.
    absent = dict.fromkeys(name for name in index if index[name] == [None, None])
    pipeline = DiffusionPipeline.from_pretrained(exported, local_files_only=True, **absent)
    assert type(pipeline) is type(given.family.make())
    kinds = DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler
    assert isinstance(pipeline.scheduler, kinds)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    # The folder is a teacher again, too.
    again = load_teacher(exported, num_steps=2, **given.family.options).denoiser
    own = given.model.student().network
    own = own.network if isinstance(own, EDMNetwork) else own
    loaded = again.network.network if isinstance(again.network, EDMNetwork) else again.network
    for name, weight in own.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)
        assert torch.equal(loaded.state_dict()[name], weight)


def test_the_readme_gives_the_students_own_samples(given, exported, monkeypatch):
    """Its lines, run in the folder: for prompts with noise of our own, for the rest as they are."""
    if getattr(given.teacher.denoiser.network, "use_additional_conditions", False):
        pytest.skip("diffusers' pipeline tells sizes to transformers of 128 x 128 latents only")
    lines = lines_of(exported)
    student = given.model.student()
    x_T = student.initial_noise(10, torch.Generator().manual_seed(0))
    condition = None
    if student.num_classes is not None:
        condition = torch.arange(10) % student.num_classes
    if student.conditions is not None:
        x_T, condition = x_T[:1], condition[:1]
        assert f'pipe("{PROMPTS[0]}"' in lines
        lines = lines.replace("output_type=", "latents=x_T, output_type=")
        if "PixArt" in type(given.family.make()).__name__:  # knows the published sizes only
            lines = lines.replace("output_type=", "use_resolution_binning=False, output_type=")
    with torch.no_grad():
        wanted = schedules.sample(
            student, x_T, condition, schedules.explicit(GRID, student.schedule)
        )
        if given.teacher.codec is not None:
            wanted = given.teacher.codec.decode(wanted)
    if isinstance(given.family.make(), FluxPipeline):  # noise is given in tokens
        x_T = FluxPipeline._pack_latents(x_T, *x_T.shape)
    monkeypatch.chdir(exported)
    scope = {"x_T": x_T}
    exec(lines, scope)
    x = scope["x"]
    if student.conditions is not None:
        wanted = (wanted / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(x, wanted, rtol=1e-3, atol=1e-3)
    assert float(x.std()) > 0.01


def guided_teacher(tmp_path, name, **options):
    FAMILIES[name].make().save_pretrained(tmp_path / "pipeline")
    given = {**FAMILIES[name].options, "num_steps": 2, **options}
    return load_teacher(tmp_path / "pipeline", **given)


UNTOLD = {
    "a pipeline that does not rescale": ("Stable Diffusion 3", {"guidance_rescale": 0.7}),
    "distilled guidance and rescaled true one": ("Flux", {"guidance_rescale": 0.7}),
    "guidance that the pipeline takes for none": ("Stable Diffusion 2", {"guidance_scale": 0.5}),
}


@pytest.mark.parametrize(("name", "options"), UNTOLD.values(), ids=UNTOLD)
def test_guidance_that_the_pipeline_has_no_argument_for_is_refused(tmp_path, name, options):
    """Before training; a student of another guidance than its teacher's is judged by its own."""
    teacher = guided_teacher(tmp_path, name, **options)
    with pytest.raises(InvalidArgumentError, match=r"student=\{'guidance_.*guidance_scale=1"):
        distill(teacher, num_steps=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_folder.check_export(teacher, guidance_scale=1.0)
    teacher.denoiser.set_guidance(3.0)
    run_folder.check_export(teacher)


def test_an_edm_student_of_prompts_is_sampled_by_its_pipeline(tmp_path, monkeypatch):
    """As Playground 2.5: pipelines take EDM's times as sigmas."""
    pipeline = FAMILIES["SDXL"].make()
    pipeline.register_modules(scheduler=EDMEulerScheduler(prediction_type="v_prediction"))
    pipeline.save_pretrained(tmp_path / "pipeline")
    teacher = load_teacher(tmp_path / "pipeline", prompts=PROMPTS, guidance_scale=3.0)
    student, config = teacher.denoiser, teacher.make_solver().config
    folder = export_student(student, GRID, config, tmp_path / "student", find_base(teacher))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(folder)
    scope = {"noise": noise}
    exec(lines_of(folder).replace('"pt"', '"latent", latents=noise'), scope)
    grid = schedules.explicit(GRID, student.schedule)
    with torch.no_grad():
        x_T = student.schedule.initial_std * noise
        wanted = schedules.sample(student, x_T, torch.tensor([0]), grid)
    # It starts at the root of sigma^2 + 1.
    torch.testing.assert_close(scope["x"], wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["Stable Diffusion 2", "PixArt"])
def test_the_readme_makes_pictures_of_the_students_size(tmp_path, monkeypatch, name):
    options = {**FAMILIES[name].options, "latent_size": (16, 8)}
    FAMILIES[name].make().save_pretrained(tmp_path / "pipeline")
    teacher = load_teacher(tmp_path / "pipeline", num_steps=2, **options)
    config = teacher.make_solver().config
    folder = export_student(
        teacher.denoiser, GRID, config, tmp_path / "student", find_base(teacher)
    )
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(lines_of(folder), scope)
    assert scope["x"].shape == (1, 3, 32, 16)
    assert json.loads((folder / "redif.json").read_text())["latent_size"] == [16, 8]


def test_a_pipeline_of_an_unknown_class_is_no_pipeline_to_call(tmp_path):
    pipeline, config = FAMILIES["Stable Diffusion 2"].make(), {"_class_name": "MyOwnPipeline"}
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **config}))
    table = Conditions({"encoder_hidden_states": torch.zeros(3, 12, 16)})
    teacher = load_teacher(tmp_path / "pipeline", conditions=table, num_steps=2)
    run_folder.check_export(teacher)
    solver = teacher.make_solver()
    folder = export_student(
        teacher.denoiser, GRID, solver.config, tmp_path / "student", find_base(teacher)
    )
    assert "called with embeddings" in lines_of(folder)


def test_guidance_is_distilled_away_with_a_reward_of_pixels(tmp_path):
    """Local credit from a map of pixels, and a student at half the price of its teacher."""
    family = FAMILIES["Stable Diffusion 2"]
    teacher = load_teacher(family.make(), num_steps=2, **family.options)
    bank = TeacherBank.build(teacher, 8, cache_dir=tmp_path)
    reward = Decoded("mse", teacher.codec)
    env = ReDiFVectorEnv(
        4, teacher, schedule=GRID, bank=bank, group_size=2, reward=reward, guidance_scale=1.0
    )
    model = ReDiFPPO("StudentPolicy", env, learning_rate=1e-3, batch_size=4, seed=0)
    model.learn(4 * len(GRID))
    assert (teacher.denoiser.nfe, model.student().nfe) == (2, 1)
    own, trained = (d.network.parameters() for d in (teacher.denoiser, model.student()))
    assert not all(torch.equal(one, two) for one, two in zip(own, trained, strict=True))
    # What the environment pays is the reward of what the codec makes of both.
    state = env.last_state
    pixels = teacher.codec.decode(state.x_t), teacher.codec.decode(state.teacher_x_0)
    wanted = -(pixels[0] - pixels[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(reward(state.x_t, state.teacher_x_0, None), wanted)
