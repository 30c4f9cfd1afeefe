"""Tables and pictures of finished runs, and what they show."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from redif_env.files import replacing, write_json, write_text

from ..comparison import weigh
from ..pictures import columns, save_samples
from .entrants import ENTRANTS, OURS
from .runs import STANDARD, Run, Runs
from .tasks import RANKED, REWARD

# Of ours, those that the others are compared with, in this order.
HEADLINE = (OURS,)
TITLES = {
    REWARD: "reward",
    "paired_mse": "paired MSE",
    "frechet": "excess Frechet",
    "sliced_wasserstein": "excess sliced W.",
    "coverage": "coverage",
    "label_agreement": "label agreement",
    "label_balance": "label balance",
}
_KINDS = {"ours": 0, "rival": 1, "solver": 2}  # the order of rows
Finished = Mapping[str, list[tuple[Run, dict[str, Any]]]]


def report(runs: Runs, planned: Sequence[Run], folder: Path) -> str:
    """Compare the planned runs that are finished; returns Markdown.

    Writes `TASK.md`, `TASK.json` with every interval and comparison, and the pictures
    `TASK-nfe.png`, `TASK-cost.png` and `TASK-samples.png` to the folder.
    """
    sections, compared = [], {}
    for num_steps in sorted({run.num_steps for run in planned if run != STANDARD}):
        finished = find_finished(runs, [run for run in planned if run.num_steps == num_steps])
        if finished:
            found = compare(runs, finished)
            compared[num_steps] = found
            sections.append(
                f"## {_title(num_steps)}\n\n{table(finished, found)}\n\n{summary(found)}"
            )
            _draw_samples(runs, finished, folder)
    if not compared:
        return "No run is finished."
    if standard := weigh_standard(runs, planned):
        sections.append(_standard_table(standard))
    name = runs.task.name
    written = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {runs.task.teacher.device}",
        "steps": compared,
        "standard": standard,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", written)
    _draw_quality(compared, folder / f"{name}-nfe.png")
    _draw_cost(_comparable(runs, planned), compared, folder / f"{name}-cost.png")
    text = "\n\n".join([_opening(runs, compared), overview(compared), *sections]) + "\n"
    write_text(folder / f"{name}.md", text)
    return text


def find_finished(runs: Runs, planned: Sequence[Run]) -> Finished:
    """The finished runs of each method, with their lines."""
    finished: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in planned:
        line = runs.find(run)
        if line is not None:
            finished.setdefault(run.method, []).append((run, line))
    return finished


def compare(runs: Runs, finished: Finished) -> dict[str, Any]:
    """Intervals of every method, and the headline recipes against all others; plain data."""
    drawn = {name: [runs.drawn(run) for run, _ in own] for name, own in finished.items()}
    focus = [name for name in HEADLINE if name in drawn]
    found = weigh(drawn, runs.task.bench, focus)
    for name, own in finished.items():
        lines = [line for _, line in own]
        found["methods"][name]["runs"] = {
            "seeds": len(lines),
            "nfe": _mean([line["nfe"] for line in lines]),
            "cost": _mean([sum(line["ledger"].values()) for line in lines]),
            "seconds": _mean([line["seconds"] for line in lines]),
            "settings": lines[0]["settings"],
        }
    return found


def weigh_standard(runs: Runs, planned: Sequence[Run]) -> dict[str, Any]:
    """Ours of each number of steps against many steps of a solver, plain data by name.

    Each is compared alone: who asks for the fewest steps goes down from the most, and stops where
    a verdict fails, which needs no correction.
    """
    found: dict[str, Any] = {}
    if STANDARD not in planned or runs.find(STANDARD) is None:
        return found
    for num_steps in sorted({run.num_steps for run in planned if run.method == OURS}):
        same = [run for run in planned if (run.method, run.num_steps) == (OURS, num_steps)]
        if finished := find_finished(runs, same):
            name = f"{OURS}, {_title(num_steps)}"
            own = [runs.drawn(run) for run, _ in finished[OURS]]
            drawn = {name: own, STANDARD.label: [runs.drawn(STANDARD)]}
            found[name] = weigh(drawn, runs.task.bench, [name])
    return found


def _standard_table(found: Mapping[str, Any]) -> str:
    """One row for each number of steps of ours, and one for the solver."""
    title = f"{_title(STANDARD.num_steps)} of `{STANDARD.method}`"
    solver = next(iter(found.values()))["methods"][STANDARD.label]
    figures = [name for name in TITLES if name in solver]
    rows = [["", *(TITLES[name] for name in figures), "against the solver"]]
    rows += [["---"] * len(rows[0])]
    for name, each in found.items():
        cells = [_cell(each["methods"][name][figure], figure) for figure in figures]
        rows.append([name, *cells, _verdicts(each, name, STANDARD.label)])
    rows.append([title, *(_cell(solver[figure], figure) for figure in figures), ""])
    return f"## How many steps do for {title}\n\n{_markdown(rows)}"


def table(finished: Finished, found: Mapping[str, Any]) -> str:
    """One row a method, best paired MSE first within its kind, and the verdicts on ours."""
    methods = found["methods"]
    figures = [name for name in TITLES if name in next(iter(methods.values()))]
    ours = [name for name in HEADLINE if name in methods]
    head = ["method", "NFE", "cost, k", "seconds", "seeds", *(TITLES[name] for name in figures)]
    head += [f"`{name}` against it" for name in ours]
    rows = [head, ["---"] * len(head)]
    for name in sorted(methods, key=lambda n: (_KINDS[ENTRANTS[n].kind], _badness(methods[n]))):
        own = methods[name]
        about = own["runs"]
        cells = [
            name,
            f"{about['nfe']:g}",
            f"{about['cost'] / 1000:.0f}",
            f"{about['seconds']:.0f}",
        ]
        cells += [about["seeds"], *(_cell(own[figure], figure) for figure in figures)]
        cells += [_verdicts(found, first, name) for first in ours]
        rows.append([str(cell) for cell in cells])
    floor = [
        _cell(found["floor"][name], None) if name in found["floor"] else _of_copies(name)
        for name in figures
    ]
    rows.append(["teacher on other noise", "", "", "", "", *floor, *([""] * len(ours))])
    return _markdown(rows)


def overview(compared: Mapping[int, Mapping[str, Any]]) -> str:
    """All numbers of steps in one table: what methods are ordered by, and `ours` against each."""
    all_found = list(compared.values())
    first = next(iter(all_found[0]["methods"].values()))
    figure = REWARD if REWARD in first else "paired_mse"
    names = dict.fromkeys(name for found in all_found for name in found["methods"])
    last = {name: own for found in all_found for name, own in found["methods"].items()}
    order = sorted(names, key=lambda n: (_KINDS[ENTRANTS[n].kind], _badness(last[n])))
    rows = [[TITLES[figure], *(_title(steps) for steps in compared)], ["---"] * (len(compared) + 1)]
    rows += [[name, *(_brief(found, name, figure) for found in all_found)] for name in order]
    return _markdown(rows)


def _brief(found: Mapping[str, Any], name: str, figure: str) -> str:
    """A figure, with the verdict on `ours` against it."""
    if name not in found["methods"]:
        return ""
    words = [_short(found["methods"][name][figure]["estimate"])]
    words += [verdict] if (verdict := _verdicts(found, OURS, name, (figure,))) else []
    return _marked(found, (name, OURS) if verdict else (name,), " ".join(words))


def _marked(found: Mapping[str, Any], names: Sequence[str], text: str | None = None) -> str:
    """The first method's name, or what is said of them, marked where one was trained once."""
    text = names[0] if text is None else text
    return f"{text} (1)" if any(_of_one_seed(found, name) for name in names) else text


def _of_one_seed(found: Mapping[str, Any], name: str) -> bool:
    trained = ENTRANTS[name].train is not None and name in found["methods"]
    return trained and found["methods"][name]["runs"]["seeds"] == 1


def summary(found: Mapping[str, Any]) -> str:
    """Each verdict with the rivals that it holds against."""
    lines = []
    for name in HEADLINE:
        for figure in RANKED:
            words: dict[str, list[str]] = {}
            for row in found["comparisons"]:
                if row["method"] == name and row["figure"] == figure:
                    words.setdefault(row["verdict"], []).append(
                        _marked(found, (row["rival"], name))
                    )
            if words:
                parts = (f"{word}: {', '.join(words[word])}" for word in sorted(words))
                lines.append(f"* `{name}`, {TITLES[figure]}. {'. '.join(parts)}.")
    return "\n".join(lines)


def tuning_table(lines: Sequence[dict[str, Any]]) -> str:
    """Trials in Markdown, for each number of steps, budget and method.

    Best first: by the reward where it has no gradient, else by paired MSE.
    """
    figures = [name for name in (REWARD, "paired_mse", "frechet") if any(name in x for x in lines)]
    titles = ["method", "steps", "budget, k", "settings"]
    rows = [titles + [TITLES.get(name, name).removeprefix("excess ") for name in figures]]
    rows.append(["---"] * len(rows[0]))
    same = ("num_steps", "budget", "method")
    for line in sorted(lines, key=lambda x: (*(x[name] for name in same), _cost_of(x))):
        settings = ", ".join(f"{name} {value}" for name, value in line["settings"].items())
        about = [line["method"], str(line["num_steps"]), f"{line['budget'] / 1000:.0f}", settings]
        rows.append(about + [_short(line[name]) if name in line else "-" for name in figures])
    return _markdown(rows)


def _cost_of(line: Mapping[str, Any]) -> float:
    return -line[REWARD] if REWARD in line else line["paired_mse"]


def _opening(runs: Runs, compared: Mapping[int, Any]) -> str:
    first = next(iter(compared.values()))
    trained = [
        _of_one_seed(found, name) for found in compared.values() for name in found["methods"]
    ]
    warning = (
        " **(1): of one training, which says nothing of another: a verdict is on this one alone.**"
    )
    return (
        f"# {runs.task.name}\n\n"
        f"Means over seeds with {first['level']:.0%} intervals; {first['num_samples']} test tasks. "
        "Cost: thousands of network-forward equivalents of training and of searching the grid, "
        "without the teacher's answers, which all share. Seconds: wall clock, one thread."
        " The first table says what `ours` is against each: better, matches, worse, or not shown."
        + (warning if any(trained) else "")
    )


def _title(num_steps: int) -> str:
    return "1 step" if num_steps == 1 else f"{num_steps} steps"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(figure: Mapping[str, Any], name: str | None) -> str:
    """A figure with its interval; of distances the excess over the floor."""
    shown = figure["excess"] if name in ("frechet", "sliced_wasserstein") else figure
    low, high = _short(shown["low"]), _short(shown["high"])
    return f"{_short(shown['estimate'])} ({low} to {high})"


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:.2e}"
    return f"{value:.5f}" if abs(value) < 0.1 else f"{value:.3f}"


def _verdicts(
    found: Mapping[str, Any], method: str, rival: str, figures: Sequence[str] = RANKED
) -> str:
    words = [
        row["verdict"]
        for figure in figures
        for row in found["comparisons"]
        if (row["figure"], row["method"], row["rival"]) == (figure, method, rival)
    ]
    return " / ".join(words)


def _badness(own: Mapping[str, Any]) -> float:
    """What methods are ordered by: the error, or minus a reward that has no gradient."""
    return -own[REWARD]["estimate"] if REWARD in own else own["paired_mse"]["estimate"]


def _of_copies(name: str) -> str:
    return "0" if name == "paired_mse" else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _distance(own: Mapping[str, Any]) -> float:
    """What distributions are ranked by, over its floor."""
    figure = "frechet" if "frechet" in own else "sliced_wasserstein"
    return own[figure]["excess"]["estimate"]


def _draw_quality(compared: Mapping[int, Any], path: Path) -> None:
    """Paired MSE and excess distance against the network evaluations a sample."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = dict.fromkeys(name for found in compared.values() for name in found["methods"])
    for name in names:
        own = [found["methods"][name] for found in compared.values() if name in found["methods"]]
        nfe = [each["runs"]["nfe"] for each in own]
        style = _style(name)
        left.plot(nfe, [each["paired_mse"]["estimate"] for each in own], label=name, **style)
        right.plot(nfe, [max(_distance(each), 1e-3) for each in own], **style)
    left.set(yscale="log", xlabel="network evaluations a sample", ylabel="paired MSE")
    right.set(yscale="log", xlabel="network evaluations a sample")
    right.set_ylabel("distance to the teacher, over the floor (at least 0.001)")
    worst = [f["methods"]["ddim"] for f in compared.values() if "ddim" in f["methods"]]
    if worst:  # some solvers diverge on uniform grids
        left.set_ylim(top=3 * max(each["paired_mse"]["estimate"] for each in worst))
        right.set_ylim(top=3 * max(map(_distance, worst)))
    figure.legend(loc="outside right upper", fontsize=7)
    _save(figure, path)


def _comparable(runs: Runs, planned: Sequence[Run]) -> list[dict[str, Any]]:
    """The lines of the planned runs, and of the same with other budgets."""
    budgets = {line["budget"] for line in runs.read() if line["budget"]}
    trained = [run for run in planned if run.budget]
    same = [dataclasses.replace(run, budget=budget) for run in trained for budget in budgets]
    return [line for run in same if (line := runs.find(run)) is not None]


def _draw_cost(lines: Sequence[Mapping[str, Any]], compared: Mapping[int, Any], path: Path) -> None:
    """Paired MSE against what training cost, at every budget that was run."""
    figure = Figure(figsize=(4.2 * len(compared), 4), layout="constrained")
    axes = figure.subplots(1, len(compared), squeeze=False)[0]
    for place, num_steps in zip(axes, compared, strict=True):
        own = [line for line in lines if line["num_steps"] == num_steps]
        for name in dict.fromkeys(line["method"] for line in own):
            points: dict[int, list[Mapping[str, Any]]] = {}
            for line in own:
                if line["method"] == name:
                    points.setdefault(line["budget"], []).append(line)
            costs = [_mean([sum(x["ledger"].values()) for x in points[b]]) for b in sorted(points)]
            errors = [_mean([x["paired_mse"] for x in points[b]]) for b in sorted(points)]
            place.plot(costs, errors, label=name, **_style(name))
        place.set(yscale="log", title=_title(num_steps), xlabel="network-forward equivalents")
    axes[0].set_ylabel("paired MSE")
    axes[-1].legend(fontsize=6)
    _save(figure, path)


def _draw_samples(runs: Runs, finished: Finished, folder: Path) -> None:
    """Teacher and each method on the same tasks; of the last number of steps that is drawn."""
    test = runs.task.test
    if test.x_T.ndim != 4:
        return
    shown = columns(len(test), test.condition)
    rows = {f"teacher, {runs.task.teacher.num_steps} steps": test.teacher_x_0[shown]}
    for name, own in finished.items():
        run, _ = own[0]
        rows[f"{name}, {run.num_steps}"] = runs.shown(run)
    num_steps = next(iter(finished.values()))[0][0].num_steps
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{runs.task.name}-samples-{num_steps}.png"
    classes = None if test.condition is None else test.condition[shown]
    save_samples(path, rows, classes, runs.task.teacher.codec)


def _style(name: str) -> dict[str, Any]:
    ours = ENTRANTS[name].kind == "ours"
    place = list(ENTRANTS).index(name)
    return {
        "color": f"C{place % 10}",
        "marker": "o" if ours else "s" if ENTRANTS[name].kind == "rival" else "x",
        "linestyle": "-" if ours else "--" if ENTRANTS[name].kind == "rival" else ":",
        "linewidth": 2 if name in HEADLINE else 1,
        "markersize": 4,
    }


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
