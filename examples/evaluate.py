"""Judge few-step samplers side by side, with intervals, against a teacher or real data.

`python examples/evaluate.py --teacher digits --methods runs/a/student runs/b/student samples.npy`.
docs/evaluation.md says which figure to trust for what.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from torch import Tensor

from agents.comparison import Features, Method, Yardstick, evaluate
from agents.distillation import REFERENCE_SEED, find_judge, versions
from agents.evaluation import Judge
from agents.export import load_adaptive
from agents.inception import load_inception
from redif_env import schedules
from redif_env.errors import InvalidArgumentError, check_integer, plain_errors, require
from redif_env.files import write_json
from redif_env.loading import BUNDLED, METADATA, find_folder, load_denoiser, load_teacher
from redif_env.rendering import pixels
from redif_env.teacher import Teacher, TeacherBank

SAMPLE_FILES = (".npy", ".safetensors")
TENSOR_NAMES = ("samples", "x_0", "teacher_x_0")
BATCH_SIZE = 256
LARGEST = 2.0  # of an image in [-1, 1]: samplers of few steps leave it a little
DEFAULT_TEACHER = "digits"


@dataclasses.dataclass
class Args:
    """Judge few-step samplers side by side, with intervals, against a teacher or real data."""

    methods: tuple[str, ...]
    """Students of ReDiF, diffusers folders, .npy or .safetensors files, folders of PNGs; name=PATH
    names one, and name=PATH,PATH are training seeds of one method."""
    teacher: str | None = None
    """Bundled teacher, or a diffusers folder, whose noise and classes the methods answer; default:
    digits, or none with a reference, where methods can then only be files."""
    reference: Path | None = None
    """Real data, a file or folder like the methods' samples, to compare with in the teacher's
    place; half of it measures the floor."""
    num_samples: int = 1000
    """Tasks; fewer where a file has fewer rows."""
    teacher_steps: int = 50
    """Steps of the teacher."""
    num_steps: int = 4
    """Steps of diffusers folders that are no students of ReDiF, with their own scheduler."""
    judge: Path | None = None
    """Folder of a judge; default: the teacher's."""
    inception: Path | None = None
    """Weights of torch-fidelity's Inception, for the standard FID; never downloaded."""
    num_resamples: int = 1000
    """Resamples of the bootstrap."""
    level: float = 0.95
    """Of the intervals."""
    seed: int = 0
    """Of the tasks and the resamples."""
    device: str = "cpu"
    """Device, such as cpu or cuda."""
    out: Path | None = None
    """JSON file to write."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Samples of one source.

    Attributes:
        samples: Float32 `(N, ...)`, images in [-1, 1].
        condition: Classes asked for, or None.
        paired: Whether they answer the tasks row by row.
    """

    samples: Tensor
    condition: Tensor | None = None
    paired: bool = False


class Tasks(NamedTuple):
    """A teacher, and the bank of what it was asked."""

    teacher: Teacher
    bank: TeacherBank


def main(args: Args) -> dict[str, Any]:
    """Evaluate, print the table, and return the report."""
    num = check_integer("num_samples", args.num_samples, 10)
    named = parse_methods(args.methods)
    if args.out is not None:
        check_out(args.out)
    inception = None if args.inception is None else load_inception(args.inception, args.device)
    tasks = make_tasks(args, num)
    judge = choose_judge(args, tasks)
    drawn = {
        name: [draw(Path(path), tasks, args) for path in paths] for name, paths in named.items()
    }
    yardstick = make_yardstick(args, tasks)
    num = min(len(yardstick.answers), *(len(d.samples) for ds in drawn.values() for d in ds))
    report = evaluate(
        {
            name: make_method(name, seeds, num, args.reference is None, args.seed)
            for name, seeds in drawn.items()
        },
        cut(yardstick, num),
        Features(judge, inception),
        num_resamples=args.num_resamples,
        level=args.level,
        seed=args.seed,
    )
    against = args.reference or args.teacher or DEFAULT_TEACHER
    report |= {"reference": str(against), "paths": named, "versions": versions()}
    print(table(report))
    if args.out is not None:
        write_json(args.out, report)
    return report


def check_out(out: Path) -> None:
    """Make the folder of a file that is written after minutes of work."""
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError("out", str(out), f"pass a file's name ({error}).") from error


def parse_methods(texts: Sequence[str]) -> dict[str, list[str]]:
    """Paths by name, from `name=PATH,PATH` or a path, which is then its own name."""
    named: dict[str, list[str]] = {}
    for text in texts:
        name, _, paths = text.rpartition("=")
        if not paths or (name or paths) in named:
            raise InvalidArgumentError("methods", text, "name each method once: name=PATH.")
        named[name or paths] = seeds = paths.split(",")
        if len({*seeds} - {""}) < len(seeds):  # two of one would pass for a spread of trainings
            raise InvalidArgumentError("methods", text, "name each seed's path once: PATH,PATH.")
    if not named:
        raise InvalidArgumentError("methods", texts, "pass one at least.")
    return named


def make_tasks(args: Args, num: int) -> Tasks | None:
    """The teacher's, or None where only files are compared with a reference."""
    name = args.teacher or (DEFAULT_TEACHER if args.reference is None else None)
    if name is None:
        return None
    teacher = load_teacher(name, num_steps=args.teacher_steps, device=args.device)
    return Tasks(teacher, TeacherBank.build(teacher, num, split="test", seed=args.seed))


def choose_judge(args: Args, tasks: Tasks | None) -> Judge | None:
    """The one that was asked for, or the teacher's, where there is any."""
    if args.judge is not None:
        return Judge.load(args.judge).to(args.device)
    return None if tasks is None else find_judge(tasks.teacher)


@torch.no_grad()
def draw(path: Path, tasks: Tasks | None, args: Args) -> Drawn:
    """What a model answers to the tasks, or the samples that a file or folder holds."""
    pictures = not (path / "student").is_dir() and any(path.glob("*.png"))  # a run has some, too
    if path.suffix in SAMPLE_FILES or pictures:
        return read_samples(path, None if tasks is None else tasks.bank, args.device)
    if not path.is_dir() and str(path) not in BUNDLED:
        raise InvalidArgumentError("methods", str(path), "there is no such file or folder.")
    folder = find_folder(path)
    if tasks is None:
        raise InvalidArgumentError("teacher", None, f"pass the one whose noise {path} answers.")
    teacher, bank = tasks
    rows = range(0, len(bank), BATCH_SIZE)
    answer = sampler(folder, args.num_steps, teacher)
    batches = []
    for start in rows:
        batch = slice(start, start + BATCH_SIZE)
        condition = None if bank.condition is None else bank.condition[batch]
        batches.append(answer(bank.x_T[batch], condition))
    samples = pixels(torch.cat(batches), teacher.codec)
    return Drawn(samples, bank.condition, paired=True)


def sampler(folder: Path, num_steps: int, teacher: Teacher) -> Any:
    """A function from noise `(N, ...)` and classes to samples."""
    if (folder / "schedule_head").is_dir():
        pipeline = load_adaptive(folder).to(teacher.device)
        return lambda x_T, condition: pipeline(latents=x_T, class_labels=condition)[0]
    metadata = folder / METADATA
    info = json.loads(metadata.read_text()) if metadata.is_file() else {}
    if "num_steps" not in info:
        model = load_teacher(folder, num_steps=num_steps, device=teacher.device)
        check_model(folder, model.denoiser.latent_shape, teacher)
        return model.sample
    guidance = {name: info[name] for name in ("guidance_scale", "guidance_rescale") if name in info}
    student = load_denoiser(folder, **guidance).to(teacher.device)
    check_model(folder, student.latent_shape, teacher)
    grid = schedules.explicit(
        times_of(info, student.schedule.num_train_timesteps), student.schedule
    )
    return lambda x_T, condition: schedules.sample(student, x_T, condition, grid)


def times_of(info: dict[str, Any], length: int) -> list[float]:
    """The times that an exported student steps at, by whichever name its scheduler has them."""
    if "ramp" in info:  # of EDM: from 0 at the noise to 1 at the data
        return [(1 - share) * length for share in info["ramp"]]
    return info.get("timesteps") or [sigma * length for sigma in info["sigmas"]]


def check_model(folder: Path, shape: tuple[int, ...], teacher: Teacher) -> None:
    """Refuse models of other latents, to whom the teacher's noise means nothing."""
    if shape != teacher.denoiser.latent_shape:
        raise InvalidArgumentError(
            "methods",
            f"{folder} with latents of {shape}",
            f"pass models of the teacher's latents, {teacher.denoiser.latent_shape}.",
        )


def read_samples(
    path: Path, bank: TeacherBank | None = None, device: str | torch.device = "cpu"
) -> Drawn:
    """Samples of a file or a folder of PNGs.

    Floats are taken as they are: images `(N, C, H, W)` in [-1, 1], of which up to 2 is let pass, or
    points `(N, F)` of any range. Bytes are images `(N, H, W)` or `(N, H, W, C)`, as PNGs have them.
    A .safetensors file may also hold `condition`, int64 `(N,)`, and the `x_T` of the samples: where
    both are the bank's, samples are paired with the teacher's answers.

    Raises:
        InvalidArgumentError: for what is missing, or of another form or range.

    Warns:
        RuntimeWarning: for images without a number below 0, as of [0, 1].
    """
    try:
        held = _read(path)
    except Exception as error:  # numpy and matplotlib raise many kinds for damaged files
        raise InvalidArgumentError(
            "samples", str(path), f"pass a .npy or .safetensors file, or PNGs of a size ({error})."
        ) from error
    samples = as_samples(held["samples"], path).to(device)
    condition = as_classes(held.get("condition"), len(samples), path)
    paired = bank is not None and same_tasks(held.get("x_T"), condition, bank, len(samples))
    return Drawn(samples, None if condition is None else condition.to(device), paired)


def _read(path: Path) -> dict[str, Tensor]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is no regular file")  # reading a pipe would wait for ever
    if path.suffix == ".npy":
        return {"samples": torch.from_numpy(np.load(path, allow_pickle=False))}
    if path.suffix == ".safetensors":
        held = load_file(path)
        others = sorted({*held} - {*TENSOR_NAMES, "condition", "x_T"})
        known = [name for name in TENSOR_NAMES if name in held]
        if not known and len(others) != 1:
            raise ValueError(f"name its tensor 'samples'; it holds {sorted(held)}")
        return {**held, "samples": held[(known or others)[0]]}
    images = [imread(file) for file in sorted(path.glob("*.png"))]
    return {"samples": torch.from_numpy((np.stack(images) * 255).round().astype(np.uint8))}


def as_samples(held: Tensor, path: Path) -> Tensor:
    """Float32 samples, images in [-1, 1], from floats or bytes; transparency is left out."""
    if held.dtype == torch.uint8 and (held.ndim == 3 or (held.ndim == 4 and held.shape[3] <= 4)):
        images = held.unsqueeze(3) if held.ndim == 3 else held
        colours = images.shape[3] - (images.shape[3] in (2, 4))
        return images[..., :colours].permute(0, 3, 1, 2).float() / 127.5 - 1
    if not held.is_floating_point() or held.ndim < 2:
        raise InvalidArgumentError(
            "samples",
            f"{path} with {held.dtype} {tuple(held.shape)}",
            "pass floats in [-1, 1], (N, C, H, W) or (N, F), or bytes (N, H, W, C).",
        )
    if held.ndim > 2 and held.numel():
        check_range(held, path)
    return held.float()


def check_range(images: Tensor, path: Path) -> None:
    """Refuse floats of bytes' range, and warn of what seems to be of [0, 1]."""
    low, high = float(images.min()), float(images.max())
    if max(-low, high) > LARGEST:
        raise InvalidArgumentError(
            "samples",
            f"{path} with images in [{low:.4g}, {high:.4g}]",
            "pass floats in [-1, 1] (x / 127.5 - 1 of [0, 255], 2 x - 1 of [0, 1]; clip what "
            f"leaves [-{LARGEST:g}, {LARGEST:g}]), or bytes (N, H, W, C).",
        )
    if low >= 0:
        text = f"{path}: images in [{low:.4g}, {high:.4g}] are taken as of [-1, 1], not of [0, 1]."
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def as_classes(held: Tensor | None, num: int, path: Path) -> Tensor | None:
    """Classes of samples, int64 `(N,)`, or None."""
    if held is None:
        return None
    if held.shape != (num,) or held.is_floating_point():
        raise InvalidArgumentError(
            "condition",
            f"{path} with {held.dtype} {tuple(held.shape)}",
            f"pass integers ({num},), a class a sample.",
        )
    return held.long()


def same_tasks(x_T: Tensor | None, condition: Tensor | None, bank: TeacherBank, num: int) -> bool:
    """Whether samples started from the first rows of the bank's noise, with its classes if any."""
    num = min(num, len(bank))
    tasks = [(x_T, bank.x_T)]
    if bank.condition is not None:
        tasks.append((condition, bank.condition))
    return all(
        own is not None
        and own.shape[1:] == theirs.shape[1:]
        and torch.equal(own[:num], theirs[:num].cpu())
        for own, theirs in tasks
    )


def make_yardstick(args: Args, tasks: Tasks | None) -> Yardstick:
    """The teacher's answers and those to other noise; or two halves of real data."""
    if args.reference is not None:
        real = read_samples(args.reference, device=args.device).samples
        # Data often come sorted by class.
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(args.seed))
        first, second = real[order.to(real.device)].tensor_split(2)
        return Yardstick(first, second)
    assert tasks is not None
    teacher, bank = tasks
    seed = args.seed + REFERENCE_SEED
    other = TeacherBank.build(teacher, len(bank), split="test", seed=seed)
    answers, reference = (pixels(b.teacher_x_0, teacher.codec) for b in (bank, other))
    return Yardstick(answers, reference, bank.condition)


def cut(yardstick: Yardstick, num: int) -> Yardstick:
    """A yardstick of `num` answers."""
    condition = None if yardstick.condition is None else yardstick.condition[:num]
    return dataclasses.replace(yardstick, answers=yardstick.answers[:num], condition=condition)


def make_method(
    name: str, drawn: Sequence[Drawn], num: int, to_teacher: bool, seed: int = 0
) -> Method:
    """A method of `num` rows; paired if all of its seeds are, and the yardstick is the teacher.

    Rows that answer no tasks are chosen at random: files often come sorted by class.

    Raises:
        InvalidArgumentError: where some of the seeds have classes and others have none.
    """
    paired = to_teacher and all(each.paired for each in drawn)
    generator = torch.Generator().manual_seed(seed)
    samples, classes = [], []
    for each in drawn:
        rows = torch.arange(num)
        if not paired:
            rows = torch.randperm(len(each.samples), generator=generator)[:num]
        rows = rows.to(each.samples.device)
        samples.append(each.samples[rows])
        if each.condition is not None:
            classes.append(each.condition[rows])
    if classes and len(classes) < len(drawn):
        raise InvalidArgumentError(
            "methods",
            f"{name} with classes of {len(classes)} seeds of {len(drawn)}",
            "pass `condition` in the files of all seeds or of none.",
        )
    return Method(samples, torch.stack(classes) if classes else None, paired)


def table(report: dict[str, Any]) -> str:
    """The report for people: a block a figure, then what the comparisons show."""
    methods, floor = report["methods"], report["floor"]
    width = max(len("floor"), *map(len, methods)) + 2
    lines = [
        f"\n{report['num_samples']:,} samples to {report['num_reference']:,} of "
        f"{report['reference']}; intervals of {report['level']:.0%}, "
        f"{report['num_resamples']:,} resamples"
    ]
    for figure in dict.fromkeys(name for own in methods.values() for name in own):
        lines.append(f"\n{figure}")
        if figure in floor:
            lines.append(f"  {'floor':{width}}{_format(floor[figure])}")
        for name, own in methods.items():
            if figure in own:
                excess = own[figure].get("excess")
                over = f"   excess {_format(excess)}" if excess else ""
                lines.append(f"  {name:{width}}{_format(own[figure])}{over}")
        lines += [
            f"  {row['method']} is {row['verdict']} against {row['rival']} (p {row['p_holm']:.3f})"
            if row["verdict"] in ("better", "worse")
            else f"  {row['method']} against {row['rival']}: {row['verdict']}"
            for row in report["comparisons"]
            if row["figure"] == figure
        ]
    return "\n".join(lines)


def _format(interval: dict[str, Any]) -> str:
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    return f"{estimate:10.4g} [{low:.4g}, {high:.4g}]"


if __name__ == "__main__":
    with plain_errors():
        main(require("tyro", "examples").cli(Args))
