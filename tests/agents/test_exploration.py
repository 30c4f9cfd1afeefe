"""How ReDiFPPO explores: in windows of steps, with a std that is learned or follows the gap."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from probes import (
    TWO_STEPS,
    Constant,
    decayed,
    denoiser,
    error,
    make_agent,
    tasks,
    train,
)
from probes import make_env as make_probe
from small_world import ITERATION, PLAIN_EXPLORATION, STOCK, OnRolloutEnd, deployed
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from tripwire import Tripwire, arm

from agents import ReDiFPPO
from agents.ppo import GAP_FRACTION, RatioError
from redif_env import MSE, TeacherBank, schedules

STEPS = 3


def trained_on(model: ReDiFPPO) -> list[Tensor]:
    """Will hold the actions of each minibatch that the agent computes a loss of."""
    seen, loss = [], model._loss

    def noting(batch: Any, *rest: Any) -> Any:
        seen.append(batch.actions)
        return loss(batch, *rest)

    model._loss = noting
    return seen


def in_order(actions: Tensor) -> Tensor:
    return actions[actions[:, 0].argsort()]


WINDOWS = [
    pytest.param({"antithetic": False}, id="group"),
    pytest.param({"antithetic": True}, id="antithetic"),
    pytest.param({"advantage": "gae", "credit": "global"}, id="gae"),
    pytest.param({"advantage": "gae", "credit": "local"}, id="gae-local"),
]


@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("window", [1, 2, "all"])
def test_exactly_the_windows_steps_explore_and_are_trained_on(
    make_env, make_model, options, window
):
    """Two episodes a rollout; nothing is learned, so that the rollout's policy can be asked."""
    settings = {"stochastic_steps": window, "n_steps": 2 * STEPS, "learning_rate": 0.0, **options}
    model = make_model(make_env(16), **settings)
    actions_trained = trained_on(model)
    model.learn(2 * STEPS * 16)
    buffer = model.rollout_buffer
    # The rollout asked the network in batches of other sizes, which add up in another order.
    same = torch.isclose(buffer["actions"], deployed(model), rtol=0, atol=2e-6)
    explored = ~same.all(2)
    # A step explores with all of its elements, or with none; 0.02 N(0, 1) is seldom so small.
    assert (explored == (same.float().mean(2) < 0.1)).all()
    width = STEPS if window == "all" else window
    episodes = explored.unflatten(0, (2, STEPS))
    assert (episodes.sum(1) == width).all()
    # the windows are cyclic: of the neighbours around the circle, one pair starts one
    starts = (episodes & ~episodes.roll(1, 1)).sum(1)
    assert (starts == (width < STEPS)).all()
    groups = episodes.unflatten(2, (-1, 4))
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    trained = torch.cat(actions_trained)
    assert torch.equal(in_order(trained), in_order(buffer["actions"][explored]))
    states = 4 if window == 1 else 16  # of groups of four, see test_sharing
    assert model.rows_trained == width * 2 * states


@pytest.mark.parametrize("window", [1, 2])
def test_each_step_explores_equally_often(make_env, make_model, window):
    model = make_model(make_env(64), stochastic_steps=window)
    buffer = model.rollout_buffer
    torch.manual_seed(0)
    drawn, draws = [], 200
    for model.rollouts in range(draws):
        steps = []
        for buffer.pos in range(STEPS):
            steps.append(model._exploring_rows(buffer)[::4])
        drawn.append(torch.stack(steps))
    share = torch.stack(drawn).float().mean((0, 2))
    # 4.5 standard errors of a share among 200 x 16 groups
    expected = window / STEPS
    error_of_share = (expected * (1 - expected) / (draws * 16)) ** 0.5
    assert (share - expected).abs().max() < 4.5 * error_of_share
    # groups draw by themselves: now and then two neighbours differ
    assert (drawn[0] != drawn[0].roll(1, 1)).any()


def learns_std(make_model: Any, env: Any = None, **options: Any) -> ReDiFPPO:
    policy = {"learn_std": True, **options.pop("policy_kwargs", {})}
    return make_model(env, policy_kwargs=policy, **options)


def set_factors(model: ReDiFPPO, weights: list[float]) -> None:
    model.policy.step_scale.weight.data = torch.tensor(weights)


def test_the_std_has_its_own_learning_rate_and_gradient_clip(make_model):
    model = learns_std(make_model, learning_rate=1e-3, policy_kwargs={"std_lr_scale": 7.0})
    before = model.policy.step_scale.weight.detach().clone()
    model.learn(2 * ITERATION)
    actor, std = model.policy.optimizer.param_groups
    assert [id(p) for p in std["params"]] == [id(model.policy.step_scale.weight)]
    assert not {id(p) for p in actor["params"]} & {id(p) for p in std["params"]}
    assert std["lr"] == pytest.approx(7 * actor["lr"])
    assert not torch.equal(model.policy.step_scale.weight, before)
    for group, size in ((actor, 1e-4), (std, 100.0)):
        for weight in group["params"]:
            weight.grad = torch.full_like(weight, size)
    norms = model._clip_gradients()
    assert norms["std_grad_norm"].item() == pytest.approx(100 * STEPS**0.5, rel=1e-5)
    # what is too large is clipped, and the actor's, which is not, stays
    assert model.policy.step_scale.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert all(torch.equal(w.grad, torch.full_like(w, 1e-4)) for w in actor["params"])


def test_the_logged_norm_of_the_std_is_that_of_its_gradient(make_model):
    model = learns_std(make_model, batch_size=32, max_grad_norm=1e9, **PLAIN_EXPLORATION)
    model.learn(ITERATION)
    expected = model.policy.step_scale.weight.grad.norm().item()
    logged = model.logger.name_to_value
    assert logged["train/std_grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert expected > 0
    assert logged["train/grad_norm"] != logged["train/std_grad_norm"]


@pytest.mark.parametrize("ratio", ["element", "sum"])
def test_with_a_learned_std_the_ratio_starts_at_one(make_model, ratio):
    credit = "local" if ratio == "element" else "global"
    model = learns_std(make_model, ratio=ratio, credit=credit, n_epochs=2, **PLAIN_EXPLORATION)
    set_factors(model, [0.7, -0.4, 0.1])
    model.learn(ITERATION)
    # float32 of other batch sizes
    assert model.logger.name_to_value["train/ratio_error"] < 1e-3
    # negative control: a factor that changed before the update is noticed
    meddle = OnRolloutEnd(lambda model: set_factors(model, [0.8, -0.4, 0.1]))
    with pytest.raises(RatioError):
        model.learn(ITERATION, callback=meddle)


def test_the_rollout_explores_with_the_learned_factors(make_model):
    model = learns_std(make_model, eta=0.0, min_std=0.02, learning_rate=0.0, **PLAIN_EXPLORATION)
    set_factors(model, [1.0, 0.0, -0.5])
    model.learn(ITERATION)
    wanted = 0.02 * 4.0 ** torch.tensor([1.0, 0.0, -0.5]).tanh()
    stds = model.rollout_buffer["std"].flatten(1)
    torch.testing.assert_close(stds, wanted[:, None].expand(-1, 8))
    noise = (model.rollout_buffer["actions"] - model.rollout_buffer["mean"].flatten(2)).std((1, 2))
    # a std of 8 x 64 samples, give or take 4.5 / sqrt(2 x 512)
    assert (noise / wanted - 1).abs().max() < 0.14


@pytest.mark.parametrize(
    ("ent_coef", "expected"),
    [
        pytest.param(0.0, 1 / 4, id="alone"),
        # Advantages have a std of 1, so noise costs sqrt(2) a nat an element: more than this ...
        pytest.param(0.5, 1 / 4, id="weak bonus"),
        # ... and less than this.
        pytest.param(3.0, 4.0, id="strong bonus"),
    ],
)
def test_noise_that_only_hurts_is_learned_away_unless_there_is_a_bonus(ent_coef, expected):
    """The student is perfect from the start, and the reward is quadratic."""
    dim, bank = 4, tasks(torch.zeros(1, 4))

    def make_student():
        return denoiser(Constant(dim), dim)

    env = make_probe(make_student, bank, group_size=4)
    policy = {"learn_std": True, "std_lr_scale": 10.0}
    options = {"ent_coef": ent_coef, "antithetic": False, "learning_rate": 0.01, "n_epochs": 2}
    model = make_agent(env, make_student, policy=policy, **options)
    train(model, 1)
    first = model.logger.name_to_value["train/exploration_std_step_0"]
    train(model, 60)
    last = model.logger.name_to_value["train/exploration_std_step_0"]
    assert first == pytest.approx(0.1)
    assert last == pytest.approx(0.1 * expected, rel=0.1)


def test_a_reward_that_ignores_the_noise_leaves_the_std_alone():
    """Negative control: it is the reward that lowers it."""
    bank = tasks(torch.zeros(1, 4))

    def make_student():
        return denoiser(Constant(4), 4)

    env = make_probe(make_student, bank, group_size=4, reward=0.0 * MSE())
    options = {"antithetic": False, "learning_rate": 0.01, "policy": {"learn_std": True}}
    model = train(make_agent(env, make_student, **options), 20)
    assert not model.policy.step_scale.weight.any()


def test_a_learned_std_is_saved_and_loaded(make_env, make_model, tmp_path):
    model = learns_std(make_model, learning_rate=1e-3, **PLAIN_EXPLORATION).learn(2 * ITERATION)
    factors = model.policy.step_scale.weight.detach().clone()
    assert factors.any()
    model.save(tmp_path / "agent")
    loaded = ReDiFPPO.load(tmp_path / "agent", env=make_env(seed=1))
    assert torch.equal(loaded.policy.step_scale.weight, factors)
    names = [group.get("norm_name") for group in loaded.policy.optimizer.param_groups]
    assert names == [None, "std_grad_norm"]
    loaded.learn(ITERATION, reset_num_timesteps=False)
    assert not torch.equal(loaded.policy.step_scale.weight, factors)


def test_two_pairs_of_opposite_noise_can_learn_a_std(make_model):
    """One pair alone is refused, see test_ppo_options.py."""
    model = learns_std(make_model, antithetic=True, learning_rate=1e-3).learn(2 * ITERATION)
    assert model.policy.step_scale.weight.any()


def test_one_pair_of_opposite_noise_says_nothing_about_the_std():
    """Why it is refused: both members deviate equally far, with opposite advantages."""
    bank = tasks(torch.full((1, 4), 0.3))

    def make_student():
        return denoiser(Constant(4), 4)

    def std_gradient(group_size: int) -> float:
        env = make_probe(make_student, bank, group_size=4, num_envs=64)
        policy = {"learn_std": True}
        settings = {"antithetic": True, "learning_rate": 0.0, "policy": policy}
        model = make_agent(env, make_student, batch_size=64, max_grad_norm=1e9, **settings)
        model.rollout_buffer.group_size = group_size
        train(model, 1)
        return model.logger.name_to_value["train/std_grad_norm"]

    # float32 of a sum that cancels
    assert std_gradient(2) < 1e-3 * std_gradient(4)


class GapNotes(BaseCallback):
    """At the start of each rollout the gap and std that it is made with; at its end the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[float] = []
        self.stds: list[float] = []
        self.starts: list[Any] = []
        self.ends: list[Any] = []

    def _on_rollout_start(self) -> None:
        self.gaps.append(self.model.gap)
        self.stds.append(self.model.policy.min_std)
        self.starts.append(self.training_env.env.state)

    def _on_rollout_end(self) -> None:
        self.ends.append(self.training_env.env.last_state)

    def _on_step(self) -> bool:
        return True


def root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize(
    ("group_size", "options"),
    [(4, {}), (2, {}), (4, PLAIN_EXPLORATION), (1, {"advantage": "batch"})],
    ids=["4", "2", "4 without pairs", "1"],
)
def test_the_gap_is_that_of_the_last_rollouts_groups(make_env, make_model, group_size, options):
    model = make_model(make_env(group_size=group_size), gap_fraction=0.3, min_std=1e-4, **options)
    notes = GapNotes()
    env = model.env.env
    env.reset(seed=0)
    state = env.state
    with torch.no_grad():
        x_0 = schedules.sample(model.policy.denoiser, state.x_T, state.condition, env.timesteps)
    model.learn(4 * ITERATION, callback=notes)
    # before anything was sampled: the first tasks, without noise
    assert torch.equal(notes.starts[0].x_T, state.x_T)
    expected = [root_mean_square(x_0 - state.teacher_x_0)]
    noisy = []
    for end in notes.ends[:-1]:
        gaps = end.x_t - end.teacher_x_0
        expected.append(root_mean_square(gaps.unflatten(0, (-1, group_size)).mean(1)))
        noisy.append(root_mean_square(gaps))
    assert notes.gaps == pytest.approx(expected, rel=1e-5)
    assert notes.stds == pytest.approx([0.3 * gap for gap in expected], rel=1e-5)
    if group_size > 1:
        # negative control: single samples are farther away, by their noise
        assert all(more > gap for more, gap in zip(noisy, expected[1:], strict=True))
    logged = model.logger.name_to_value
    assert logged["train/gap"] == pytest.approx(notes.gaps[-1])
    assert logged["train/min_std"] == pytest.approx(notes.stds[-1])


def test_min_std_is_the_floor_of_the_gap_rule(make_model):
    floors = [0.5, 1e-4]
    stds = []
    for floor in floors:
        notes = GapNotes()
        make_model(gap_fraction=0.3, min_std=floor).learn(2 * ITERATION, callback=notes)
        stds.append(notes.stds)
    assert stds[0] == [0.5, 0.5]
    assert all(1e-4 < std < 0.5 for std in stds[1])


def test_the_gap_is_measured_on_a_few_tasks_at_most(make_env, make_model, monkeypatch):
    monkeypatch.setattr("agents.exploration.GAP_TASKS", 3)
    model, notes = make_model(make_env(16), gap_fraction=1.0), GapNotes()
    evaluations = model.policy.denoiser.network_evaluations
    model.learn(16 * STEPS, callback=notes)
    spent = model.policy.denoiser.network_evaluations - evaluations - model.rows_trained
    in_rollout = 4 + (3 + 4) + (1 + 3 * 4)  # states, see test_sharing
    assert spent == in_rollout + 3 * STEPS
    state = notes.starts[0]
    fresh = make_model(make_env(16)).policy.denoiser
    with torch.no_grad():
        grid = model.policy.timesteps
        x_0 = schedules.sample(fresh, state.x_T[:3], state.condition[:3], grid)
    gap = root_mean_square(x_0 - state.teacher_x_0[:3])
    assert notes.gaps[0] == pytest.approx(gap, rel=1e-4)


def test_a_loaded_agent_goes_on_with_its_gap(make_env, make_model, tmp_path):
    model = make_model(gap_fraction=0.4, min_std=1e-4).learn(2 * ITERATION)
    model.save(tmp_path / "agent")
    loaded, notes = ReDiFPPO.load(tmp_path / "agent", env=make_env(seed=1)), GapNotes()
    loaded.learn(2 * ITERATION, callback=notes)
    assert notes.gaps[0] == model.gap > 0
    assert notes.gaps[1] != model.gap


def test_only_students_have_a_gap(make_env, make_model):
    """Generic policies refuse a number, see test_ppo_options.py."""
    assert make_model(gap_fraction="auto").gap_fraction == GAP_FRACTION == 0.5
    assert make_model(gap_fraction=None).gap_fraction is None
    options = {**STOCK, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    generic = ReDiFPPO("MultiInputPolicy", make_env(), **options)
    assert generic.gap_fraction is None
    generic.learn(ITERATION)
    assert generic.gap == 0
    assert "train/gap" not in generic.logger.name_to_value


class LooksAtTheGap(ReDiFPPO):
    """Negative control: asks for the gap's value while the rollout is under way."""

    def _add_outcome(self, buffer: Any, infos: Any) -> None:
        super()._add_outcome(buffer, infos)
        if "episode" in infos:
            self.gap = float(self._gap)


def test_the_gap_does_not_make_the_host_wait_in_a_rollout(bank, make_env):
    def reads(kind: type[ReDiFPPO], gap_fraction: float | None) -> int:
        env = make_env()
        options = {"batch_size": 8, "n_epochs": 1, "seed": 0, "gap_fraction": gap_fraction}
        model = kind("StudentPolicy", env, **options)
        model.learn(ITERATION)
        env._bank = TeacherBank(arm(bank.x_T), arm(bank.teacher_x_0), arm(bank.condition))
        step = env.step
        env.step = lambda actions: arm(step(actions))
        model._last_obs = arm(model.env.reset_tensor())
        counter = CountsReads()
        model.learn(ITERATION, callback=counter, reset_num_timesteps=False)
        assert isinstance(model._gap, Tripwire) == (gap_fraction is not None)
        return counter.reads

    # the environment looks at its flags in each step, on the CPU, and the statistics at the end
    assert reads(ReDiFPPO, 0.5) == reads(ReDiFPPO, None)
    assert reads(LooksAtTheGap, 0.5) == reads(ReDiFPPO, None) + 1


class CountsReads(BaseCallback):
    """Reads of tripwires from the start of the rollout to its end."""

    def _on_rollout_start(self) -> None:
        self.before = Tripwire.reads

    def _on_rollout_end(self) -> None:
        self.reads = Tripwire.reads - self.before

    def _on_step(self) -> bool:
        return True


DIM = 8


class Curved(nn.Module):
    """A small network of latents and time: far from the states that it will meet, it is useless."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(DIM + 1, 32), nn.Tanh(), nn.Linear(32, DIM))
        generator = torch.Generator().manual_seed(seed)
        for weight in self.body.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = torch.cat([x_t.flatten(1), t[:, None] / 1000], 1)
        return self.body(inputs).reshape(x_t.shape)


def curved_student():
    return denoiser(Curved(), DIM)


@functools.cache
def curved_banks() -> tuple[TeacherBank, TeacherBank]:
    """Training and held-out tasks, whose answers are those of two networks of the same kind."""
    noise = torch.randn(768, 1, 1, DIM, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1000.0, 700.0])[:, None].expand(2, 768)
    with torch.no_grad():
        answers = Curved(0)(noise, t[0]) + 0.5 * Curved(5)(noise, t[1])
    return TeacherBank(noise[:512], answers[:512]), TeacherBank(noise[512:], answers[512:])


class Explored(NamedTuple):
    """Error on held-out tasks, as a share of that at the start, and the std of each iteration."""

    left: float
    stds: list[float]


@functools.cache
def explored(gap: float | None = None, **options: float) -> Explored:
    """25 iterations of 128 trajectories of two steps, the first with that gap."""
    bank, held_out = curved_banks()
    env = make_probe(curved_student, bank, TWO_STEPS, num_envs=128)
    budget = {"learning_rate": decayed(5e-3), "n_epochs": 3, "batch_size": 32}
    model = make_agent(env, curved_student, **budget, **options)
    model.gap = gap or 0.0
    before, notes = error(model, held_out), GapNotes()
    model.learn(25 * 128 * len(TWO_STEPS), callback=notes)
    return Explored(error(model, held_out) / before, notes.stds)


RULE = {"gap_fraction": 0.5, "min_std": 1e-6}


@pytest.mark.parametrize("gap", [10.0, 1e-4])
def test_from_a_wrong_gap_the_std_finds_its_size(gap):
    """Forty times too large or five thousand times too small: one rollout, and it is measured."""
    proper, wrong = explored(**RULE), explored(gap, **RULE)
    assert wrong.stds[0] == pytest.approx(0.5 * gap)
    assert not 0.05 < wrong.stds[0] / proper.stds[0] < 20
    # the students are not the same, nor are their gaps: seeds 0 to 4 were at 0.86 to 1.15 times
    for actual, wanted in zip(wrong.stds[5:], proper.stds[5:], strict=True):
        assert actual == pytest.approx(wanted, rel=0.3)
    # and what was lost is a rollout or two: seeds 0 to 4 ended at 0.97 to 1.26 times the error
    assert wrong.left < 1.5 * proper.left
    assert proper.stds[-1] < 0.6 * proper.stds[0]  # it shrinks as the student learns


@pytest.mark.parametrize("std", [5.0, 5e-5])
def test_a_fixed_std_of_that_size_learns_far_less(std):
    """Negative control: the rule does it. Seeds 0 to 4 ended at 2.9 to 4 times the error."""
    fixed = explored(min_std=std)
    assert set(fixed.stds) == {std}
    assert fixed.left > 2.2 * explored(**RULE).left
