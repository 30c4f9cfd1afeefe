"""A reward of your own, with credit for each place, and a student trained on it beside the pixels.

`python examples/custom_reward.py` takes a minute or two on one core.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from agents import distill
from redif_env import MSE, MapReward, TeacherBank, check_reward, load_teacher, schedules
from redif_env.errors import plain_errors, require
from redif_env.rewards import evaluate_terms


class Edges(MapReward):
    """Minus the squared difference of slopes: each place against its right and lower neighbour."""

    differentiable = True

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        error = functional.pad(x_0 - teacher_x_0, (0, 1, 0, 1), mode="replicate")
        across, down = error[..., :-1, 1:], error[..., 1:, :-1]
        here = error[..., :-1, :-1]
        return -((across - here) ** 2 + (down - here) ** 2)


@dataclasses.dataclass
class Args:
    """Train on edges beside pixels."""

    weight: float = 1.0
    """Of the edges; 1 counts as much as the pixels."""
    teacher_steps: int = 50
    """Steps of the teacher."""
    schedule: tuple[float, ...] = (850.0, 300.0)
    """Times of the student's steps."""
    iterations: int = 40
    """Rollouts, each followed by an update."""
    num_envs: int = 256
    """Trajectories of a rollout."""
    bank_size: int = 1024
    """Training tasks."""
    seed: int = 0
    """Seed of training."""


def main(args: Args) -> dict[str, tuple[float, float]]:
    """Train; returns each term's mean on held-out tasks, before and after."""
    teacher = load_teacher("digits", num_steps=args.teacher_steps)
    tasks = TeacherBank.build(teacher, 128, split="validation")
    check_reward(Edges(), tasks)
    reward = MSE() + args.weight * Edges()
    # In comparable units, so that the weight means something.
    reward = reward.normalised(tasks, teacher.denoiser, args.schedule)
    result = distill(
        teacher,
        len(args.schedule),
        schedule=args.schedule,
        reward=reward,
        iterations=args.iterations,
        num_envs=args.num_envs,
        bank_size=args.bank_size,
        num_held_out=100,
        seed=args.seed,
    )
    test = TeacherBank.build(teacher, 128, split="test")
    grid = schedules.explicit(args.schedule, teacher.denoiser.schedule)
    terms = []
    for denoiser in (teacher.denoiser, result.student):
        with torch.no_grad():
            x_0 = schedules.sample(denoiser, test.x_T, test.condition, grid)
        terms.append(evaluate_terms(reward, x_0, test.teacher_x_0, test.condition).terms)
    return {name: (float(terms[0][name].mean()), float(terms[1][name].mean())) for name in terms[0]}


if __name__ == "__main__":
    with plain_errors():
        for name, (before, after) in main(require("tyro", "examples").cli(Args)).items():
            print(f"{name}: {before:.4f} with plain DDIM, {after:.4f} after training")
