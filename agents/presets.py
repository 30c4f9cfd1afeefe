"""Published recipes as plain data, so that anyone can rerun history.

A recipe has keyword arguments for the environment, the policy and the agent, and says whether the
learning rate falls linearly to 0:

    recipe = preset("ddpo")
    env = ReDiFVectorEnv(512, schedule="uniform", **recipe["env"])
    ReDiFPPO("StudentPolicy", env, policy_kwargs=recipe["policy"], **recipe["agent"])
"""

from __future__ import annotations

import copy
from typing import Any

from redif_env.errors import check_choice
from redif_env.rewards import Reward
from redif_env.rewards.base import weighted_terms

Recipe = dict[str, Any]

# This project's: element ratios, local credit, one exploring step, opposite noise of one size in
# all elements that follows the gap to the teacher, three epochs.
_DEFAULT: Recipe = {
    "env": {"group_size": 2},
    "policy": {"exploration_noise": "rademacher"},
    "agent": {
        "ratio": "element",
        "advantage": "group",
        "credit": "local",
        "stochastic_steps": "one",
        "antithetic": True,
        "eta": 0.0,
        "min_std": 0.005,
        "gap_fraction": 0.5,
        "clip_range": 0.2,
        "learning_rate": 2e-4,
        "batch_size": 256,
        "n_epochs": 3,
        "ema_decay": 0.95,
    },
    "decay": True,
}

# Black et al. 2024 and its public code: every step explores with the DDPM kernel, one ratio from
# the *mean* log-prob, clipped at 1e-4, rewards whitened over the whole batch.
_DDPO: Recipe = {
    "env": {"group_size": 1},
    "policy": {"exploration_mean": "sde"},
    "agent": {
        "ratio": "mean",
        "advantage": "batch",
        "credit": "global",
        "stochastic_steps": "all",
        "antithetic": False,
        "eta": 1.0,
        "min_std": 0.02,
        "gap_fraction": None,
        "clip_range": 1e-4,
        "advantage_clip": 10.0,
        "learning_rate": 1e-5,
        "batch_size": 256,
        "n_epochs": 1,
        "ema_decay": 0.0,
    },
    "decay": False,
}


def _changed(recipe: Recipe, agent: dict[str, Any], env: dict[str, Any] | None = None) -> Recipe:
    return {
        **recipe,
        "env": {**recipe["env"], **(env or {})},
        "agent": {**recipe["agent"], **agent},
    }


_PENALTY = {"divergence": "kl", "divergence_coef": 0.04, "advantage_clip": 5.0}

# Where a draw says all there is (one step, whose gradient is then exact) or little (one number for
# all elements), a fresh draw is worth more than a further look at the last one (docs/decisions.md).
_FRESH = {"n_epochs": 1, "batch_size": 64}
# What a recipe's agent changes for students of so many steps, up to the next number: the closer the
# start is to the teacher, the smaller the rate that still improves on it.
BY_STEPS: dict[str, dict[int, dict[str, Any]]] = {
    "default": {1: _FRESH, 2: {}, 3: {"learning_rate": 1e-4}, 6: {"learning_rate": 2e-5}}
}
# ... and for rewards with a term that has no map.
WITHOUT_MAP: dict[str, dict[str, Any]] = {"default": _FRESH}
# With a map and fixed times, how many steps are explored, the last ones: local credit leaves out
# what an early one does elsewhere in the sample.
EXPLORED = {"default": 2}
# ... and what changes besides. What a late step does, credit has nearly in full, so that a draw is
# used once, and tasks differ more than draws do: each counts the same.
_ALIKE = {"n_epochs": 1, "batch_size": 32, "advantage_std": "group"}
WITH_MAP: dict[str, dict[int, dict[str, Any]]] = {
    "default": {1: _ALIKE, 2: {}, 3: _ALIKE, 4: {**_ALIKE, "learning_rate": 5e-5}, 6: _ALIKE}
}
# ... and from how many on they are of second order, which starts closer.
SECOND_ORDER = {"default": 4}
PRESETS: dict[str, Recipe] = {
    "default": _DEFAULT,
    "ddpo": _DDPO,
    # Shao et al. 2024 on denoising: groups share noise and class; joint ratio; KL penalty, here in
    # closed form instead of by the k3 estimator.
    "grpo": _changed(
        _DDPO,
        {
            "ratio": "sum",
            "advantage": "group",
            "advantage_std": "group",
            "clip_range": 0.2,
            **_PENALTY,
        },
        {"group_size": 4},
    ),
    # arXiv 2512.22802: DDPO's settings, with a divergence penalty and advantages clipped at 5.
    "redif-paper": _changed(_DDPO, _PENALTY),
}


def preset(
    name: str,
    num_steps: int | None = None,
    reward: Reward | None = None,
    learned: bool = False,
) -> Recipe:
    """A copy of a recipe.

    Args:
        name: One of `PRESETS`.
        num_steps: Of the student; None: as it is in `PRESETS`.
        reward: What is trained on, if known. Without a map credit is global.
        learned: Whether times are learned too.

    Raises:
        InvalidArgumentError: for an unknown name.
    """
    recipe = copy.deepcopy(PRESETS[check_choice("preset", name, tuple(PRESETS))])
    agent, env = recipe["agent"], recipe["env"]
    has_maps = reward is None or all(term.has_map for _, term in weighted_terms(reward))
    if name in BY_STEPS and num_steps is not None:
        agent |= _of_steps(BY_STEPS[name], num_steps)
        if has_maps and not learned:
            agent |= {**_of_steps(WITH_MAP[name], num_steps), **_late(num_steps, EXPLORED[name])}
            env["solver_order"] = 2 if num_steps >= SECOND_ORDER[name] else 1
    if not has_maps:
        agent |= WITHOUT_MAP.get(name, {})
    if reward is not None and not reward.has_map:
        agent["credit"] = "global"
    return recipe


def _of_steps(changes: dict[int, dict[str, Any]], num_steps: int) -> dict[str, Any]:
    return changes[max(fewest for fewest in changes if fewest <= num_steps)]


def _late(num_steps: int, explored: int) -> dict[str, Any]:
    """Leaves early steps alone, if there are more than the last `explored` ones."""
    early = max(num_steps - explored, 0)
    return {"step_weights": [0.0] * early + [1.0] * explored} if early else {}
