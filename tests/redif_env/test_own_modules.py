"""Modules of one's own: points, sound, scores and denoisers of sigma, as teachers and students."""

import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from agents import ReDiFPPO
from redif_env import (
    Conditions,
    Denoiser,
    EDMNetwork,
    KernelSolver,
    ReDiFVectorEnv,
    ScoreNetwork,
    SigmaNetwork,
    Teacher,
    TeacherBank,
    schedules,
)
from redif_env.code_key import own_code
from redif_env.denoiser import call_network
from redif_env.errors import InvalidArgumentError
from redif_env.loading import build_denoiser, noise_schedule, solver_maker
from redif_env.noise import FlowSchedule, VESchedule, VPSchedule, from_x0
from redif_env.teacher import _unsaved_buffers

VP = VPSchedule(DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
MEAN, STD = 0.5, 0.25


def exact(x, sigma):
    """E[x_0 | x] for x = x_0 + sigma eps and data N(MEAN, STD^2)."""
    gain = STD**2 / (STD**2 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)
    return MEAN + gain * (x - MEAN)


class Exact(nn.Module):
    """The exact denoiser D(x, sigma), or the exact score, plus weights that start at no effect."""

    def __init__(self, score=False):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.score = score

    def forward(self, x, sigma):
        x_0 = exact(x, sigma) + self.shift
        return (x_0 - x) / sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2 if self.score else x_0


class Points(nn.Module):
    """The exact epsilon of points (N, D), from x_t and t."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t):
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        return from_x0(exact(x_t / alpha, sigma / alpha), x_t, alpha, sigma, "epsilon") + self.shift


class Sound(nn.Module):
    """A small network of waves (N, C, L) with a class."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classes = nn.Embedding(4, 8)
        self.body = nn.Sequential(nn.Conv1d(2 + 8, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 2, 1))

    def forward(self, x_t, t, condition):
        told = self.classes(condition) + torch.cos(t / 300)[:, None]
        return self.body(torch.cat([x_t, told[:, :, None].expand(-1, -1, x_t.shape[2])], 1))


def ve(kind, **options):
    schedule = VESchedule(sigma_max=20.0)
    return Denoiser(kind(Exact(**options), schedule), schedule, "sample", (3, 2))


OWN = {
    "points": lambda: Denoiser(Points(), VP, "epsilon", (2,)),
    "sound": lambda: Denoiser(
        Sound(), FlowSchedule(), "flow_prediction", (2, 16), num_classes=3, null_class=3
    ),
    "D(x, sigma)": lambda: ve(SigmaNetwork),
    "score": lambda: ve(ScoreNetwork, score=True),
}
EXACT = [name for name in OWN if name != "sound"]


def teacher_of(name, num_steps=8):
    denoiser = OWN[name]()
    return Teacher(denoiser, functools.partial(KernelSolver, denoiser), num_steps)


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_network_is_the_exact_denoiser(name):
    denoiser = OWN[name]()
    t = torch.tensor([900.0, 400.0, 100.0])
    x_t = torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    shape = (-1, *[1] * len(denoiser.latent_shape))
    wanted = exact(x_t / alpha.reshape(shape), sigma / alpha)
    # An epsilon's x_0 is a difference of numbers sigma / alpha times as large.
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x_t, t), wanted, rtol=1e-4, atol=1e-4)
        later = denoiser(x_t, 0.9 * t.round())
    assert not torch.allclose(later, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_the_teacher_solves_the_flow_with_first_order(name):
    """The flow of Gaussian data is known: x_0 = m + s (x_T - a m) / sqrt(a^2 s^2 + sigma^2)."""
    fine = teacher_of(name)
    x_T = fine.denoiser.initial_noise(64, torch.Generator().manual_seed(0))
    end = torch.tensor([fine.denoiser.schedule.max_timestep])
    alpha, sigma = (
        float(f(end)) for f in (fine.denoiser.schedule.alpha, fine.denoiser.schedule.sigma)
    )
    wanted = MEAN + STD * (x_T - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    errors = [
        float((teacher_of(name, n).sample(x_T) - wanted).square().mean().sqrt()) for n in (40, 80)
    ]
    # Euler's error halves with the step; the last step to the data has an order of its own.
    assert errors[1] < 0.65 * errors[0]
    assert errors[1] < 0.05


@pytest.mark.parametrize("name", OWN)
def test_ppo_trains_a_copy(name, tmp_path):
    teacher = teacher_of(name)
    bank = TeacherBank.build(teacher, 16, cache_dir=tmp_path)
    env = ReDiFVectorEnv(8, teacher, schedule="uniform", num_steps=2, bank=bank, group_size=2)
    model = ReDiFPPO("StudentPolicy", env, learning_rate=1e-2, batch_size=8, seed=0)
    before = [weight.clone() for weight in teacher.denoiser.network.parameters()]
    model.learn(2 * 8 * 2)
    own, trained = teacher.denoiser.network.parameters(), model.student().network.parameters()
    for start, weight, new in zip(before, own, trained, strict=True):
        assert torch.equal(start, weight)
        assert not torch.equal(start, new)
    model.save(tmp_path / "agent")
    loaded = ReDiFPPO.load(tmp_path / "agent").student()
    with torch.no_grad():
        grid = env.timesteps
        ours = schedules.sample(model.student(), bank.x_T, bank.condition, grid)
        assert torch.equal(schedules.sample(loaded, bank.x_T, bank.condition, grid), ours)


def test_schedules_are_part_of_the_key():
    """Two modules of the same name and weights with other schedules answer otherwise."""
    keys = set()
    for schedule in (VP, VPSchedule(DDIMScheduler().alphas_cumprod)):
        denoiser = Denoiser(Points(), schedule, "epsilon", (2,))
        keys.add(Teacher(denoiser, functools.partial(KernelSolver, denoiser), 4).fingerprint())
    assert len(keys) == 2


def random_unet(**options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        add_attention=False,
        **options,
    ).eval()


@torch.no_grad()
def test_the_solver_is_diffusers_ddim():
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing"
    )
    denoiser = build_denoiser(random_unet(), scheduler, {})
    x_T = denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    ours, stock = (
        Teacher(denoiser, make, 5).sample(x_T)
        for make in (functools.partial(KernelSolver, denoiser), solver_maker(scheduler, denoiser))
    )
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_solver_is_diffusers_flow_matching():
    scheduler = FlowMatchEulerDiscreteScheduler()
    denoiser = build_denoiser(random_unet(), scheduler, {})
    x_T = denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    stock = Teacher(denoiser, solver_maker(scheduler, denoiser), 5)
    solver = scheduler.from_config(scheduler.config)
    solver.set_timesteps(5)
    own = functools.partial(KernelSolver, denoiser, solver.timesteps.tolist())
    torch.testing.assert_close(Teacher(denoiser, own, 5).sample(x_T), stock.sample(x_T))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_edm_networks_are_diffusers_preconditioning_and_euler_steps(predicts):
    """The EDM scheduler's own preconditioning, in Euler's method by hand (Karras, algorithm 1)."""
    scheduler = EDMEulerScheduler(prediction_type=predicts, sigma_max=10.0)
    network = random_unet()
    denoiser = build_denoiser(network, scheduler, {})
    assert type(denoiser.network) is EDMNetwork
    teacher = Teacher(denoiser, solver_maker(scheduler, denoiser), 4)
    x_T = denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    assert float(x_T.std()) == pytest.approx(10, rel=0.1)
    x, times = x_T, [1000.0, 750.0, 500.0, 250.0, 0.0]
    sigmas = denoiser.schedule.sigma(torch.tensor(times))
    for sigma, following in itertools.pairwise(sigmas):
        seen = scheduler.precondition_inputs(x, sigma)
        raw = network(seen, scheduler.precondition_noise(sigma).reshape(1)).sample
        x_0 = scheduler.precondition_outputs(x, raw, sigma)
        x = x + (following - sigma) * (x - x_0) / sigma
    torch.testing.assert_close(teacher.sample(x_T), x, rtol=1e-4, atol=1e-4)


def test_edm_sigmas_are_karras():
    """Evenly spaced times of the VE schedule are the sigmas of diffusers' EDM scheduler."""
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(11)
    times = 1000 * (1 - torch.arange(10) / 10)
    torch.testing.assert_close(noise_schedule(scheduler).sigma(times), scheduler.sigmas[:10])


def test_infinite_sigma_is_refused():
    with pytest.raises(InvalidArgumentError, match="infinite"):
        SigmaNetwork(Exact(), FlowSchedule())


class Returns(nn.Module):
    """A network that returns what `make` makes of `x_t`."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.make = make

    def forward(self, x_t, t):
        return self.make(self.weight * x_t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.mean(1, keepdim=True), r"\[4, 1\].*\[4, 2\]"),  # would broadcast
        (lambda x: x[:1], r"\[1, 2\].*\[4, 2\]"),
        (lambda x: (x,), "tuple"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_network_that_returns_something_else_is_refused(make, message):
    denoiser = Denoiser(Returns(make), VP, "sample", (2,))
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        denoiser(torch.ones(4, 2), torch.full((4,), 500.0))
    assert caught.value.argument == "network"
    # negative control: like x_t, or an object that holds it as diffusers' do
    for good in (lambda x: x, lambda x: SimpleNamespace(sample=x)):
        denoiser = Denoiser(Returns(good), VP, "sample", (2,))
        assert torch.equal(denoiser(torch.ones(4, 2), torch.full((4,), 500.0)), torch.ones(4, 2))


def test_a_teacher_that_answers_nan_is_refused_and_not_cached(tmp_path):
    """Otherwise the reward is blamed, and the answers stay in the cache."""
    denoiser = Denoiser(Returns(lambda x: x * math.nan), VP, "sample", (2,))
    teacher = Teacher(denoiser, functools.partial(KernelSolver, denoiser), 2)
    with pytest.raises(InvalidArgumentError, match=r"teacher=.*NaN"):
        TeacherBank.build(teacher, 4, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_edm_network_predicts_what_edm_schedulers_know():
    """They fail with other kinds; to take one for another would be silent."""
    with pytest.raises(InvalidArgumentError, match="prediction_type='sample'"):
        build_denoiser(UNet2DModel(8), EDMEulerScheduler(prediction_type="sample"), {})


class Told(nn.Module):
    def forward(self, x_t, t, embedding):
        return x_t + embedding


def test_a_table_of_other_names_is_refused():
    good, bad = (Conditions({name: torch.ones(3, 2)}) for name in ("embedding", "text"))
    with pytest.raises(InvalidArgumentError, match=r"conditions=.*text.*Told") as caught:
        Denoiser(Told(), VP, "sample", (2,), conditions=bad)
    assert caught.value.argument == "conditions"
    wrapped = SigmaNetwork(Told(), VP)  # passes names on, whatever they are
    assert Denoiser(wrapped, VP, "sample", (2,), conditions=good).num_classes == 3
    denoiser = Denoiser(Told(), VP, "sample", (2,), conditions=good)
    x_0 = denoiser(torch.ones(1, 2), torch.ones(1), torch.zeros(1).long())
    assert torch.equal(x_0, torch.full((1, 2), 2.0))
    # Compiled code does not say its arguments, and is taken as it is.
    example = (torch.ones(1, 2), torch.ones(1), torch.ones(1, 2))
    compiled = torch.jit.trace(Told(), example)
    assert Denoiser(compiled, VP, "sample", (2,), conditions=good).num_classes == 3


class Times(nn.Module):
    """x_t times a constant of the module's."""

    def __init__(self, factor=1.0, function=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.factor = factor
        self.function = function

    def forward(self, x_t, t):
        x_t = self.factor * self.weight * x_t
        return x_t if self.function is None else self.function(x_t)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x_t, t):
        return self.weight * x_t


class Doubles(Keeps):
    def forward(self, x_t, t):
        return 2 * self.weight * x_t


Doubles.__name__ = "Keeps"  # which a script prints


def make_times(power):
    """Classes of one name and source, whose `forward` differs by what encloses it."""

    class Enclosed(Times):
        def forward(self, x_t, t):
            return (self.weight * x_t) ** power

    return Enclosed()


def scripted(doubles):
    return torch.jit.script(Doubles() if doubles else Keeps())


def traced(function):
    return torch.fx.symbolic_trace(Times(function=function))


HALF = 0.5


def scale(x_t):
    return HALF * x_t


def halve(network, x_t, t, told, times=0.5):
    return scale(network(x_t, t)) * times


NETWORKS = {
    "an enclosed number": (make_times, (1, 2)),
    "a constant": (Times, (1.0, 2.0)),
    "a function": (functools.partial(Times, 1.0), (torch.sin, lambda x: x + 1, lambda x: x + 2)),
    "a script": (scripted, (False, True)),
    "a graph": (traced, (torch.sin, torch.cos)),
    "what it wraps": (lambda power: nn.Sequential(make_times(power)), (1, 2)),
}


def key_of(network, **options):
    denoiser = Denoiser(network, VP, "sample", (2,), **options)
    return Teacher(denoiser, functools.partial(KernelSolver, denoiser), 4).fingerprint()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_code_is_part_of_the_key(name):
    """Modules of the same name and weights that compute something else; and of the same, not."""
    make, options = NETWORKS[name]
    assert len({key_of(make(option)) for option in options}) == len(options)
    assert len({key_of(make(options[-1])) for _ in range(2)}) == 1


def test_how_the_network_is_called_is_part_of_the_key():
    calls = [halve, functools.partial(halve, times=0.25), lambda network, x_t, t, told: x_t]
    keys = [key_of(Times(), call=call) for call in calls]
    assert len({*keys, key_of(Times())}) == 4
    assert key_of(Times(), call=functools.partial(halve, times=0.25)) == keys[1]


def test_what_the_code_refers_to_is_part_of_the_key(monkeypatch):
    before = key_of(Times(), call=halve)
    monkeypatch.setattr(sys.modules[__name__], "HALF", 0.25)
    assert key_of(Times(), call=halve) != before


PRINT_KEY = """
import functools, sys
sys.path[:0] = sys.argv[1:]
from test_own_modules import Times, halve, key_of
def forward(x):
    return x if x.ndim in {2, 3, 4, 5} and str(x.dtype) in {"a", "b", "c", "d"} else 2 * x
print(key_of(Times(2.0, forward), call=functools.partial(halve, times=0.25)))
"""


def test_the_key_of_own_code_is_that_of_any_process():
    """Sets of constants have an order of the process's own."""
    folder = Path(__file__).parent
    keys = {
        subprocess.run(
            [sys.executable, "-c", PRINT_KEY, str(folder), str(folder.parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1


def test_what_libraries_wrote_needs_no_code(teacher):
    """So that a bank in the cache outlives the releases of Python, and of this project."""
    assert own_code(teacher.denoiser.network, teacher.denoiser.call) == []
    assert own_code(nn.Sequential(nn.Linear(2, 2)), call_network) == []
    assert own_code(SigmaNetwork(nn.Identity(), VP), call_network) == []


class Scaled(nn.Module):
    """A linear map times a buffer that its state dict has, or not.

    Args:
        scale: The buffer.
        persistent: Whether the state dict has it.
    """

    def __init__(self, scale: float, persistent: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("scale", torch.tensor(scale), persistent=persistent)

    def forward(self, x_t, t):
        return self.linear(x_t) * self.scale


def test_buffers_that_are_not_saved_are_part_of_the_key(tmp_path):
    """Weights alone are the same, and the second teacher would be given the first one's answers."""
    one, two = Scaled(1.0), Scaled(0.5)
    assert one.state_dict().keys() == {"linear.weight", "linear.bias"}
    assert key_of(one) != key_of(two)
    assert key_of(one) == key_of(Scaled(1.0))
    banks = []
    for network in (one, two):
        denoiser = Denoiser(network, VP, "sample", (2,))
        teacher = Teacher(denoiser, functools.partial(KernelSolver, denoiser), 4)
        banks.append(TeacherBank.build(teacher, 4, cache_dir=tmp_path))
    assert not torch.equal(banks[0].teacher_x_0, banks[1].teacher_x_0)


def test_other_keys_are_of_the_state_dict_alone(teacher):
    """Banks of networks without such buffers stay in use: nothing is added to their digest."""
    for network in (teacher.denoiser.network, Scaled(1.0, persistent=True)):
        assert not _unsaved_buffers(network)
    assert _unsaved_buffers(Scaled(1.0)).keys() == {"scale"}
