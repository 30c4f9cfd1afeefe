"""A few-step student of Stable Diffusion on one GPU: LoRA, half precision, rewards of pixels.

    python examples/stable_diffusion.py --teacher path/to/stable-diffusion --prompts prompts.txt

The teacher is a diffusers folder and the prompts are a text file, one a line. The student has no
guidance: it learns the guided teacher's answers at half the price of a step. The memory that is
needed is printed first.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from agents import ReDiFPPO, export_student
from agents.callbacks import HeldOutEvaluation, ProgressBar
from agents.distillation import find_base, next_free
from agents.memory import estimate, measure_activations
from agents.pictures import save_samples
from redif_env import (
    MSE,
    Decoded,
    Denoiser,
    ReDiFVectorEnv,
    Reward,
    Teacher,
    TeacherBank,
    load_teacher,
    schedules,
)
from redif_env.errors import InvalidArgumentError, check_choice, plain_errors, require
from redif_env.rewards import LPIPS, CLIPCosine, evaluate_terms

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass
class Args:
    """Distil Stable Diffusion into a few-step student."""

    teacher: str
    """Diffusers folder, or a repository of the hub with --download."""
    prompts: Path
    """Text file with a prompt a line."""
    negative_prompt: str | None = None
    """What the teacher is led away from."""
    guidance_scale: float = 7.5
    """Of the teacher."""
    teacher_steps: int = 30
    """Steps of the teacher."""
    num_steps: int = 4
    """Steps of the student."""
    clip: str = CLIPCosine.source
    """Folder of a CLIP model, or a repository in the local cache."""
    lpips: bool = True
    """Whether the reward has LPIPS too."""
    lpips_weights: Path | None = None
    """File of torchvision's AlexNet; default: where torch keeps what it downloaded."""
    lpips_size: int | None = None
    """What images are resized to for LPIPS; default: as they are."""
    iterations: int = 100
    """Rollouts, each followed by an update."""
    num_envs: int = 64
    """Trajectories of a rollout."""
    batch_size: int = 32
    """Transitions of a minibatch."""
    micro_batch_size: int = 4
    """Rows that are in the network at once: halve it when memory runs out."""
    gradient_checkpointing: bool = True
    """Compute activations again in place of keeping them."""
    lora_rank: int = 16
    """Rank of the adapters."""
    learning_rate: float = 3e-4
    """Initial learning rate."""
    dtype: str = "bfloat16"
    """Of the frozen weights; the adapters are float32."""
    bank_size: int = 512
    """Training tasks that the teacher answers."""
    num_held_out: int = 64
    """Tasks that the weights of the reward are found on, and as many that are reported."""
    eval_every: int = 10
    """Iterations between two evaluations."""
    seed: int = 0
    """Seed of training."""
    device: str = "cuda"
    """Device."""
    download: bool = False
    """Whether the teacher, CLIP and AlexNet may be downloaded."""
    out: Path | None = None
    """Folder of the run, which must not exist; default runs/stable-diffusion."""


def main(args: Args) -> dict[str, tuple[float, float]]:
    """Train and export; returns each term's mean on held-out tasks, before and after."""
    out = args.out or next_free(Path("runs") / "stable-diffusion")
    if out.exists():
        raise InvalidArgumentError("out", str(out), "it exists; choose another name.")
    teacher = load(args)
    reward = make_reward(args, teacher)
    needs: dict[str, Any] = {
        "num_envs": args.num_envs,
        "num_steps": args.num_steps,
        "bank_size": args.bank_size,
        "lora_rank": args.lora_rank,
        "reward": reward,
    }
    print(estimate(teacher, **needs), flush=True)

    start = copy.copy(teacher.denoiser)  # what training starts from: the same weights, unguided
    start.set_guidance(1.0)
    grid = schedules.uniform(start.schedule, args.num_steps)
    train, validation, test = build_banks(args, teacher)
    # In comparable units: otherwise the term with the largest numbers decides alone.
    reward = reward.normalised(validation, start, grid, args.micro_batch_size)
    x_0 = sample(start, test, grid)
    model = make_model(args, teacher, reward, grid, train)
    teacher.offload()
    activations = measure_activations(model.policy.denoiser, args.micro_batch_size)
    print(estimate(teacher, **needs, offloaded=True, activations=activations), flush=True)

    model.learn(
        args.iterations * args.num_envs * args.num_steps,
        callback=[HeldOutEvaluation(validation, args.eval_every), ProgressBar(args.iterations)],
    )
    student = model.student()
    rows = {"teacher": test.teacher_x_0, "before": x_0, "student": sample(student, test, grid)}
    out.mkdir(parents=True)
    export_student(student, grid, teacher.make_solver().config, out / "student", find_base(teacher))
    save_samples(out / "samples.png", rows, test.condition, teacher.codec)
    before, after = (mean_terms(reward, rows[name], test) for name in ("before", "student"))
    return {name: (before[name], after[name]) for name in before}


def load(args: Args) -> Teacher:
    """The teacher, of whose network and decoder a few rows are in memory at a time."""
    check_choice("dtype", args.dtype, DTYPES)
    teacher = load_teacher(
        args.teacher,
        num_steps=args.teacher_steps,
        prompts=args.prompts,
        negative_prompt=args.negative_prompt,
        guidance_scale=args.guidance_scale,
        batch_size=args.micro_batch_size,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        local_files_only=not args.download,
    )
    if teacher.codec is None:
        raise InvalidArgumentError("teacher", args.teacher, "pass a latent model.")
    teacher.codec.batch_size = args.micro_batch_size
    return teacher


def make_reward(args: Args, teacher: Teacher) -> Reward:
    """Agreement of pixels, of CLIP's embeddings and of LPIPS's features."""
    local = not args.download
    near: Reward = MSE()
    if args.lpips:
        near = near + LPIPS(args.lpips_weights, size=args.lpips_size, local_files_only=local)
    clip = CLIPCosine(args.clip, local_files_only=local)
    # Terms with a map, and without one, are decoded apart.
    return Decoded(near, teacher.codec) + Decoded(clip, teacher.codec)


def build_banks(args: Args, teacher: Teacher) -> tuple[TeacherBank, TeacherBank, TeacherBank]:
    """Tasks for training, validation and test."""

    def build(size: int, split: str) -> TeacherBank:
        return TeacherBank.build(teacher, size, split=split, progress=True)

    held_out = args.num_held_out
    return build(args.bank_size, "train"), build(held_out, "validation"), build(held_out, "test")


def make_model(
    args: Args, teacher: Teacher, reward: Reward, grid: Tensor, bank: TeacherBank
) -> ReDiFPPO:
    """The agent: pairs of opposite noise, one exploring step a trajectory, adapters only."""
    env = ReDiFVectorEnv(
        args.num_envs,
        teacher,
        schedule=grid,
        bank=bank,
        reward=reward,
        group_size=2,
        guidance_scale=1.0,
        seed=args.seed,
    )
    return ReDiFPPO(
        "StudentPolicy",
        env,
        LinearSchedule(args.learning_rate, 0.0, 1.0),
        batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
        seed=args.seed,
        policy_kwargs={
            "lora_rank": args.lora_rank,
            "gradient_checkpointing": args.gradient_checkpointing,
        },
    )


@torch.no_grad()
def sample(denoiser: Denoiser, bank: TeacherBank, grid: Tensor) -> Tensor:
    """What plain DDIM makes of the bank's noise."""
    return schedules.sample(denoiser, bank.x_T, bank.condition, grid)


@torch.no_grad()
def mean_terms(reward: Reward, x_0: Tensor, bank: TeacherBank) -> dict[str, float]:
    """Each term's mean on the bank's tasks."""
    score = evaluate_terms(reward, x_0, bank.teacher_x_0, bank.condition)
    return {name: float(values.mean()) for name, values in score.terms.items()}


if __name__ == "__main__":
    with plain_errors():
        for name, (before, after) in main(require("tyro", "examples").cli(Args)).items():
            print(f"{name}: {before:.4f} with plain DDIM, {after:.4f} after training")
