"""Methods side by side, on points and on the bundled digits."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from agents.comparison import Features, Method, Yardstick, evaluate, row_figures
from agents.distillation import find_judge
from agents.evaluation import Judge, frechet_distance, label_agreement
from redif_env.errors import InvalidArgumentError

NUM = 150
WORDS = ("better", "worse")


def ring(generator, num=NUM, shift=0.0):
    """Points on the unit circle."""
    angle = 2 * torch.pi * torch.rand(num, generator=generator)
    return torch.stack([angle.cos() + shift, angle.sin()], 1)


def test_points_need_no_judge_and_get_no_frechet_distance(generator):
    answers = ring(generator)
    methods = {
        "near": Method([answers + 0.01 * torch.randn(NUM, 2, generator=generator)], paired=True),
        "far": Method([answers + 0.5], paired=True),
        "elsewhere": Method([ring(generator, shift=0.5)]),
    }
    report = evaluate(methods, Yardstick(answers, ring(generator)), num_resamples=200)
    json.dumps(report)  # plain data
    near, far, elsewhere = (report["methods"][name] for name in methods)
    assert not {"frechet", "kid", "label_balance", "ssim"} & set(far)
    assert far["paired_mse"]["estimate"] == pytest.approx(0.25)
    assert far["paired_mse"]["excess"]["high"] == far["paired_mse"]["high"]  # its floor is 0
    assert "paired_mse" not in elsewhere
    for figure in ("sliced_wasserstein", "mmd", "energy_distance", "recall", "coverage"):
        assert far[figure]["excess"]["low"] > 0, figure
        assert elsewhere[figure]["excess"]["low"] > 0, figure
        assert abs(near[figure]["excess"]["estimate"]) < far[figure]["excess"]["estimate"] / 3
    words = {
        (row["figure"], row["method"], row["rival"]): row["verdict"]
        for row in report["comparisons"]
    }
    assert words["sliced_wasserstein", "near", "far"] == "better"
    assert words["coverage", "near", "far"] == "better"
    assert words["sliced_wasserstein", "far", "elsewhere"] == "not shown"
    assert not any(figure in ("precision", "density") for figure, *_ in words)


def test_a_method_that_is_the_floor_has_no_excess(generator):
    answers = ring(generator)
    yardstick = Yardstick(answers, ring(generator))
    report = evaluate({"same": Method([answers], paired=True)}, yardstick, num_resamples=100)
    for name, figure in report["methods"]["same"].items():
        if "excess" in figure:
            for number in figure["excess"].values():
                assert number == pytest.approx(0, abs=1e-6), name


def test_a_copy_with_other_noise_is_not_shown_to_be_anything(generator):
    """Negative control: the reference's own distribution, drawn again, in 20 worlds."""
    words = []
    for _ in range(20):
        answers = ring(generator, 60)
        methods = {"a": Method([ring(generator, 60)]), "b": Method([ring(generator, 60)])}
        report = evaluate(methods, Yardstick(answers, ring(generator, 60)), num_resamples=200)
        words += [
            row["verdict"] for row in report["comparisons"] if row["figure"] == "sliced_wasserstein"
        ]
    # 5 % of 20 are expected, and more than 4 in 0.3 %
    assert sum(word in ("better", "worse") for word in words) <= 4


def claims_of_equals(generator, worlds, num_resamples):
    """Share of worlds in which any of five equal methods is said to be better; and by intervals."""
    by_verdict = by_interval = 0
    for seed in range(worlds):
        answers = torch.zeros(100, 1)
        methods = {
            str(i): Method([torch.randn(100, 1, generator=generator)], paired=True)
            for i in range(5)
        }
        found = evaluate(
            methods,
            Yardstick(answers, answers),
            figures=("paired_mse",),
            num_resamples=num_resamples,
            seed=seed,
        )["comparisons"]
        by_verdict += any(row["verdict"] in WORDS for row in found)
        ends = [row["difference"] for row in found]
        by_interval += any(end["low"] > 0 or end["high"] < 0 for end in ends)
        assert all((row["p_holm"] <= 0.05) == (row["verdict"] in WORDS) for row in found)
    return by_verdict / worlds, by_interval / worlds


def test_too_few_resamples_show_nothing_and_say_so(generator):
    """Ten pairs at 100 resamples, whose intervals would find a difference in a fifth of worlds."""
    with pytest.warns(RuntimeWarning, match="pass num_resamples=399 at least"):
        by_verdict, by_interval = claims_of_equals(generator, 50, 100)
    assert by_verdict == 0
    assert by_interval > 0.1
    answers, same = torch.zeros(100, 1), torch.ones(100, 1)
    methods = {str(i): Method([same], paired=True) for i in range(5)}

    def words(**options):
        found = evaluate(methods, Yardstick(answers, answers), figures=("paired_mse",), **options)
        return {row["verdict"] for row in found["comparisons"]}

    with pytest.warns(RuntimeWarning, match="100 resamples can show nothing of 10 comparisons"):
        assert words(num_resamples=100) == {"not shown"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words(num_resamples=399) == {"matches"}
        assert words(num_resamples=100, focus=["0"], level=0.9) == {"matches"}


@pytest.mark.slow
def test_equal_methods_are_rarely_said_to_differ(generator):
    """The family-wise error of ten pairs, at the fewest resamples that can show anything.

    1,000 worlds know 5 % to 0.7 %; the percentile of 100 rows adds about 1 %. Intervals alone, of
    which an end lies inside the outermost resample, would claim twice as much.
    """
    by_verdict, by_interval = claims_of_equals(generator, 1000, 399)
    assert 0.02 < by_verdict < 0.08
    assert by_interval > 0.09


def test_seeds_widen_the_interval(generator):
    answers = ring(generator)
    yardstick = Yardstick(answers, ring(generator))
    noise = torch.randn(NUM, 2, generator=generator)
    methods = {
        "one": Method([answers + 0.2 * noise], paired=True),
        "three": Method([answers + scale * noise for scale in (0.1, 0.2, 0.3)], paired=True),
    }
    report = evaluate(methods, yardstick, num_resamples=300)["methods"]
    one, three = report["one"]["paired_mse"], report["three"]["paired_mse"]
    mean = (0.01 + 0.04 + 0.09) * float(noise.square().mean()) / 3
    assert three["estimate"] == pytest.approx(mean, rel=1e-4)
    assert three["high"] - three["low"] > 5 * (one["high"] - one["low"])


def test_images_get_the_figures_of_distill(teacher, bank, held_out):
    judge = find_judge(teacher)
    answers, reference = held_out.teacher_x_0[:32], bank.teacher_x_0
    classes = held_out.condition[:32]
    shifted = answers + 0.5
    report = evaluate(
        {"shifted": Method([shifted], classes, True)},
        Yardstick(answers, reference, classes),
        Features(judge, lambda images: images.flatten(1)[:, :5]),
        num_resamples=100,
    )
    found = {name: row["estimate"] for name, row in report["methods"]["shifted"].items()}
    assert found["paired_mse"] == pytest.approx(0.25, rel=1e-4)
    assert found["psnr"] == pytest.approx(12.04, abs=0.01)  # 20 log10(2) + 10 log10(4)
    assert found["frechet"] == pytest.approx(frechet_distance(judge, shifted, reference), rel=1e-4)
    assert found["label_agreement"] == pytest.approx(label_agreement(judge, shifted, classes))
    assert found["ssim"] < 0.99
    assert {"fid", "inception_kid", "kid", "label_balance"} <= set(found)
    floor = report["floor"]["label_agreement"]["estimate"]
    assert floor == pytest.approx(label_agreement(judge, answers, classes))
    assert "paired_mse" not in report["floor"]


def test_each_seed_is_judged_by_its_own_classes(teacher, held_out):
    """Answers of the teacher in two orders; one order's classes would be wrong for the other."""
    answers, classes = held_out.teacher_x_0[:32], held_out.condition[:32]
    order = torch.arange(31, -1, -1)
    samples = [answers, answers[order]]
    both = torch.stack([classes, classes[order]])
    report = evaluate(
        {"own": Method(samples, both), "first": Method(samples, classes)},
        Yardstick(answers, answers, classes),
        Features(find_judge(teacher)),
        figures=("label_agreement",),
        num_resamples=100,
    )
    floor = report["floor"]["label_agreement"]["estimate"]
    own, first = (report["methods"][name]["label_agreement"] for name in ("own", "first"))
    assert own["estimate"] == pytest.approx(floor)
    assert first["estimate"] < floor - 0.2


def test_paired_figures_are_rows(teacher, bank):
    features = Features(find_judge(teacher))
    answers = bank.teacher_x_0
    samples = answers.clone()
    samples[3] += 1
    rows = row_figures(samples, answers, features)
    assert rows["paired_mse"].nonzero().flatten().tolist() == [3]
    assert rows["feature_distance"].nonzero().flatten().tolist() == [3]
    assert float(rows["paired_mse"][3]) == pytest.approx(1)
    assert rows["ssim"].argmin() == rows["psnr"].argmin() == 3


def test_what_cannot_be_compared_is_refused(generator):
    answers, reference = ring(generator), ring(generator)
    yardstick = Yardstick(answers, reference)

    def refused(match, method=None, yardstick=yardstick, **options):
        with pytest.raises(InvalidArgumentError, match=match):
            evaluate({"m": method or Method([answers])}, yardstick, **options)

    refused("pass 150, as many as the floor", Method([answers[:100]]))
    refused(r"pass samples of \(2,\)", Method([answers[:, :1]]))
    refused("pass finite samples", Method([answers / 0]))
    refused("one seed at least", Method([]))
    refused("more than 5", yardstick=Yardstick(answers[:5], reference))
    refused("reference", yardstick=Yardstick(answers, reference[:, :1]))
    refused(r"classes \(10,\)", Method([answers], torch.zeros(10).long()))
    refused(r"classes \(150, 1\)", Method([answers], torch.zeros(150, 1).long()))
    refused(r"pass integers \(150,\) or \(1, 150\)", Method([answers], torch.zeros(150)))
    classes = Yardstick(answers, reference, torch.zeros(1).long())
    refused(r"yardstick='torch.int64 classes \(1,\)'", yardstick=classes)
    refused("judge=", features=Features(Judge()))
    refused("num_resamples=10", num_resamples=10)
    refused("level=95", level=95)
