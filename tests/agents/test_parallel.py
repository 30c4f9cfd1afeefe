"""Two processes train one student as one process would: gloo on the CPU."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import parallel_worker
import pytest
import small_runs
import torch
from parallel_worker import (
    CASES,
    GROUP,
    NUM_ENVS,
    gradients,
    in_double,
    learn,
    make_agent,
    make_env,
    outcome,
    whole_run,
)
from small_runs import Killed
from test_checkpoints import same
from tiny_models import FAMILIES

import agents
from agents import ReDiFPPO, compatibility
from agents.callbacks import HeldOutEvaluation
from agents.checkpoints import Checkpoints, pack, unpack
from agents.resuming import agent_state, load_training
from benchmarks import scaling
from redif_env import ReDiFVectorEnv, TeacherBank, load_denoiser, parallel
from redif_env.errors import InvalidArgumentError, MissingExtraError

ROOT = Path(agents.__file__).parents[1]
PATIENCE = 600  # seconds until the test gives up on processes that wait for each other


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    inherited = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **os.environ}
    return {**inherited, **{name: str(value) for name, value in more.items()}}


def run_pair(folder, *arguments):
    """Two processes that ran `parallel_worker.py`: their folder, exit codes and errors."""
    port = free_port()
    command = [sys.executable, parallel_worker.__file__, str(folder), *arguments]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    shared |= {"LOCAL_WORLD_SIZE": 2, "REDIF_CACHE": folder / "cache"}
    shared |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            command,
            env=environment(RANK=rank, LOCAL_RANK=rank, **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        assert (folder / f"done-{rank}.pt").exists(), outputs[rank][1]
    return folder, [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIF_CACHE", str(folder / "cache"))
        small_runs.write_teacher(folder / "teacher")
        for name in ("alone", "alone too"):
            with pytest.raises(Killed):
                whole_run(folder, name, 4)
    return run_pair(folder)


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    small_runs.write_teacher(folder / "teacher")
    return run_pair(folder, parallel_worker.IN_PARTS)


def left(pair, name):
    """What each of the two left under a name."""
    return [torch.load(pair[0] / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def whole_bank(pair, monkeypatch):
    """The cache that the pair filled, in which one process finds the same bank."""
    monkeypatch.setenv("REDIF_CACHE", str(pair[0] / "cache"))


def test_the_bank_is_that_of_one_process(pair, tmp_path):
    ours, theirs = left(pair, "bank")
    assert torch.equal(ours, theirs)
    alone = TeacherBank.build(make_env().teacher, parallel_worker.BANK, cache_dir=tmp_path)
    torch.testing.assert_close(ours, alone.teacher_x_0, rtol=0, atol=1e-5)


def test_the_shares_of_tasks_make_up_those_of_one_process(pair, whole_bank, tmp_path):
    first, second = left(pair, "tasks")
    parallel_worker.tasks(tmp_path)
    alone = torch.load(tmp_path / "tasks-0.pt", weights_only=True)
    for ours, theirs, whole in zip(first, second, alone, strict=True):
        assert torch.equal(torch.cat([ours, theirs]), whole)
        assert not torch.equal(ours, theirs)
        assert torch.equal(whole[::GROUP].repeat_interleave(GROUP), whole)


def replay(model: ReDiFPPO, state, rollouts, last):
    """The gradient of an agent on the last of rollouts that others made, and their advantages.

    The advantages are its own; the gradient is with the others', which differ by rounding.
    """
    in_double(model).policy.load_state_dict(state)
    buffer = model.rollout_buffer
    for stored in rollouts:
        buffer._store = {n: v for n, v in stored.items() if n not in ("advantages", "returns")}
        buffer.compute_returns_and_advantage(*last)
    advantages = buffer["advantages"]
    buffer._store["advantages"] = rollouts[-1]["advantages"]
    (batch,) = buffer.get()
    model._add_gradients(batch, 0.2, None)
    return gradients(model), advantages


def union(parts):
    """Rollouts of two processes side by side, and what followed them."""
    rollouts = [
        {name: torch.cat([ours[name], theirs[name]], 1) for name in ours}
        for ours, theirs in zip(*(part["rollouts"] for part in parts), strict=True)
    ]
    last = zip(*(part["last"] for part in parts), strict=True)
    return rollouts, tuple(map(torch.cat, last))


def distance(actual, expected) -> float:
    """Of tensors by name, relative to the norm of those that are expected."""

    def flat(tensors):
        return torch.cat([tensors[name].double().flatten() for name in expected])

    return float((flat(actual) - flat(expected)).norm() / flat(expected).norm())


@pytest.mark.parametrize("name", CASES)
def test_the_averaged_gradient_is_that_of_one_process_on_all_rows(pair, whole_bank, name):
    parts = left(pair, name)
    first, second = (part["gradients"] for part in parts)
    assert all(torch.equal(first[weight], second[weight]) for weight in first)
    rollouts, last = union(parts)
    expected, advantages = replay(make_agent(**CASES[name]), parts[0]["policy"], rollouts, last)
    assert distance({"": rollouts[-1]["advantages"]}, {"": advantages}) < 5e-6
    assert set(first) == set(expected)
    assert distance(first, expected) < 1e-6
    # The first process's rows alone have another gradient, and other advantages, unless those are
    # whitened later.
    half = make_agent(make_env(shard=(0, 2)), **CASES[name])
    own, advantages = replay(half, parts[0]["policy"], parts[0]["rollouts"], parts[0]["last"])
    together = parts[0]["rollouts"][-1]["advantages"]
    assert (distance({"": advantages}, {"": together}) > 1e-2) == (name != "critic")
    assert distance(own, expected) > 1e-2


@pytest.mark.parametrize("name", ["trained", "learned"])
def test_all_processes_have_one_student_after_training(pair, name):
    first, second = left(pair, name)
    assert all(torch.equal(first["policy"][key], second["policy"][key]) for key in first["policy"])
    states = (run["optimizer"]["state"] for run in (first, second))
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for key in ("updates", "n_updates", "num_timesteps", "lr_divisor", "gap", "reward"):
        assert first[key] == second[key], key
    assert torch.equal(first["order"], second["order"])
    assert first["num_timesteps"] == 3 * NUM_ENVS * len(parallel_worker.GRID)
    assert 3 < first["updates"] < 3 * 3 * 2  # some were left out, as the KL grew too large
    assert first["lr_divisor"] != 1
    # They act with noise of their own.
    assert not torch.equal(first["noise"], second["noise"])


def test_figures_are_those_of_all_rows(pair):
    runs = left(pair, "trained")
    groups = torch.cat([run["error"] for run in runs]).unflatten(0, (-1, GROUP))
    assert runs[0]["gap"] == pytest.approx(float(groups.mean(1).square().mean().sqrt()), rel=1e-5)
    rewards = torch.cat([run["rewards"] for run in runs], 1)
    assert runs[0]["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert float(runs[0]["rewards"].mean()) != pytest.approx(runs[0]["reward"], rel=1e-3)


def test_what_was_trained_together_goes_on_alone(pair, whole_bank):
    """The weights that the first process saved are all that must be known."""
    model = ReDiFPPO.load(pair[0] / "trained-saved.zip", env=make_env())
    (first, _) = left(pair, "trained")
    assert all(torch.equal(first["policy"][k], v) for k, v in model.policy.state_dict().items())
    learn(model, 1)


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(pair):
    for run in left(pair, "finite"):
        assert run == {"skipped": 1, "moved": False}


def test_a_wrong_ratio_in_one_process_stops_all(pair):
    for message in left(pair, "ratio"):
        assert "before the first update" in message


def assert_same_runs(pair, name, straight):
    for run, expected in zip(left(pair, name), left(pair, straight), strict=True):
        for part in expected:
            assert same(run[part], expected[part]), part
    assert not same(*(run["random"] for run in left(pair, name)))  # each has its own
    students = [(pair[0] / run / "student").rglob("*.safetensors") for run in (name, straight)]
    for ours, theirs in zip(*students, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("name", ["died", "signalled"])
def test_as_many_processes_go_on_bit_by_bit(pair, name):
    assert_same_runs(pair, name, "straight")


def test_a_signal_to_one_process_saves_and_ends_all(pair):
    assert left(pair, "code") == [128 + signal.SIGTERM] * 2
    assert Checkpoints(pair[0] / "signalled/checkpoints").iterations()[-1] == 6
    assert "SIGTERM: saved after iteration 3" in pair[2][0][1]


def rows(parts):
    """The environment's rows of processes, put together."""
    whole = {name: value for name, value in parts[0].items() if name != "state"}
    for name in ("tasks", "episodes"):
        whole[name] = torch.cat([part[name] for part in parts])
    names = [name for name, value in parts[0]["state"].items() if value is not None]
    states = {name: torch.cat([part["state"][name] for part in parts]) for name in names}
    return {**whole, "state": states}


def test_two_processes_go_on_with_what_one_began(pair, whole_bank):
    folder = pair[0]
    assert "the checkpoint is of 1 process, and now there are 2" in pair[2][0][1]
    assert "the checkpoint is of" not in pair[2][1][1]
    first, second = left(pair, "alone")
    agents = [run["agent"] for run in (first, second)]
    for part in ("policy", "optimizer", "counters", "start", "training"):
        assert same(*(agent[part] for agent in agents)), part
    assert not same(first["random"], second["random"])
    alone = outcome(whole_run(folder, "alone too", resume=True))
    assert same(rows([alone["agent"]["env"]]), rows([agent["env"] for agent in agents]))
    assert first["report"]["processes"] == 2
    for part in ("ledger", "trajectories", "network_evaluations"):
        assert first["report"][part] == alone["report"][part], part
    ours, theirs = (run["report"]["history"] for run in (first, alone))
    assert ours[0] == theirs[0]
    assert ours[1]["paired_mse"] == pytest.approx(theirs[1]["paired_mse"], rel=1e-6)  # judged anew
    assert [entry["iteration"] for entry in ours] == [entry["iteration"] for entry in theirs]
    assert ours[-1]["paired_mse"] == pytest.approx(theirs[-1]["paired_mse"], rel=0.1)
    assert not same(ours, theirs)


def test_a_killed_process_ends_the_run_and_one_process_goes_on(pair, whole_bank):
    folder, codes, outputs = pair
    assert codes[1] == -9
    assert codes[0] == 1
    last = outputs[0][1].rstrip().splitlines()
    assert any("LostProcessError: process 0 could not" in line for line in last)
    saved = Checkpoints(folder / "killed/checkpoints").newest()
    assert saved is not None
    assert saved[0] == 2
    with pytest.warns(RuntimeWarning, match="is of 2 processes, and now there is 1"):
        run = whole_run(folder, "killed", resume=True)
    straight = left(pair, "straight")[0]["report"]
    for part in ("ledger", "trajectories"):
        assert run.report[part] == straight[part], part
    before, after = (report["history"][:2] for report in (straight, run.report))
    assert before[0] == after[0]
    assert before[1]["paired_mse"] == pytest.approx(after[1]["paired_mse"], rel=1e-6)
    assert before[1]["reward_exploring"] != after[1]["reward_exploring"]
    # What it went on from.
    model = run.model
    generators = load_training(model, HeldOutEvaluation(model.env.env.unwrapped.bank), *saved)
    state, expected = unpack(*pack(agent_state(model))), saved[1]["agent"]
    for part in ("policy", "optimizer", "gap", "adaptive", "start", "training", "task_means"):
        assert same(state[part], expected[part]), part
    parts = [expected["env"], *(other["env"] for other in saved[1]["others"])]
    assert same(rows([state["env"]]), rows(parts))
    drawn = []
    for _ in range(2):
        generators.init_callback(model)
        generators.on_training_start({}, {})
        drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_a_student_in_parts_is_the_same_one(in_parts):
    """Trained, judged, saved and exported, whichever process holds which weights."""
    runs = [left(in_parts, name)[0] for name in ("straight", "parts")]
    whole, parts = (run["agent"] for run in runs)
    moments = [agent["optimizer"]["state"] for agent in (whole, parts)]
    assert len(moments[0]) > 10
    close(parts["policy"], whole["policy"])
    close(*({(i, n): t for i, m in each.items() for n, t in m.items()} for each in moments[::-1]))
    assert parts["counters"]["updates"] == whole["counters"]["updates"]
    reports = [run["report"] for run in runs]
    assert reports[0]["ledger"] == reports[1]["ledger"]
    for one, other in zip(*(report["history"] for report in reports), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    exported = [
        load_denoiser(in_parts[0] / name / "student").network.state_dict()
        for name in ("straight", "parts")
    ]
    close(exported[1], exported[0])
    loaded = ReDiFPPO.load(in_parts[0] / "parts.zip").policy.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in parts["policy"].items())


def close(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=str(name))


@pytest.mark.slow
def test_a_student_in_parts_goes_on_bit_by_bit(in_parts):
    assert_same_runs(in_parts, "died in parts", "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_gradient_in_parts(in_parts, name):
    for whole, parts in left(in_parts, f"family {name}"):
        assert set(parts) == set(whole)
        assert distance(parts, whole) < 1e-6


@pytest.mark.slow
def test_each_process_holds_its_part_alone(in_parts):
    student = left(in_parts, "straight")[0]["report"]["parameters"]["student"]
    held = left(in_parts, "elements")
    for name in ("weights", "average", "gradients", "moments", "start"):
        assert held[0][name] + held[1][name] == student
        assert held[0][name] == pytest.approx(student / 2, rel=0.02)


def test_the_second_process_is_silent(pair):
    folder, _, outputs = pair
    assert outputs[1][0] == ""
    assert list(folder.glob("log-trained-0/**/events*"))
    assert not list(folder.glob("log-trained-1"))


def test_one_process_is_left_alone():
    values, gradient = torch.arange(6.0).reshape(3, 2), torch.ones(2)
    assert parallel.shard() == (0, 1)
    assert parallel.is_main()
    assert parallel.share(7) == 7
    for function in (parallel.mean, parallel.total, parallel.gather):
        assert function(values) is values
    assert torch.equal(parallel.std(values), values.std())
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = gradient
    assert parallel.average_gradients([weight], {"loss": values})["loss"] is values
    assert weight.grad is gradient
    (seen,) = parallel.in_shares(lambda rows: (values[rows],), 3)
    assert seen.data_ptr() == values.data_ptr()


def test_adapters_are_not_held_in_parts():
    with pytest.raises(InvalidArgumentError, match="shard_student=True: pass False with adapters"):
        make_agent(policy_kwargs={"shard_student": True, "lora_rank": 2})


def test_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"pip install redif\[accelerate\]"):
        parallel.start("cpu")


@pytest.mark.parametrize(
    ("shard", "argument"),
    [((2, 2), "shard"), ((-1, 2), "shard"), ((0, 0), "shard"), (3, "shard"), ((0, 3), "num_envs")],
)
def test_shares_that_make_no_sense_are_refused(teacher, shard, argument):
    with pytest.raises(InvalidArgumentError) as error:
        ReDiFVectorEnv(8, teacher, group_size=4, shard=shard)
    assert error.value.argument == argument


def test_other_environments_are_refused(make_env, monkeypatch):
    env = make_env()
    compatibility.check_parallel(env)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    with pytest.raises(InvalidArgumentError, match="shard="):
        compatibility.check_parallel(env)
    with pytest.raises(InvalidArgumentError, match="shard="):
        compatibility.check_parallel(None)
    with pytest.raises(InvalidArgumentError, match="equally long"):
        compatibility.check_parallel(make_env(schedule="free", num_steps=3, shard=(0, 2)))
    compatibility.check_parallel(make_env(shard=(0, 2)))


def test_seeds_of_processes_are_their_own(monkeypatch):
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    second = parallel.own_seed(0, 5)
    monkeypatch.undo()
    assert (
        len({second, parallel.own_seed(0, 5), parallel.own_seed(0), parallel.own_seed(1, 5)}) == 4
    )


def test_gradients_go_in_parts_of_one_dtype(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 5)
    sizes = [(3, torch.float32), (2, torch.float32), (9, torch.float32), (4, torch.bfloat16)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    buckets = [[len(tensor) for tensor in bucket] for bucket in parallel._buckets(tensors)]
    assert buckets == [[3, 2], [9], [4]]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = [
    *("--num-steps", "2", "--schedule", "850,300", "--iterations", "2", "--num-envs", "16"),
    *("--bank-size", "64", "--num-held-out", "100"),
]


@pytest.mark.slow
def test_torchrun_trains_one_student(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", *TORCHRUN, str(ROOT / "examples/distill.py")]
    done = subprocess.run(
        [*command, *TINY, "--out", str(out)],
        env=environment(REDIF_CACHE=tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on held-out noise") == 1
    report = json.loads((out / "summary.json").read_text())
    assert report["processes"] == 2
    assert report["trajectories"] == 32
    assert report["held_out"]["student"]["paired_mse"] < report["held_out"]["ddim"]["paired_mse"]
    load_denoiser(out / "student")


@pytest.mark.slow
def test_shares_that_do_not_divide_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", *TORCHRUN, str(ROOT / "examples/distill.py")]
    done = subprocess.run(
        [*command, "--num-envs", "6", "--out", str(out)],
        env=environment(REDIF_CACHE=tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode != 0
    assert "num_envs=6: pass a multiple of 4" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_the_benchmark_measures_both_kinds_of_scaling(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path))
    args = scaling.Args(num_envs=8, num_steps=1, iterations=2, repeats=1, device="cpu")
    medians = scaling.main(args)
    assert set(medians) == {"one process", "strong", "weak"}
    for seconds, cpu, weights in medians.values():
        assert seconds > 0 < cpu
        assert weights == medians["one process"][2] > 100_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in medians)
