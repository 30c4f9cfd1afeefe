"""The benchmark of learned schedules, on a few tasks of a fast teacher."""

from __future__ import annotations

import json

import pytest
import torch

from agents.distillation import find_judge
from benchmarks import schedules as benchmark
from redif_env import schedules
from redif_env.errors import InvalidArgumentError
from redif_env.loading import load_denoiser

NOISE = load_denoiser("digits").schedule


def earlier(num_steps):
    """The uniform grid, a tenth earlier."""
    return NOISE.snap(0.9 * schedules.uniform(NOISE, num_steps))


@pytest.fixture
def args(tmp_path):
    return benchmark.Args(
        seeds=(0,),
        num_steps=(2,),
        start_steps=(3,),
        adaptive_iterations=1,
        joint_iterations=1,
        num_envs=16,
        out=tmp_path / "results.json",
    )


@pytest.fixture
def world(args, teacher, bank, monkeypatch):
    monkeypatch.setattr(benchmark, "FIXED_STEPS", (1, 2, 3, 4, 5))
    # a search takes seconds for each number of steps; any other grid will do
    monkeypatch.setattr(schedules, "search", lambda model, bank, n: earlier(n))
    world = benchmark.World(args, teacher, bank, bank, bank, bank, find_judge(teacher))
    monkeypatch.setattr(benchmark, "make_world", lambda args: world)
    return world


def test_every_part_runs_once_and_is_read_again(args, world, capsys):
    rows = benchmark.main(args)
    parts = [row["part"] for row in rows]
    assert {part: parts.count(part) for part in benchmark.PARTS} == {
        "global": 1,
        "adaptive": 1,
        "joint": 6,
    }
    assert json.loads(args.out.read_text()) == rows
    assert args.out.with_suffix(".png").stat().st_size > 0
    before = capsys.readouterr().out
    assert "| 2 | learned | 1 |" in before
    assert benchmark.main(args) == rows  # nothing is run again
    assert benchmark.table(rows) in capsys.readouterr().out


def test_an_oracle_is_no_worse_than_the_grids(args, world):
    """By arithmetic: what each sample, or class, would choose for itself."""
    known = benchmark.oracle(world, 0.002)
    for bound in known.values():
        assert (
            bound["paired_mse"] + 0.002 * bound["nfe"]
            <= min(
                row["paired_mse"] + 0.002 * steps
                for steps in benchmark.FIXED_STEPS
                for row in [benchmark.fixed(world, steps)["searched"]]
            )
            + 1e-6
        )
    assert known["sample"]["paired_mse"] + 0.002 * known["sample"]["nfe"] <= (
        known["class"]["paired_mse"] + 0.002 * known["class"]["nfe"] + 1e-6
    )


def test_lengths_dealt_out_to_one_are_its_grid(args, world):
    """All at three steps: the same figures as that grid's."""
    shares = torch.tensor([0.0, 0.0, 0.0, 1.0])
    dealt = benchmark.random_lengths(world, shares, 0)
    row = benchmark.fixed(world, 3)["searched"]
    assert dealt == {name: row[name] for name in dealt}
    grid = torch.tensor(row["timesteps"])
    mse = schedules.paired_mse(world.teacher.denoiser, world.test, grid)
    assert dealt["paired_mse"] == pytest.approx(mse, rel=1e-4)


def test_an_unknown_part_is_refused(args):
    args.parts = ("global", "local")
    with pytest.raises(InvalidArgumentError, match="parts"):
        benchmark.main(args)
