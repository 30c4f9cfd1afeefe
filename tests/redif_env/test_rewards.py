"""Rewards: arithmetic, torchmetrics, and the algebra of sums."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from redif_env import MSE, PSNR, SSIM, Cosine, Reward, register_reward
from redif_env.errors import InvalidArgumentError, InvalidRewardError
from redif_env.rewards import HistogramKL, MultiScaleSSIM, WeightedSum, evaluate, make_reward

MAPS = [MSE(), SSIM(), SSIM(sigma=0.5), 0.3 * MSE() + 2 * SSIM()]


@pytest.fixture
def pair(generator):
    """Images in [-1, 1] and noisy copies of them."""
    x_0 = torch.rand(3, 2, 16, 20, generator=generator) * 2 - 1
    return x_0, (x_0 + 0.3 * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)


def score(reward, x_0, teacher_x_0):
    return reward(x_0, teacher_x_0, None)


def test_mse_by_hand():
    x_0, answer = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, -3.0]])
    assert score(MSE(), x_0, answer).tolist() == [-2.5, -4.5]
    assert MSE().reward_map(x_0, answer, None).tolist() == [[-1.0, -4.0], [0.0, -9.0]]


def test_psnr_by_hand():
    x_0, answer = torch.tensor([[0.2, -0.2]]), torch.zeros(1, 2)
    # 10 log10(2^2 / 0.04)
    assert float(score(PSNR(), x_0, answer)) == pytest.approx(20, abs=1e-4)
    assert float(score(PSNR(data_range=1), x_0, answer)) == pytest.approx(13.9794, abs=1e-4)


def test_psnr_is_torchmetrics(pair):
    for row in range(3):
        wanted = peak_signal_noise_ratio(pair[0][row], pair[1][row], data_range=2.0)
        assert float(score(PSNR(), *pair)[row]) == pytest.approx(float(wanted), rel=1e-5)


def test_psnr_of_a_copy_is_finite(pair):
    assert bool(score(PSNR(), pair[0], pair[0]).isfinite().all())


def ssim_at(x, y, row, column, sigma=1.5, data_range=2.0):
    """SSIM at one pixel by the formula of Wang et al. 2004, in Python numbers."""
    radius = int(3.5 * sigma + 0.5)
    weights, ones, twos = [], [], []
    for i, j in itertools.product(range(-radius, radius + 1), repeat=2):
        weights.append(math.exp(-(i * i + j * j) / (2 * sigma**2)))
        ones.append(float(x[row + i, column + j]))
        twos.append(float(y[row + i, column + j]))
    weights = [weight / sum(weights) for weight in weights]

    def mean(values):
        return sum(w * v for w, v in zip(weights, values, strict=True))

    mu, nu = mean(ones), mean(twos)
    var_one = mean([v * v for v in ones]) - mu * mu
    var_two = mean([v * v for v in twos]) - nu * nu
    covariance = mean([v * w for v, w in zip(ones, twos, strict=True)]) - mu * nu
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return ((2 * mu * nu + c1) * (2 * covariance + c2)) / (
        (mu * mu + nu * nu + c1) * (var_one + var_two + c2)
    )


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_ssim_map_by_hand(pair, sigma):
    reward_map = SSIM(sigma=sigma).reward_map(*pair, None)
    for row, channel, i, j in ((0, 0, 7, 9), (1, 1, 8, 12), (2, 0, 10, 6)):
        wanted = ssim_at(pair[0][row, channel], pair[1][row, channel], i, j, sigma)
        assert float(reward_map[row, channel, i, j]) == pytest.approx(wanted, abs=1e-4)  # float32


def test_ssim_is_torchmetrics(pair):
    wanted = structural_similarity_index_measure(*pair, data_range=2.0, reduction="none")
    torch.testing.assert_close(score(SSIM(), *pair), wanted)
    wider = structural_similarity_index_measure(*pair, data_range=4.0, reduction="none")
    assert not torch.allclose(score(SSIM(), *pair), wider, atol=1e-3)


def test_ssim_of_a_digit_needs_no_border(bank):
    """8x8 images are smaller than the window of 11; the score must still exist."""
    scores = score(SSIM(), bank.teacher_x_0[:4], bank.teacher_x_0[4:8])
    assert bool(scores.isfinite().all())
    assert bool((scores < 0.9).all())


def test_cosine_by_hand():
    x_0 = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[-2.0, 0.0]]])
    answer = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    assert score(Cosine(), x_0, answer).tolist() == pytest.approx([1, math.sqrt(0.5), -1])


@pytest.mark.parametrize(("size", "scales"), [(176, 5), (48, 4), (40, 3), (20, 2)])
def test_ms_ssim_is_torchmetrics(generator, size, scales):
    x_0 = torch.rand(3, 2, size, size, generator=generator) * 2 - 1
    answer = (x_0 + 0.3 * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    betas = tuple(beta / sum(betas) for beta in betas)
    options = {"data_range": 2.0, "normalize": "relu", "reduction": "none"}
    # The kernel's size is ignored for Gaussian windows, but not by torchmetrics's check of sizes.
    wanted = multiscale_structural_similarity_index_measure(
        x_0, answer, betas=betas, kernel_size=1, **options
    )
    assert MultiScaleSSIM().num_scales(size) == scales
    torch.testing.assert_close(score(MultiScaleSSIM(), x_0, answer), wanted)
    assert not torch.allclose(wanted, score(SSIM(), x_0, answer), atol=1e-3)


def test_ms_ssim_of_small_images_is_ssim(bank):
    pair = bank.teacher_x_0[:4], bank.teacher_x_0[:4] * 0.5
    torch.testing.assert_close(score(MultiScaleSSIM(), *pair), score(SSIM(), *pair))
    narrow = MultiScaleSSIM(sigma=0.5)
    assert narrow.num_scales(8) == 2
    assert not torch.allclose(score(narrow, *pair), score(SSIM(sigma=0.5), *pair), atol=1e-3)


def test_ms_ssim_of_opposed_contrasts_is_zero_with_a_gradient_of_zero(pair):
    x_0 = pair[0].clone().requires_grad_()
    values = score(MultiScaleSSIM(), x_0, -pair[0])
    assert values.tolist() == [0] * 3
    values.sum().backward()
    assert x_0.grad.tolist() == torch.zeros_like(x_0).tolist()
    x_0 = pair[0].clone().requires_grad_()
    score(MultiScaleSSIM(), x_0, pair[1]).sum().backward()
    assert bool((x_0.grad != 0).any())


def histogram(values, bins=32):
    """Shares of bins with half a count added, by numpy."""
    counts, _ = np.histogram(np.clip(values, -1, 1), bins, (-1, 1))
    return (counts + 0.5) / (counts + 0.5).sum()


@pytest.mark.parametrize("bins", [32, 5])
def test_histogram_kl_is_numpys(pair, bins):
    x_0 = 1.5 * pair[0]  # some beyond the range
    wanted = []
    for row in range(3):
        shares = [
            [histogram(part[row, channel].numpy(), bins) for part in (pair[1], x_0)]
            for channel in range(2)
        ]
        wanted.append(-np.mean([(p * np.log(p / q)).sum() for p, q in shares]))
    assert score(HistogramKL(bins), x_0, pair[1]).tolist() == pytest.approx(wanted, rel=1e-4)
    # Negative control: the other direction is another number.
    assert score(HistogramKL(bins), pair[1], x_0).tolist() != pytest.approx(wanted, rel=1e-2)


def test_histogram_kl_by_hand():
    """Two bins: (3.5, 1.5) of 5 against (2.5, 2.5) of 5."""
    answer = torch.tensor([[-0.5, -0.1, -0.9, 0.0]])  # 0 is the upper bin's
    x_0 = torch.tensor([[-1.0, -0.2, 0.3, 1.0]])
    wanted = -(0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5))
    assert float(score(HistogramKL(2), x_0, answer)) == pytest.approx(wanted, rel=1e-5)


def test_histogram_kl_sees_values_and_not_places(pair):
    shuffled = pair[1].flatten(2).roll(7, 2).reshape(pair[1].shape)
    torch.testing.assert_close(score(HistogramKL(), *pair), score(HistogramKL(), pair[0], shuffled))
    assert bool((score(HistogramKL(), -pair[0].abs(), pair[1]) < -0.1).all())
    channels = pair[1].flip(1)
    assert not torch.allclose(score(HistogramKL(), pair[0], channels), score(HistogramKL(), *pair))


def test_histogram_kl_passes_nan_on(pair):
    x_0 = pair[0].clone()
    x_0[1, 0, 2, 2] = torch.nan
    assert score(HistogramKL(), x_0, pair[1]).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("reward", [MSE(), PSNR(), SSIM(), MultiScaleSSIM(), Cosine()])
def test_a_gradient_step_raises_what_says_it_is_differentiable(pair, reward):
    assert reward.differentiable
    x_0 = pair[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(reward, x_0, pair[1]).sum(), x_0)
    step = 0.01 * functional.normalize(gradient.flatten(1), dim=1).reshape(x_0.shape)
    raised = score(reward, pair[0] + step, pair[1])
    assert bool((raised > score(reward, *pair)).all())
    assert bool((score(reward, pair[0] - step, pair[1]) < score(reward, *pair)).all())


@pytest.mark.parametrize(
    ("reward", "best"),
    [
        (MSE(), 0.0),
        (SSIM(), 1.0),
        (MultiScaleSSIM(), 1.0),
        (Cosine(), 1.0),
        (PSNR(), 106.0206),
        (HistogramKL(), 0.0),
    ],
)
def test_a_copy_scores_best(pair, reward, best):
    copies, others = score(reward, pair[0], pair[0]), score(reward, *pair)
    assert copies.tolist() == pytest.approx([best] * 3, abs=1e-4)
    assert bool((others < copies).all())


@pytest.mark.parametrize("reward", MAPS, ids=lambda reward: reward.name)
def test_the_maps_mean_is_the_reward(pair, reward):
    assert reward.has_map
    mean = reward.reward_map(*pair, None).flatten(1).mean(1)
    torch.testing.assert_close(score(reward, *pair), mean)
    values, reward_map = evaluate(reward, *pair, None)
    torch.testing.assert_close(values, mean)
    torch.testing.assert_close(reward_map, reward.reward_map(*pair, None))


@pytest.mark.parametrize(
    "reward",
    [*MAPS, PSNR(), Cosine(), HistogramKL(), MultiScaleSSIM(sigma=0.5)],
    ids=lambda reward: reward.name,
)
def test_rows_do_not_influence_each_other(pair, reward):
    together = score(reward, *pair)
    for row in range(3):
        alone = score(reward, pair[0][row : row + 1], pair[1][row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_sums_are_sums(pair):
    total = 0.5 * MSE() + SSIM() * 2 + PSNR()
    wanted = 0.5 * score(MSE(), *pair) + 2 * score(SSIM(), *pair) + score(PSNR(), *pair)
    torch.testing.assert_close(score(total, *pair), wanted)
    torch.testing.assert_close(score(3 * total, *pair), 3 * wanted)
    torch.testing.assert_close(score(-1 * total, *pair), -wanted)


def test_a_sum_has_a_map_when_every_term_has_one():
    assert (MSE() + SSIM()).has_map
    assert (MSE() + PSNR()).has_map
    assert not (PSNR() + Cosine()).has_map
    with pytest.raises(InvalidArgumentError, match="credit='global'"):
        PSNR().reward_map(torch.zeros(1, 1), torch.zeros(1, 1), None)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("mse", MSE()),
        (" ssim ", SSIM()),
        ("mse + 0.5*ssim", MSE() + 0.5 * SSIM()),
        ("2 * mse+1e-1*psnr + cosine", 2 * MSE() + 0.1 * PSNR() + Cosine()),
        ("-1*mse", -MSE()),
        ("mse + -0.5*ssim", MSE() - SSIM() / 2),
    ],
)
def test_parsing(pair, text, reward):
    parsed = make_reward(text)
    torch.testing.assert_close(score(parsed, *pair), score(reward, *pair))
    assert parsed.name == reward.name


def test_a_plain_name_is_no_sum():
    assert type(make_reward("mse")) is MSE
    assert type(make_reward("0.5*mse")) is WeightedSum
    reward = Cosine()
    assert make_reward(reward) is reward


@pytest.mark.parametrize("text", ["no such", "mse + no such", "mse +", "", "x*mse", "nan*mse", 3])
def test_what_does_not_parse(text):
    with pytest.raises(InvalidArgumentError, match=r"(reward|weight)="):
        make_reward(text)


class Constant(Reward):
    """Returns what it is told to; for the checks."""

    def __init__(self, value, reward_map=None):
        self.value = value
        self.map = reward_map
        self.has_map = reward_map is not None

    def __call__(self, x_0, teacher_x_0, condition):
        return self.value

    def reward_map(self, x_0, teacher_x_0, condition):
        return self.map


def test_own_rewards_by_name(pair):
    register_reward("always three", lambda: Constant(torch.full((3,), 3.0)))
    assert score(make_reward("2*always three"), *pair).tolist() == [6.0] * 3


@pytest.mark.parametrize(
    "reward",
    [
        Constant(torch.zeros(3, 1)),
        Constant(torch.zeros(2)),
        Constant(torch.tensor(0.0)),
        Constant(0.0),
        Constant(None),
        Constant(None, torch.zeros(2, 2, 16, 19)),
        Constant(None, torch.zeros(3)),
    ],
)
def test_wrong_shapes_are_refused(pair, reward):
    with pytest.raises(InvalidRewardError, match=r"reward 'constant' returned=.*return a tensor"):
        evaluate(reward, *pair, None)


def test_rewards_come_in_float32(pair):
    values, _ = evaluate(Constant(torch.zeros(3, dtype=torch.float64)), *pair, None)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (1, 1, 16, 5), (2, 3)])
def test_ssim_needs_images_larger_than_its_window(shape):
    x_0 = torch.zeros(shape)
    with pytest.raises(InvalidArgumentError, match=r"sigma=1\.5: choose a smaller window"):
        SSIM()(x_0, x_0, None)
    if len(shape) == 4:
        assert float(SSIM(sigma=0.5)(x_0, x_0, None)) == pytest.approx(1)


@pytest.mark.parametrize("other", [1, "mse", None])
def test_only_rewards_add(other):
    with pytest.raises((TypeError, InvalidArgumentError)):
        MSE() + other


def test_arithmetic_of_rewards_is_that_of_their_values(pair):
    one, two = score(MSE(), *pair), score(PSNR(), *pair)
    for reward, expected in [
        (-MSE(), -one),
        (MSE() - PSNR(), one - two),
        (MSE() / 2, one / 2),
        (MSE() - (PSNR() - MSE()) / 4, one - (two - one) / 4),
        (sum([MSE(), PSNR(), MSE()]), 2 * one + two),
    ]:
        torch.testing.assert_close(score(reward, *pair), expected)
        # and by its own name
        torch.testing.assert_close(score(make_reward(reward.name), *pair), expected)


NO_ARITHMETIC = {
    "a number added": lambda: 1 + MSE(),
    "a number subtracted": lambda: MSE() - 1,
    "a name subtracted": lambda: MSE() - "ssim",
    "divided by 0": lambda: MSE() / 0,
    "divided by a reward": lambda: MSE() / SSIM(),
    "a name of a sum": lambda: register_reward("a+b", MSE),
    "a name with a weight": lambda: register_reward("2*mse", MSE),
    "a name with spaces around it": lambda: register_reward(" mse", MSE),
    "no name": lambda: register_reward("", MSE),
    "another thing than a name": lambda: register_reward(3, MSE),
}


@pytest.mark.parametrize("wrong", NO_ARITHMETIC.values(), ids=NO_ARITHMETIC)
def test_other_arithmetic_and_names_are_refused(wrong):
    with pytest.raises(InvalidArgumentError, match=r"\.$"):
        wrong()
