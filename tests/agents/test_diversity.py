"""Recall, coverage and balance of labels: by hand, on clusters, and their noise."""

from __future__ import annotations

import math

import pytest
import torch

from agents.distillation import find_judge
from agents.diversity import (
    balance_blocks,
    block_means,
    covered,
    judged_quality,
    label_balance,
    radii,
    recalled,
    significance,
)
from redif_env.errors import InvalidArgumentError


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_radii_by_hand():
    assert radii(column(0, 1, 3, 7), 1).tolist() == [1, 1, 2, 4]
    assert radii(column(0, 1, 3, 7), 2).tolist() == [3, 2, 3, 6]
    with pytest.raises(InvalidArgumentError, match="k=4"):
        radii(column(0, 1, 3, 7), 4)


def test_recall_and_coverage_by_hand():
    """Balls of the samples: [-1, 1], [0, 2]; of the reference: [-4, 4], [1, 7], [7, 13]."""
    samples, reference = column(0, 1), column(0, 4, 10)
    assert recalled(samples, reference, 1).tolist() == [1, 0, 0]
    assert covered(samples, reference, 1).tolist() == [1, 1, 0]


def test_one_far_sample_raises_recall_and_not_coverage(generator):
    """Why both are judged: the ball of an outlier takes in half of the plane."""
    reference = torch.randn(200, 2, generator=generator)
    collapsed = 0.01 * torch.randn(99, 2, generator=generator)
    far = torch.full((1, 2), 50.0)
    assert float(recalled(collapsed, reference, 5).mean()) < 0.05
    assert float(recalled(torch.cat([collapsed, far]), reference, 5).mean()) > 0.4
    assert float(covered(torch.cat([collapsed, far]), reference, 5).mean()) < 0.2


def test_the_same_distribution_is_covered_and_half_of_it_is_half(generator):
    draws = torch.randn(2, 400, 4, generator=generator)
    draws[:, :200, 0] += 40  # two modes
    samples, reference = draws
    assert float(recalled(samples, reference, 5).mean()) > 0.9
    assert float(covered(samples, reference, 5).mean()) > 0.9
    assert float(recalled(samples[:200], reference, 5).mean()) == pytest.approx(0.5, abs=0.06)
    assert float(covered(samples[:200], reference, 5).mean()) == pytest.approx(0.5, abs=0.06)


def test_recall_and_coverage_by_loops(generator):
    """By loops, as the paper writes it."""
    samples, reference = torch.randn(2, 12, 3, generator=generator)
    for row in range(12):
        hit, near = False, False
        for sample in samples:
            others = sorted(float((sample - other).norm()) for other in samples)
            hit |= float((sample - reference[row]).norm()) <= others[2]  # itself, then k = 2
            own = sorted(float((reference[row] - other).norm()) for other in reference)
            near |= float((sample - reference[row]).norm()) <= own[2]
        assert bool(recalled(samples, reference, 2)[row]) == hit
        assert bool(covered(samples, reference, 2)[row]) == near


def test_balance_by_hand():
    labels, reference = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 2])
    # shares 3/4, 1/4, 0 and 1/4, 1/4, 1/2
    assert float(label_balance(labels, reference)) == pytest.approx(0.5)
    assert float(label_balance(reference, reference.flip(0))) == 1
    assert float(label_balance(torch.tensor([0]), torch.tensor([4]))) == 0


def test_blocks_of_a_mean_have_that_mean(generator):
    values = torch.rand(48, generator=generator)
    blocks = block_means(values, 6)
    torch.testing.assert_close(blocks.mean(), values.double().mean())
    torch.testing.assert_close(blocks[1], values[8:16].double().mean())
    with pytest.raises(InvalidArgumentError, match="blocks=49"):
        block_means(values, 49)


def test_pseudo_values_of_a_mean_are_its_blocks():
    """With labels 0 and 1 and a reference all 1 the balance is the share of ones."""
    labels = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1])
    shares = balance_blocks(labels, torch.ones(8).long(), 4)
    torch.testing.assert_close(shares, block_means(labels.float(), 4))


def test_pseudo_values_know_the_noise_of_the_balance(generator):
    """Their standard error against the spread over fresh draws; skewed, so that it is smooth."""
    chances = torch.tensor([0.6, 0.2, 0.2])
    reference = torch.arange(320) % 3

    def draw():
        return torch.multinomial(chances, 320, replacement=True, generator=generator)

    spread = torch.stack([label_balance(draw(), reference) for _ in range(400)]).std()
    errors = [balance_blocks(draw(), reference, 16).std() / 4 for _ in range(40)]
    # the mean of 40 errors, each known to 1 / sqrt(30); the reference's blocks add a little
    assert float(torch.stack(errors).mean()) == pytest.approx(float(spread), rel=0.2)


def test_significance_is_students_t():
    change = torch.tensor([1.0, 2.0, 3.0, 2.0])
    assert significance(change) == pytest.approx(2 / (math.sqrt(2 / 3) / 2))
    assert significance(torch.zeros(4)) == 0
    assert significance(torch.full((4,), 0.1)) == math.inf
    assert significance(torch.full((4,), -0.1)) == -math.inf


def test_the_judge_sees_what_a_student_lost(teacher, bank, held_out):
    """Teacher's answers to other noise against copies of one digit and a blank page."""
    judge = find_judge(teacher)
    answers, reference = held_out.teacher_x_0, bank.teacher_x_0

    def judged(samples):
        quality = judged_quality(
            judge, samples, answers, reference, held_out.condition, blocks=8, k=3
        )
        assert all(blocks.shape == (8,) for blocks in quality.values())
        return {name: float(blocks.mean()) for name, blocks in quality.items()}

    itself = judged(answers)
    assert itself["label_balance"] == 1
    assert itself["label_agreement"] > 0.9
    assert itself["recall"] > 0.5
    assert itself["coverage"] > 0.5
    for poor in (answers[:1].expand_as(answers), -torch.ones_like(answers)):
        lost = judged(poor)
        for figure in itself:
            assert lost[figure] < itself[figure] - 0.3, figure


def test_without_classes_there_is_no_agreement(teacher, bank, held_out):
    quality = judged_quality(
        find_judge(teacher), held_out.x_T, held_out.teacher_x_0, bank.x_T, None, blocks=4, k=2
    )
    assert set(quality) == {"recall", "coverage", "label_balance"}
