"""The protocol: terms by name, what a reward declares, comparable units, and the checker."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tripwire import arm, count_reads, disarm

import redif_env
from redif_env import (
    MSE,
    PSNR,
    SSIM,
    CompressedSize,
    Cosine,
    MapReward,
    ReDiFEnv,
    ReDiFVectorEnv,
    Reward,
    TeacherBank,
    check_reward,
    mdp,
    rewards,
    schedules,
)
from redif_env.errors import InvalidArgumentError, InvalidRewardError
from redif_env.rewards import (
    Features,
    HistogramKL,
    MultiScaleSSIM,
    WeightedSum,
    base,
    evaluate,
    evaluate_terms,
    make_reward,
    register_reward,
)

GRID = [850.0, 300.0]


@pytest.fixture
def pair(generator):
    x_0 = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
    return x_0, (x_0 + 0.3 * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)


# Terms


@pytest.mark.parametrize("text", ["mse - 0.5*ssim", "mse - ssim", "0.5*mse -ssim"])
def test_a_difference_by_name_says_how_to_subtract(text):
    with pytest.raises(InvalidArgumentError, match=r"reward=.*to subtract.*'mse \+ -0.5\*ssim'"):
        make_reward(text)


def test_a_weight_behind_its_reward_says_where_it_goes():
    with pytest.raises(InvalidArgumentError, match=r"reward='ssim\*0.5'.*'0.5\*ssim'"):
        make_reward("mse + ssim*0.5")


def test_a_name_with_a_minus_is_no_difference(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", {"my": MSE, "my-own": MSE})
    (weight, _), _ = make_reward("-2*my-own + my").terms
    assert weight == -2


def test_a_reward_shows_its_terms_and_weights():
    assert repr(MSE()) == "<MSE mse>"
    assert repr(MSE() + 0.5 * MSE()) == "<WeightedSum 1*mse+0.5*mse>"


def test_terms_come_before_their_weights(pair):
    score = evaluate_terms(2 * MSE() + 0.5 * PSNR(), *pair, None)
    assert list(score.terms) == ["mse", "psnr"]
    torch.testing.assert_close(score.terms["mse"], MSE()(*pair, None))
    torch.testing.assert_close(score.terms["psnr"], PSNR()(*pair, None))
    wanted = 2 * score.terms["mse"] + 0.5 * score.terms["psnr"]
    torch.testing.assert_close(score.values, wanted)
    for one, two in zip(evaluate(2 * MSE() + 0.5 * PSNR(), *pair, None), score[:2], strict=True):
        assert torch.equal(one, two)


def test_a_reward_is_its_own_only_term(pair):
    score = evaluate_terms(Cosine(), *pair, None)
    assert list(score.terms) == ["cosine"]
    assert torch.equal(score.terms["cosine"], score.values)


def test_terms_of_one_name_are_told_apart(pair):
    inner = WeightedSum([(1.0, SSIM(sigma=0.5)), (1.0, SSIM(sigma=1.0))])
    score = evaluate_terms(WeightedSum([(1.0, SSIM(sigma=0.3)), (1.0, inner)]), *pair, None)
    assert list(score.terms) == ["ssim", "ssim_2", "ssim_2_2"]
    for name, sigma in zip(score.terms, (0.3, 0.5, 1.0), strict=True):
        torch.testing.assert_close(score.terms[name], SSIM(sigma=sigma)(*pair, None))


class Negated(Reward):
    """Wraps another reward, and passes its terms on."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x_0, teacher_x_0, condition):
        return -self.inner(x_0, teacher_x_0, condition)

    def detailed(self, x_0, teacher_x_0, condition):
        inner = self.inner.detailed(x_0, teacher_x_0, condition)
        return inner._replace(values=-inner.values, map=None)


def test_a_wrapper_can_pass_terms_on(pair):
    score = evaluate_terms(Negated(MSE() + Cosine()), *pair, None)
    torch.testing.assert_close(score.values, -(MSE() + Cosine())(*pair, None))
    assert list(score.terms) == ["mse", "cosine"]


def test_a_sum_declares_what_its_terms_do():
    network = Features(torch.nn.Identity(), "")
    total = MSE() + CompressedSize() + network + network
    assert (total.has_map, total.differentiable, total.nfe) == (True, False, 4)
    assert (MSE() + network).differentiable
    assert not total.over_batch
    batched = Cosine()
    batched.over_batch = True
    assert (MSE() + batched).over_batch


def test_the_environment_reports_terms(teacher, bank):
    options = {"schedule": GRID, "reward": "2*mse + 0.1*psnr", "step_cost": 0.25, "seed": 0}
    env = ReDiFVectorEnv(3, teacher, bank=bank, **options)
    env.reset()
    actions = torch.zeros(env.action_space.shape)
    assert "reward_terms" not in env.step(actions)[4]
    _, rewards, _, _, infos = env.step(actions)
    terms = infos["reward_terms"]
    state = env.last_state
    torch.testing.assert_close(terms["mse"], MSE()(state.x_t, state.teacher_x_0, None))
    torch.testing.assert_close(rewards, 2 * terms["mse"] + 0.1 * terms["psnr"] - 0.25 * 2)


def test_the_single_environment_reports_them_too(teacher, bank):
    env = ReDiFEnv(teacher=teacher, bank=bank, schedule=GRID, reward="mse + cosine", seed=0)
    env.reset()
    env.step(np.zeros(env.action_space.shape, np.float32))
    _, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert terminated
    terms = info["reward_terms"]
    assert isinstance(terms["mse"], np.float32)
    assert reward == pytest.approx(float(terms["mse"] + terms["cosine"]))


def test_terms_of_rows_under_way_are_zero(teacher, bank):
    env = ReDiFVectorEnv(2, teacher, bank=bank, seed=0)
    env.reset()
    actions = torch.zeros(env.action_space.shape)
    actions[:, -1] = torch.tensor([-1.0, 0.0])  # the first goes straight to the data
    _, rewards, terminations, _, infos = env.step(actions)
    assert terminations.tolist() == [True, False]
    assert infos["reward_terms"]["mse"].tolist() == rewards.tolist()
    assert rewards[1] == 0


def test_scoring_reads_nothing(teacher, bank):
    """Terms cost no look at the values: on CUDA the host would wait for each."""
    process = mdp.Process(
        schedule=teacher.denoiser.schedule,
        max_steps=2,
        reward=make_reward("mse + 0.1*psnr + cosine + histogram_kl"),
        timesteps=torch.tensor([*GRID, 0.0]),
    )
    state = mdp.initial(process, bank, torch.arange(4))
    armed = {name: arm(getattr(state, name)) for name in ("x_t", "t", "teacher_x_0", "step_index")}
    with count_reads() as reads:
        score = mdp.score(process, mdp.replace(state, **armed))
    assert reads == [0]
    assert disarm(score.values).shape == (4,)


# Malformed values


class Returns(Reward):
    """Returns what it is told to."""

    def __init__(self, value):
        self.value = value

    def __call__(self, x_0, teacher_x_0, condition):
        return self.value


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (torch.zeros(4, dtype=torch.int64), r"call \.float\(\)"),
        (torch.zeros(4, dtype=torch.bool), r"call \.float\(\)"),
        (torch.zeros(4, dtype=torch.complex64), r"call \.float\(\)"),
        (torch.zeros(4, device="meta"), "device of the samples, cpu"),
        (torch.zeros(4, 1), r"shape \(4,\)"),
    ],
)
def test_malformed_values_are_refused(pair, value, remedy):
    with pytest.raises(InvalidRewardError, match=rf"reward 'returns' returned=.*{remedy}"):
        evaluate(Returns(value), *pair, None)
    with pytest.raises(InvalidRewardError, match=remedy):
        evaluate(MSE() + Returns(value), *pair, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_welcome(pair, dtype):
    assert evaluate(Returns(torch.ones(4, dtype=dtype)), *pair, None)[0].dtype == torch.float32


# Comparable units


@pytest.fixture
def samples(teacher, bank):
    with torch.no_grad():
        grid = torch.tensor([*GRID, 0.0])
        return schedules.sample(teacher.denoiser, bank.x_T, bank.condition, grid)


def test_a_term_is_divided_by_its_deviation_over_tasks(teacher, bank, samples):
    reward = 3 * MSE() + 0.5 * PSNR()
    units = reward.normalised(bank, teacher.denoiser, GRID, batch_size=7)
    error = ((samples - bank.teacher_x_0) ** 2).numpy().astype(np.float64).mean((1, 2, 3))
    wanted = [3 / error.std(), 0.5 / (10 * np.log10(4 / error)).std()]
    assert [weight for weight, _ in units.terms] == pytest.approx(wanted, rel=1e-4)
    assert [term for _, term in units.terms] == [term for _, term in reward.terms]


def test_normalised_terms_vary_by_their_weights(teacher, bank, samples):
    reward = MSE() + 2 * Cosine() + 0.5 * SSIM(sigma=0.5)
    for weight, term in reward.normalised(bank, teacher.denoiser, GRID).terms:
        values = weight * term(samples, bank.teacher_x_0, bank.condition)
        wanted = {"mse": 1, "cosine": 2, "ssim": 0.5}[term.name]
        assert float(values.std(correction=0)) == pytest.approx(wanted, rel=1e-4)
    # Negative control: before, one of them decides everything.
    raw = [float(term(samples, bank.teacher_x_0, None).std()) for _, term in reward.terms]
    assert max(raw) > 3 * min(raw)


def test_units_do_not_depend_on_the_units_before(teacher, bank):
    one = (MSE() + PSNR()).normalised(bank, teacher.denoiser, GRID)
    two = one.normalised(bank, teacher.denoiser, GRID)
    weights = [weight for weight, _ in one.terms]
    assert [b / a**2 for (b, _), a in zip(two.terms, weights, strict=True)] == pytest.approx([1, 1])


def test_a_reward_alone_becomes_a_sum_of_one(teacher, bank, samples):
    units = MSE().normalised(bank, teacher.denoiser, torch.tensor([*GRID, 0.0]))
    values = units(samples, bank.teacher_x_0, bank.condition)
    assert float(values.std(correction=0)) == pytest.approx(1, rel=1e-4)


def test_what_has_no_scale_is_refused(teacher, bank):
    constant = Returns(torch.full((len(bank),), 0.1))
    with pytest.raises(InvalidArgumentError, match=r"reward='returns': it scores all tasks alike"):
        (MSE() + constant).normalised(bank, teacher.denoiser, GRID)
    broken = Returns(torch.full((len(bank),), torch.nan))
    with pytest.raises(InvalidRewardError, match="finite"):
        broken.normalised(bank, teacher.denoiser, GRID)
    with pytest.raises(InvalidArgumentError, match="schedule"):
        MSE().normalised(bank, teacher.denoiser, [1.0, 2.0])


class OwnScore(MSE):
    """Scores by itself, as a reward that shares work between values and map does."""

    def __init__(self, spoil):
        self.spoil = spoil

    def score(self, x_0, teacher_x_0, condition):
        values, reward_map = super().score(x_0, teacher_x_0, condition)
        return values, self.spoil(reward_map)


@pytest.mark.parametrize("spoil", [lambda m: m[:1], lambda m: m[:, 0], lambda m: m.long()])
def test_the_map_of_a_score_of_ones_own_is_checked(pair, spoil):
    """One row of a map would be broadcast to all, and each credited with another's reward."""
    evaluate(OwnScore(lambda m: m), *pair, None)
    with pytest.raises(InvalidRewardError):
        evaluate(OwnScore(spoil), *pair, None)


@pytest.mark.parametrize("make", [MSE(), 3, None])
def test_what_makes_no_reward_is_refused(make):
    """An instance would be shared, and call nothing."""
    with pytest.raises(InvalidArgumentError, match="make="):
        register_reward("made_of_nothing", make)


def test_a_name_that_makes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    register_reward("a_number", lambda: 3)
    with pytest.raises(InvalidArgumentError, match="a_number"):
        make_reward("a_number")


def test_a_sum_has_terms():
    with pytest.raises(InvalidArgumentError, match="terms="):
        WeightedSum([])


# The checker


class Error(MapReward):
    """A reward that keeps the protocol; every subclass below breaks it once."""

    differentiable = True

    def reward_map(self, x_0, teacher_x_0, condition):
        return -((x_0 - teacher_x_0) ** 2)


class WithoutMap(Error):
    has_map = False

    def __call__(self, x_0, teacher_x_0, condition):
        return self.reward_map(x_0, teacher_x_0, condition).flatten(1).mean(1)


class ReturnsNaN(WithoutMap):
    def __call__(self, x_0, teacher_x_0, condition):
        return super().__call__(x_0, teacher_x_0, condition) * torch.nan


class PoleAtCopies(WithoutMap):
    def __call__(self, x_0, teacher_x_0, condition):
        return -super().__call__(x_0, teacher_x_0, condition).abs().log()


class Fickle(WithoutMap):
    calls = 0

    def __call__(self, x_0, teacher_x_0, condition):
        self.calls += 1
        return super().__call__(x_0, teacher_x_0, condition) + self.calls


class Ranked(WithoutMap):
    def __call__(self, x_0, teacher_x_0, condition):
        values = super().__call__(x_0, teacher_x_0, condition)
        return values - values.mean()


class InPlace(WithoutMap):
    def __call__(self, x_0, teacher_x_0, condition):
        return super().__call__(x_0.sub_(1), teacher_x_0, condition)


class AnotherMean(Error):
    def __call__(self, x_0, teacher_x_0, condition):
        return super().__call__(x_0, teacher_x_0, condition) + 1


class SmallMap(Error):
    def reward_map(self, x_0, teacher_x_0, condition):
        return super().reward_map(x_0, teacher_x_0, condition)[:, 0]


class Integer(WithoutMap):
    def __call__(self, x_0, teacher_x_0, condition):
        return super().__call__(x_0, teacher_x_0, condition).long()


class NoGradient(WithoutMap):
    @torch.no_grad()
    def __call__(self, x_0, teacher_x_0, condition):
        return super().__call__(x_0, teacher_x_0, condition)


class BadGradient(WithoutMap):
    def __call__(self, x_0, teacher_x_0, condition):
        zero = (x_0 * 0).flatten(1).sum(1)
        return super().__call__(x_0, teacher_x_0, condition) + zero.abs().sqrt()


class Unnamed(WithoutMap):
    name = ""


class Costly(WithoutMap):
    nfe = 0.5


class Vague(WithoutMap):
    differentiable = None


BROKEN = {
    ReturnsNaN: "NaN",
    PoleAtCopies: "copy",
    Fickle: "second call",
    Ranked: "row 0 scores otherwise",
    InPlace: "changed='x_0'",
    AnotherMean: r"differs from reward\.score|not the mean",
    SmallMap: "shape",
    Integer: "floats",
    NoGradient: "no gradient",
    BadGradient: "gradient is not finite",
    Unnamed: "name",
    Costly: "nfe",
    Vague: "differentiable",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_the_checker_finds_what_is_broken(bank, kind):
    with pytest.raises(InvalidRewardError, match=BROKEN[kind]):
        check_reward(kind(), bank)
    with pytest.raises(InvalidRewardError, match=BROKEN[kind]):
        check_reward(MSE() + kind(), bank)


@pytest.mark.parametrize("kind", [Error, WithoutMap])
def test_the_checker_accepts_the_same_reward_unbroken(bank, kind):
    check_reward(kind(), bank)


def test_rewards_over_a_batch_say_so(bank):
    class Honest(Ranked):
        over_batch = True
        differentiable = False

    check_reward(Honest(), bank)


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "cosine", "histogram_kl", "ms_ssim"])
def test_the_projects_own_rewards_pass(bank, name):
    check_reward(make_reward(name), bank)


def test_sums_and_blind_rewards_pass(bank):
    check_reward(MSE() + 0.5 * CompressedSize() + HistogramKL() * 2 + MultiScaleSSIM(), bank)


def test_the_checker_refuses_what_is_no_reward(bank):
    with pytest.raises(InvalidArgumentError, match="reward="):
        check_reward(MSE, bank)
    with pytest.raises(InvalidArgumentError, match="at least 2 tasks"):
        check_reward(MSE(), bank.subset(1))


def test_the_bank_may_have_no_classes(bank):
    check_reward(MSE(), TeacherBank(bank.x_T, bank.teacher_x_0))


def test_the_package_offers_it():
    assert redif_env.check_reward is check_reward
    assert redif_env.MapReward is base.MapReward


# The page


def table():
    """Rows of docs/rewards.md's table of rewards: name, class, copy, map, gradient, networks."""
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    lines = page.split("| name | class |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_name():
    # Other tests register rewards of their own.
    names = {name for name, make in base._REGISTRY.items() if isinstance(make, type)}
    assert {row[0].strip("`") for row in table()} - {""} == names


def test_the_page_says_what_the_classes_do():
    for _, kind, _, has_map, gradient, networks in table():
        reward = getattr(rewards, re.match(r"`(\w+)", kind)[1])
        assert (gradient == "yes") == reward.differentiable, kind
        assert int(networks) == reward.nfe, kind
        if not issubclass(reward, Features):  # theirs is an argument
            assert (has_map != "-") == reward.has_map, kind


def test_the_page_says_what_copies_score(bank):
    pair = bank.teacher_x_0, bank.teacher_x_0
    names = ("mse", "psnr", "ssim", "ms_ssim", "cosine", "histogram_kl")
    said = {row[0].strip("`"): float(row[2].split()[0]) for row in table() if row[2][0].isdigit()}
    for name in names:
        copies = make_reward(name)(*pair, None)
        assert copies.tolist() == pytest.approx([said[name]] * len(bank), abs=0.03), name
