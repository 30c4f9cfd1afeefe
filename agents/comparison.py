"""Methods side by side: figures to a reference, their floors, intervals, and what they show."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from redif_env.errors import InvalidArgumentError, check_choice, check_integer, check_number
from redif_env.rewards.base import Reward
from redif_env.rewards.base import evaluate as evaluate_reward
from redif_env.rewards.distributional import MMD, energy_kernel, polynomial_kernel
from redif_env.rewards.pixel import MSE, PSNR, SSIM

from . import metrics
from .evaluation import Judge
from .intervals import Draws, holm, holm_levels, needed_resamples, resample, verdict
from .metrics import Statistic

LARGER_IS_BETTER = frozenset(
    {"psnr", "ssim", "label_agreement", "label_balance", "reward"}
    | {"precision", "recall", "density", "coverage"}
)
# Of these more than the floor is no virtue: samples that all look typical have more of both.
UNRANKED = frozenset({"precision", "density"})
# Of answers compared with themselves, which need no measuring; 106 dB for a copy is a convention.
PAIRED_FLOORS = {"paired_mse": 0.0, "feature_distance": 0.0, "ssim": 1.0}
SMALLEST_SSIM = 6  # pixels; the window's radius is 5
K = 5  # neighbours, as Naeem et al. 2020

Extractor = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What methods are measured against.

    Attributes:
        answers: Samples of the reference's own distribution, `(N, ...)`: the floor is measured on
            them. With a teacher, its answers to the tasks.
        reference: Others of the same distribution, `(M, ...)`, on other noise, so that sharing
            noise with the answers gives no advantage.
        condition: Classes of the answers, int64 `(N,)`, or None.
    """

    answers: Tensor
    reference: Tensor
    condition: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method drew.

    Attributes:
        samples: One tensor `(N, ...)` a training seed, S of them; in random order, unless paired:
            some figures look at the first rows only.
        condition: Classes that were asked for, int64 `(N,)` if of all seeds, or `(S, N)`; or None.
        paired: Whether row i answers the task of row i of the yardstick's answers.
    """

    samples: Sequence[Tensor]
    condition: Tensor | None = None
    paired: bool = False


@dataclasses.dataclass(frozen=True)
class Features:
    """What samples are seen through.

    Attributes:
        judge: Features and labels; None leaves out what needs labels, and sees points `(N, F)` as
            they are, images flattened.
        inception: Of `inception.load_inception`; None leaves out the standard FID.
        reward: One whose mean over paired samples is a figure, too; None leaves it out.
    """

    judge: Judge | None = None
    inception: Extractor | None = None
    reward: Reward | None = None

    def see(self, samples: Tensor) -> Tensor:
        """Features `(N, F)` for all but the standard FID."""
        return samples.flatten(1) if self.judge is None else self.judge(samples)


# What a training's samples come to: by figure its value, a float64 scalar, and that of each
# resample, float64 `(B,)`.
Drawn = Mapping[str, tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The yardstick as seen, and the resamples that methods share.

    Attributes:
        yardstick, features: As given.
        seen: Features of the reference, `(M, F)`.
        inception_seen: Of the inception network, or None.
        task_counts: Resamples of tasks, `(B, N)`.
        reference_counts: Of the reference, `(B, M)`.
        generator: Goes on with resamples that are not shared.
        wanted: Figures.
    """

    yardstick: Yardstick
    features: Features
    seen: Tensor
    inception_seen: Tensor | None
    task_counts: Tensor
    reference_counts: Tensor
    generator: torch.Generator
    wanted: Sequence[str]

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        yardstick: Yardstick,
        features: Features,
        figures: Sequence[str],
        num_resamples: int,
        seed: int = 0,
    ) -> Bench:
        """Look at the yardstick once; the same arguments give the same resamples.

        Args:
            yardstick: What to measure against.
            features: What to see through.
            figures: Which of `FIGURES` to compute.
            num_resamples: B.
            seed: Of the resamples.
        """
        generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
        device = yardstick.answers.device
        inception = features.inception
        return cls(
            yardstick,
            features,
            features.see(yardstick.reference),
            None if inception is None else inception(yardstick.reference),
            resample(num_resamples, len(yardstick.answers), generator).to(device),
            resample(num_resamples, len(yardstick.reference), generator).to(device),
            generator,
            figures,
        )

    @torch.no_grad()
    def draw(
        self, samples: Tensor, condition: Tensor | None, paired: bool, shares_tasks: bool
    ) -> Drawn:
        """The figures of one training's samples, and their bootstrap distributions.

        Args:
            samples: `(N, ...)`.
            condition: Classes that were asked for, int64 `(N,)`, or None.
            paired: Whether row i answers the task of row i of the yardstick's answers.
            shares_tasks: Whether to draw the same resamples of rows as of others that do.
        """
        counts = self.task_counts
        if not shares_tasks:
            counts = resample(len(counts), counts.shape[1], self.generator).to(counts.device)
        num, num_reference = counts.shape[1], self.reference_counts.shape[1]
        found = {}
        for name, statistic in statistics(_Sight(samples, condition, paired, self)).items():
            figure = metrics.estimate(statistic, num, num_reference, counts.device)
            found[name] = figure.cpu(), statistic(counts, self.reference_counts).cpu()
        return found

    @functools.cached_property
    def floor(self) -> Drawn:
        """The figures of the yardstick's own answers, which all methods share tasks with."""
        return self.draw(
            self.yardstick.answers, self.yardstick.condition, paired=False, shares_tasks=True
        )


@torch.no_grad()
def evaluate(
    methods: Mapping[str, Method],
    yardstick: Yardstick,
    features: Features | None = None,
    *,
    focus: Sequence[str] | None = None,
    figures: Sequence[str] | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure of every method with its interval, the floor, and comparisons of pairs.

    Figures of distributions (`frechet`, `kid`, `mmd`, `energy_distance`, `sliced_wasserstein`,
    `precision`, `recall`, `density`, `coverage`, `label_balance`, `fid`, `inception_kid`) are to
    `yardstick.reference`; `label_agreement` to the classes asked for; `paired_mse`, `psnr`, `ssim`,
    `feature_distance` and `reward`, of paired methods, to `yardstick.answers` row by row.
    docs/evaluation.md says which of them to trust.

    Args:
        methods: By name. All have as many rows as the yardstick's answers, because the bias of
            distances depends on the number.
        yardstick: What to measure against.
        features: What to see through; default: samples as they are.
        focus: Methods to compare with all others; default: all with all. The fewer pairs, the less
            Holm's correction takes away.
        figures: Which of `FIGURES` to compute; default: all that there are.
        num_resamples: Resamples of the bootstrap, B.
        level: Of the intervals.
        seed: Of the resamples.

    Returns:
        `floor`: an interval by figure. `methods`: by name and figure an interval and, where there
        is a floor, its `excess` over it, an interval too, larger than 0 where the method is worse.
        `comparisons`: of each figure but precision and density, and each pair, the difference in
        an interval of the level that Holm tests it at, the p-value, Holm's, and the verdict on
        the first of the two, see `intervals.verdict`. All plain data.

    Warns:
        RuntimeWarning: where the resamples are too few for a verdict, see
            `intervals.needed_resamples`. All are then `"not shown"`.

    Raises:
        InvalidArgumentError: for samples of other shapes or numbers than the answers', or not
            finite; for fewer rows than neighbours; for a judge of other images.
    """
    features = features or Features()
    num_resamples = check_integer("num_resamples", num_resamples, 100)
    level = check_number("level", level, 0.5, 0.999)
    _check(methods, yardstick)
    for name in focus or ():
        check_choice("focus", name, tuple(methods))
    for name in figures or ():
        check_choice("figures", name, FIGURES)
    _check_judge(features.judge, yardstick.answers.shape[1:])
    wanted = FIGURES if figures is None else figures
    bench = Bench.prepare(yardstick, features, wanted, num_resamples, seed)
    drawn = {name: _draw_all(method, bench) for name, method in methods.items()}
    return weigh(drawn, bench, focus, level)


def weigh(
    drawn: Mapping[str, Sequence[Drawn]],
    bench: Bench,
    focus: Sequence[str] | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """What `evaluate` returns, of what a bench drew.

    Args:
        drawn: What the bench drew of each training seed, by method.
        bench: The bench.
        focus: Methods to compare with all others; default: all with all.
        level: Of the intervals.

    Warns:
        RuntimeWarning: as `evaluate`.
    """
    base = _over_seeds([bench.floor])
    methods = {name: _over_seeds(seeds) for name, seeds in drawn.items()}
    families = _families(methods, focus)
    _warn_of_few_resamples(families, len(bench.task_counts), level)
    return {
        "num_samples": len(bench.yardstick.answers),
        "num_reference": len(bench.yardstick.reference),
        "level": level,
        "num_resamples": len(bench.task_counts),
        "floor": {name: dataclasses.asdict(each.interval(level)) for name, each in base.items()},
        "methods": {name: _described(own, base, level) for name, own in methods.items()},
        "comparisons": _compare(families, methods, base, level),
    }


@torch.no_grad()
def measure(samples: Tensor, yardstick: Yardstick, features: Features) -> dict[str, float]:
    """Every figure of samples that answer the yardstick's tasks, without intervals.

    Args:
        samples: `(N, ...)`, row i for the task of row i of the answers.
        yardstick: What to measure against.
        features: What to see through.

    Returns:
        Figures by name, see `evaluate`.

    Raises:
        InvalidArgumentError: as `evaluate`.
    """
    _check({"samples": Method([samples])}, yardstick)
    _check_judge(features.judge, yardstick.answers.shape[1:])
    bench = Bench.prepare(yardstick, features, FIGURES, 1)
    found = statistics(_Sight(samples, yardstick.condition, True, bench))
    sizes = len(samples), len(yardstick.reference), samples.device
    return {name: float(metrics.estimate(each, *sizes)) for name, each in found.items()}


def row_figures(
    samples: Tensor, answers: Tensor, features: Features, condition: Tensor | None = None
) -> dict[str, Tensor]:
    """Paired figures of each row, `(N,)` each.

    `paired_mse` and `psnr`; `ssim` of images; with a judge `feature_distance`, the mean squared
    difference of its features; with a reward `reward`.
    """
    rows = {
        "paired_mse": -MSE()(samples, answers, None),
        "psnr": PSNR()(samples, answers, None),
    }
    if samples.ndim == 4 and min(samples.shape[2:]) >= SMALLEST_SSIM:
        rows["ssim"] = SSIM()(samples, answers, None)
    if features.judge is not None:
        change = features.see(samples) - features.see(answers)
        rows["feature_distance"] = change.square().mean(1)
    if features.reward is not None:
        rows["reward"] = evaluate_reward(features.reward, samples, answers, condition)[0]
    return rows


@dataclasses.dataclass(frozen=True)
class _Sight:
    """Samples of one seed, seen through the bench's features; each view is computed once."""

    samples: Tensor
    condition: Tensor | None
    paired: bool
    bench: Bench

    @functools.cached_property
    def seen(self) -> Tensor:
        return self.bench.features.see(self.samples)

    @functools.cached_property
    def rows(self) -> dict[str, Tensor]:
        if not self.paired:
            return {}
        answers, features = self.bench.yardstick.answers, self.bench.features
        return row_figures(self.samples, answers, features, self.condition)

    @functools.cached_property
    def neighbourhoods(self) -> dict[str, Statistic]:
        return metrics.neighbourhoods(self.seen, self.bench.seen, K)

    @functools.cached_property
    def standard(self) -> tuple[Tensor, Tensor] | None:
        inception, seen = self.bench.features.inception, self.bench.inception_seen
        return None if inception is None or seen is None else (inception(self.samples), seen)

    def row(self, name: str) -> Statistic | None:
        """A mean over rows."""
        return metrics.mean(self.rows[name]) if name in self.rows else None

    def of_judge(self, statistic: Callable[[Tensor, Tensor], Statistic]) -> Statistic | None:
        """Only of a judge's features: raw points and pixels are no Gaussian."""
        judge = self.bench.features.judge
        return None if judge is None else statistic(self.seen, self.bench.seen)

    def of_standard(self, statistic: Callable[[Tensor, Tensor], Statistic]) -> Statistic | None:
        return None if self.standard is None else statistic(*self.standard)

    def mmd(self) -> Statistic:
        target = self.bench.seen
        kernel = MMD().fit_kernel(target[: metrics.MAX_PAIRWISE].double())
        return metrics.discrepancy(kernel, self.seen, target)

    def label_balance(self) -> Statistic | None:
        judge, reference = self.bench.features.judge, self.bench.yardstick.reference
        if judge is None:
            return None
        labels, targets = (judge.logits(each).argmax(1) for each in (self.samples, reference))
        return metrics.class_balance(labels, targets)

    def label_agreement(self) -> Statistic | None:
        judge = self.bench.features.judge
        if judge is None or self.condition is None:
            return None
        return metrics.mean((judge.logits(self.samples).argmax(1) == self.condition).double())


_kid = functools.partial(metrics.discrepancy, polynomial_kernel)
_FIGURES: dict[str, Callable[[_Sight], Statistic | None]] = {
    "paired_mse": lambda sight: sight.row("paired_mse"),
    "psnr": lambda sight: sight.row("psnr"),
    "ssim": lambda sight: sight.row("ssim"),
    "feature_distance": lambda sight: sight.row("feature_distance"),
    "reward": lambda sight: sight.row("reward"),
    "frechet": lambda sight: sight.of_judge(metrics.frechet_distance),
    "kid": lambda sight: sight.of_judge(_kid),
    "mmd": _Sight.mmd,
    "energy_distance": lambda sight: metrics.discrepancy(
        energy_kernel, sight.seen, sight.bench.seen
    ),
    "sliced_wasserstein": lambda sight: metrics.sliced_wasserstein(sight.seen, sight.bench.seen),
    "precision": lambda sight: sight.neighbourhoods["precision"],
    "recall": lambda sight: sight.neighbourhoods["recall"],
    "density": lambda sight: sight.neighbourhoods["density"],
    "coverage": lambda sight: sight.neighbourhoods["coverage"],
    "label_balance": _Sight.label_balance,
    "label_agreement": _Sight.label_agreement,
    "fid": lambda sight: sight.of_standard(metrics.frechet_distance),
    "inception_kid": lambda sight: sight.of_standard(_kid),
}
FIGURES = tuple(_FIGURES)


def statistics(sight: _Sight) -> dict[str, Statistic]:
    """The figures that the bench wants and the samples have, by name."""
    found = {name: _FIGURES[name](sight) for name in sight.bench.wanted}
    return {name: statistic for name, statistic in found.items() if statistic is not None}


def _draw_all(method: Method, bench: Bench) -> list[Drawn]:
    """Of each training seed of a method; unpaired samples have noise of their own."""
    classes: Sequence[Tensor | None] = [None] * len(method.samples)
    if method.condition is not None:
        classes = list(method.condition.expand(len(method.samples), -1))
    return [
        bench.draw(samples, condition, method.paired, shares_tasks=method.paired)
        for samples, condition in zip(method.samples, classes, strict=True)
    ]


def _over_seeds(seeds: Sequence[Drawn]) -> dict[str, Draws]:
    """The distribution of each figure's mean over seeds."""
    return {
        name: Draws.of(
            torch.stack([drawn[name][0] for drawn in seeds]),
            torch.stack([drawn[name][1] for drawn in seeds]),
        )
        for name in seeds[0]
    }


def _described(
    own: Mapping[str, Draws], floor: Mapping[str, Draws], level: float
) -> dict[str, dict[str, Any]]:
    described = {}
    for name, draws in own.items():
        described[name] = dataclasses.asdict(draws.interval(level))
        base = _floor(name, draws, floor)
        if base is not None:
            excess = base - draws if name in LARGER_IS_BETTER else draws - base
            described[name]["excess"] = dataclasses.asdict(excess.interval(level))
    return described


def _floor(name: str, like: Draws, floor: Mapping[str, Draws]) -> Draws | None:
    """The floor of a figure; None where there is none, as of a PSNR."""
    if name in PAIRED_FLOORS:
        return Draws(PAIRED_FLOORS[name], torch.full_like(like.values, PAIRED_FLOORS[name]))
    return floor.get(name)


Families = Mapping[str, Sequence[tuple[str, str]]]  # pairs of methods, by figure


def _families(
    drawn: Mapping[str, Mapping[str, Draws]], focus: Sequence[str] | None
) -> dict[str, list[tuple[str, str]]]:
    """Pairs of methods that both have a figure, by figure: Holm corrects for those of one."""
    figures = dict.fromkeys(name for own in drawn.values() for name in own)
    return {
        figure: _pairs([name for name, own in drawn.items() if figure in own], focus)
        for figure in figures
        if figure not in UNRANKED
    }


def _warn_of_few_resamples(families: Families, num_resamples: int, level: float) -> None:
    most = max(map(len, families.values()), default=0)
    needed = needed_resamples(most, level)
    if num_resamples < needed:
        warnings.warn(
            f"{num_resamples} resamples can show nothing of {most} comparisons: pass "
            f"num_resamples={needed} at least, or compare fewer methods.",
            RuntimeWarning,
            stacklevel=3,
        )


def _compare(
    families: Families,
    drawn: Mapping[str, Mapping[str, Draws]],
    floor: Mapping[str, Draws],
    level: float,
) -> list[dict[str, Any]]:
    """Each pair of each family: its difference, p-values and verdict."""
    comparisons = []
    for figure, pairs in families.items():
        differences = [drawn[first][figure] - drawn[second][figure] for first, second in pairs]
        p_values = [difference.p_value() for difference in differences]
        rows = zip(
            pairs, differences, p_values, holm(p_values), holm_levels(p_values, level), strict=True
        )
        for (first, second), difference, p, p_holm, own_level in rows:
            rival = drawn[second][figure]
            base = _floor(figure, rival, floor)
            interval = difference.interval(own_level)
            gap = None if base is None else (rival - base).estimate
            larger_is_better = figure in LARGER_IS_BETTER
            # Of fewer, the interval is shorter than its level says: nothing matches either.
            enough = len(difference.values) >= needed_resamples(len(pairs), level)
            shown = verdict(interval, p_holm, gap, larger_is_better, level)
            comparisons.append(
                {
                    "figure": figure,
                    "method": first,
                    "rival": second,
                    "difference": dataclasses.asdict(interval),
                    "p": p,
                    "p_holm": p_holm,
                    "verdict": shown if enough else "not shown",
                }
            )
    return comparisons


def _pairs(names: Sequence[str], focus: Sequence[str] | None) -> list[tuple[str, str]]:
    """Each pair once, one of `focus` first where there is one."""
    pairs = list(itertools.combinations(names, 2))
    if focus is None:
        return pairs
    kept = [pair for pair in pairs if set(pair) & set(focus)]
    return [pair if pair[0] in focus else pair[::-1] for pair in kept]


def _check(methods: Mapping[str, Method], yardstick: Yardstick) -> None:
    num, num_reference = len(yardstick.answers), len(yardstick.reference)
    if min(num, num_reference) <= K:
        raise InvalidArgumentError(
            "yardstick",
            f"{num} answers, {num_reference} of the reference",
            f"pass more than {K} of each.",
        )
    _check_classes("yardstick", yardstick.condition, (num,))
    _check_rows("reference", yardstick.reference, yardstick.answers.shape[1:])
    _check_rows("answers", yardstick.answers, yardstick.answers.shape[1:])
    for name, method in methods.items():
        if not method.samples:
            raise InvalidArgumentError(name, method.samples, "pass samples of one seed at least.")
        for samples in method.samples:
            _check_rows(name, samples, yardstick.answers.shape[1:])
            if len(samples) != num:
                raise InvalidArgumentError(
                    name,
                    f"{len(samples)} rows",
                    f"pass {num}, as many as the floor is measured on.",
                )
        _check_classes(name, method.condition, (num,), (len(method.samples), num))


def _check_classes(name: str, condition: Tensor | None, *shapes: tuple[int, ...]) -> None:
    # Other shapes would be broadcast against the labels of samples.
    if condition is not None and (condition.shape not in shapes or condition.is_floating_point()):
        raise InvalidArgumentError(
            name,
            f"{condition.dtype} classes {tuple(condition.shape)}",
            f"pass integers {' or '.join(map(str, shapes))}, or None.",
        )


def _check_judge(judge: Judge | None, shape: torch.Size) -> None:
    if judge is None:
        return
    channels, side = judge.config["in_channels"], judge.config["sample_size"]
    if tuple(shape) != (channels, side, side):
        raise InvalidArgumentError(
            "judge",
            f"one of images of {(channels, side, side)}",
            f"pass one that was trained for samples of {tuple(shape)}, or None.",
        )


def _check_rows(name: str, samples: Tensor, shape: torch.Size) -> None:
    if samples.shape[1:] != shape:
        raise InvalidArgumentError(
            name, f"samples of {tuple(samples.shape[1:])}", f"pass samples of {tuple(shape)}."
        )
    if not bool(samples.isfinite().all()):
        raise InvalidArgumentError(name, "NaN or infinity", "pass finite samples only.")
