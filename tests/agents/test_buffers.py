"""TorchRolloutBuffer, with numbers that say where they belong: 100 x step + row."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces

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


def test_only_the_step_that_explored_is_trained_on():
    buffer = make_buffer(stochastic_steps=1)
    explored = torch.tensor([[0, 0, 2, 2], [1, 1, 0, 0]])
    for step in range(STEPS):
        if step % LENGTH == 0:
            buffer.add_explored_step(explored[step // LENGTH])
        buffer.add(
            {"latents": marked(step, *SHAPE), "condition": marks(step).long()},
            marked(step, 4),
            torch.arange(ROWS).float() * (step % LENGTH == LENGTH - 1),
            torch.full((ROWS,), step % LENGTH == 0),
            torch.zeros(ROWS),
            gaussian=Gaussian(marked(step, *SHAPE), marked(step, 1, 1, 1)),
        )
    buffer.compute_returns_and_advantage(torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool))
    trained = torch.cat([batch.actions[:, 0] for batch in buffer.get(3)]).tolist()
    # 100 x step + row: steps 0 and 2 of the first episode, 3 + 1 and 3 + 0 of the second
    assert sorted(trained) == [0, 1, 202, 203, 302, 303, 400, 401]
    for batch in buffer.get(3):
        row = (batch.actions[:, 0] % 100).long()
        assert torch.equal(batch.advantages.sign(), torch.where(row % 2 == 0, -1.0, 1.0))
