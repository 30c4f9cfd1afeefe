r"""docs/own_score_model.md, run from top to bottom, against the original sampler written in numpy.

The sampler below shares nothing with the package but the weights: the probability-flow ODE
:math:`y' = -\tfrac12 \beta(t) (y + s(t, y))` by Heun's method in double precision.
"""

import copy
import functools
import itertools
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agents import ReDiFPPO, distill
from redif_env import (
    Conditions,
    Denoiser,
    EDMNetwork,
    KernelSolver,
    OnnxNetwork,
    ReDiFVectorEnv,
    Teacher,
    TeacherBank,
    TimeNetwork,
    TimeScoreNetwork,
)
from redif_env.errors import InvalidArgumentError, MissingExtraError
from redif_env.noise import SDESchedule, VESchedule, VPSchedule

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PAGE = Path(__file__).parents[2] / "docs" / "own_score_model.md"
BETA_MIN, BETA_MAX = 0.1, 20.0


# --- the authors' side ---


def silu(x):
    return x / (1 + np.exp(-x))


def integral(t):
    return BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2


def score(arrays, t, y):
    """The published network; t `(N,)`, y `(N, 2)`."""
    h = np.concatenate([y, t[:, None]], 1)
    for layer in range(3):
        h = h @ arrays[f"Dense_{layer}/kernel"] + arrays[f"Dense_{layer}/bias"]
        h = silu(h) if layer < 2 else h
    return h / np.sqrt(1 - np.exp(-integral(t)))[:, None]


def original_sampler(arrays, y, num_steps=500, eps=1e-3):
    """Samples at the data: from t = 1 to eps, and what is expected of the data there."""

    def slope(t, y):
        beta = BETA_MIN + t * (BETA_MAX - BETA_MIN)
        return -0.5 * beta * (y + score(arrays, np.full(len(y), t), y))

    for t, s in itertools.pairwise(np.linspace(1, eps, num_steps + 1)):
        first = slope(t, y)
        y = y + (s - t) * (first + slope(s, y + (s - t) * first)) / 2
    noise = (1 - np.exp(-integral(eps))) * score(arrays, np.full(len(y), eps), y)
    return (y + noise) / np.exp(-integral(eps) / 2)


def write_graph(path, arrays, external=""):
    """The published network as a graph of t (N,) and y (N, 2), with weights in file `external`."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {**arrays, "two": [1], "min": -BETA_MIN, "rise": -(BETA_MAX - BETA_MIN) / 2}
    constants = {
        name: np.asarray(value, np.int64 if name == "two" else np.float32)
        for name, value in {**constants, "one": 1.0}.items()
    }
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["t", "two"], ["column"]),
        node("Concat", ["y", "column"], ["h0"], axis=1),
        node("Mul", ["column", "rise"], ["a"]),
        node("Add", ["a", "min"], ["b"]),
        node("Mul", ["b", "column"], ["exponent"]),
        node("Exp", ["exponent"], ["kept"]),
        node("Sub", ["one", "kept"], ["variance"]),
        node("Sqrt", ["variance"], ["std"]),
    ]
    for i in range(3):
        names = [f"Dense_{i}/kernel", f"Dense_{i}/bias"]
        nodes.append(node("Gemm", [f"h{i}", *names], [f"raw{i}"]))
        nodes.append(node("Sigmoid", [f"raw{i}"], [f"gate{i}"]))
        nodes.append(node("Mul", [f"raw{i}", f"gate{i}"], [f"h{i + 1}"]))
    nodes.append(node("Div", ["raw2", "std"], ["score"]))
    info = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "score",
        [info("t", shape=["N"]), info("y", shape=["N", 2])],
        [info("score", shape=["N", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    options = {
        "save_as_external_data": True,
        "location": external,
        "size_threshold": 100,
    }
    onnx.save(model, str(path), **(options if external else {}))


# --- the page ---


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Everything that the page's Python defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 9
    scope: dict = {"__name__": "documentation"}
    folder, before = tmp_path_factory.mktemp("page"), os.getcwd()
    os.chdir(folder)
    try:
        with torch.random.fork_rng():
            exec(blocks[0], scope)
            arrays = dict(np.load("score.npz"))
            samples = dict(np.load("original.npz"))
            x_T = np.random.default_rng(0).standard_normal((128, 2))
            np.savez("original.npz", x_T=x_T, x_0=original_sampler(arrays, x_T))
            write_graph(folder / "score.onnx", arrays)
            scope["their_function"] = functools.partial(score, arrays)
            for block in blocks[1:]:
                exec(block, scope)
    finally:
        os.chdir(before)
    return {**scope, "arrays": arrays, "samples": samples, "folder": folder}


def teacher_of(network, schedule, num_steps, kind=TimeScoreNetwork, end_time=1.0):
    denoiser = Denoiser(kind(network, schedule, end_time), schedule, "epsilon", (2,))
    return Teacher(denoiser, functools.partial(KernelSolver, denoiser), num_steps)


def extrapolated_distance(page, network, schedule=None, **options):
    """Distance from the original of 2 x_0(100 steps) - x_0(50 steps), without first-order error."""
    schedule = schedule or SDESchedule(BETA_MIN, BETA_MAX)
    x_0 = [teacher_of(network, schedule, n, **options).sample(page["x_T"]) for n in (50, 100)]
    return float((2 * x_0[1] - x_0[0] - page["x_0"]).square().mean().sqrt())


def near_an_arc(points):
    """Share of points within 0.25 of one of the two half circles that the data lie on."""
    x, y = points.T
    upper = (((x + 0.5) ** 2 + (y + 0.25) ** 2).sqrt() - 1).abs() + (-0.25 - y).clamp_min(0)
    lower = (((x - 0.5) ** 2 + (y - 0.25) ** 2).sqrt() - 1).abs() + (y - 0.25).clamp_min(0)
    return float((torch.minimum(upper, lower) < 0.25).float().mean())


def test_the_original_samples_are_two_moons(page):
    """Or else agreement would mean nothing. The network is small, trained for a second."""
    x_0 = page["x_0"]
    gaussian = x_0.mean(0) + x_0.std(0) * page["x_T"]
    assert near_an_arc(x_0) > 0.55 > near_an_arc(gaussian) + 0.05
    assert near_an_arc(page["moons"](500)) > 0.9


def test_the_samples_of_the_page_are_those_of_the_original_sampler(page):
    samples = page["samples"]
    wanted = original_sampler(page["arrays"], samples["x_T"].astype(float))
    np.testing.assert_allclose(samples["x_0"], wanted, rtol=0, atol=1e-3)  # float32


def test_the_teacher_converges_to_the_original_sampler(page):
    """Of first order: half the distance with twice the steps, so nothing else explains it."""
    coarse, fine = page["distances"]
    assert fine < 0.02
    assert 1.8 < coarse / fine < 2.2
    # Of second order: about (distance / std of the data)^2.
    assert extrapolated_distance(page, page["Ours"](page["score"])) < 0.003


WRONG = {
    "time not scaled": {"end_time": 1000.0},
    "time that ends at 0.9": {"end_time": 0.9},
    "score taken for epsilon": {"kind": TimeNetwork},
    "sub-VP": {"schedule": SDESchedule(BETA_MIN, BETA_MAX, sub=True)},
    "half the betas": {"schedule": SDESchedule(BETA_MIN / 2, BETA_MAX / 2)},
    "squared cosine": {
        "schedule": VPSchedule(torch.cos(torch.linspace(0, 0.999, 1000) * torch.pi / 2) ** 2)
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_conventions_are_caught(page, name):
    """By ten times the tolerance of the right ones."""
    assert not extrapolated_distance(page, page["Ours"](page["score"]), **WRONG[name]) < 0.03


def test_reversed_time_is_caught(page):
    class Backwards(nn.Module):
        def forward(self, x_t, time):
            return page["score"](1 - time.clamp_max(1 - 1e-3), x_t)

    assert not extrapolated_distance(page, Backwards()) < 0.03


def test_a_kernel_that_was_not_transposed_is_caught(page):
    """The square one loads without complaint."""
    arrays = {**page["arrays"], "Dense_1/kernel": page["arrays"]["Dense_1/kernel"].T}
    ported = page["Score"]()
    ported.load_state_dict(page["state_dict_of"](arrays))
    assert not extrapolated_distance(page, page["Ours"](ported)) < 0.03


@torch.no_grad()
def test_all_variants_are_the_same_teacher(page):
    answers = {
        "torch": page["teacher"].sample(page["x_T"]),
        "jax": page["make_teacher"](page["Ours"](page["ported"])).sample(page["x_T"]),
        "onnx": page["frozen"].sample(page["x_T"]),
        "callback": page["called"].sample(page["x_T"]),
    }
    assert torch.equal(answers["torch"], answers["jax"])
    for name in ("onnx", "callback"):  # float32 in another order; a callback in double
        torch.testing.assert_close(answers[name], answers["torch"], rtol=1e-3, atol=1e-3)
    assert page["graph"].path == Path("score.onnx")


@torch.no_grad()
def test_the_published_conventions_that_the_page_names(page):
    """score_sde networks return -score * std and are told 999 t; Equinox has int_beta = t."""

    class ScoreSDE(nn.Module):
        def forward(self, x_t, labels):
            std = (-torch.expm1(-integral(labels / 999))).sqrt()
            return -page["score"](labels / 999, x_t) * std[:, None]

    schedule = SDESchedule(BETA_MIN, BETA_MAX)
    teacher = teacher_of(ScoreSDE(), schedule, 50, TimeNetwork, end_time=999)
    wanted = page["teacher"].sample(page["x_T"])
    torch.testing.assert_close(teacher.sample(page["x_T"]), wanted, rtol=1e-3, atol=1e-3)
    time = torch.tensor([0.5, 4.0, 10.0])
    equinox = SDESchedule(10, 10)
    torch.testing.assert_close(equinox.alpha(time * 1000 / 10), (-time / 2).exp())
    torch.testing.assert_close(equinox.sigma(time * 1000 / 10), (1 - (-time).exp()).sqrt())


@pytest.mark.parametrize("spatial", [(3,), (3, 2)])
def test_convolution_kernels_of_flax(page, spatial):
    """Against the definition, sum over offsets and channels, of a kernel (..., in, out)."""
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((*spatial, 4, 4)).astype("f4")
    x = generator.standard_normal((*(8 for _ in spatial), 4)).astype("f4")  # channels last
    shape = [8 - k + 1 for k in spatial]
    wanted = np.zeros((*shape, 4), "f4")
    for place in itertools.product(*map(range, shape)):
        window = x[tuple(slice(p, p + k) for p, k in zip(place, spatial, strict=True))]
        wanted[place] = np.tensordot(window, kernel, window.ndim)
    convolve = nn.functional.conv1d if len(spatial) == 1 else nn.functional.conv2d
    first = torch.from_numpy(np.moveaxis(x, -1, 0).copy())[None]

    def result(weight):
        return np.moveaxis(convolve(first, torch.from_numpy(weight.copy()))[0].numpy(), 0, -1)

    np.testing.assert_allclose(result(page["weight"](kernel)), wanted, rtol=1e-4, atol=1e-4)
    swapped = np.swapaxes(page["weight"](kernel), 0, 1)
    assert not np.allclose(result(swapped), wanted, rtol=1e-2, atol=1e-2)


def test_the_log_snr_that_a_network_is_told(page):
    """log(alpha^2 / sigma^2) = -log(exp(B) - 1) under the VP SDE."""
    told = page["LogSNR"](lambda x_t, value: value)
    t = torch.tensor([10.0, 500.0, 1000.0])
    wanted = -np.log(np.expm1(integral(t.double().numpy() / 1000)))
    np.testing.assert_allclose(told(None, t), wanted, rtol=1e-4)


def test_the_student_beats_plain_ddim_on_held_out_noise(page):
    errors = page["held_out"]
    assert page["result"].timesteps.shape == (3,)
    assert errors["student"] < 0.5 * errors["ddim_searched"] < errors["ddim"]


@pytest.mark.slow
def test_students_of_three_seeds_beat_plain_ddim(page):
    size = {"iterations": 60, "num_envs": 128, "bank_size": 1024, "num_held_out": 500}
    for seed in range(3):
        result = distill(page["teacher"], 2, **size, learning_rate=3e-3, seed=seed)
        errors = {name: row["paired_mse"] for name, row in result.report["held_out"].items()}
        assert errors["student"] < 0.1 * errors["ddim_searched"]


def test_the_student_of_a_graph_is_another_network(page):
    model, student = page["model"], page["student"]
    assert type(model.student().network) is page["Student"]
    pairs = zip(student.parameters(), model.policy.denoiser.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in pairs)
    # It learned the graph's predictions.
    t = torch.full((128,), 300.0)
    x_t = page["schedule"].alpha(t)[:, None] * page["x_0"]
    x_t = x_t + page["schedule"].sigma(t)[:, None] * page["x_T"].float()
    with torch.no_grad():
        taught, wanted = student.predict(x_t, t), page["frozen"].denoiser.predict(x_t, t)
    assert float((taught - wanted).square().mean()) < 0.1 * float(wanted.square().mean())


def test_a_graph_is_refused_as_a_student(page):
    bank = TeacherBank(page["x_T"], page["x_0"])
    graph = OnnxNetwork(page["folder"] / "score.onnx", ("y", "t"))
    frozen = teacher_of(graph, SDESchedule(), 2)
    env = ReDiFVectorEnv(4, frozen, schedule="uniform", num_steps=2, group_size=2, bank=bank)
    with pytest.raises(InvalidArgumentError, match=r"student='TimeScoreNetwork'.*no weights"):
        ReDiFPPO("StudentPolicy", env, batch_size=8)


# --- the adapters ---

MEAN, STD = 0.5, 0.25


class GaussianScore(nn.Module):
    """The score of x_t at a time in [0, end], for data N(MEAN, STD^2) under `schedule`."""

    def __init__(self, schedule, end):
        super().__init__()
        self.schedule, self.end = schedule, end

    def forward(self, x_t, time):
        t = time * 1000 / self.end
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        return -(x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("end", [1.0, 10.0])
@pytest.mark.parametrize(
    "schedule", [SDESchedule(), SDESchedule(sub=True), VESchedule(sigma_max=20.0)]
)
def test_a_score_of_time_is_the_posterior_mean(schedule, end, generator):
    """E[x_0 | x_t] of Gaussian data, by regression; not so if the score is taken for epsilon."""
    t = torch.tensor([900.0, 400.5, 100.0])
    x_t = torch.randn(3, 2, generator=generator)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    wanted = MEAN + gain * (x_t - alpha * MEAN)
    answers = []
    for kind in (TimeScoreNetwork, TimeNetwork):
        network = kind(GaussianScore(schedule, end), schedule, end)
        answers.append(Denoiser(network, schedule, "epsilon", (2,))(x_t, t))
    # x_0 is a difference of numbers sigma / alpha times as large, up to 60.
    torch.testing.assert_close(answers[0], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answers[1], wanted, rtol=1e-2, atol=1e-2)


def test_what_a_network_of_time_is_told():
    class Told(nn.Module):
        def forward(self, x_t, time, condition=None, rows=None):
            self.heard = (time.tolist(), condition if rows is None else rows)
            return x_t

    network = TimeNetwork(Told(), SDESchedule(num_train_timesteps=500), end_time=999.0)
    x_t, t = torch.ones(2, 3), torch.tensor([500.0, 125.0])
    assert torch.equal(network(x_t, t), x_t)
    assert network.network.heard == ([999.0, 249.75], None)
    network(x_t, t, torch.tensor([1, 2]))
    assert network.network.heard[1].tolist() == [1, 2]
    network(x_t, t, rows=torch.tensor([3.0, 4.0]))
    assert network.network.heard[1].tolist() == [3.0, 4.0]
    with pytest.raises(InvalidArgumentError, match="end_time=0"):
        TimeNetwork(Told(), SDESchedule(), end_time=0)


def test_constants_are_part_of_the_key():
    """Teachers of the same weights with other constants must not share their answers."""
    schedule = SDESchedule()
    networks = [TimeNetwork(nn.Linear(2, 2), schedule, end) for end in (1.0, 999.0)]
    networks += [EDMNetwork(nn.Linear(2, 2), schedule, data) for data in (0.5, 1.0)]
    for network in networks:
        nn.init.ones_(network.network.weight)
        nn.init.zeros_(network.network.bias)
    keys = set()
    for network in networks:
        denoiser = Denoiser(network, schedule, "sample", (2,))
        keys.add(Teacher(denoiser, functools.partial(KernelSolver, denoiser), 4).fingerprint())
    assert len(keys) == 4


# --- graphs ---


@pytest.fixture(scope="module")
def make_graph(tmp_path_factory):
    """Writes a graph of x + time, plus a class or row if it takes one, and returns its path."""
    from onnx import TensorProto, helper

    folder, number = tmp_path_factory.mktemp("graphs"), itertools.count()

    def make(kind="FLOAT", time="FLOAT", told=(), rows="N", time_shape=("N", 1), output=None):
        kind, time = getattr(TensorProto, kind), getattr(TensorProto, time)
        given = [("x", kind, [rows, 2]), ("time", time, list(time_shape))]
        given += [(name, TensorProto.INT64, ["N", 1]) for name in told]
        nodes, total = [], "x"
        for name, *_ in given[1:]:
            nodes.append(helper.make_node("Cast", [name], [f"{name}'"], to=kind))
            nodes.append(helper.make_node("Add", [total, f"{name}'"], [f"{total}+"]))
            total += "+"
        nodes.append(helper.make_node(output or "Identity", [total], ["y"]))
        graph = helper.make_graph(
            nodes,
            "sum",
            [helper.make_tensor_value_info(*each) for each in given],
            [helper.make_tensor_value_info("y", kind, None)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 10
        path = folder / f"{next(number)}.onnx"
        onnx.save(model, str(path))
        return path

    return make


X_T, TIMES = torch.arange(6.0).reshape(3, 2), torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE"])
@pytest.mark.parametrize("time", ["FLOAT", "INT64", "INT32"])
def test_kinds_of_numbers(make_graph, kind, time):
    network = OnnxNetwork(make_graph(kind, time))
    answer = network(X_T, TIMES)
    assert answer.dtype == torch.float32
    assert torch.equal(answer, X_T + TIMES[:, None])
    rows = torch.cat([network(X_T[i : i + 1], TIMES[i : i + 1]) for i in range(3)])
    assert torch.equal(rows, answer)
    assert torch.equal(network(X_T.bfloat16(), TIMES), answer.bfloat16())


def test_classes_and_rows_of_a_table(make_graph):
    classes = torch.tensor([30, 20, 10])
    graph = OnnxNetwork(make_graph(told=("class",)))
    wanted = X_T + TIMES[:, None] + classes[:, None]
    assert torch.equal(graph(X_T, TIMES, classes), wanted)
    table = Conditions({"size": torch.tensor([[1], [5]]), "crop": torch.tensor([[100], [200]])})
    graph = OnnxNetwork(make_graph(told=("size", "crop")), inputs=("x", "time"))
    denoiser = Denoiser(graph, SDESchedule(), "sample", (2,), conditions=table)
    with torch.no_grad():
        answer = denoiser(X_T, TIMES, torch.tensor([0, 1, 0]))
    told = torch.tensor([[101.0], [205.0], [101.0]])
    assert torch.equal(answer, X_T + TIMES[:, None] + told)


def test_graphs_that_do_not_fit(make_graph, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"path=.*cannot load"):
        OnnxNetwork(tmp_path / "none.onnx")
    path = make_graph()
    for inputs in (("x", "t"), ("x",), ("x", "time", "time")):
        with pytest.raises(InvalidArgumentError, match=r"inputs=.*\['x', 'time'\]"):
            OnnxNetwork(path, inputs)
    with pytest.raises(InvalidArgumentError, match=r"x: \[3, 2\].*free first axis"):
        OnnxNetwork(make_graph(rows=3))
    with pytest.raises(InvalidArgumentError, match=r"time: \[\].*free first axis"):
        OnnxNetwork(make_graph(time_shape=()))
    with pytest.raises(InvalidArgumentError, match=r"time: tensor\(bool\)"):
        OnnxNetwork(make_graph(time="BOOL"))
    with pytest.raises(InvalidArgumentError, match=r"condition=.*\['class', 'time', 'x'\]"):
        OnnxNetwork(make_graph(told=("class",)))(X_T, TIMES)
    graph = OnnxNetwork(path)
    with pytest.raises(InvalidArgumentError, match=r"condition=.*\['time', 'x'\]"):
        graph(X_T, TIMES, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match=r"x_t=\(3, 4\).*refuses"):
        graph(torch.zeros(3, 4), TIMES)
    with pytest.raises(InvalidArgumentError, match=r"path=.*makes \(1, 1\) of \(3, 2\)"):
        OnnxNetwork(make_graph(output="ReduceSum"))(X_T, TIMES)


def test_graphs_have_no_gradients(make_graph):
    graph, x_t = OnnxNetwork(make_graph()), X_T.clone().requires_grad_()
    with pytest.raises(InvalidArgumentError, match="x_t='with gradients'"):
        graph(x_t, TIMES)
    with torch.no_grad():
        assert torch.equal(graph(x_t, TIMES), X_T + TIMES[:, None])


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_graphs_can_be_copied(make_graph, copy_of):
    graph = OnnxNetwork(make_graph(), inputs=("x", "time"))
    other = copy_of(graph)
    assert torch.equal(other(X_T, TIMES), graph(X_T, TIMES))
    assert repr(other) == repr(graph)


@pytest.mark.parametrize("external", ["", "score.onnx.data", "weights.bin", 150 * "w" + ".bin"])
def test_weights_of_a_graph_are_part_of_the_key(page, tmp_path, external):
    """Also those that lie beside it, where both graphs are the same bytes."""
    keys: dict = {}
    graphs = set()
    for factor in (1.0, 1.0, 2.0):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        name = "Dense_2/kernel"
        arrays = {**page["arrays"], name: factor * page["arrays"][name]}
        write_graph(folder / "score.onnx", arrays, external)
        graphs.add((folder / "score.onnx").read_bytes())
        graph = OnnxNetwork(folder / "score.onnx", inputs=("y", "t"))
        keys.setdefault(factor, set()).add(teacher_of(graph, SDESchedule(), 4).fingerprint())
    assert len(graphs) == (1 if external else 2)
    assert [len(each) for each in keys.values()] == [1, 1]
    assert keys[1.0] != keys[2.0]


def test_without_onnxruntime(make_graph, monkeypatch):
    path = make_graph()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"redif\[onnx\]"):
        OnnxNetwork(path)
