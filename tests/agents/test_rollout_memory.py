"""A rollout keeps every latent once: as the action that made it, or as an episode's start."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from small_world import GRID, ITERATION, NUM_ENVS
from torch import nn

from agents.memory import rollout_size
from redif_env import Denoiser
from redif_env.mdp import PAST
from redif_env.rewards import fit_map

D = 64
MODES = {
    "one": {},
    "two": {"stochastic_steps": 2},
    "all": {"stochastic_steps": "all", "antithetic": False},
    "critic": {"advantage": "gae"},
}


class Shifted(gym.vector.VectorWrapper):
    """Shows other latents than those that were acted into."""

    def reset(self, **options):
        obs, infos = super().reset(**options)
        return {**obs, "latents": obs["latents"] + 0.01}, infos

    def step(self, actions):
        obs, *rest = super().step(actions)
        return {**obs, "latents": obs["latents"] + 0.01}, *rest


def watched(model):
    """Will hold the latents that each step of the rollout starts from."""
    seen, act = [], model._act

    def noting(observation, *rest):
        seen.append(observation["latents"].clone())
        return act(observation, *rest)

    model._act = noting
    return seen


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bound", [10.0, 1.0])
def test_what_was_observed_comes_out_bit_by_bit(make_env, make_model, options, bound):
    """Two episodes a rollout, of noise that the smaller bound clips."""
    model = make_model(make_env(action_bound=bound), n_steps=2 * len(GRID), **options)
    seen = watched(model)
    model.learn(2 * ITERATION)
    buffer, latents = model.rollout_buffer, torch.stack(seen)
    assert torch.equal(buffer["observation/latents"], latents)
    actions = buffer["actions"].reshape(latents.shape)
    clipped = actions[0] != latents[1]
    assert bool(clipped.any()) == (bound == 1.0)
    flat = {row.numpy().tobytes() for row in latents.flatten(0, 1)}
    for batch in buffer.get(8):
        assert {row.numpy().tobytes() for row in batch.observations["latents"]} <= flat
        same = (actions.flatten(2).flatten(0, 1)[:, None] == batch.actions).all(2)
        acted_on = latents.flatten(0, 1)[same.int().argmax(0)]
        assert torch.equal(acted_on, batch.observations["latents"])


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_states_and_actions_take_steps_plus_one_latents(make_env, make_model, options):
    model = make_model(make_env(), **options)
    model.learn(ITERATION)
    store = model.rollout_buffer._store
    assert "observation/latents" not in store
    assert store["actions"].numel() + store["start"].numel() == (len(GRID) + 1) * NUM_ENVS * D
    # Means are kept where they are trained on: once with one exploring step.
    kept = 1 if model.window == 1 else len(GRID)
    assert store["mean"].numel() == kept * NUM_ENVS * D


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_what_was_seen_of_the_step_before_comes_out_bit_by_bit(make_env, make_model, options):
    """Where one step explores, that one's alone is stored; what belongs to it too comes along."""
    model = make_model(make_env(solver_order=2), n_steps=2 * len(GRID), **options)
    seen, act = [], model._act

    def noting(observation, *rest):
        seen.append({name: value.clone() for name, value in observation.items()})
        return act(observation, *rest)

    model._act = noting
    model.learn(2 * ITERATION)
    kept = 2 if model.window == 1 else 2 * len(GRID)
    buffer = model.rollout_buffer
    assert buffer[f"observation/{PAST}"].shape[:2] == (kept, NUM_ENVS)
    together = {name: torch.stack([row[name] for row in seen]).flatten(0, 1) for name in seen[0]}
    latents = together["latents"].flatten(1)
    steps = []
    for batch in buffer.get(8):
        observed = batch.observations
        assert observed.keys() == together.keys()
        places = (observed["latents"].flatten(1)[:, None] == latents).all(2).int().argmax(1)
        for name, value in observed.items():
            assert torch.equal(value, together[name][places]), name
        steps += batch.step_index.tolist()
    assert len(set(steps)) == len(GRID)


def test_the_means_of_the_explored_steps_are_those_acted_with(make_env, make_model):
    """Of two episodes: `actions - mean` is the noise of the steps that explored."""
    model = make_model(make_env(), n_steps=2 * len(GRID), eta=0.0, min_std=0.1)
    drawn, explore = [], model.policy.explore

    def noting(*args):
        drawn.append(explore(*args))
        return drawn[-1]

    model.policy.explore = noting
    model.learn(2 * ITERATION)
    buffer = model.rollout_buffer
    means = torch.stack([entry.gaussian.mean for entry in drawn]).unflatten(0, (2, len(GRID)))
    explored = buffer["explored_step"]
    for episode in range(2):
        rows = torch.arange(NUM_ENVS)
        assert torch.equal(buffer["mean"][episode], means[episode, explored[episode], rows])
    assert len(explored.unique()) > 1


def test_a_wrappers_observations_are_stored_as_they_are(make_env, make_model):
    """Negative control: the action does not tell them, so nothing may be inferred from it."""
    model = make_model(Shifted(make_env()))
    seen = watched(model)
    model.learn(ITERATION)
    buffer = model.rollout_buffer
    assert "observation/latents" in buffer._store
    assert torch.equal(buffer["observation/latents"], torch.stack(seen))
    assert not torch.equal(seen[1].flatten(1), buffer["actions"][0])


@pytest.mark.parametrize("shifted_first", [True, False])
def test_another_environment_decides_anew(make_env, make_model, shifted_first):
    envs = [Shifted(make_env()), make_env()]
    first, second = envs if shifted_first else reversed(envs)
    model = make_model(first)
    model.learn(ITERATION)
    model.set_env(second)
    seen = watched(model)
    model.learn(ITERATION)
    buffer, latents = model.rollout_buffer, torch.stack(seen)
    assert torch.equal(buffer["observation/latents"], latents)
    flat = {row.numpy().tobytes() for row in latents.flatten(0, 1)}
    for batch in buffer.get(8):
        assert {row.numpy().tobytes() for row in batch.observations["latents"]} <= flat


def test_the_size_of_large_latents_is_that_of_what_must_be_kept(teacher):
    """The path; and the explored step's mean, the map and the advantages, a latent each."""
    shape = (3, 32, 32)
    denoiser = Denoiser(nn.Identity(), teacher.denoiser.schedule, "sample", shape)
    latents = 4 * math.prod(shape) * 100 * (16 + 1 + 3)
    assert latents < rollout_size(denoiser, 100, 16) < 1.01 * latents


@pytest.mark.parametrize("radii", [[1, 0, 0], [2, 1, 0], [1, 1, 1]], ids=str)
def test_credit_has_the_radius_of_the_step_that_explored(make_env, make_model, radii):
    """Of a square's mean times its side, so that noise stays of one size."""
    maps = []

    class Watched(gym.vector.VectorWrapper):
        def step(self, actions):
            *rest, infos = super().step(actions)
            maps.extend([infos["reward_map"]] if "reward_map" in infos else [])
            return *rest, infos

    model = make_model(Watched(make_env()), local_radius=radii)
    model.learn(ITERATION)
    buffer = model.rollout_buffer
    (found,), (explored,) = maps, buffer["explored_step"]
    assert len(explored.unique()) > 1
    for row, step in enumerate(explored.tolist()):
        side = 2 * radii[step] + 1
        wanted = side * fit_map(found[row : row + 1], found.shape[1:], radii[step])[0]
        assert torch.equal(buffer["reward_map"][0, row], wanted)
        # negative control: another step's radius gives another map
        other = fit_map(found[row : row + 1], found.shape[1:], radii[step] + 1)[0]
        assert not torch.allclose(buffer["reward_map"][0, row], other)


def test_the_mean_over_independent_places_times_the_side_has_their_spread():
    """Why the factor: without it the credit of a wide radius would be a third of the others'."""
    noise = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    inner = fit_map(noise, noise.shape[1:], 1)[:, :, 1:-1, 1:-1]
    assert float(3 * inner.std()) == pytest.approx(1, rel=0.02)  # of 57,600 places
