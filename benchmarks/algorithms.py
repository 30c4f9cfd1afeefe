"""Every algorithm of examples/swap_algorithm.py at equal cost: `python benchmarks/algorithms.py`.

All get as many denoising steps of the same training tasks, with the options of the table there, and
are judged on validation tasks, deterministic. Runs in the output file are not redone, and several
processes may share it. `--docs docs/algorithms.md` puts the table there.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.sample_efficiency import add, read
from examples import swap_algorithm
from examples.swap_algorithm import ALGORITHMS
from redif_env.errors import InvalidArgumentError, check_choice, require

HEADER = "| variant | algorithm | seeds | return | error, % of the baseline's | CPU seconds |"
KEY = ("algorithm", "variant", "seed", "total_timesteps")


@dataclasses.dataclass
class Args:
    """Compare algorithms."""

    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """Algorithms to run, on each variant that they take."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    total_timesteps: int = 20_000
    """Denoising steps of a run."""
    num_envs: int = 64
    """Trajectories of a batch."""
    bank_size: int = 2048
    """Training tasks."""
    num_held_out: int = 512
    """Validation tasks."""
    out: Path = Path("benchmarks/results/algorithms.json")
    """Results, a list of runs."""
    docs: Path | None = None
    """Page whose table of results is replaced."""


def plan(args: Args) -> list[swap_algorithm.Args]:
    """The runs, seed by seed, so that an unfinished file holds every algorithm."""
    for name in args.algorithms:
        check_choice("algorithms", name, tuple(ALGORITHMS))
    return [
        swap_algorithm.Args(
            algo=name,
            variant=variant,
            seed=seed,
            total_timesteps=args.total_timesteps,
            num_envs=args.num_envs,
            bank_size=args.bank_size,
            num_held_out=args.num_held_out,
        )
        for seed in args.seeds
        for name in args.algorithms
        for variant in ALGORITHMS[name].variants
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, in Markdown, best first within a variant."""
    lines = [HEADER]
    lines.append("|" + "---|" * 6)
    for variant in sorted({row["variant"] for row in rows}):
        own = [row for row in rows if row["variant"] == variant]
        baseline = _spread([row["baseline_return"] for row in own], 3)
        lines.append(f"| {variant} | *baseline* | | {baseline} | 100 | |")
        groups = {name: [r for r in own if r["algorithm"] == name] for name in ALGORITHMS}
        found = [(name, group) for name, group in groups.items() if group]
        for name, group in sorted(found, key=lambda pair: statistics.fmean(map(error, pair[1]))):
            cells = (
                _spread([row["final_return"] for row in group], 3),
                _spread([error(row) for row in group], 1),
                _spread([row["seconds"] for row in group], 0),
            )
            lines.append(f"| {variant} | {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, new: str) -> str:
    """The page with `new` in place of its table of results.

    Raises:
        InvalidArgumentError: for a page that has none.
    """
    old = re.search(re.escape(HEADER) + r"(\n\|.*)*", page)
    if old is None:
        raise InvalidArgumentError("docs", page[:80], f"add a line {HEADER!r} where it belongs.")
    return page[: old.start()] + new + page[old.end() :]


def error(row: dict[str, Any]) -> float:
    """Squared error of the trained policy, percent of the baseline's."""
    return 100 * row["final_return"] / row["baseline_return"]


def _spread(values: list[float], digits: int) -> str:
    """Mean, and smallest..largest where they differ."""
    mean, low, high = (
        f"{v:.{digits}f}" for v in (statistics.fmean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low}..{high})"


def main(args: Args) -> list[dict[str, Any]]:
    """Run what is missing, print the table, and return the runs of this length."""
    torch.set_num_threads(1)
    if args.docs is not None:  # an unfit page is refused before the first run
        with_table(args.docs.read_text(), HEADER)
    for run in plan(args):
        _, variant = swap_algorithm.resolve(run)
        key = (run.algo, variant, run.seed, run.total_timesteps)
        if key not in {tuple(row[name] for name in KEY) for row in read(args.out)}:
            add(args.out, swap_algorithm.main(run))
    rows = [row for row in read(args.out) if row["total_timesteps"] == args.total_timesteps]
    print(table(rows))
    if args.docs is not None:
        args.docs.write_text(with_table(args.docs.read_text(), table(rows)))
    return rows


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
