"""Options of ReDiFPPO that do not go together meet a typed error."""

from __future__ import annotations

import copy
import functools

import gymnasium as gym
import pytest
import torch
from diffusers import DDIMScheduler
from small_world import GRID, ITERATION, STOCK, weights
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from torch import nn

from agents import ReDiFPPO, TorchVecEnv
from agents.buffers import TorchRolloutBuffer
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import load_teacher
from redif_env.teacher import Teacher, TeacherBank


def case(argument, *, env=None, **options):
    return pytest.param(argument, env or {}, options, id=f"{argument}-{env or ''}{options}")


@pytest.mark.parametrize(
    ("argument", "env_options", "options"),
    [
        case("ratio", ratio="product"),
        case("advantage", advantage="td"),
        case("credit", credit="near"),
        case("stochastic_steps", stochastic_steps="two"),
        case("ema_decay", ema_decay=1.5),
        case("ema_decay", ema_decay="slow"),
        case("eta", eta=2.0),
        case("min_std", min_std=0.0),
        case("ratio", ratio="mean", credit="local"),
        case("ratio", ratio="sum", credit="local"),
        case("credit", env={"reward": "psnr"}),
        case("trained", trained="times"),
        case("trained", trained="schedule"),
        case("schedule_head", policy_kwargs={"schedule_head": {}}),
        case("advantage", env={"schedule": "free"}, advantage="gae", antithetic=False),
        case(
            "timesteps",
            env={"schedule": "free", "num_steps": 3},
            policy_kwargs={"timesteps": [850.0, 300.0]},
        ),
        case(
            "schedule_head['kind']",
            env={"schedule": "free"},
            policy_kwargs={"schedule_head": {"kind": "normal"}},
        ),
        case(
            "candidates",
            env={"schedule": "free"},
            policy_kwargs={"schedule_head": {"kind": "categorical", "candidates": 1}},
        ),
        case("schedule_clip_range", env={"schedule": "free"}, schedule_clip_range=-1),
        case("group_size", env={"group_size": 1}),
        case("group_size", env={"num_envs": 6, "group_size": 3}, antithetic=True, batch_size=9),
        case("stochastic_steps", stochastic_steps=4),
        case("stochastic_steps", stochastic_steps=0),
        case("step_weights", step_weights=[1.0, 1.0]),
        case("step_weights", step_weights=[1.0, -1.0, 1.0]),
        case("step_weights", step_weights=[0.0, 0.0, 0.0]),
        case("gap_fraction", gap_fraction=-0.5),
        case("ent_coef", ent_coef=0.01),
        case("learn_std", env={"group_size": 2}, policy_kwargs={"learn_std": True}),
        case(
            "exploration_noise",
            env={"group_size": 4},
            policy_kwargs={"learn_std": True, "exploration_noise": "rademacher"},
        ),
        case("exploration_noise", policy_kwargs={"exploration_noise": "pink"}),
        case("exploration_unit", policy_kwargs={"exploration_unit": "pixel"}),
        case("antithetic", advantage="gae", credit="global", antithetic=True),
        case("n_steps", n_steps=4),
        case("n_steps", n_steps=-3),
        case("n_steps", n_steps=0),
        case("n_epochs", n_epochs=0),
        case("batch_size", batch_size=0),
        case("action_type", env={"action_type": "epsilon"}),
        case("action_type", env={"residual": True}),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    make_env, make_model, argument, env_options, options
):
    env = make_env(**env_options)
    with pytest.raises(InvalidArgumentError) as caught:
        make_model(env, **options)
    assert caught.value.argument == argument
    assert caught.value.remedy.endswith(".")
    assert caught.value.value in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: VecNormalize(TorchVecEnv(env), norm_obs=False),
        lambda env: VecMonitor(TorchVecEnv(env)),
        lambda env: DummyVecEnv([lambda: gym.make("CartPole-v1")]),
    ],
)
def test_a_student_needs_the_bare_environment(make_env, make_model, wrap):
    """A wrapper sees numpy only; it would be passed over in silence."""
    with pytest.raises(InvalidArgumentError, match="without wrappers") as caught:
        make_model(wrap(make_env()))
    assert caught.value.argument == "env"


class Reward(gym.vector.VectorWrapper):
    """Returns another reward; with `maps`, its map too."""

    def __init__(self, env, maps=False, change=lambda reward: -1000 * reward):
        super().__init__(env)
        self.maps, self.change = maps, change

    def step(self, actions):
        obs, rewards, *ends, infos = self.env.step(actions)
        if self.maps and "reward_map" in infos:
            infos = {**infos, "reward_map": self.change(infos["reward_map"])}
        return obs, self.change(rewards), *ends, infos


class Without(gym.vector.VectorWrapper):
    def step(self, actions):
        *rest, infos = self.env.step(actions)
        return *rest, {name: infos[name] for name in infos if name != "reward_map"}


UNHEARD = {
    "another reward": Reward,
    "a reward of every step": lambda env: Reward(env, change=lambda reward: reward - 0.1),
    "no map": Without,
}


@pytest.mark.parametrize("wrap", UNHEARD.values(), ids=UNHEARD)
@pytest.mark.parametrize("schedule", [GRID, "free"])
def test_local_credit_refuses_a_wrapper_that_it_would_not_hear(
    make_env, make_model, wrap, schedule
):
    options = {"num_steps": 3} if schedule == "free" else {}
    model = make_model(wrap(make_env(schedule=schedule, **options)))
    before = weights(model)
    with pytest.raises(InvalidArgumentError, match=r"credit='local'.*'global'"):
        model.learn(2 * ITERATION)
    assert torch.equal(weights(model), before)
    # and so after another environment was good
    if schedule == GRID:
        model = make_model(make_env())
        model.learn(ITERATION)
        model.set_env(TorchVecEnv(wrap(make_env())))
        with pytest.raises(InvalidArgumentError, match="credit='local'"):
            model.learn(ITERATION)


def test_wrappers_that_credit_hears_are_taken(make_env, make_model):
    """Rewards of the other sign train another student, with global credit and with maps."""
    cases = {
        "local": (lambda env: env, "mse", "local"),
        "unchanged": (lambda env: Reward(env, change=torch.clone), "mse", "local"),
        "of a sum": (lambda env: Reward(env, change=torch.clone), "mse + psnr", "local"),
        "turned": (lambda env: Reward(env, maps=True), "mse", "local"),
        "global": (lambda env: env, "mse", "global"),
        "global, turned": (Reward, "mse", "global"),
    }
    after = {}
    for name, (wrap, reward, credit) in cases.items():
        model = make_model(wrap(make_env(reward=reward)), credit=credit)
        after[name] = weights(model.learn(ITERATION))
    assert torch.equal(after["local"], after["unchanged"])
    assert not torch.equal(after["local"], after["turned"])
    assert not torch.equal(after["global"], after["global, turned"])


def test_gymnasium_wrappers_of_one_environment_count():
    """Those of `make` change nothing and are taken off, with which tensors stay tensors."""
    options = {"n_steps": 16, "batch_size": 16, "ratio": "sum", "advantage": "gae"}
    plain = gym.make("ReDiF-v0", schedule="uniform", num_steps=2)
    wrapped = gym.wrappers.TransformReward(plain, lambda reward: reward * 0 - 7.0)
    model = ReDiFPPO("MultiInputPolicy", wrapped, **options).learn(16)
    assert model.credit == "global"
    assert {episode["r"] for episode in model.ep_info_buffer} == {-14.0}
    assert isinstance(model.env, DummyVecEnv)
    assert isinstance(ReDiFPPO("MultiInputPolicy", plain, **options).env, TorchVecEnv)
    with pytest.raises(InvalidArgumentError, match="without wrappers"):
        ReDiFPPO("StudentPolicy", wrapped, advantage="batch")


def test_the_default_credit_goes_with_the_ratio(make_model):
    assert make_model().credit == "local"
    assert make_model(ratio="mean").credit == "global"


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("eta", lambda left: 5.0 if left < 0.6 else 0.1),
        ("eta", lambda left: float("nan")),
        ("min_std", lambda left: 0.0 if left < 0.6 else 0.01),
    ],
)
@pytest.mark.parametrize("gap_fraction", [None, 0.5])
def test_functions_of_the_progress_keep_to_the_range_of_numbers(
    make_model, name, schedule, gap_fraction
):
    with pytest.raises(InvalidArgumentError) as caught:
        make_model(**{name: schedule}, gap_fraction=gap_fraction).learn(3 * ITERATION)
    assert caught.value.argument == name


@pytest.mark.parametrize("name", ["ratio", "advantage", "credit"])
def test_other_policies_are_stock_ppo_or_nothing(make_env, name):
    wrong = {"ratio": "element", "advantage": "group", "credit": "local"}[name]
    options = {**STOCK, name: wrong, "batch_size": 8}
    if name == "credit":
        options["ratio"] = "element"
        options["advantage"] = "group"
    with pytest.raises(InvalidArgumentError, match="StudentPolicy"):
        ReDiFPPO("MultiInputPolicy", make_env(), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gap_fraction", 0.5),
        ("step_weights", [1.0, 1.0, 1.0]),
        ("stochastic_steps", 2),
        ("stochastic_steps", "one"),
        ("divergence", "kl"),
    ],
)
def test_other_policies_refuse_what_they_would_ignore(make_env, name, value):
    with pytest.raises(InvalidArgumentError, match="StudentPolicy") as caught:
        ReDiFPPO("MultiInputPolicy", make_env(), **{**STOCK, "batch_size": 8, name: value})
    assert caught.value.argument == name


def test_a_grid_that_is_not_the_environments_is_refused(make_model):
    """The policy would predict for other times than those of its observations."""
    with pytest.raises(InvalidArgumentError):
        make_model(policy_kwargs={"timesteps": [900.0, 500.0, 100.0]})


class PlainNetwork(nn.Module):
    """A network that diffusers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, condition=None):
        return self.scale * x_t


def test_a_teacher_of_another_library_is_copied(teacher, make_env, make_model, tmp_path):
    config = {**teacher.make_solver().config, "prediction_type": "sample"}
    own = Denoiser(PlainNetwork(), teacher.denoiser.schedule, "sample", (1, 8, 8), num_classes=10)
    make_solver = functools.partial(DDIMScheduler.from_config, config)
    model = make_model(make_env(teacher=Teacher(own, make_solver, num_steps=5)))
    model.learn(ITERATION)
    assert own.network.scale == 1
    trained = model.policy.denoiser.network.scale
    assert trained != 1
    model.save(tmp_path / "agent")
    assert ReDiFPPO.load(tmp_path / "agent").policy.denoiser.network.scale == trained


def test_a_module_is_no_student(make_model):
    with pytest.raises(InvalidArgumentError, match="student"):
        make_model(policy_kwargs={"student": PlainNetwork()})


def test_the_student_has_the_guidance_that_the_environment_says(make_env, make_model):
    """A student without guidance learns from a guided teacher, from the same weights."""
    guided = load_teacher("digits", num_steps=5, guidance_scale=2.0)
    bank = TeacherBank.build(guided, 16)
    env = make_env(teacher=guided, bank=bank, guidance_scale=1.0)
    model = make_model(env)
    assert (guided.denoiser.nfe, model.student().nfe, env.process.nfe_per_step) == (2, 1, 1)
    start, own = model.student().network.state_dict(), guided.denoiser.network.state_dict()
    assert all(torch.equal(start[name], own[name]) for name in own)
    model.learn(ITERATION)
    assert guided.denoiser.guidance_scale == 2
    same = make_model(make_env(teacher=guided, bank=bank))
    assert same.student().nfe == 2


def test_a_student_of_another_guidance_scale_is_refused(teacher, make_env, make_model):
    """It would ask its network twice where the environment counts once."""
    student = copy.deepcopy(teacher.denoiser)
    student.set_guidance(3.0)
    with pytest.raises(InvalidArgumentError, match="guidance_scale=3") as caught:
        make_model(policy_kwargs={"student": student})
    assert caught.value.argument == "student"
    make_model(make_env(guidance_scale=3.0), policy_kwargs={"student": student})


@pytest.mark.parametrize("name", ["learning_rate", "clip_range", "clip_range_vf"])
@pytest.mark.parametrize("bad", [-1e-4, float("nan")])
def test_a_function_of_the_progress_that_leaves_its_range_is_refused(make_model, name, bad):
    def function(remaining: float) -> float:
        return 0.1 if remaining > 0.2 else bad

    model = make_model(**{name: function})
    with pytest.raises(InvalidArgumentError) as caught:
        model.learn(2 * ITERATION)
    assert caught.value.argument == name
    assert model.rollouts == 2


@pytest.mark.parametrize("name", ["target_kl", "max_grad_norm", "vf_coef", "gamma", "ent_coef"])
def test_a_function_where_a_number_is_wanted_is_refused(make_model, name):
    with pytest.raises(InvalidArgumentError) as caught:
        make_model(**{name: lambda remaining: 0.5})
    assert caught.value.argument == name


def test_a_buffer_of_ones_own_is_used(make_model):
    class Own(TorchRolloutBuffer):
        pass

    assert type(make_model(rollout_buffer_class=Own).rollout_buffer) is Own
