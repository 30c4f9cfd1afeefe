"""The critic that predicts a map of values: its inputs, what it can learn, and learning with it."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces
from probes import (
    TWO_STEPS,
    Constant,
    PerClass,
    ShuffledAdvantages,
    decayed,
    denoiser,
    error,
    make_agent,
    make_env,
    tasks,
    train,
)
from torch import Tensor, nn

from agents.critics import Critic, MapCritic
from redif_env import TeacherBank
from redif_env.rewards.base import MapReward

NUM_CLASSES = 3


def space_of(shape: tuple[int, ...], classes: bool = True) -> spaces.Dict:
    seen = {
        "latents": spaces.Box(-1, 1, shape),
        "timestep": spaces.Box(0, 1, (1,)),
        "steps_left": spaces.Box(0, 1, (1,)),
    }
    return spaces.Dict({**seen, **({"condition": spaces.Discrete(NUM_CLASSES)} if classes else {})})


def observations(shape: tuple[int, ...], num: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(num, *shape, generator=generator),
        "timestep": torch.rand(num, 1, generator=generator),
        "steps_left": torch.rand(num, 1, generator=generator),
        "condition": torch.randint(NUM_CLASSES, (num,), generator=generator),
    }


def made(shape: tuple[int, ...], classes: bool = True, width: int = 64) -> MapCritic:
    torch.manual_seed(0)
    return MapCritic(space_of(shape, classes), width)


SHAPES = [(1, 8, 8), (3, 4, 6), (1, 1, 1), (5,), (1,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [True, False])
def test_a_value_for_each_element_of_the_latents(shape, classes):
    critic, obs = made(shape, classes), observations(shape)
    values = critic(obs)
    assert values.shape == (6, int(torch.Size(shape).numel()))
    assert values.dtype == torch.float32
    # rows do not mix
    alone = critic({name: part[2:3] for name, part in obs.items()})
    torch.testing.assert_close(alone, values[2:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_reads_latents_time_steps_left_and_class(shape):
    critic, obs = made(shape), observations(shape)
    values = critic(obs)
    others = {
        "latents": obs["latents"] + 1,
        "timestep": obs["timestep"] / 2,
        "steps_left": obs["steps_left"] / 2,
        "condition": (obs["condition"] + 1) % NUM_CLASSES,
    }
    for name, other in others.items():
        change = (critic({**obs, name: other}) - values).abs()
        assert change.mean() > 1e-5, name  # rounding: 1e-7
    # negative control: without classes in its space it does not look at them
    blind = made(shape, classes=False)
    assert torch.equal(blind({**obs, "condition": others["condition"]}), blind(obs))


def test_a_value_belongs_to_its_place():
    """Three convolutions of 3 x 3 see three elements around."""
    critic, obs = made((1, 9, 9)), observations((1, 9, 9))
    before = critic(obs).reshape(6, 9, 9)
    obs["latents"][:, 0, 1, 1] += 1
    changed = (critic(obs).reshape(6, 9, 9) - before).abs().amax(0) > 0
    wanted = torch.zeros(9, 9, dtype=torch.bool)
    wanted[:5, :5] = True
    assert torch.equal(changed, wanted)


def test_maps_are_flattened_like_the_latents():
    """Channels first: an element's value has the place of its reward."""
    critic = made((2, 3, 3))
    nn.init.zeros_(critic.body[-1].weight)
    critic.body[-1].bias.data = torch.tensor([1.0, 2.0])
    values = critic(observations((2, 3, 3)))
    assert values[0].tolist() == [1.0] * 9 + [2.0] * 9


def regression_error(shape: tuple[int, ...], classes: bool = True) -> float:
    """Share of a map's variance that is left after 600 steps of regression, on new rows.

    The map depends on each element, on the class and on the time.
    """

    def target(obs: dict[str, Tensor]) -> Tensor:
        shared = obs["timestep"] * (1 + obs["condition"][:, None])
        return obs["latents"].flatten(1) ** 2 - shared

    critic = made(shape, classes)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for step in range(600):
        obs = observations(shape, 64, seed=step)
        loss = nn.functional.mse_loss(critic(obs), target(obs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs = observations(shape, 512, seed=10_000)
    with torch.no_grad():
        return float((critic(obs) - target(obs)).square().mean() / target(obs).var())


@pytest.mark.parametrize("shape", [(1, 4, 4), (4,), (1,)])
def test_a_map_is_learned(shape):
    seen, unseen = regression_error(shape), regression_error(shape, classes=False)
    assert seen < 0.1
    # negative control: the class cannot be guessed, and its share of the variance stays
    assert unseen > seen + 0.04


def map_learner(dim: int, **options):
    """An agent with a value map on a probe of one task.

    Its noise, which the student ignores, tells the elements apart: a map has no other sign of them.
    """
    noise, answers = torch.randn(2, 1, 1, 1, dim, generator=torch.Generator().manual_seed(0))
    bank = TeacherBank(noise, 0.5 * answers)

    def make_student():
        return denoiser(Constant(dim), dim)

    settings = {"advantage": "gae", "credit": "local", "n_epochs": 4}
    settings = {**settings, "learning_rate": decayed(0.03), "policy": {"critic_lr_scale": 1.0}}
    return make_agent(make_env(make_student, bank), make_student, **{**settings, **options}), bank


def share_left(dim: int, **options) -> float:
    """Error of the deployed student after 40 iterations, as a share of that before."""
    model, bank = map_learner(dim, **options)
    before = error(model, bank)
    return error(train(model, 40), bank) / before


@pytest.mark.parametrize("dim", [1, 4, 64])
def test_a_student_improves_with_a_value_map(dim):
    # seeds 0 to 2 left at most 0.015, and with shuffled advantages at least 0.64
    assert share_left(dim) < 0.05


def test_a_student_with_shuffled_advantages_does_not():
    """Negative control."""
    assert share_left(4, kind=ShuffledAdvantages) > 0.2


def test_a_map_credits_each_element_where_the_whole_does_not():
    """Negative control: of 256 elements the whole reward says little about any one.

    Seeds 0 to 2 left 0.06 to 0.08 of the error with maps, 0.29 to 0.31 without.
    """
    assert share_left(256) < share_left(256, credit="global") / 2


def test_what_is_kept_of_a_value_map():
    model, _ = map_learner(4)
    train(model, 1)
    assert isinstance(model.policy.value_critic, MapCritic)
    for name in ("values", "returns", "advantages"):
        assert model.rollout_buffer[name].shape == (1, 32, 4)
    # and of a critic of one value
    model, _ = map_learner(4, credit="global")
    train(model, 1)
    assert isinstance(model.policy.value_critic, Critic)
    assert model.rollout_buffer["values"].shape == (1, 32)


class ClassMap(MapReward):
    """A map of the class alone: its element d is worth condition x (-1)^d."""

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor) -> Tensor:
        signs = 1.0 - 2.0 * (torch.arange(x_0.shape[-1]) % 2)
        return condition[:, None, None, None] * signs.expand_as(x_0)


@pytest.mark.parametrize("vf_coef", [0.5, 0.0])
def test_the_value_map_explains_the_returns(vf_coef):
    """Of four classes, at both steps; and the logged share says so."""
    bank = tasks(torch.zeros(4, 6), torch.arange(4))

    def make_student():
        return denoiser(PerClass(4, 6), 6, num_classes=4)

    env = make_env(make_student, bank, TWO_STEPS, reward=ClassMap())
    options = {"advantage": "gae", "n_epochs": 4, "vf_coef": vf_coef}
    model = make_agent(env, make_student, learning_rate=decayed(1e-3), **options)
    train(model, 1)
    first = model.logger.name_to_value["train/explained_variance"]
    train(model, 20)
    last = model.logger.name_to_value["train/explained_variance"]
    assert first < 0.2
    assert last > 0.9 if vf_coef else last < 0.2
    observation, _ = env.reset()
    for _ in range(2):
        wanted = observation["condition"][:, None] * (1.0 - 2.0 * (torch.arange(6) % 2))
        mean = (model.policy.values(observation) - wanted).abs().mean()
        assert mean < 0.3 if vf_coef else mean > 0.8
        observation = env.step(torch.zeros(32, 6))[0]
