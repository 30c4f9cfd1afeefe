"""The folder of a run: its name, and what is written there at the end."""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import Tensor

from redif_env import parallel
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.files import write_json
from redif_env.prompts import INDEX, read_index
from redif_env.teacher import Teacher, TeacherBank

from .export import can_export, export_student, make_scheduler, snippet
from .lora import merge
from .pictures import save_samples
from .resuming import RunFolderError


def next_free(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... if it exists."""
    return next(each for each in _numbered(folder) if not each.exists())


def last_taken(folder: Path) -> Path:
    """The one of these before the next free one; `folder` if there is none."""
    taken = itertools.takewhile(Path.exists, _numbered(folder))
    return [folder, *taken][-1]


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def check_out(out: str | Path | None, resume: bool) -> Path | None:
    """The folder to write to, which a new run makes and a resumed one has.

    Raises:
        InvalidArgumentError: if there is one, if there is none to resume, or if none can be made.
    """
    if out is None:
        if resume:
            raise InvalidArgumentError("resume", True, "pass out, the folder of the run.")
        return None
    folder = Path(out)
    # Only the first process needs the folder: nodes need not share a disk.
    first = parallel.rank_of_launcher() == 0
    if resume and first and not folder.is_dir():
        raise RunFolderError("out", str(out), "it is no folder: leave out resume.")
    if not resume and folder.exists():
        raise InvalidArgumentError("out", str(out), "it exists; choose another name or remove it.")
    if not resume and first:
        _check_writable(folder)
    return folder


def _check_writable(folder: Path) -> None:
    """Refuse, before hours of work, a folder that can not be made after them."""
    parent = next(each for each in folder.absolute().parents if each.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise InvalidArgumentError(
            "out", str(folder), f"choose one in a folder that can be written to ({error})."
        ) from error


def find_base(teacher: Teacher) -> Path | None:
    """The folder of a teacher's pipeline, where it has parts that a student needs too."""
    if teacher.source is None or (teacher.codec is None and teacher.denoiser.conditions is None):
        return None
    folder = Path(teacher.source)
    return folder if (folder / INDEX).is_file() else None


def check_export(teacher: Teacher, guidance_scale: float | None = None) -> None:
    """Refuse, before training, what `write_student` could not write after it.

    Args:
        teacher: Whose student is trained.
        guidance_scale: The student's; None: the teacher's.

    Raises:
        InvalidArgumentError: for a solver's config that makes no scheduler, and for guidance that
            the teacher's pipeline has no argument for.
    """
    student = copy.copy(teacher.denoiser)
    if guidance_scale is not None:
        student.set_guidance(guidance_scale, student.guidance_rescale)
    if can_export(student):
        make_scheduler(teacher.make_solver().config, student)
        base = find_base(teacher)
        snippet(student, {} if base is None else read_index(base))


def write_student(folder: Path, student: Denoiser, timesteps: Tensor, teacher: Teacher) -> None:
    """A diffusers folder, `student/`, or `student.safetensors` of what diffusers can not load."""
    if not can_export(student):
        save_model(merge(student).network, str(folder / "student.safetensors"))
        return
    shutil.rmtree(folder / "student", ignore_errors=True)  # of a run that was resumed
    export_student(
        student, timesteps, teacher.make_solver().config, folder / "student", find_base(teacher)
    )


def write_results(
    folder: Path,
    report: dict[str, Any],
    teacher: Teacher,
    bank: TeacherBank,
    samples: dict[str, Tensor],
) -> None:
    """A picture of samples beside the teacher's answers in `bank`, and `summary.json`."""
    steps = report["num_steps"]
    rows = {
        f"teacher, {teacher.num_steps} steps": bank.teacher_x_0,
        f"DDIM, {steps} steps": samples["ddim"],
        f"student, {steps} steps": samples["student"],
    }
    save_samples(folder / "samples.png", rows, bank.condition, teacher.codec)
    write_json(folder / "summary.json", report)
