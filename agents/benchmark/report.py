"""Tables and pictures of finished runs, and what they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import Run, Runs


def report(runs: Runs, planned: Sequence[Run], folder: Path) -> str:
    """TODO"""
    return ""


def tuning_table(lines: Sequence[dict[str, Any]]) -> str:
    """Trials in Markdown, best first, for each method."""
    rows = ["| method | settings | paired MSE | Frechet |", "|---|---|---|---|"]
    for line in sorted(lines, key=lambda each: (each["method"], each["paired_mse"])):
        settings = ", ".join(f"{name} {value:g}" for name, value in line["settings"].items())
        frechet = f"{line['frechet']:.3f}" if "frechet" in line else "-"
        rows.append(f"| {line['method']} | {settings} | {line['paired_mse']:.5f} | {frechet} |")
    return "\n".join(rows)
