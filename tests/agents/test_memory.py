"""Memory: micro-batches, checkpoints and half precision change nothing but what they should."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from small_world import GRID, ITERATION, NUM_ENVS, OnRolloutEnd, weights
from tiny_models import FAMILIES
from torch import nn

from agents import ReDiFPPO
from agents.lora import add_adapters, merge
from agents.memory import PeakMemory, estimate, measure_activations, num_adapter_weights
from agents.policies import enable_gradient_checkpointing
from redif_env import Decoded, ReDiFVectorEnv, TeacherBank, load_teacher
from redif_env.errors import InvalidArgumentError
from redif_env.loading import build_from_description, describe

ALL = {"stochastic_steps": "all", "antithetic": False}
CASES = {
    "local": {},
    "global": {"credit": "global", "ratio": "sum"},
    "weights": {"step_weights": [3.0, 1.0, 0.0]},
    "critic": {"advantage": "gae", "credit": "global", "antithetic": False},
    "value map": {"advantage": "gae", "antithetic": False},
    "divergence": {"divergence": "js", "policy_kwargs": {"reference": True}},
    "learned std": {"policy_kwargs": {"learn_std": True}, "ent_coef": 0.1},
}


def gradients(model):
    parameters = [p for group in model.policy.optimizer.param_groups for p in group["params"]]
    return torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None])


def moved(model):
    """Away from ratio 1, where clips and penalties would do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.policy.denoiser.network.parameters():
            weight.add_(0.002 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_the_parts_are_that_of_the_whole(make_model, name):
    """Of a minibatch of 24 in parts of 5, the last of 4, for every loss there is."""
    model = make_model(n_epochs=1, batch_size=ITERATION, **{**ALL, **CASES[name]})
    model.learn(ITERATION)
    moved(model)
    whole = next(model.rollout_buffer.get(ITERATION))
    statistics = model._add_gradients(whole, 0.2, None)
    expected = gradients(model)
    model.micro_batch_size = 5
    in_parts = model._add_gradients(whole, 0.2, None)
    # float32 sums in another order
    torch.testing.assert_close(
        gradients(model), expected, rtol=1e-3, atol=1e-5 * expected.abs().max()
    )
    assert statistics.keys() == in_parts.keys()
    for key in statistics:
        torch.testing.assert_close(in_parts[key], statistics[key], rtol=1e-3, atol=1e-5)
    # Negative control: parts that are not weighted by their size are another gradient.
    model.policy.optimizer.zero_grad()
    for rows in torch.arange(ITERATION).split(5):
        part = type(whole)(*(_rows(value, rows) for value in whole))
        (model._loss(part, 0.2, None)[0] / 5).backward()
    assert (gradients(model) - expected).abs().max() > 1e-3 * expected.abs().max()


def _rows(value, rows):
    if isinstance(value, dict):
        return {key: tensor[rows] for key, tensor in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(tensor[rows] for tensor in value))
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value


def test_training_in_micro_batches_is_the_same_training(make_model):
    sizes = (None, 3)  # one after the other: they share the global generator
    whole, parts = (make_model(micro_batch_size=size).learn(2 * ITERATION) for size in sizes)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)
    assert parts._n_updates == whole._n_updates
    assert parts.updates == whole.updates
    assert parts.rows_trained == whole.rows_trained
    assert parts.policy.denoiser.network_evaluations == whole.policy.denoiser.network_evaluations


def test_no_more_rows_are_in_the_network_at_once(make_model, tmp_path):
    model = make_model(micro_batch_size=3)
    seen = watch(model)
    model.learn(ITERATION)
    assert max(seen) == 3
    model.save(tmp_path / "agent")
    loaded = ReDiFPPO.load(tmp_path / "agent")
    assert loaded.micro_batch_size == loaded.policy.denoiser.batch_size == 3
    plain = make_model(**ALL)
    seen = watch(plain)
    plain.learn(ITERATION)
    assert max(seen) == NUM_ENVS


def watch(model):
    seen = []
    network = model.policy.denoiser.network
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("size", [0, 1.5, "all"])
def test_a_size_that_makes_no_sense_is_refused(make_model, size):
    with pytest.raises(InvalidArgumentError) as caught:
        make_model(micro_batch_size=size)
    assert caught.value.argument == "micro_batch_size"


CHECKPOINTED = (
    "pixels",
    "Stable Diffusion 1",
    "DiT",
    "PixArt",
    "Stable Diffusion 3",
    "Flux",
    "EDM",
)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_change_no_gradient_and_keep_less(name, monkeypatch):
    """Of a network of each class, in evaluation mode, where some libraries would not."""
    family = FAMILIES[name]
    denoiser = load_teacher(family.make(), num_steps=1, **family.options).denoiser
    denoiser.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    x_t, condition = denoiser.initial_noise(2, generator), denoiser.initial_condition(2, generator)
    t = torch.full((2,), 300.0)

    def gradient():
        loss = denoiser(x_t, t, condition).square().mean()
        wanted = list(denoiser.network.parameters())
        return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]

    calls, checkpoint = [], torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    expected = gradient()
    assert not calls
    enable_gradient_checkpointing(denoiser.network)
    assert not denoiser.training
    for ours, theirs in zip(gradient(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert calls
    calls.clear()
    with torch.no_grad():  # rollouts pay nothing
        denoiser(x_t, t, condition)
    assert not calls


def test_a_checkpointed_student_learns_the_same_with_less_memory(make_model):
    models = [
        make_model(policy_kwargs={"gradient_checkpointing": on}).learn(ITERATION)
        for on in (False, True)
    ]
    plain, checkpointed = (measure_activations(model.policy.denoiser, 16) for model in models)
    assert checkpointed < 0.75 * plain
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", [nn.Linear(2, 2), "unsupported"])
def test_a_network_without_checkpoints_is_refused(network):
    if network == "unsupported":
        network = FAMILIES["pixels"].make().unet
        network._supports_gradient_checkpointing = False  # what diffusers asks
    with pytest.raises(InvalidArgumentError, match="micro_batch_size") as caught:
        enable_gradient_checkpointing(network)
    assert caught.value.argument == "gradient_checkpointing"


@functools.cache
def half_teacher(dtype):
    family = FAMILIES["Stable Diffusion 1"]
    return load_teacher(family.make(), num_steps=2, dtype=dtype, **family.options)


def half_agent(dtype, rank, tmp_path, num_envs=8, **options):
    teacher = half_teacher(dtype)
    bank = TeacherBank.build(teacher, 8, cache_dir=tmp_path)
    env = ReDiFVectorEnv(
        num_envs, teacher, schedule=[800.0, 300.0], bank=bank, group_size=2, guidance_scale=1.0
    )
    return teacher, ReDiFPPO(
        "StudentPolicy",
        env,
        1e-3,
        n_epochs=1,
        seed=0,
        policy_kwargs={"lora_rank": rank},
        # Little exploration, so that differences of the means would be seen.
        gap_fraction=None,
        min_std=0.005,
        **{"batch_size": 8, "micro_batch_size": 4, **options},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_ratio_at_one_and_trains_in_float32(dtype, tmp_path):
    pytest.importorskip("peft")
    teacher, model = half_agent(dtype, 2, tmp_path)
    network = model.policy.denoiser.network
    frozen = {w.dtype for w in network.parameters() if not w.requires_grad}
    trained = {w.dtype for w in network.parameters() if w.requires_grad}
    assert (frozen, trained) == ({dtype}, {torch.float32})
    assert model.policy.denoiser.dtype == teacher.denoiser.dtype == dtype
    errors = []
    check = model._check_ratio
    model._check_ratio = lambda error: (errors.append(float(error)), check(error))
    before = weights(model)
    model.learn(2 * 8 * 2)
    # Rollout and update send the same rows through the same kernels: 0, or rounding of a few.
    assert len(errors) == 2
    assert max(errors) < 1e-2
    assert not torch.equal(weights(model), before)
    state = model.policy.optimizer.state
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.float32}
    assert model.rollout_buffer["mean"].dtype == torch.float32


def test_another_dtype_in_the_update_is_noticed(tmp_path):
    """Negative control: the check would see it if rollout and update differed in precision."""
    from agents.ppo import RatioError

    pytest.importorskip("peft")
    _, model = half_agent(torch.bfloat16, 2, tmp_path)
    change = OnRolloutEnd(lambda agent: nn.Module.to(agent.policy.denoiser.network, torch.float32))
    with pytest.raises(RatioError, match="dtype"):
        model.learn(2 * 8, callback=change)


def test_without_adapters_a_half_precision_teachers_student_is_float32(tmp_path):
    teacher, model = half_agent(torch.bfloat16, None, tmp_path)
    own = teacher.denoiser.network.state_dict()
    for name, weight in model.policy.denoiser.network.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, own[name].float())
    assert teacher.denoiser.dtype == torch.bfloat16
    table = teacher.denoiser.conditions.tensors()["encoder_hidden_states"]
    assert model.policy.denoiser.conditions is teacher.denoiser.conditions
    before = table.dtype
    model.learn(2 * 8)
    assert table.dtype == before


def test_adapters_are_merged_in_float32():
    """In bfloat16 what was learned would be rounded away: weights have 8 bits."""
    pytest.importorskip("peft")
    denoiser = half_teacher(torch.bfloat16).denoiser
    base = copy.deepcopy(denoiser.network)
    adapted = add_adapters(copy.deepcopy(denoiser), 2)
    with torch.no_grad():
        for name, weight in adapted.network.named_parameters():
            if ".lora_B." in name:
                weight.fill_(1e-4)
    merged = merge(adapted)
    assert {w.dtype for w in merged.network.parameters()} == {torch.float32}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = adapted.network.get_submodule(name)
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    start = base.get_submodule(name).weight.float()
    torch.testing.assert_close(
        merged.network.get_submodule(name).weight - start, change, atol=1e-7, rtol=0
    )
    rounded = (start + change).bfloat16().float() - start  # negative control
    assert (rounded - change).abs().max() > 0.5 * change.abs().max()


def test_a_description_keeps_the_dtype():
    family = FAMILIES["pixels"]
    teacher = load_teacher(family.make(), num_steps=1, dtype=torch.bfloat16)
    made = build_from_description(describe(teacher.denoiser, teacher.make_solver()))
    assert made.dtype == torch.bfloat16


def size(tensors):
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("credit", ["local", "global"])
def test_the_estimate_is_what_an_agent_holds(rank, credit, tmp_path):
    """Byte by byte, of every tensor that training a latent student of prompts leaves behind."""
    pytest.importorskip("peft")
    reference = {"divergence": "kl"}
    teacher, model = half_agent(torch.bfloat16, rank, tmp_path, credit=credit, **reference)
    model.learn(2 * 8)
    policy, env = model.policy, model.env.env.unwrapped
    shape = {"num_envs": 8, "num_steps": 2, "bank_size": 8, "lora_rank": rank}
    parts = estimate(teacher, **shape, reference=True, has_map=credit == "local").parts
    student = list(policy.denoiser.network.parameters())
    trained = [weight for weight in student if weight.requires_grad]
    others = (policy.ema_denoiser.network, policy.reference_denoiser.network)
    shared = {id(weight) for weight in student}
    own = [w for network in others for w in network.parameters() if id(w) not in shared]
    state = [s[key] for s in policy.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert parts["teacher"] == size(teacher.denoiser.network.parameters())
    assert parts["student"] == size(student)
    assert parts["its average and reference"] == size(own)
    assert parts["gradients"] == size(w.grad for w in trained)
    assert parts["optimiser"] == size(state)
    assert parts["weights at the start"] == size(model._start)
    assert parts["rollout"] == size(model.rollout_buffer._store.values())
    assert parts["bank"] == size([env.bank.x_T, env.bank.teacher_x_0, env.bank.condition])
    table, codec = teacher.denoiser.conditions, teacher.codec
    assert parts["decoder and conditions"] == size(
        [*table.buffers(), *codec.parameters(), *codec.buffers()]
    )


@pytest.mark.parametrize("name", ["pixels", "Stable Diffusion 1", "Flux"])
def test_adapters_are_counted_without_making_them(name):
    pytest.importorskip("peft")
    family = FAMILIES[name]
    denoiser = load_teacher(family.make(), num_steps=1, **family.options).denoiser
    counted = num_adapter_weights(denoiser.network, 5)
    add_adapters(denoiser, 5)
    assert counted == sum(w.numel() for w in denoiser.parameters() if w.requires_grad)


def test_the_networks_of_a_reward_count(teacher):
    from redif_env.rewards import Features

    codec = load_teacher(FAMILIES["latent diffusion"].make(), num_steps=1).codec
    features = Features(nn.Conv2d(1, 4, 3), "", map=False)
    shape = {"num_envs": 8, "num_steps": 3, "bank_size": 8}
    reward = 0.5 * Decoded(features, codec) + Decoded("mse", codec)
    parts = estimate(teacher, **shape, reward=reward).parts
    assert parts["networks of the reward"] == 4 * (4 * 9 + 4)
    assert estimate(teacher, **shape).parts["networks of the reward"] == 0


def test_an_offloaded_teacher_takes_nothing_and_unknown_activations_are_said(teacher):
    shape = {"num_envs": 8, "num_steps": len(GRID), "bank_size": 8}
    on, off = (estimate(teacher, **shape, offloaded=o) for o in (False, True))
    assert on.total - off.total == on.parts["teacher"] > 0
    assert "unknown" in str(on)
    assert "at least" in str(on)
    known = estimate(teacher, **shape, activations=10**9)
    assert known.total == on.total + 10**9
    assert "unknown" not in str(known)
    assert "1.000" in str(known)


def test_the_peak_of_tensors_by_hand():
    outside = torch.zeros(100, 100)
    with PeakMemory() as memory:
        x = outside + 1  # 40,000 bytes
        x.view(-1).add_(1)  # the same storage
        y = x * 2
        del x
        z = y + y
        del y, z
        torch.zeros(10)
    assert memory.peak == 2 * 40_000


def test_activations_grow_with_the_rows_and_leave_nothing_behind(make_model):
    denoiser = make_model().policy.denoiser
    counted = denoiser.network_evaluations
    few, many = (measure_activations(denoiser, rows) for rows in (8, 32))
    weights_size = size(denoiser.network.parameters())
    assert few > weights_size  # gradients are included
    # Beyond the gradients, which the backward pass makes while it lets go of activations, a
    # row's share is constant.
    assert 2 * few < many < 4 * few + weights_size
    assert denoiser.network_evaluations == counted
    assert all(weight.grad is None for weight in denoiser.network.parameters())
