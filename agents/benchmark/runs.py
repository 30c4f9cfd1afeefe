"""Running entrants: each run once, one line of figures a run, and what intervals are made of.

Several processes may work on the same folders: each run is taken by one, and one that was
interrupted is started anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from redif_env import schedules
from redif_env.errors import InvalidArgumentError, check_choice, check_integer
from redif_env.files import write_tensors, write_text

from ..baselines import UNTRAINED, Ledger, Result, solve
from ..comparison import Drawn, measure
from ..guards import TrainingDivergedError
from ..pictures import columns
from ..reporting import versions
from . import students
from .entrants import (
    ENTRANTS,
    GRID,
    OURS,
    SEARCHED,
    SOLVER_ORDER,
    UNIFORM,
    Entrant,
)
from .settings import BEYOND, REMEDIES, TRIALS, chosen
from .tasks import RANKED, Task

T = TypeVar("T")
SAMPLES = "x_0"
ESTIMATE = ".estimate"
IDENTITY = "identity"
TUNING_SEED = 100  # of no reported run


@dataclasses.dataclass(frozen=True)
class Run:
    """What is to be done.

    Attributes:
        method: Name of the entrant.
        num_steps: Steps of its grid.
        seed: Of training; solvers have 0 only.
        budget: Network-forward equivalents of training; 0 for solvers.
        settings: Of training.
    """

    method: str
    num_steps: int
    seed: int
    budget: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def entrant(self) -> Entrant:
        """Who runs."""
        return ENTRANTS[self.method]

    @property
    def label(self) -> str:
        """A file's name, without its ending: file systems take 255 bytes."""
        changed = "".join(f"-{name}-{_plain(value)}" for name, value in _flat(self.settings))
        label = f"{self.method}-{self.num_steps}-{self.seed}-{self.budget}{changed}"
        if len(label) <= LONGEST:
            return label
        return f"{label[: LONGEST - 13]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"


LONGEST = 200  # name of a file, which endings and temporary names are added to
# What many steps of a good solver give: how few of ours do?
STANDARD = Run("dpmpp2m" + SEARCHED, 16, 0, 0)


def plan(
    methods: Iterable[str],
    num_steps: Iterable[int],
    seeds: Iterable[int],
    budget: int,
    task: str = "digits",
) -> list[Run]:
    """Runs, all methods of a seed before the next seed, so that an early stop is fair.

    Settings are those that were chosen for `task`. Last comes `STANDARD`, if its solver and ours
    are asked for.

    Raises:
        InvalidArgumentError: for an unknown method, numbers that make no sense, and what is named
            twice: one training would count as two.
    """
    methods = _once("methods", [_known(name) for name in methods])
    steps = _once("num_steps", [check_integer("num_steps", each, 1) for each in num_steps])
    seeds = _once("seeds", [check_integer("seeds", each, 0) for each in seeds])
    runs = []
    for place, seed in enumerate(seeds):
        for number in steps:
            for name in methods:
                if number < ENTRANTS[name].fewest:
                    continue
                if ENTRANTS[name].train is not None:
                    settings = chosen(name, task, number)
                    runs.append(Run(name, number, seed, budget, settings))
                elif place == 0:
                    runs.append(Run(name, number, 0, 0))
    if {OURS, STANDARD.method} <= {*methods} and STANDARD not in runs:
        runs.append(STANDARD)
    return runs


def plan_trials(methods: Iterable[str], task: str = "digits") -> list[Run]:
    """All trials of the methods that have any on this task, and those of rivals or ours alone."""
    own = task if any(trials.task == task for trials in TRIALS) else None
    of_task = [trials for trials in TRIALS if trials.task == own]
    of_task += [trials for trials in (*BEYOND, *REMEDIES) if trials.task == task]
    return [
        Run(name, trials.num_steps, TUNING_SEED, trials.budget, settings)
        for trials in of_task
        for name in methods
        for settings in trials.settings.get(_known(name), ())
    ]


class Runs:
    """The runs of a task.

    Beside the line of figures a run leaves its resampled figures and some samples, for intervals
    and pictures: reports, also of runs that are added later, need no run twice.

    Args:
        task: The task.
        lines: File of figures, a JSON object a line. What is resampled is in the folder of the same
            name without suffix.
        folder: Of all samples, students, searched grids and locks. With other test tasks a student
            that is there is judged, and not trained again.
    """

    def __init__(self, task: Task, lines: Path, folder: Path) -> None:
        self.task, self.lines, self.folder = task, lines, folder
        self.kept = lines.with_suffix("")

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        if not self.lines.exists():
            return []
        return [json.loads(line) for line in self.lines.read_text().splitlines()]

    def find(self, run: Run) -> dict[str, Any] | None:
        """The line of a run whose resampled figures are there and of this task, or None.

        Another teacher, recipe or number of tasks makes it another run.
        """
        if not self._is_kept(run):
            return None
        wanted = self._about(run)
        if run.entrant.train is None:
            del wanted["bank"]
        for line in self.read():
            if all(line.get(name) == value for name, value in wanted.items()):
                return line
        return None

    def _about(self, run: Run) -> dict[str, Any]:
        """What tells its line from those of other runs."""
        return {
            **dataclasses.asdict(run),
            "recipe": run.entrant.recipe,
            "teacher": self._teacher,
            "bank": self._bank,
            "num_validation": len(self.task.validation),
            "num_test": len(self.task.test),
        }

    @functools.cached_property
    def _teacher(self) -> str:
        return self.task.teacher.fingerprint()

    @property
    def _bank(self) -> int:
        """Network evaluations behind the teacher's answers for training."""
        teacher = self.task.teacher
        return len(self.task.train) * teacher.num_steps * teacher.denoiser.nfe

    def drawn(self, run: Run) -> Drawn:
        """A finished run's figures, and those of resamples."""
        tensors = load_file(self._kept(run))
        return {
            name: (tensors[name + ESTIMATE], values.double())
            for name, values in tensors.items()
            if name != SAMPLES and not name.endswith(ESTIMATE)
        }

    def shown(self, run: Run) -> Tensor:
        """A finished run's samples of the tasks that pictures show."""
        return load_file(self._kept(run))[SAMPLES]

    def samples(self, run: Run) -> Tensor:
        """All samples of a run that was made here."""
        return load_file(self._samples(run))[SAMPLES]

    def execute(self, runs: Sequence[Run]) -> None:
        """Do what is missing and nobody else is doing.

        A training that diverges is said so, leaves nothing, and is tried again the next time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(runs, 1):
            lock = FileLock(self.folder / f"{run.label}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            with lock:
                if self.find(run) is not None:
                    continue
                self._check_sizes(run)
                try:
                    line = self._execute(run)
                    shown = {k: line[k] for k in (*RANKED, "seconds") if k in line}
                except TrainingDivergedError as error:  # of one; the others go on
                    shown = {"failed": str(error)}
                print(f"{number}/{len(runs)}", run.label, shown, flush=True)

    def _check_sizes(self, run: Run) -> None:
        """Refuse to replace figures of the same run on other numbers of tasks."""
        about = self._about(run)
        for name, option in (("num_test", "--num-test"), ("num_validation", "--num-validation")):
            for line in self.read():
                if _same(line, about) and line.get(name) != about[name]:
                    raise InvalidArgumentError(
                        name,
                        about[name],
                        f"{self.lines} has {run.label} with {line.get(name)}, which would be lost: "
                        f"pass {option} {line.get(name)}, other --results, or remove its line.",
                    )

    def grid(self, solver: str, num_steps: int) -> tuple[Tensor, int]:
        """A solver's searched grid, and the network evaluations of finding it: searched once."""
        searched = f"{self._teacher[:12]}-{len(self.task.validation)}"
        searched += f"-{solver}" if solver != UNTRAINED[1] else ""
        path = self.folder / f"grid-{num_steps}-{searched}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                grid, spent = self.task.search(solver, num_steps)
                write_text(path, json.dumps({"grid": grid.tolist(), "spent": spent}))
        found = json.loads(path.read_text())
        return schedules.explicit(found["grid"], self.task.teacher.denoiser.schedule), found[
            "spent"
        ]

    def _execute(self, run: Run) -> dict[str, Any]:
        task, entrant = self.task, run.entrant
        result = self._solved(run) if entrant.train is None else self._trained(run, entrant.train)
        samples = result.sample(task.test.x_T, task.test.condition).detach().contiguous()
        line = self._line(run, result, samples)
        write_tensors(self._samples(run), {SAMPLES: samples})
        self._keep(run, samples)
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.lines}.lock"):
            kept = [other for other in self.read() if not _same(other, line)]
            write_text(self.lines, "".join(json.dumps(each) + "\n" for each in (*kept, line)))
        return line

    def _solved(self, run: Run) -> Result:
        """A solver on its grid, with the search on its ledger."""
        grid, spent = self.task.uniform(run.num_steps), 0
        if run.entrant.searched:
            grid, spent = self.grid(run.entrant.solver, run.num_steps)
        result = solve(run.entrant.solver, self.task.teacher, grid)
        result.ledger.evaluations["search"] += spent
        return result

    def _trained(self, run: Run, train: Callable[..., Result]) -> Result:
        """The student of a run, trained now unless it was before."""
        task, path = self.task, self.folder / f"{run.label}.student.safetensors"
        start = task.start or task.teacher.denoiser
        trained = {**self._about(run), "reward": task.reward.name}
        del trained["num_test"]
        result = students.load(path, start, trained)
        if result is None:
            settings = dict(run.settings)
            grid, spent = task.uniform(run.num_steps), 0
            if settings.pop(GRID, None) != UNIFORM:
                solver = UNTRAINED[settings.get(SOLVER_ORDER, 1)]
                grid, spent = self.grid(solver, run.num_steps)
            result = train(task, grid, run.budget, run.seed, **settings)
            result.ledger.evaluations["search"] += spent
            if not all(bool(each.isfinite().all()) for each in result.student.network.parameters()):
                raise TrainingDivergedError("the student's weights are not finite.")
            students.save(path, result, trained)
        return result

    def _line(self, run: Run, result: Result, samples: Tensor) -> dict[str, Any]:
        task = self.task
        figures = measure(samples, task.yardstick, task.features)
        return {
            **self._about(run),
            "kind": run.entrant.kind,
            "nfe": result.nfe,
            "timesteps": result.timesteps.tolist(),
            **{name: round(value, 6) for name, value in figures.items()},
            "ledger": _costs(result.ledger),
            "updates": dict(result.ledger.updates),
            "seconds": round(result.ledger.seconds, 1),
            "history": _thinned(result.history),
            "threads": torch.get_num_threads(),
            "device": str(task.teacher.device),
            "versions": versions(),
        }

    def _keep(self, run: Run, samples: Tensor) -> None:
        """Write what reports need; float32 tells resamples of a figure apart well enough."""
        test = self.task.test
        drawn = self.task.bench.draw(samples, test.condition, paired=True, shares_tasks=True)
        tensors = {SAMPLES: samples[columns(len(test), test.condition)]}
        tensors |= {name: values.float() for name, (_, values) in drawn.items()}
        tensors |= {name + ESTIMATE: estimate for name, (estimate, _) in drawn.items()}
        self.kept.mkdir(parents=True, exist_ok=True)
        write_tensors(self._kept(run), tensors, {IDENTITY: self.task.identity})

    def _is_kept(self, run: Run) -> bool:
        if not self._kept(run).exists():
            return False
        with safe_open(self._kept(run), "pt") as file:
            return (file.metadata() or {}).get(IDENTITY) == self.task.identity

    def _kept(self, run: Run) -> Path:
        return self.kept / f"{run.label}.safetensors"

    def _samples(self, run: Run) -> Path:
        return self.folder / f"{run.label}.safetensors"


def _plain(value: Any) -> str:
    """A setting as part of a file's name, which has no brackets and blanks."""
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Sorted pairs of names and values, those of settings in settings too."""
    pairs: list[tuple[str, Any]] = []
    for name, value in sorted(settings.items()):
        own = above + name
        pairs += _flat(value, f"{own}.") if isinstance(value, Mapping) else [(own, value)]
    return pairs


def _once(argument: str, values: list[T]) -> list[T]:
    if len({*values}) < len(values):
        raise InvalidArgumentError(argument, values, "name each once.")
    return values


def _known(name: str) -> str:
    return check_choice("method", name, tuple(ENTRANTS))


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = ("method", "num_steps", "seed", "budget", "settings", "teacher")
    return all(one.get(name) == other.get(name) for name in names)


def _costs(ledger: Ledger) -> dict[str, int]:
    return {name: count for name, count in ledger.evaluations.items() if count}


def _thinned(history: list[dict[str, float]], num: int = 20) -> list[dict[str, float]]:
    """Some entries, evenly spread, the last one too."""
    every = max(len(history) // num, 1)
    return history[::-1][::every][::-1]
