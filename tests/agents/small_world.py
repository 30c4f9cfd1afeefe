"""What the tests of this folder share: a grid of three steps, options, and small helpers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from torch import Tensor

GRID = (850.0, 533.0, 200.0)
NUM_ENVS = 8
ITERATION = NUM_ENVS * len(GRID)  # transitions of one rollout

# ReDiFPPO as Stable-Baselines3's PPO
STOCK = {"ratio": "sum", "advantage": "gae", "credit": "global"}
# every step explores with independent noise, as in the published recipes
PLAIN_EXPLORATION = {"stochastic_steps": "all", "antithetic": False}


def lines_of(folder: Path) -> str:
    """The block that the folder's README tells people to run."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def weights(model: Any) -> Tensor:
    """All parameters of an agent's policy in one vector."""
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def deployed(model: Any) -> Tensor:
    """The deployed step from each observation of the last rollout, `(T, N, D)`."""
    buffer = model.rollout_buffer
    names = ("latents", "timestep", "steps_left", "condition")
    with torch.no_grad():
        return torch.stack(
            [
                model.policy.get_distribution(
                    {name: buffer[f"observation/{name}"][step] for name in names}
                ).mode()
                for step in range(buffer.buffer_size)
            ]
        )


class OnRolloutEnd(BaseCallback):
    """Does something between a rollout and its update.

    Args:
        action: Called with the agent.
    """

    def __init__(self, action: Callable[[Any], Any]) -> None:
        super().__init__()
        self.action = action

    def _on_rollout_end(self) -> None:
        self.action(self.model)

    def _on_step(self) -> bool:
        return True


@torch.no_grad()
def tell_apart(head: Any, obs: dict[str, Tensor]) -> None:
    """Make an adaptive schedule head stop in half of these rows, and go on in the others."""
    direction = torch.randn(head.change.in_features, generator=torch.Generator().manual_seed(0))
    along = head.features(obs) @ direction
    gain = 20 / along.std()
    head.change.weight[-1] = gain * direction
    head.change.bias[-1] = -gain * along.median()


class Keeps(KVWriter):
    """The names of all that is logged, and their last values."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def write(self, key_values, key_excluded, step=0) -> None:
        self.values.update(key_values)

    def close(self) -> None:
        pass
