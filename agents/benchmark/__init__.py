"""Few-step techniques side by side: tasks, entrants, runs and the tables of what they show.

`examples/compare.py` is its command; docs/benchmark.md has the protocol and the results.
"""

from .entrants import ENTRANTS, OURS, Entrant, taking_part
from .runs import Run, Runs, plan, plan_trials
from .tasks import TASKS, Sizes, Task, make_task, usual_sizes

__all__ = [
    "ENTRANTS",
    "OURS",
    "TASKS",
    "Entrant",
    "Run",
    "Runs",
    "Sizes",
    "Task",
    "make_task",
    "plan",
    "plan_trials",
    "taking_part",
    "usual_sizes",
]
