"""TorchRolloutBuffer, with numbers that say where they belong: 100 x step + row."""

from __future__ import annotations

import itertools

import pytest
import torch
from gymnasium import spaces

from agents.advantages import TaskMeans
from agents.buffers import TorchRolloutBuffer
from redif_env.transition import Gaussian

STEPS, ROWS, LENGTH, GROUP = 6, 4, 3, 2  # two episodes of three steps, two groups of two rows
SHAPE = (1, 2, 2)


def make_buffer(**changes) -> TorchRolloutBuffer:
    space = spaces.Dict(latents=spaces.Box(-1, 1, SHAPE), condition=spaces.Discrete(10))
    settings = {"advantage": "group", "group_size": GROUP, "episode_length": LENGTH, **changes}
    return TorchRolloutBuffer(
        STEPS,
        space,
        spaces.Box(-1, 1, (4,)),
        "cpu",
        n_envs=ROWS,
        gae_lambda=0.9,
        gamma=0.99,
        **settings,
    )


def marks(step: int) -> torch.Tensor:
    return 100.0 * step + torch.arange(ROWS)


def marked(step: int, *shape: int) -> torch.Tensor:
    return marks(step).reshape(-1, *[1] * len(shape)).expand(-1, *shape).clone()


def reward_map(episode: int) -> torch.Tensor:
    """Each row's map is its own: 1000 x episode + 10 x row + element."""
    element = torch.arange(4.0).reshape(1, *SHAPE)
    return -(1000.0 * episode + 10 * torch.arange(ROWS).reshape(-1, 1, 1, 1) ** 2 + element)


def fill(buffer: TorchRolloutBuffer, with_log_prob: bool = False) -> TorchRolloutBuffer:
    for step in range(STEPS):
        ended = step % LENGTH == LENGTH - 1
        maps = reward_map(step // LENGTH)
        extra = (
            {"log_prob": marks(step) + 0.5}
            if with_log_prob
            else {"gaussian": Gaussian(marked(step, *SHAPE) + 0.25, marked(step, 1, 1, 1) + 1)}
        )
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            maps.flatten(1).mean(1) if ended else torch.zeros(ROWS),
            torch.full((ROWS,), step % LENGTH == 0),
            marks(step) / 100,
            **extra,
        )
        if ended and buffer.credit == "local":
            buffer.add_reward_map(maps)
    assert buffer.full
    buffer.compute_returns_and_advantage(torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool))
    return buffer


def test_what_was_added_comes_out():
    buffer = fill(make_buffer(advantage="gae"), with_log_prob=True)
    for batch in buffer.get(5):
        mark = batch.actions[:, 0]
        assert torch.equal(
            batch.observations["latents"], mark.reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
        )
        assert torch.equal(batch.observations["condition"], mark.long())
        assert torch.equal(batch.old_values, mark / 100)
        assert torch.equal(batch.old_log_prob, mark + 0.5)
        assert batch.old is None
        step, row = (mark // 100).long(), (mark % 100).long()
        assert torch.equal(batch.advantages, buffer["advantages"][step, row])
        assert torch.equal(batch.returns, batch.advantages + batch.old_values)


def test_the_gaussian_stays_with_its_action():
    for batch in fill(make_buffer()).get(7):
        mark = batch.actions[:, 0].reshape(-1, 1, 1, 1)
        assert torch.equal(batch.old.mean, (mark + 0.25).expand(-1, *SHAPE))
        assert torch.equal(batch.old.std, mark + 1)


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100, None])
def test_every_transition_comes_once_an_epoch(batch_size):
    buffer = fill(make_buffer())
    everything = sorted(float(mark) for step in range(STEPS) for mark in marks(step))
    batches = [batch.actions[:, 0] for batch in buffer.get(batch_size)]
    assert sorted(torch.cat(batches).tolist()) == everything
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_the_order_is_random_and_belongs_to_the_buffer():
    orders = {}
    for seed in (0, 0, 1):
        buffer = fill(make_buffer(seed=seed))
        before = torch.get_rng_state()
        epochs = [torch.cat([b.actions[:, 0] for b in buffer.get(5)]).tolist() for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)  # the policy's noise is not shifted
        assert epochs[0] != epochs[1]
        orders.setdefault(seed, epochs)
        assert orders[seed] == epochs
    assert orders[0] != orders[1]


def test_memory_is_allocated_once():
    buffer = fill(make_buffer(credit="local"))
    names = ["observation/latents", "observation/condition", "actions", "rewards", "mean", "std"]
    before = {name: buffer[name].data_ptr() for name in [*names, "values", "reward_map"]}
    buffer.reset()
    assert (buffer.pos, buffer.full) == (0, False)
    fill(buffer)
    assert {name: buffer[name].data_ptr() for name in before} == before


def test_group_advantages_hold_for_the_whole_episode():
    """Two episodes a rollout: each step carries its own episode's advantage, not a neighbour's."""
    buffer = fill(make_buffer())
    returns = torch.stack([reward_map(e).flatten(1).mean(1) for e in range(2)])  # (2, ROWS)
    groups = returns.reshape(2, 2, GROUP)
    centred = (groups - groups.mean(2, keepdim=True)).reshape(2, ROWS)
    expected = centred / centred.std()
    seen = torch.zeros(STEPS, ROWS)
    for batch in buffer.get(5):
        step, row = (batch.actions[:, 0] // 100).long(), (batch.actions[:, 0] % 100).long()
        seen[step, row] = batch.advantages
        assert torch.equal(batch.returns, returns[step // LENGTH, row])
    torch.testing.assert_close(seen, expected.repeat_interleave(LENGTH, 0))
    # negative control: the two groups differ, so that a shifted row would be noticed
    assert (expected[:, :2].abs() - expected[:, 2:].abs()).abs().min() > 0.1


def test_local_credit_stays_with_its_row_and_element():
    buffer = make_buffer(credit="local")
    for step in range(STEPS):
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            torch.zeros(ROWS),
            torch.full((ROWS,), step % LENGTH == 0),
            torch.zeros(ROWS),
            gaussian=Gaussian(marked(step, *SHAPE), marked(step, 1, 1, 1)),
        )
        if step % LENGTH == LENGTH - 1:
            maps = torch.zeros(ROWS, *SHAPE)
            # in episode e, only row 2 differs from its group, and only at element e
            maps[2].view(-1)[step // LENGTH] = 1.0
            buffer.add_reward_map(maps)
    buffer.compute_returns_and_advantage(torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool))
    for batch in buffer.get(5):
        assert batch.advantages.shape == (len(batch.actions), 4)
        for mark, advantages in zip(
            batch.actions[:, 0].long().tolist(), batch.advantages, strict=True
        ):
            episode, row = mark // 100 // LENGTH, mark % 100
            sign = {2: 1.0, 3: -1.0}.get(row, 0.0)  # rows 2 and 3 are a group
            expected = torch.zeros(4)
            expected[episode] = sign
            assert torch.equal(advantages.sign(), expected)


def test_a_second_rollout_forgets_the_first():
    buffer = fill(make_buffer())
    first = buffer["advantages"].clone()
    buffer.reset()
    for step in range(STEPS):
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            torch.arange(ROWS).float() ** 3 * (step % LENGTH == LENGTH - 1),
            torch.full((ROWS,), step % LENGTH == 0),
            torch.zeros(ROWS),
            gaussian=Gaussian(marked(step, *SHAPE), marked(step, 1, 1, 1)),
        )
    buffer.compute_returns_and_advantage(torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool))
    cubes = torch.tensor([0.0, 1.0, 8.0, 27.0]).expand(2, -1)
    assert torch.equal(buffer["returns"], cubes.repeat_interleave(LENGTH, 0))
    assert not torch.allclose(buffer["advantages"], first)


EXPLORED = torch.tensor([[0, 0, 2, 2], [1, 1, 0, 0]])  # of the two episodes, by row
# 100 x step + row, of windows that start there; cyclically, so that 2 is followed by 0
TRAINED = {
    1: [[0, 1], [202, 203], [400, 401], [302, 303]],
    2: [[0, 1, 100, 101], [202, 203, 2, 3], [400, 401, 500, 501], [302, 303, 402, 403]],
    3: [[100 * step + row for step in range(STEPS) for row in range(ROWS)]],
}


def fill_windows(**changes) -> TorchRolloutBuffer:
    """Rows explore from the step that `EXPLORED` names on."""
    buffer = make_buffer(**changes)
    for step in range(STEPS):
        if step % LENGTH == 0:
            buffer.add_explored_step(EXPLORED[step // LENGTH])
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            torch.arange(ROWS).float() * (step % LENGTH == LENGTH - 1),
            torch.full((ROWS,), step % LENGTH == 0),
            torch.zeros(ROWS),
            gaussian=Gaussian(marked(step, *SHAPE), marked(step, 1, 1, 1)),
        )
    buffer.compute_returns_and_advantage(torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool))
    return buffer


@pytest.mark.parametrize("window", TRAINED)
@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_only_the_steps_that_explored_are_trained_on(window, advantage):
    buffer = fill_windows(stochastic_steps=window, advantage=advantage)
    for batch_size in (3, None):
        trained = torch.cat([batch.actions[:, 0] for batch in buffer.get(batch_size)]).tolist()
        assert sorted(trained) == sorted(itertools.chain(*TRAINED[window]))


@pytest.mark.parametrize("window", TRAINED)
def test_what_explored_keeps_its_advantage_and_step(window):
    for batch in fill_windows(stochastic_steps=window).get(3):
        step = (batch.actions[:, 0] // 100).long()
        assert torch.equal(batch.step_index, step % LENGTH)
        row = (batch.actions[:, 0] % 100).long()
        assert torch.equal(batch.advantages.sign(), torch.where(row % 2 == 0, -1.0, 1.0))


TASKS = torch.tensor([[3, 3, 0, 0], [0, 0, 2, 2]])  # of the two episodes, by row


def fill_tasks(buffer: TorchRolloutBuffer, scale: float) -> TorchRolloutBuffer:
    buffer.reset()
    for step in range(STEPS):
        ended = step % LENGTH == LENGTH - 1
        maps = scale * reward_map(step // LENGTH)
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            maps.flatten(1).mean(1) * ended,
            torch.full((ROWS,), step % LENGTH == 0),
            torch.zeros(ROWS),
            gaussian=Gaussian(marked(step, *SHAPE), marked(step, 1, 1, 1)),
        )
        if ended:
            buffer.add_reward_map(maps)
            buffer.add_tasks(TASKS[step // LENGTH])
    buffer.compute_returns_and_advantage(torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool))
    return buffer


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_task_baselines_of_maps_and_rows_are_mixed_by_weight(weight):
    options = {"advantage": "task", "num_tasks": 5}
    mixed = make_buffer(credit="local", local_weight=weight, **options)
    local, whole = make_buffer(credit="local", **options), make_buffer(**options)
    means = TaskMeans(5)
    for scale in (1.0, 0.5):  # the second rollout has the first one's means as its baseline
        for buffer in (mixed, local, whole):
            fill_tasks(buffer, scale)
        expected = weight * local["advantages"] + (1 - weight) * whole["advantages"].unsqueeze(2)
        torch.testing.assert_close(mixed["advantages"], expected)
        maps = scale * torch.stack([reward_map(episode) for episode in range(2)]).flatten(2)
        torch.testing.assert_close(local["advantages"], means.relative(maps, TASKS))
    # negative control: without their tasks the returns have another baseline
    others = make_buffer(credit="local", num_tasks=5, advantage="batch")
    assert (fill_tasks(others, 0.5)["advantages"] - local["advantages"]).abs().max() > 0.1


def fill_value_maps(**changes) -> TorchRolloutBuffer:
    """Episodes rewarded by maps, with values that differ in each step, row and element."""
    buffer = make_buffer(advantage="gae", credit="local", **changes)
    values = torch.randn(STEPS + 1, ROWS, 4, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        ended = step % LENGTH == LENGTH - 1
        maps = reward_map(step // LENGTH) / 1000
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            maps.flatten(1).mean(1) * ended,
            torch.full((ROWS,), step % LENGTH == 0),
            values[step],
            gaussian=Gaussian(marked(step, *SHAPE), marked(step, 1, 1, 1)),
        )
        if ended:
            buffer.add_reward_map(maps)
    buffer.compute_returns_and_advantage(values[-1], torch.ones(ROWS, dtype=torch.bool))
    return buffer


def raw_value_map_advantages(buffer: TorchRolloutBuffer) -> torch.Tensor:
    """Element-wise GAE, `(T, N, D)`, written out from the end of each episode."""
    values, result = buffer["values"], torch.empty(STEPS, ROWS, 4)
    for step in reversed(range(STEPS)):
        if step % LENGTH == LENGTH - 1:
            final = reward_map(step // LENGTH).flatten(1) / 1000
            result[step] = final - values[step]
        else:
            delta = 0.99 * values[step + 1] - values[step]
            result[step] = delta + 0.99 * 0.9 * result[step + 1]
    return result


def whitened(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_value_map_gives_each_element_its_own_advantage(weight, normalize):
    buffer = fill_value_maps(local_weight=weight, normalize_advantage=normalize)
    local = raw_value_map_advantages(buffer)
    whole = local.mean(2)
    assert float(buffer.advantage_scale) == pytest.approx(float(local.std()), rel=1e-5)
    torch.testing.assert_close(buffer["returns"], local + buffer["values"])
    if normalize:
        local, whole = whitened(local), whitened(whole)
    expected = weight * local + (1 - weight) * whole.unsqueeze(2)
    # float32 of numbers near 1, through six steps
    torch.testing.assert_close(buffer["advantages"], expected, rtol=1e-4, atol=1e-5)
    for batch in buffer.get(5):
        step, row = (batch.actions[:, 0] // 100).long(), (batch.actions[:, 0] % 100).long()
        assert torch.equal(batch.advantages, buffer["advantages"][step, row])
        assert torch.equal(batch.old_values, buffer["values"][step, row])
        assert torch.equal(batch.returns, buffer["returns"][step, row])
