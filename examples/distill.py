"""Distil a teacher into a few-step student, and show how good it is.

`python examples/distill.py --help` lists the options; the defaults take a few minutes on two cores.
`torchrun --nproc-per-node 8 examples/distill.py --device cuda` trains on eight devices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents import distill
from agents.distillation import last_taken, next_free
from redif_env import parallel
from redif_env.errors import InvalidArgumentError, plain_errors, require


@dataclasses.dataclass
class Args:
    """Distil a teacher into a few-step student."""

    teacher: str = "digits"
    """Bundled teacher, or a diffusers folder with unet/ and scheduler/."""
    num_steps: int = 4
    """Steps of the student."""
    method: str = "ppo"
    """ppo, or a technique of docs/baselines.md to compare with."""
    student: float | None = None
    """Share of the teacher's parameters, such as 0.25, of a smaller student."""
    warm_up: int | None = None
    """Iterations of regression on the teacher's answers first; default: 1000 if smaller, else 0."""
    schedule: str = "search"
    """search (the best for the untrained student), uniform, karras, or times like 850,533,289."""
    reward: str = "mse"
    """A name of docs/rewards.md, or a sum such as "mse + 0.5*ssim"."""
    solver_order: int | None = None
    """1 steps as DDIM, 2 as DPM-Solver++ 2M; default: 2 from 4 steps on where that can be had."""
    guidance_scale: float | None = None
    """Of the student; default: the teacher's. 1 distils guidance away, at half the cost."""
    iterations: int = 150
    """Rollouts, each followed by an update."""
    num_envs: int = 512
    """Trajectories of a rollout, of all processes together."""
    preset: str = "default"
    """Recipe: default, ddpo, grpo or redif-paper; the next seven default to its values."""
    group_size: int | None = None
    """Trajectories that share noise and class."""
    batch_size: int | None = None
    """Transitions of a minibatch."""
    learning_rate: float | None = None
    """Initial learning rate."""
    n_epochs: int | None = None
    """Passes over a rollout."""
    eta: float | None = None
    """Noise factor while exploring."""
    min_std: float | None = None
    """Smallest exploration std, in latent units."""
    gap_fraction: float | None = None
    """Exploration std as a share of the distance to the teacher; 0 explores with min_std."""
    changes: tuple[str, ...] | None = None
    """Further changes to the recipe, such as target_kl=0.05 adaptive_lr=true divergence=kl."""
    lora_rank: int | None = None
    """Train adapters of this rank in place of all weights; needs pip install -e ".[lora]"."""
    lora_targets: tuple[str, ...] | None = None
    """Names that the adapted layers end in, such as to_q to_v; default: agents.lora's."""
    precision: str | None = None
    """bfloat16 to let the student's network compute in it while it is trained; default float32."""
    micro_batch_size: int | None = None
    """Rows that are in the student's network at once, for models that fill the memory."""
    gradient_checkpointing: bool | None = None
    """Whether to compute activations again in place of keeping them."""
    shard_student: bool | None = None
    """Several processes share out weights, gradients, moments and average of the student."""
    bank_size: int = 6144
    """Training tasks that the teacher answers."""
    num_held_out: int = 1000
    """Test tasks that the figures are measured on."""
    eval_every: int = 10
    """Iterations between two evaluations on validation tasks."""
    seed: int = 0
    """Seed of training."""
    device: str = "cpu"
    """Device, such as cpu or cuda."""
    out: Path | None = None
    """Folder of the run, which must not exist; default runs/TEACHER-STEPS-steps-seed-SEED."""
    checkpoint_every: int | None = 10
    """Iterations between two checkpoints in the folder; None writes none."""
    resume: bool = False
    """Go on with the run in out (default: the last of that name) with the same options."""


def main(args: Args) -> dict[str, Any]:
    """Run, print the table, and return the report."""
    options = dataclasses.asdict(args)
    if args.out is None:
        name = f"{Path(args.teacher).name}-{args.num_steps}-steps-seed-{args.seed}"
        choose = last_taken if args.resume else next_free
        options["out"] = choose(Path("runs") / name)
    options["schedule"] = parse_schedule(args.schedule)
    options["changes"] = None if args.changes is None else parse_changes(args.changes)
    report = distill(**options, progress=True).report
    if parallel.is_main():
        print(table(report))
        print(where_to_look(options["out"]))
    return report


def parse_schedule(text: str) -> str | list[float]:
    """Times between commas as a list; a name as it is, which `distill` checks."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Options of `name=value`: numbers, lists, true, false and null as JSON has them, or words."""
    changes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not value:
            raise InvalidArgumentError("changes", text, "write name=value, as in target_kl=0.05.")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    return changes


def table(report: dict[str, Any]) -> str:
    """The report's figures for people."""
    steps = report["num_steps"]
    labels = {
        "student": f"student, {steps} steps",
        "warm_up": f"student, {steps} steps, warm-up alone",
        "ddim_searched": f"DDIM, {steps} steps, searched grid",
        "dpmpp2m_searched": f"DPM-Solver++, {steps} steps, searched",
        "ddim": f"DDIM, {steps} steps, uniform grid",
        "teacher_floor": "teacher itself (floor)",
    }
    lines = [f"\n{'on held-out noise':34}{'paired MSE':>12}{'Frechet':>10}{'right label':>13}"]
    for key in (key for key in labels if key in report["held_out"]):
        label = labels[key]
        figures = report["held_out"][key]
        mse, frechet, agreement = (
            figures[name] for name in ("paired_mse", "frechet", "label_agreement")
        )
        lines.append(
            f"{label:34}{_format(mse, '.5f'):>12}{_format(frechet, '.3f'):>10}"
            f"{_format(agreement, '.2%'):>13}"
        )
    total, size = report["network_evaluations"], report["parameters"]
    lines.append(f"\n{size['student']:,} parameters; the teacher has {size['teacher']:,}")
    lines.append(
        f"{report['trajectories']:,} trajectories, {total:,} network-forward equivalents, "
        f"{report['seconds']:.0f} seconds ({report['hardware']})"
    )
    ledger = report["ledger"]
    teacher, search = ledger["teacher"], ledger["search"]
    lines.append(
        f"of these: teacher's answers {teacher:,}; search of the grid {search:,}; "
        f"training {total - teacher - search:,}"
    )
    return "\n".join(lines)


def where_to_look(out: Path) -> str:
    """What the run has left, and what to do with it."""
    return f"""
{out}/samples.png    the same noise: teacher, plain DDIM, student
{out}/student        a diffusers folder; its README.md samples it in ten lines
{out}/summary.json   every figure above, and more
tensorboard --logdir {out.parent}    curves and pictures while training"""


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


if __name__ == "__main__":
    with plain_errors():
        main(require("tyro", "examples").cli(Args))
