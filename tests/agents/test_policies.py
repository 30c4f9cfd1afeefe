"""StudentPolicy: what it deploys, what it explores with, and what it is made from."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Normal

from agents.policies import Critic, StudentPolicy, make_student
from redif_env import transition
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, TeacherFolderError
from redif_env.loading import BUNDLED, describe, load_denoiser
from redif_env.noise import VPSchedule

# one batch against another of the same rows: float32 convolutions sum in another order
FLOAT32 = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def env(make_env):
    return make_env()


@pytest.fixture
def make_policy(env):
    def make(**changes) -> StudentPolicy:
        settings = {"timesteps": env.timesteps.tolist(), **changes}
        observation_space = settings.pop("observation_space", env.single_observation_space)
        action_space = settings.pop("action_space", env.single_action_space)
        return StudentPolicy(observation_space, action_space, lambda _: 1e-4, **settings)

    return make


def ddim_step(policy, env) -> torch.Tensor:
    """The deterministic step from the environment's own state, by the kernel of redif_env."""
    state = env.state
    index = int(state.step_index[0])
    s = env.timesteps[index + 1].expand(env.num_envs)
    x0_pred = policy.denoiser(state.x_t, state.t, state.condition)
    return transition.step(env.process.schedule, state.x_t, x0_pred, state.t, s).mean.flatten(1)


class DropoutNetwork(nn.Module):
    """Random in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_t, t, condition=None):
        return self.dropout(self.scale * x_t)


def make_dropout_student() -> Denoiser:
    schedule = load_denoiser("digits").schedule
    return Denoiser(DropoutNetwork(), schedule, "sample", (1, 8, 8), num_classes=10)


def make_large_student() -> Denoiser:
    schedule = VPSchedule(torch.linspace(0.999, 0.01, 1000))
    return Denoiser(nn.Identity(), schedule, "sample", (1, 16, 16))


@pytest.mark.parametrize("exploration", [(0.0, 0.02, "ode"), (1.0, 0.5, "sde"), (0.5, 0.5, "ode")])
def test_the_mode_is_the_ddim_step_whatever_the_exploration(make_policy, env, exploration):
    eta, min_std, mean = exploration
    policy = make_policy(eta=eta, min_std=min_std, exploration_mean=mean)
    obs, _ = env.reset(seed=1)
    with torch.no_grad():
        expected = ddim_step(policy, env)
        actions, _, _ = policy(obs, deterministic=True)
        explored, _, _ = policy(obs)
    torch.testing.assert_close(actions, expected, **FLOAT32)
    # negative control: exploring moves away from it by at least the floor
    assert (explored - expected).std() > 0.9 * min_std


def test_the_times_are_the_environments_along_a_whole_episode(make_policy, env):
    """The policy sees no grid, only what is left of it; it must agree with the environment's."""
    policy = make_policy(eta=0.5)
    obs, _ = env.reset(seed=2)
    for _ in range(env.max_steps + 1):  # the next episode's first step too
        with torch.no_grad():
            mode = policy.get_distribution(obs).mode()
            torch.testing.assert_close(mode, ddim_step(policy, env), **FLOAT32)
            obs, *_ = env.step(mode)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_the_times_survive_float32_shares_of_any_length(make_env, make_policy, num_steps):
    """`steps_left` is a share such as 3/7; a grid index must come back from it exactly."""
    env = make_env(4, schedule="uniform", num_steps=num_steps)
    policy = make_policy(timesteps=env.timesteps.tolist(), student=make_dropout_student)
    obs, _ = env.reset(seed=0)
    for _ in range(num_steps):
        with torch.no_grad():
            expected = ddim_step(policy, env)
            torch.testing.assert_close(policy.get_distribution(obs).mode(), expected, **FLOAT32)
        obs, *_ = env.step(torch.zeros(4, 64))


def test_log_prob_and_entropy_are_those_of_the_kernel(make_policy, env):
    policy = make_policy(eta=0.6, min_std=0.03)
    obs, _ = env.reset(seed=3)
    state, s = env.state, env.timesteps[1].expand(8)
    schedule = env.process.schedule

    def column(scale):
        return scale.reshape(-1, 1, 1, 1)

    with torch.no_grad():
        actions, _, log_prob = policy(obs)
        values, evaluated, entropy = policy.evaluate_actions(obs, actions)
        x0_pred = policy.denoiser(state.x_t, state.t, state.condition)
    alpha_t, sigma_t = column(schedule.alpha(state.t)), column(schedule.sigma(state.t))
    alpha_s, sigma_s = column(schedule.alpha(s)), column(schedule.sigma(s))
    mean = alpha_s * x0_pred + sigma_s * (state.x_t - alpha_t * x0_pred) / sigma_t
    std = 0.6 * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).sqrt()
    normal = Normal(mean, std)
    maps = normal.log_prob(actions.reshape(mean.shape)).flatten(1)
    # a difference of 1e-6 in the mean, over a std near 0.3, times 64 elements
    torch.testing.assert_close(evaluated, maps.sum(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(log_prob, evaluated, rtol=0, atol=1e-3)
    expected = normal.entropy().expand(mean.shape).flatten(1).sum(1)
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        policy.get_distribution(obs).log_prob_map(actions), maps, rtol=0, atol=1e-3
    )
    assert values.shape == (8, 1)
    # negative control: other actions are less likely
    assert (policy.evaluate_actions(obs, actions + 1)[1] < evaluated).all()


def test_explore_keeps_the_gaussian_it_drew_from(make_policy, env):
    policy = make_policy(eta=0.5, min_std=0.05)
    obs, _ = env.reset(seed=4)
    with torch.no_grad():
        torch.manual_seed(0)
        explored = policy.explore(obs)
        mean = policy.get_distribution(obs).gaussian.mean
    torch.manual_seed(0)
    noise = torch.randn(8, 1, 8, 8)
    torch.testing.assert_close(explored.gaussian.mean, mean)
    drawn = explored.gaussian.mean + explored.gaussian.std * noise
    torch.testing.assert_close(explored.actions, drawn.flatten(1))


def test_the_student_stays_in_evaluation_mode(make_policy, env):
    policy = make_policy(student=make_dropout_student, critic=True)
    obs, _ = env.reset(seed=5)
    policy.set_training_mode(True)
    assert policy.value_critic.training
    assert not policy.denoiser.training
    assert torch.equal(
        policy.get_distribution(obs).gaussian.mean, policy.get_distribution(obs).gaussian.mean
    )
    policy.denoiser.network.train()  # negative control: in training mode it would be random
    assert not torch.equal(
        policy.get_distribution(obs).gaussian.mean, policy.get_distribution(obs).gaussian.mean
    )


def test_the_average_moves_by_its_share(make_policy):
    policy = make_policy()
    start = [weight.clone() for weight in policy.denoiser.network.parameters()]
    for weight in policy.denoiser.network.parameters():
        weight.data += 1.0
    for _ in range(3):
        policy.update_ema(0.9, updates=1_000)
    for averaged, weight in zip(policy.ema_denoiser.network.parameters(), start, strict=True):
        # three float32 lerps of numbers near 1
        torch.testing.assert_close(averaged, weight + (1 - 0.9**3), rtol=0, atol=1e-6)
        assert not averaged.requires_grad


def test_an_average_without_decay_follows_at_once(make_policy):
    policy = make_policy()
    weight = next(policy.denoiser.network.parameters())
    averaged = next(policy.ema_denoiser.network.parameters())
    weight.data += 1.0
    policy.update_ema(0.0, updates=1_000)
    assert torch.equal(averaged, weight)


def test_load_student_sets_the_average_too(make_policy, teacher):
    policy = make_policy(student=describe(teacher.denoiser, teacher.make_solver()))
    weights = teacher.denoiser.network.state_dict()
    name, weight = next(iter(weights.items()))
    assert not torch.equal(policy.denoiser.network.state_dict()[name], weight)  # random before
    policy.load_student(weights)
    assert torch.equal(policy.denoiser.network.state_dict()[name], weight)
    assert torch.equal(policy.ema_denoiser.network.state_dict()[name], weight)


def test_students_are_made_from_a_name_a_folder_a_description_or_a_function(teacher):
    by_name = make_student("digits").network.state_dict()
    by_folder = make_student(BUNDLED["digits"]).network.state_dict()
    assert all(torch.equal(by_name[name], by_folder[name]) for name in by_name)
    described = make_student(describe(teacher.denoiser, teacher.make_solver()))
    assert described.network.state_dict().keys() == by_name.keys()
    assert described.prediction_type == teacher.denoiser.prediction_type
    assert (described.num_classes, described.null_class) == (10, 10)
    assert torch.equal(described.schedule.alpha_table, teacher.denoiser.schedule.alpha_table)
    assert isinstance(make_student(make_dropout_student).network, DropoutNetwork)


@pytest.mark.parametrize("source", [3, None, nn.Identity(), lambda: 3, lambda: nn.Identity()])
def test_other_sources_of_a_student_are_refused(source):
    with pytest.raises(InvalidArgumentError, match=r"student=.*pass a folder"):
        make_student(source)


def test_a_denoiser_is_copied(teacher):
    """What is not of diffusers can be described by nothing smaller."""
    student, own = make_student(teacher.denoiser), teacher.denoiser
    assert student is not own
    with torch.no_grad():
        next(student.network.parameters()).add_(1)
    assert not torch.equal(next(student.network.parameters()), next(own.network.parameters()))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(TeacherFolderError, match="nowhere"):
        make_student(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"observation_space": spaces.Box(-1, 1, (64,))}, "observation_space"),
        (
            {"observation_space": spaces.Dict(latents=spaces.Box(-1, 1, (1, 8, 8)))},
            "observation_space",
        ),
        ({"student": make_large_student}, "student"),
        ({"action_space": spaces.Box(-1, 1, (65,))}, "action_space"),
        ({"action_space": spaces.Discrete(4)}, "action_space"),
        ({"eta": 1.5}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"min_std": 0.0}, "min_std"),
        ({"exploration_mean": "pde"}, "exploration_mean"),
        ({"critic_lr_scale": -1}, "critic_lr_scale"),
        ({"use_sde": True}, "use_sde"),
        ({"timesteps": [100.0, 200.0]}, "schedule"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make_policy, changes, argument):
    with pytest.raises(InvalidArgumentError) as caught:
        make_policy(**changes)
    assert caught.value.argument == argument
    assert caught.value.remedy


def test_the_critic_reads_latents_time_steps_left_and_class(env):
    torch.manual_seed(0)
    critic = Critic(env.single_observation_space, width=16)
    obs, _ = env.reset(seed=6)
    values = critic(obs)
    assert values.shape == (8,)
    others = {
        "latents": obs["latents"] + 1,
        "timestep": obs["timestep"] / 2,
        "steps_left": obs["steps_left"] / 2,
        "condition": (obs["condition"] + 1) % 10,
    }
    for name, other in others.items():
        assert (critic({**obs, name: other}) - values).abs().min() > 1e-5, name  # rounding: 1e-7
    alone = critic({name: part[3:4] for name, part in obs.items()})
    torch.testing.assert_close(alone, values[3:4])  # rows do not mix


def test_the_critic_pools_images_of_any_size(make_env):
    space = spaces.Dict(
        latents=spaces.Box(-1, 1, (3, 20, 12)),
        timestep=spaces.Box(0, 1, (1,)),
        steps_left=spaces.Box(0, 1, (1,)),
    )
    obs = {"latents": torch.ones(2, 3, 20, 12), "timestep": torch.ones(2, 1)}
    assert Critic(space, 8)({**obs, "steps_left": torch.ones(2, 1)}).shape == (2,)
    space["latents"] = spaces.Box(-1, 1, (5,))
    obs["latents"] = torch.ones(2, 5)
    assert Critic(space, 8)({**obs, "steps_left": torch.ones(2, 1)}).shape == (2,)


def test_values_are_the_critics_or_zero(make_policy, env):
    obs, _ = env.reset(seed=7)
    without = make_policy()
    assert torch.equal(without.predict_values(obs), torch.zeros(8, 1))
    torch.manual_seed(0)
    policy = make_policy(critic=True, critic_width=32)
    values = policy.predict_values(obs)
    assert torch.equal(values[:, 0], policy.value_critic(obs))
    assert torch.equal(policy.evaluate_actions(obs, torch.zeros(8, 64))[0], values)
    assert values.std() > 0


def test_actor_and_critic_have_separate_parameter_groups(make_policy):
    policy = make_policy(critic=True, critic_lr_scale=3.0)
    actor, critic = policy.optimizer.param_groups
    assert {id(p) for p in actor["params"]} == {id(p) for p in policy.denoiser.network.parameters()}
    assert {id(p) for p in critic["params"]} == {id(p) for p in policy.value_critic.parameters()}
    assert critic["lr_scale"] == 3.0
    assert len(make_policy().optimizer.param_groups) == 1


@pytest.mark.parametrize("critic", [False, True])
def test_save_and_load_give_the_same_policy(make_policy, env, tmp_path, critic):
    policy = make_policy(
        eta=0.4,
        min_std=0.07,
        exploration_mean="sde",
        exploration_unit="prediction",
        critic=critic,
    )
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.01)
    policy.save(tmp_path / "policy.pt")
    loaded = StudentPolicy.load(tmp_path / "policy.pt")
    obs, _ = env.reset(seed=8)
    actions = torch.randn(8, 64)
    for one, two in zip(
        policy.evaluate_actions(obs, actions), loaded.evaluate_actions(obs, actions), strict=True
    ):
        assert torch.equal(one, two)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in policy.state_dict().items())


def test_predict_takes_and_gives_numpy(make_policy, env):
    policy = make_policy()
    obs, _ = env.reset(seed=9)
    arrays = {name: value.numpy() for name, value in obs.items()}
    actions, _ = policy.predict(arrays, deterministic=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(actions), ddim_step(policy, env), **FLOAT32)
    one, _ = policy.predict({name: value[0] for name, value in arrays.items()}, deterministic=True)
    assert one.shape == (64,)
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(actions[0]), **FLOAT32)
