"""check_vector_env accepts what keeps the contract, and names the one thing that is broken."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from redif_env import ReDiFEnv, ReDiFScheduleVectorEnv, ReDiFVectorEnv, check_vector_env
from redif_env.checker import ConformanceError


@pytest.fixture
def build(teacher, bank):
    def make(kind=ReDiFVectorEnv, num_envs=3, **options):
        return kind(num_envs, teacher, **{"bank": bank, "num_steps": 3, **options})

    return make


SECOND = {"schedule": "uniform", "solver_order": 2}


@pytest.mark.parametrize(
    "options", [{}, {"schedule": "uniform"}, {"group_size": 3}, SECOND], ids=str
)
def test_ours_is_accepted_and_usable_afterwards(build, options):
    env = build(**options)
    check_vector_env(env)
    env.reset(seed=0)
    env.step(torch.zeros(env.action_space.shape))


def broken(change):
    """A variant whose steps return `change(observation, rewards, ends, cuts, infos)`."""

    class Broken(ReDiFVectorEnv):
        def step(self, actions):
            return change(*super().step(actions))

    return Broken


def in_observation(**changes):
    """A variant whose observations are changed, name by name."""

    def change(observation, *rest):
        return {n: changes.get(n, lambda v: v)(v) for n, v in observation.items()}, *rest

    return broken(change)


def in_infos(**changes):
    """A variant whose infos are changed, name by name, where an episode ended; None removes."""

    def change(observation, rewards, ends, cuts, infos):
        if ends.any():
            infos = {n: changes[n](v) if n in changes else v for n, v in infos.items()}
        infos = {name: value for name, value in infos.items() if value is not None}
        return observation, rewards, ends, cuts, infos

    return broken(change)


def never(observation, rewards, ends, cuts, infos):
    return observation, rewards * 0, ends & False, cuts, {}


def stay(observation, rewards, ends, cuts, infos):
    """Rows that ended show their last observation, not a new one."""
    final = infos["final_obs"]

    def choose(old, new):
        return torch.where(ends.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return {n: choose(final[n], v) for n, v in observation.items()}, rewards, ends, cuts, infos


class Reusing(ReDiFVectorEnv):
    """Writes every observation into the same tensors."""

    kept = None

    def step(self, actions):
        observation, *rest = super().step(actions)
        if self.kept is None:
            self.kept = observation
        for name, value in observation.items():
            self.kept[name].copy_(value)
        return self.kept, *rest


class NextStep(ReDiFVectorEnv):
    metadata = {**ReDiFVectorEnv.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012


class Unbounded(ReDiFVectorEnv):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.single_action_space = spaces.Box(-np.inf, np.inf, self.single_action_space.shape)


class Careless(ReDiFVectorEnv):
    """Takes actions of any shape."""

    def step(self, actions):
        fitting = torch.zeros(self.action_space.shape)
        num = min(fitting.numel(), actions.numel())
        fitting.view(-1)[:num] = actions.reshape(-1)[:num]
        return super().step(fitting)


class Silent(ReDiFVectorEnv):
    def reset(self, **options):
        return super().reset(**options)[0], None


class Unseeded(ReDiFVectorEnv):
    """Starts where chance will have it."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=int(torch.randint(2**40, ())), options=options)


class Nameless(ReDiFVectorEnv):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.single_action_space = None


def nowhere(value):
    return None


BROKEN = {
    "next-step autoreset": (NextStep, "autoreset_mode"),
    "unbounded actions": (Unbounded, "not bounded"),
    "no action space": (Nameless, "no single_action_space"),
    "reset without infos": (Silent, "reset must return"),
    "four values": (broken(lambda o, r, e, c, i: (o, r, e, i)), "five values"),
    "rewards in numpy": (broken(lambda o, r, *x: (o, r.numpy(), *x)), "rewards is a ndarray"),
    "rewards in double": (broken(lambda o, r, *x: (o, r.double(), *x)), "rewards is torch.float64"),
    "rewards in a column": (broken(lambda o, r, *x: (o, r[:, None], *x)), "rewards has shape"),
    "rewards of NaN": (broken(lambda o, r, *x: (o, r / 0 * 0, *x)), "not finite"),
    "ends in float": (broken(lambda o, r, e, *x: (o, r, e.float(), *x)), "terminations is"),
    "cuts in float": (broken(lambda o, r, e, c, i: (o, r, e, c.float(), i)), "truncations is"),
    "two kinds of end": (broken(lambda o, r, e, c, i: (o, r, e, e, i)), "both terminated and"),
    "an observation too few": (broken(lambda o, *x: ({"latents": o["latents"]}, *x)), "keys"),
    "an observation in numpy": (in_observation(latents=lambda v: v.numpy()), "'latents' is a nd"),
    "an observation in double": (in_observation(timestep=torch.Tensor.double), "'timestep' is"),
    "an observation of one row": (in_observation(latents=lambda v: v[:1]), "'latents' is torch"),
    "an observation out of bounds": (in_observation(timestep=lambda v: v + 2), "outside its space"),
    "an observation of NaN": (
        in_observation(latents=lambda v: v * torch.nan),
        "not finite|outside",
    ),
    "an unseeded start": (Unseeded, "differs between two runs"),
    "unseeded noise": (
        in_observation(latents=lambda v: v + torch.rand(v.shape)),
        "differs between two runs",
    ),
    "one buffer for all": (Reusing, "overwritten"),
    "rows that see each other": (
        in_observation(latents=lambda v: v - v.mean(0)),
        "changed another row",
    ),
    "no final observation": (in_infos(final_obs=nowhere), "lacks 'final_obs'"),
    "no mask": (in_infos(_final_obs=nowhere), "lacks '_final_obs'"),
    "a wrong mask": (in_infos(_episode=lambda v: ~v), "not the mask"),
    "a mask in numpy": (in_infos(_episode=lambda v: v.numpy()), "'_episode'"),
    "no statistics": (in_infos(episode=nowhere), "lacks 'episode'"),
    "no length": (in_infos(episode=lambda v: {"r": v["r"]}), "lacks 'l'"),
    "no return": (in_infos(episode=lambda v: {"l": v["l"]}), "lacks 'r'"),
    "lengths of 0": (in_infos(episode=lambda v: {**v, "l": v["l"] * 0}), "not positive"),
    "a wrong final observation": (
        in_infos(final_obs=lambda v: {"latents": v["latents"]}),
        r"infos\['final_obs'\]: keys",
    ),
    "no fresh start": (broken(stay), "afresh|start"),
    "no end": (broken(never), "no episode ended"),
    "any action": (Careless, "was accepted"),
}


@pytest.mark.parametrize(("kind", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_variant_is_rejected(build, kind, match):
    with pytest.raises(ConformanceError, match=match):
        check_vector_env(build(kind))


def masking(change):
    """A variant of the discrete environment with changed masks."""

    class Masking(ReDiFScheduleVectorEnv):
        def action_masks(self):
            return change(super().action_masks())

    return Masking


class Coupled(ReDiFScheduleVectorEnv):
    """The last row's choice decides for row 0 too."""

    def step(self, actions):
        actions = torch.as_tensor(actions).clone()
        if actions.shape == (self.num_envs,):
            actions[0] = actions[-1]
        return super().step(actions)


DISCRETE = {
    "masks in numpy": (masking(lambda m: m.numpy()), r"action_masks\(\) is a ndarray"),
    "masks in float": (masking(torch.Tensor.float), r"action_masks\(\) is torch.float32"),
    "masks an action short": (masking(lambda m: m[:, 1:]), r"action_masks\(\) has shape"),
    "masks without a choice": (masking(lambda m: m & (m.sum(1) > 1)[:, None]), "without any"),
    "rows that choose for others": (Coupled, "changed another row"),
}


@pytest.mark.parametrize(("kind", "match"), DISCRETE.values(), ids=DISCRETE.keys())
def test_a_broken_discrete_variant_is_rejected(teacher, bank, kind, match):
    check_vector_env(ReDiFScheduleVectorEnv(3, teacher, bank=bank), num_steps=6)
    with pytest.raises(ConformanceError, match=match):
        check_vector_env(kind(3, teacher, bank=bank))


def test_a_single_environment_is_none(teacher, bank):
    with pytest.raises(ConformanceError, match="ReDiFEnv is not a gymnasium VectorEnv"):
        check_vector_env(ReDiFEnv(teacher=teacher, bank=bank))


def test_one_row_has_no_neighbours(build):
    check_vector_env(build(num_envs=1))
    with pytest.raises(ConformanceError, match="not finite"):
        check_vector_env(build(BROKEN["rewards of NaN"][0], num_envs=1))
